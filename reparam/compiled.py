"""What `torch.compile` has made: looked into, and run, as it was before; only a candidate runs as it is deployed.

A compiled module that is run while a mode watches or widens tensors is run uncompiled by torch, and so is its code from
then on, in the whole process. A verdict on it would be about other code than what is deployed, and reparam would slow
its user's models down. So nothing compiles while reparam looks (`nothing_compiled`), with one exception (`compiled`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree

from reparam.copying import copied, has_compiled_forward
from reparam.errors import InputError


def is_compiled(module: object) -> bool:
    """Whether `torch.compile` has wrapped the module or one in it, or has made their calls or forwards."""
    return isinstance(module, nn.Module) and any(
        isinstance(part, OptimizedModule)
        or getattr(part, "_compiled_call_impl", None) is not None
        or has_compiled_forward(part)
        for part in module.modules()
    )


def calls_compiled(module: nn.Module) -> bool:
    """Whether it is compiled, or holds or names functions and modules that `torch.compile` has made."""
    return is_compiled(module) or any(map(_is_made, chain.from_iterable(map(_reached, module.modules()))))


def _reached(part: nn.Module) -> Iterator[Any]:
    """What a module holds as attributes, alone or in containers, and what its forward may call by a global name."""
    for value in vars(part).values():
        yield value
        if isinstance(value, (list, tuple, dict)):
            yield from value.values() if isinstance(value, dict) else value
    forward = getattr(type(part), "forward", None)
    if isinstance(forward, FunctionType):
        yield from (forward.__globals__.get(name) for name in forward.__code__.co_names)


def _is_made(value: Any) -> bool:
    if isinstance(value, FunctionType):
        return hasattr(value, "_torchdynamo_orig_callable") and not hasattr(value, "_torchdynamo_disable")
    return isinstance(value, OptimizedModule)


def eager(module: nn.Module) -> nn.Module:
    """The module without what `torch.compile` has made of it and of those in it; itself, if there is nothing.

    It shares the parameters with `module`; where more than its outermost wrapper goes it is a copy.

    Raises:
        InputError: a wrapper has hooks, which the module inside has not.
    """
    given: object = module
    if not isinstance(given, nn.Module):
        return module  # others say what is wrong with it
    for path, part in module.named_modules():
        if isinstance(part, OptimizedModule) and (part._forward_hooks or part._forward_pre_hooks):
            where = f" at {path}" if path else ""
            raise InputError(
                f"what torch.compile has made{where} has forward hooks, which the module inside has not; put them on "
                "that one before it is compiled"
            )
    module = _inside(module)
    if not is_compiled(module):
        return module
    try:
        twin = copied(module)
    except Exception as error:
        raise InputError(f"{type(module).__name__} cannot be copied, to take torch.compile off ({error})") from error
    for part in [*twin.modules()]:  # what copies itself in its own way copies what is in it as it is
        part._modules.update((name, _inside(child)) for name, child in part._modules.items() if child is not None)
    if is_compiled(twin):
        raise InputError(
            f"torch.compile cannot be taken off {type(module).__name__}; give the module that is not compiled"
        )
    return twin


def _inside(module: nn.Module) -> nn.Module:
    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module


def as_deployed(module: nn.Module) -> Callable[..., Any]:
    """Calls a compiled module itself, in eval mode, and puts its modes and buffers back: a copy is compiled anew, and
    not always likewise."""
    device = next((parameter.device for parameter in module.parameters()), None)

    def call(*args: Any, **kwargs: Any) -> Any:
        if device is not None:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
        with _put_back(module):
            return module(*args, **kwargs)

    return call


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    training = [part for part in module.modules() if part.training]
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True
        with torch.no_grad():
            for buffer, value in before:
                if not bool(((buffer == value) | ((buffer != buffer) & (value != value))).all()):
                    buffer.copy_(value)


_LOCK = threading.Lock()
_LOOKING: list[int] = []
"""The threads that look; torch's stance is that of the whole process, and the last of them puts it back."""
_BEFORE = ExitStack()


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within it what is compiled runs as if it were not."""
    with _LOCK:
        if not _LOOKING:
            _BEFORE.enter_context(torch.compiler.set_stance("force_eager"))
        _LOOKING.append(threading.get_ident())
    try:
        yield
    finally:
        with _LOCK:
            _LOOKING.remove(threading.get_ident())
            if not _LOOKING:
                _BEFORE.close()


@contextmanager
def compiled() -> Iterator[None]:
    """Within it, and within `nothing_compiled`, what is compiled runs compiled, or raises."""
    with (
        torch.compiler.set_stance("default"),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),  # else torch turns to eager code, in silence
    ):
        yield
