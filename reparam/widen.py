"""A stretch of code in which every floating-point tensor that is made is wide: float64, to see what is exact."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from reparam.inputs import Inputs

_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
_TORCH = os.path.dirname(torch.__file__) + os.sep
NARROW = (torch.float16, torch.bfloat16, torch.float32)


def told_dtype(inputs: Inputs) -> torch.dtype | None:
    """The dtype that float64 stands for in a run in float64: that of all floating-point inputs, if it is narrower."""
    found = {tensor.dtype for tensor in inputs.tensors() if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 and found <= set(NARROW) else None


@contextlib.contextmanager
def all_in(dtype: torch.dtype, told: torch.dtype | None = None, *, default: bool = True) -> Iterator[None]:
    """Inside, casts to a narrower dtype are casts to this one, and (`default`) tensors made without a dtype have it.

    With `told`, a model that asks for the dtype of such a tensor is told this one: it has to go the way that it goes
    when it is deployed.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype if default else before)
    try:
        with _Casts(dtype, told):
            yield
    finally:
        torch.set_default_dtype(before)


class _Casts(TorchFunctionMode):
    """Turns `x.float()`, `x.to(torch.float16)`, `zeros(..., dtype=torch.float32)` into the same in one wide dtype."""

    def __init__(self, dtype: torch.dtype, told: torch.dtype | None = None) -> None:
        super().__init__()
        self.dtype, self.told = dtype, told
        self.methods = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.methods:
            return args[0].to(self.dtype)
        if self.told is not None and func == _DTYPE and not sys._getframe(1).f_code.co_filename.startswith(_TORCH):
            found = func(*args)
            return self.told if found == self.dtype else found
        args = tuple(self._wide(value) for value in args)
        return func(*args, **{key: self._wide(value) for key, value in (kwargs or {}).items()})

    def _wide(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in NARROW else value
