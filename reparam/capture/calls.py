"""Functions that take sizes and no traced tensor, as in `torch.arange(height)` and `constant.expand(n, -1)`.

Those that draw random numbers (`torch.rand(4, 1, 1)`) make a node whatever they are given: their value is no constant.

torch checks their arguments before anything could tell the tracer of a traced size, so while a model is traced
other functions stand in their place, which ask the tracer first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from types import BuiltinFunctionType, ModuleType
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.capture.custom import custom_functions_followed, replaced

_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "zeros", "tensor")
_RANDOM = """
    bernoulli multinomial normal poisson rand rand_like randint randint_like randn randn_like randperm
"""
_OF_MODE = {"train", "training", "dropout_p", "dropout", "compute_log_sumexp"}
# A tensor may stand for a number in these: torch takes a proxy, which says it is a tensor, for one and reads memory.
_OF_NUMBERS = """
    add bitwise_and bitwise_left_shift bitwise_or bitwise_right_shift bitwise_xor bucketize clamp clamp_max
    clamp_min clip copysign div divide eq fill float_power floor_divide fmod ge greater greater_equal gt index_fill
    isin le lerp less less_equal lt masked_fill mul multiply ne not_equal pow remainder result_type rsub scatter
    searchsorted sub subtract true_divide where xlogy
"""
_SPECIAL = [name for name, function in vars(torch.special).items() if isinstance(function, BuiltinFunctionType)]
_METHODS = ("expand", "new_empty", "new_full", "new_ones", "new_zeros", "repeat", "reshape", "tile", "view")


def is_factory(target: Any) -> bool:
    """Whether it is a function of torch that makes a tensor of numbers and sizes alone."""
    return isinstance(target, BuiltinFunctionType) and target.__name__ in _FACTORIES


def functions_of_numbers() -> tuple[Callable[..., Any], ...]:
    """Functions that must not see a proxy, for `Tracer(autowrap_functions=...)`, as a model may import them by name."""
    return (
        *(getattr(torch, name) for name in f"{_OF_NUMBERS} {_RANDOM}".split() if hasattr(torch, name)),
        *(getattr(torch.special, name) for name in _SPECIAL),
    )


@lru_cache(maxsize=4096)
def always_draws(target: Any) -> bool:
    """Whether a function or method of torch draws in every call, also where stand-ins for values gave it no need to.

    torch tags the operators that draw; those with a mode or a rate of their own draw in some calls only.
    """
    name = target if isinstance(target, str) else getattr(target, "__name__", "").split(".")[0]
    if not isinstance(target, (str, BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return False
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() and not name.startswith("__") else None
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    arguments = {argument.name for overload in overloads for argument in overload._schema.arguments}
    return not arguments & _OF_MODE and any(
        torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads
    )


@contextmanager
def traced_calls(tracer: Any, root: nn.Module) -> Iterator[None]:
    """Within it, calls of these functions with a proxy make a node of the tracer's, and so does drawing numbers.

    They are replaced wherever somebody may have put them: in torch, in the names of every module of Python that is
    loaded, and in the attributes of the modules in `root` and of their classes.
    """
    with ExitStack() as stack:
        stand_ins: dict[int, Callable[..., Any]] = {}
        for owner, names in (
            *((torch, names) for names in (_FACTORIES, _RANDOM.split(), _OF_NUMBERS.split())),
            (torch.special, _SPECIAL),
        ):
            for name in names:
                if function := getattr(owner, name, None):
                    always = owner is torch and (name in _RANDOM.split() or (tracer.makes_nodes and name in _FACTORIES))
                    stand_in = _traced(tracer, "call_function", function, function, always=always)
                    stand_ins[id(function)] = stand_in
                    stack.enter_context(mock.patch.object(owner, name, stand_in))
        for patch in _elsewhere(stand_ins, root):
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", _autocast_of(torch.autocast.__init__)))
        stack.enter_context(custom_functions_followed(tracer, root))
        for name in (*_METHODS, "pow", "remainder", "bitwise_and", "clamp", "where", "float_power"):
            method = getattr(torch.Tensor, name)
            stack.enter_context(mock.patch.object(torch.Tensor, name, _traced(tracer, "call_method", name, method)))
        yield


def _autocast_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autocast(x.device.type, enabled=False)` changes nothing on any device, so it may be told the example's."""

    def init(self: Any, device_type: Any, *args: Any, **kwargs: Any) -> None:
        original(self, device_type.reparam_value if _is_proxy(device_type) else device_type, *args, **kwargs)

    return init


def _elsewhere(stand_ins: Mapping[int, Callable[..., Any]], root: nn.Module) -> Iterator[Any]:
    """Patches of the names by which others than torch know the functions."""
    for name, module in list(sys.modules.items()):
        theirs = isinstance(module, ModuleType) and not name.startswith(("torch.", "reparam."))
        if theirs and (found := _known(vars(module), stand_ins)):
            yield replaced(vars(module), found)
    for part in root.modules():
        if found := _known(vars(part), stand_ins):
            yield replaced(vars(part), found)
    for kind in {base for part in root.modules() for base in type(part).__mro__}:
        for name, stand_in in _known(vars(kind), stand_ins).items():
            yield mock.patch.object(kind, name, staticmethod(stand_in))


def _known(names: Mapping[str, Any], stand_ins: Mapping[int, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    if stand_ins.keys().isdisjoint(map(id, list(names.values()))):  # of nearly every module; asked of thousands
        return {}
    return {name: stand_ins[id(value)] for name, value in list(names.items()) if id(value) in stand_ins}


def _traced(
    tracer: Any, kind: str, target: Any, original: Callable[..., Any], *, always: bool = False
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if (always and not tracer.executing) or any(map(_is_proxy, pytree.tree_leaves((args, kwargs)))):
            return tracer.create_proxy(kind, target, args, kwargs)
        return original(*args, **kwargs)

    return call


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)  # isinstance believes a proxy that says it is an int
