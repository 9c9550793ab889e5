"""Which memory a tensor is a view of."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

View: TypeAlias = "tuple[int, int, tuple[int, ...], tuple[int, ...]]"


def storage_of(tensor: torch.Tensor) -> int:
    """The address of the storage; something else of its own for a tensor that has none."""
    return view_of(tensor)[0]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in a value of any structure."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (int, float, str, bool, type(None), torch.Size)):
        return []
    return [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


def view_of(tensor: torch.Tensor) -> View:
    """The address of the storage, the offset in it, the shape and the strides."""
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return (id(tensor), 0, (), ())
    storage = tensor.untyped_storage()
    # On the meta device there is no memory, and every address is 0.
    address = int(storage._cdata) if tensor.is_meta else storage.data_ptr()
    return (address, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride())


def fingerprint_of(tensor: torch.Tensor) -> tuple[float, float]:
    """Two sums over the elements, which tell whether the tensor was written to."""
    if tensor.is_meta:
        return 0.0, 0.0
    values = tensor.detach().double()
    return float(values.sum()), float(values.square().sum())
