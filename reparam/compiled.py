"""What `torch.compile` has wrapped: looked into, and run, as it was before; only a candidate runs as it is deployed.

A compiled module that is run while a mode watches or widens tensors is run uncompiled by torch, and so is its code from
then on, in the whole process. A verdict on it would be about other code than what is deployed, and reparam would slow
its user's models down. So nothing compiles while reparam looks (`nothing_compiled`), with one exception (`compiled`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from reparam.copying import copied
from reparam.errors import InputError


def is_compiled(module: object) -> bool:
    """Whether `torch.compile` has wrapped the module, or one in it."""
    return isinstance(module, nn.Module) and any(isinstance(part, OptimizedModule) for part in module.modules())


def eager(module: nn.Module) -> nn.Module:
    """The module without what `torch.compile` has put around it and around those in it; itself, if there is nothing.

    It shares the parameters with `module`; where a module within is compiled it is a copy.
    """
    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    if not is_compiled(module):
        return module
    twin = copied(module)
    for part in [*twin.modules()]:
        for name, child in part._modules.items():
            if isinstance(child, OptimizedModule):
                part._modules[name] = eager(child)
    return twin


def require_copyable(module: nn.Module, what: str) -> None:
    """Refuses a module that is compiled in place, which no copy of it is.

    Raises:
        InputError: it is such a module.
    """
    for path, part in module.named_modules():
        if part._compiled_call_impl is not None:
            where = f" at {path}" if path else ""
            raise InputError(
                f"the {what} is compiled in place{where} (module.compile()), and a copy of it would not be; give "
                "torch.compile(module), which leaves the module itself as it is"
            )


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Within it what is compiled runs as if it were not."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def compiled() -> Iterator[None]:
    """Within it, and within `nothing_compiled`, what is compiled runs compiled."""
    with torch.compiler.set_stance("default"):
        yield
