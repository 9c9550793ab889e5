"""A private copy of a model that shares its parameters.

What `copy.deepcopy` does, several times faster for the usual module: its dictionaries are copied by hand, submodules
in turn, and only attributes that are neither plain values nor torch's own dictionaries go through `deepcopy`.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.external_utils import wrap_inline

from reparam.errors import UnfitModelError
from reparam.lazy import Guarded, WrittenError, results_held
from reparam.quiet import without_copying_warnings

_WRAP_INLINE = wrap_inline(len).__code__
_PLAIN = (int, float, str, bool, bytes, type(None), torch.dtype, torch.device, type, torch.jit.ScriptFunction)


def copied(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same `Parameter` objects; buffers and everything else are new.

    Nothing in it is compiled by `torch.compile`.

    Raises:
        Exception: whatever `copy.deepcopy` raises for an attribute that cannot be copied.
    """
    memo: dict[int, Any] = {**results_held(model), **{id(parameter): parameter for parameter in model.parameters()}}
    return _module(model, memo)


def twin_of(model: nn.Module) -> nn.Module:
    """A copy in eval mode with parameters of its own on the same memory: to assign `weight.data` leaves the model's."""
    twin = copied(model).eval()
    own: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if type(parameter) is nn.Parameter:
                made = own.setdefault(id(parameter), nn.Parameter(parameter.detach(), parameter.requires_grad))
                module._parameters[name] = made
    return twin


@contextmanager
def parameters_kept(twin: nn.Module) -> Iterator[None]:
    """Within it a `twin_of` a model may run: it stops before it writes to a parameter, whose memory is the model's.

    Raises:
        UnfitModelError: the forward writes to one, or puts another tensor in its place.
    """
    plain = {name: p for name, p in twin.named_parameters() if type(p) is nn.Parameter and p.layout is torch.strided}
    before = {name: parameter.untyped_storage()._cdata for name, parameter in plain.items()}
    instead = "do that once before, and leave it out of the forward"
    try:
        with Guarded(frozenset(before.values())):
            yield
    except WrittenError as error:
        raise UnfitModelError(
            f"the forward of {type(twin).__name__} writes to a parameter ({error}); {instead}"
        ) from error
    for name, parameter in plain.items():
        if parameter.untyped_storage()._cdata != before[name]:
            raise UnfitModelError(f"the forward of {type(twin).__name__} assigns the parameter {name}; {instead}")


def _module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        made: nn.Module = memo[id(module)]
        return made
    if isinstance(module, OptimizedModule):
        memo[id(module)] = _module(module._orig_mod, memo)
        return _module(module, memo)
    if not _is_usual(type(module)):
        with without_copying_warnings():
            return copy.deepcopy(module, memo)
    twin = type(module).__new__(type(module))
    memo[id(module)] = twin
    state = twin.__dict__
    for name, value in module.__dict__.items():
        if name == "_modules":
            state[name] = {key: None if child is None else _module(child, memo) for key, child in value.items()}
        elif name == "_parameters":
            state[name] = dict(value)
        elif name == "_compiled_call_impl":
            state[name] = None  # it would call the module itself, as would these methods:
        elif (method := compiled_method(value)) is not None:
            if name != "forward" or method.__self__ is not module or method.__func__ is not type(module).forward:
                state[name] = _bound_to_twin(method, memo)
        elif isinstance(value, _PLAIN) or (type(value) is tuple and all(isinstance(item, _PLAIN) for item in value)):
            state[name] = value
        elif name == "_buffers":
            state[name] = {key: _buffer(buffer, memo) for key, buffer in value.items()}
        elif type(value) in (dict, set, OrderedDict) and not value:
            state[name] = type(value)()
        else:
            state[name] = copy.deepcopy(value, memo)
    return twin


def compiled_methods(module: nn.Module) -> dict[str, MethodType]:
    """By attribute, the methods that were put into the module as `torch.compile` has made them: its own, or others'."""
    found = ((name, compiled_method(value)) for name, value in vars(module).items())
    return {name: method for name, method in found if method is not None}


def compiled_method(value: Any) -> MethodType | None:
    """The bound method that `torch.compile` has made this function of; None for all else."""
    inner = value
    while isinstance(inner, FunctionType) and not hasattr(inner, "_torchdynamo_disable"):
        inner = getattr(inner, "_torchdynamo_orig_callable", None)
        if isinstance(inner, FunctionType) and inner.__code__ is _WRAP_INLINE:
            inner = vars(inner)["__wrapped__"]  # torch's own wrapper, around what a decorator of torch has made
        if isinstance(inner, MethodType):
            return inner
    return None


def _bound_to_twin(method: MethodType, memo: dict[int, Any]) -> MethodType:
    owner = method.__self__
    twin = _module(owner, memo) if isinstance(owner, nn.Module) else copy.deepcopy(owner, memo)
    return MethodType(method.__func__, twin)


def _buffer(buffer: Any, memo: dict[int, Any]) -> Any:
    if id(buffer) not in memo:
        plain = type(buffer) is torch.Tensor and buffer.layout is torch.strided and not buffer.requires_grad
        if not plain or buffer._base is not None:
            return copy.deepcopy(buffer, memo)  # keeps what buffers that share a storage have in common
        memo[id(buffer)] = buffer.detach().clone()
    return memo[id(buffer)]


def _is_usual(cls: type[nn.Module]) -> bool:
    """Whether the class leaves copying to Python's defaults."""
    return (
        not hasattr(cls, "__deepcopy__")
        and _sets_state_as_torch_does(cls)
        and cls.__reduce_ex__ is object.__reduce_ex__
        and cls.__reduce__ is object.__reduce__
        and getattr(cls, "__getstate__", None) is getattr(nn.Module, "__getstate__", None)
        and not hasattr(cls, "__slots__")
    )


def _sets_state_as_torch_does(cls: type[nn.Module]) -> bool:
    """Classes of torch repair old pickles in __setstate__; on a live module that changes nothing."""
    owner = next(base for base in cls.__mro__ if "__setstate__" in vars(base))
    return owner.__module__.startswith("torch.nn.modules.")
