"""What `torch.compile` has made: looked into, and run, as it was before; only a candidate runs as it is deployed.

A compiled module that is run while a mode watches or widens tensors is run uncompiled by torch, and so is its code from
then on, in the whole process. A verdict on it would be about other code than what is deployed, and reparam would slow
its user's models down. So nothing compiles while reparam looks (`nothing_compiled`), with one exception (`compiled`).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import nn
from torch._dynamo import convert_frame, eval_frame
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils import _pytree as pytree

from reparam.buffers import Kept
from reparam.copying import compiled_methods, copied
from reparam.errors import InputError

_TORCH = os.path.dirname(torch.__file__)
_OPERATORS = (os.path.join(_TORCH, "_higher_order_ops", ""), os.path.join(_TORCH, "nn", "attention", ""))


def is_compiled(module: object) -> bool:
    """Whether `torch.compile` has wrapped the module or one in it, or has made their calls or methods."""
    return isinstance(module, nn.Module) and any(
        isinstance(part, OptimizedModule)
        or getattr(part, "_compiled_call_impl", None) is not None
        or bool(compiled_methods(part))
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
        if callable(callback) and threading.get_ident() == thread and not _of_torch():
            found.append("compiled")
        return own(callback)

    with mock.patch.object(eval_frame, "_callback_from_stance", noting):
        yield found


def _of_torch() -> bool:
    """Whether an operator of torch makes the call, one that is compiled wherever it is called, such as `torch.cond`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename in (__file__, eval_frame.__file__):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_OPERATORS)


def eager(module: nn.Module) -> nn.Module:
    """The module without what `torch.compile` has made of it and of those in it; itself, if there is nothing.

    It shares the parameters with `module`; where more than its outermost wrapper goes it is a copy.

    Raises:
        InputError: it is no module; a wrapper has hooks, which the module inside has not; or a compiled method is that
            of a module which is not in it.
    """
    given: object = module
    if not isinstance(given, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(given).__name__}")
    inside = set(module.modules())
    for path, part in module.named_modules():
        if isinstance(part, OptimizedModule) and (part._forward_hooks or part._forward_pre_hooks):
            where = f" at {path}" if path else ""
            raise InputError(
                f"what torch.compile has made{where} has forward hooks, which the module inside has not; put them on "
                "that one before it is compiled"
            )
        for name, method in compiled_methods(part).items():
            owner = method.__self__
            if isinstance(owner, nn.Module) and owner not in inside:
                where = f"{path}.{name}" if path else name
                raise InputError(
                    f"the compiled {where} is a method of a {type(owner).__name__} that is not in the model, as in a "
                    "copy; compile the copy's own"
                )
    module = _inside(module)
    if not is_compiled(module):
        return module
    try:
        twin = copied(module)
    except Exception as error:
        raise InputError(f"{type(module).__name__} cannot be copied, to take torch.compile off ({error})") from error
    for part in [*twin.modules()]:  # what copies itself in its own way copies what is in it as it is
        if isinstance(part, torch.jit.ScriptModule):
            continue  # nothing in it can be compiled
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

    It is to be called within `compiled`. When `nothing_compiled` ends, its modes, buffers and attributes are put back,
    and so is what was in the place of each parameter and child; what it writes into a parameter, or into an object that
    an attribute refers to, is not.
    """
    device = next((parameter.device for parameter in module.parameters()), None)
    _AFTERWARDS.enter_context(_put_back(module))

    def call(*args: Any, **kwargs: Any) -> Any:
        if device is not None:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), (args, kwargs))
        return module(*args, **kwargs)

    return call


def kept_until_done(*models: Any) -> Kept:
    """The buffers of these models, which are put back when `nothing_compiled` ends."""
    kept = Kept(*models)
    _AFTERWARDS.callback(kept.put_back)
    return kept


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    held = [(one, dict(one)) for part in parts for one in (vars(part), part._buffers, part._parameters, part._modules)]
    scripts = [part for part in module.modules() if isinstance(part, torch.jit.ScriptModule)]
    modes = [(part, part.training) for part in scripts if hasattr(part, "training")]
    buffers = Kept(module)
    for part in (*parts, *(part for part, _ in modes)):
        part.training = False
    try:
        yield
    finally:
        for one, before in held:
            one.clear()
            one.update(before)
        for part, training in modes:
            part.training = training
        buffers.put_back()


_ALONE = threading.RLock()
"""Torch's stance, its default dtype and its random state are the process's: two that look at once would take each
other's for the user's, and leave them there."""
_COMPILING: Any = getattr(convert_frame, "compile_lock", None) or threading.RLock()
_PATIENCE, _LONGER = 300.0, 900.0
"""Seconds to wait for what others compile, and, while this thread compiles, for others who look: they may be waiting
for each other."""
_AFTERWARDS = ExitStack()


class _NobodyCompiles:
    """Torch's lock for those who compile: they set the default dtype and the random state to what they have found."""

    def __init__(self) -> None:
        self._held = False

    def begin(self) -> None:
        """Waits for those who do, but not for ever."""
        self._held = _COMPILING.acquire(timeout=_PATIENCE)

    def pause(self) -> None:
        """They may, until it begins again."""
        if self._held:
            self._held = False
            _COMPILING.release()

    def __enter__(self) -> _NobodyCompiles:
        self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.pause()


_LOOKING: list[_NobodyCompiles] = []


def _unlock() -> None:
    global _ALONE
    _ALONE = threading.RLock()
    _LOOKING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)  # who held it may not exist there


@contextmanager
def _alone() -> Iterator[None]:
    lock = _ALONE
    if not lock.acquire(timeout=_LONGER if _COMPILING._is_owned() else -1.0):
        raise InputError(
            "another thread fuses or verifies, and a backend of torch.compile cannot wait for it any longer; try again"
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within it what is compiled runs as if it were not, and symbolic tracing goes into it. One thread at a time.

    Raises:
        InputError: a backend of `torch.compile` calls this while another thread works, and that takes long.
    """
    with _alone():
        if _LOOKING:
            yield
            return
        nobody = _NobodyCompiles()
        _LOOKING.append(nobody)
        try:
            with (
                nobody,
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
    for nobody in _LOOKING:
        nobody.pause()  # a model may call others' threads, and wait for them
    try:
        with (
            torch.compiler.set_stance("default"),
            torch._dynamo.config.patch(fail_on_recompile_limit_hit=True),  # else torch turns to eager code, in silence
        ):
            yield
    finally:
        for nobody in _LOOKING:
            nobody.begin()
