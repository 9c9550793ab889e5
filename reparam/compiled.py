"""What `torch.compile` has made: looked into, and run, as it was before; only a candidate runs as it is deployed.

A compiled module that is run while a mode watches or widens tensors is run uncompiled by torch, and so is its code from
then on, in the whole process. A verdict on it would be about other code than what is deployed, and reparam would slow
its user's models down. So nothing compiles while reparam looks (`nothing_compiled`), with one exception (`compiled`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import nn
from torch._dynamo import eval_frame
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree

from reparam.copying import copied, has_compiled_forward, made_of_another
from reparam.errors import InputError


def is_compiled(module: object) -> bool:
    """Whether `torch.compile` has wrapped the module or one in it, or has made their calls or forwards."""
    return isinstance(module, nn.Module) and any(
        isinstance(part, OptimizedModule)
        or getattr(part, "_compiled_call_impl", None) is not None
        or has_compiled_forward(part)
        for part in module.modules()
    )


@contextmanager
def entered() -> Iterator[list[str]]:
    """A list that is not empty once this thread has called, in any way, what `torch.compile` has made."""
    found: list[str] = []
    thread, own = threading.get_ident(), getattr(eval_frame, "_callback_from_stance", None)
    if own is None:  # another torch; what `is_compiled` sees is all that is known then
        yield found
        return

    def noting(callback: Any) -> Any:
        if callable(callback) and threading.get_ident() == thread:
            found.append("compiled")
        return own(callback)

    with mock.patch.object(eval_frame, "_callback_from_stance", noting):
        yield found


def eager(module: nn.Module) -> nn.Module:
    """The module without what `torch.compile` has made of it and of those in it; itself, if there is nothing.

    It shares the parameters with `module`; where more than its outermost wrapper goes it is a copy.

    Raises:
        InputError: it is no module; a wrapper has hooks, which the module inside has not; or a forward is that of
            another module.
    """
    given: object = module
    if not isinstance(given, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(given).__name__}")
    for path, part in module.named_modules():
        if isinstance(part, OptimizedModule) and (part._forward_hooks or part._forward_pre_hooks):
            where = f" at {path}" if path else ""
            raise InputError(
                f"what torch.compile has made{where} has forward hooks, which the module inside has not; put them on "
                "that one before it is compiled"
            )
        if not isinstance(part, OptimizedModule) and made_of_another(part):
            where = f" at {path}" if path else ""
            raise InputError(
                f"the compiled forward{where} is that of another {type(part).__name__}, as in a copy; compile the "
                "copy's own forward"
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
    """Calls a compiled module itself, in eval mode: a copy is compiled anew, and not always likewise.

    It is to be called within `compiled`. When `nothing_compiled` ends, its modes, buffers and attributes are put back;
    objects that its attributes refer to, and that it changes, are not.
    """
    device = next((parameter.device for parameter in module.parameters()), None)
    _AFTERWARDS.enter_context(_put_back(module))

    def call(*args: Any, **kwargs: Any) -> Any:
        if device is not None:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
        return module(*args, **kwargs)

    return call


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    attributes = [(held, dict(held)) for part in module.modules() for held in (vars(part), part._buffers)]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    for part in module.modules():
        part.training = False
    try:
        yield
    finally:
        for held, before in attributes:
            held.clear()
            held.update(before)
        with torch.no_grad():
            for buffer, value in values:
                if not bool(((buffer == value) | ((buffer != buffer) & (value != value))).all()):
                    buffer.copy_(value)


_ALONE = threading.RLock()
"""Torch's stance, its default dtype and its random state are the process's: two that look at once would take each
other's for the user's, and leave them there."""
_AFTERWARDS = ExitStack()
_LOOKING: list[None] = []


def _unlock() -> None:
    global _ALONE
    _ALONE = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)  # who held it may not exist there


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within it what is compiled runs as if it were not, and symbolic tracing goes into it. One thread at a time."""
    with _ALONE:
        if _LOOKING:
            yield
            return
        _LOOKING.append(None)
        try:
            with (
                torch.compiler.set_stance("force_eager"),
                torch._dynamo.config.patch(error_on_nested_fx_trace=False),
                _AFTERWARDS,
            ):
                yield
        finally:
            _LOOKING.clear()


@contextmanager
def compiled() -> Iterator[None]:
    """Within it, and within `nothing_compiled`, what is compiled runs compiled, or raises."""
    with (
        torch.compiler.set_stance("default"),
        torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),  # else torch turns to eager code, in silence
    ):
        yield
