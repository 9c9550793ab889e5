"""What a user may register as an operation: how a graph spells it, what its arguments are called, and its name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import BuiltinFunctionType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef

from reparam.errors import InputError

Operator: TypeAlias = "torch._ops.OpOverload | torch._ops.OpOverloadPacket"


def spellings_of(target: Any) -> tuple[tuple[Any, ...], tuple[type[nn.Module], ...], Any]:
    """The spellings of a target in a graph: calls and module classes, and what its arguments are read from.

    Raises:
        InputError: it is nothing that can be registered.
    """
    if isinstance(target, str):
        if target.endswith("_") or not callable(getattr(torch.Tensor, target, None)):
            raise InputError(f"{target!r} is no method of torch.Tensor that returns a new tensor")
        return (target,), (), getattr(torch.Tensor, target)
    if isinstance(target, CustomOpDef):
        target = target._opoverload
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return _operator(target)
    if isinstance(target, type) and issubclass(target, nn.Module):
        return (), (target,), target.forward
    if inspect.isfunction(target) or isinstance(target, BuiltinFunctionType):
        return (target,), (), target
    kinds = "a function, a torch.library operator, the name of a tensor method, or a class of modules"
    raise InputError(f"a linear op is {kinds}, not {target!r}")


def _operator(target: Operator) -> tuple[tuple[Any, ...], tuple[type[nn.Module], ...], Any]:
    # A graph has the operator or one overload of it, as it was called.
    packet = target if isinstance(target, torch._ops.OpOverloadPacket) else target.overloadpacket
    names = packet.overloads()
    if isinstance(target, torch._ops.OpOverloadPacket) and len(names) > 1:
        raise InputError(f"{target} has several overloads; register one of them, such as {target}.{names[0]}")
    one = getattr(packet, names[0]) if isinstance(target, torch._ops.OpOverloadPacket) else target
    if one._schema.is_mutable:
        raise InputError(f"{one} writes to its arguments; register an operator that returns a new tensor")
    return (one, packet) if len(names) == 1 else (one,), (), one


def arguments_of(target: Any, source: Any, given: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Names of the arguments, and the defaults of those that have one.

    Raises:
        InputError: they cannot be read and are not given.
    """
    if given is not None:
        names = tuple(given)
        if isinstance(given, str) or not names or not all(isinstance(name, str) for name in names):
            raise InputError(f'signature={given!r} must be names of arguments, such as ("input", "weight")')
        return names, {}
    if isinstance(source, torch._ops.OpOverload):
        arguments = source._schema.arguments
        return tuple(a.name for a in arguments), {a.name: a.default_value for a in arguments if a.has_default_value()}
    try:
        parameters = list(inspect.signature(source).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    parameters = parameters[1:] if isinstance(target, (str, type)) and not isinstance(source, type) else parameters
    plain = not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
    if not parameters or not plain:
        raise InputError(f'the arguments of {name_of(target)} cannot be read off it; pass signature=("input", ...)')
    return tuple(p.name for p in parameters), {p.name: p.default for p in parameters if p.default is not p.empty}


def name_of(target: Any) -> str:
    """`mypackage.layers.Scale`: never the name of a row of our own, which has no dot."""
    if isinstance(target, str):
        return f"torch.Tensor.{target}"
    if isinstance(target, CustomOpDef):
        target = target._opoverload
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{target}"
    return f"{target.__module__ or 'torch'}.{target.__name__}"


__all__ = ["arguments_of", "name_of", "spellings_of"]
