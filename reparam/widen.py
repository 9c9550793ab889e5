"""A stretch of code in which every floating-point tensor that is made is wide: float64, to see what is exact."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


@contextlib.contextmanager
def all_in(dtype: torch.dtype) -> Iterator[None]:
    """Inside, tensors made without a dtype are `dtype`, and casts to a narrower dtype are casts to this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Casts(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


class _Casts(TorchFunctionMode):
    """Turns `x.float()`, `x.to(torch.float16)`, `zeros(..., dtype=torch.float32)` into the same in one wide dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.methods = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.methods:
            return args[0].to(self.dtype)
        args = tuple(self._wide(value) for value in args)
        return func(*args, **{key: self._wide(value) for key, value in (kwargs or {}).items()})

    def _wide(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in _NARROW else value
