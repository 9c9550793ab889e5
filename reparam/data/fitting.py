"""Fits tensors of the user's to the example inputs: names, number, kinds of dtype, batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from reparam.data.batch import Batch
from reparam.errors import InputError
from reparam.inputs import Inputs


def input_names(model: Callable[..., Any], example: Inputs) -> tuple[str, ...]:
    """A name for each tensor of the example, in order: the parameter of `forward`, with the path inside of a container.

    Where the model's signature does not tell, `input0`, `input1`, ...
    """
    tensors = list(example.tensors())
    given = getattr(model, "input_names", None)
    if isinstance(given, tuple) and len(given) == len(tensors):
        return given
    try:
        bound = inspect.signature(getattr(model, "forward", model)).bind(*example.args, **example.kwargs).arguments
    except (TypeError, ValueError):
        return tuple(f"input{number}" for number in range(len(tensors)))
    by_tensor: dict[int, str] = {}
    for path, leaf in pytree.tree_flatten_with_path(dict(bound))[0]:
        keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
        by_tensor.setdefault(id(leaf), "_".join(keys))
    return tuple(by_tensor.get(id(tensor), f"input{number}") for number, tensor in enumerate(tensors))


def with_tensors(example: Inputs, tensors: Sequence[torch.Tensor]) -> Inputs:
    """The example with other tensors in place of its own, in order."""
    remaining = iter(tensors)
    return example.map(lambda _: next(remaining))


def fitted(tensor: torch.Tensor, like: torch.Tensor, where: str) -> torch.Tensor:
    """`tensor` in the dtype of the example's, on its device.

    Raises:
        InputError: it is of another kind (integers for floating-point numbers), has values that the dtype lacks, or
            another number of dims.
    """
    if tensor.dim() != like.dim():
        raise InputError(
            f"{where} has shape {list(tensor.shape)}, {tensor.dim()} dims, where the model's input has {like.dim()}, "
            f"as in {list(like.shape)}; reshape it"
        )
    if _kind(tensor.dtype) != _kind(like.dtype):
        advice = "convert it, and normalise it as the model wants" if like.is_floating_point() else "convert it"
        raise InputError(f"{where} is {_name(tensor.dtype)}, and the model's input is {_name(like.dtype)}; {advice}")
    converted = tensor.to(like.dtype)
    if not tensor.is_floating_point() and not torch.equal(converted.to(tensor.dtype), tensor):
        raise InputError(f"{where} has values that {_name(like.dtype)}, the model's input, does not have")
    return converted.to(like.device)


def tensor_of(array: Any, where: str) -> torch.Tensor:
    """A tensor of a NumPy array (a copy) or of a tensor.

    Raises:
        InputError: it is neither, or of a dtype that torch does not have.
    """
    if isinstance(array, torch.Tensor):
        return array.detach()
    if not isinstance(array, np.ndarray):
        raise InputError(f"{where} is a {type(array).__name__}; give tensors or NumPy arrays")
    try:
        return torch.from_numpy(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="))))
    except TypeError:
        raise InputError(f"{where} is an array of {array.dtype}, which no model takes; give numbers") from None


def batches_of(
    columns: Mapping[str, torch.Tensor], example: Inputs, names: Sequence[str], label: str, limit: int
) -> tuple[list[Batch], int]:
    """Batches of the example's length made of whole columns, one for each of `names`; and how many rows there are.

    Rows lie along the first dim, where that is the example's batch: all of its tensors with dims agree in its length.
    Else the columns are one batch. The last batch is filled up with the first rows.
    """
    likes = list(example.tensors())
    lengths = {like.shape[0] for like in likes if like.dim()}
    fit = [fitted(columns[name], like, f"{label}: {name}") for name, like in zip(names, likes, strict=True)]
    if len(lengths) != 1:
        return [Batch(label, with_tensors(example, fit))], 1
    size = lengths.pop()
    rows = {tensor.shape[0] for tensor in fit if tensor.dim()}
    if len(rows) != 1:
        each = ", ".join(f"{name} {t.shape[0]}" for name, t in zip(names, fit, strict=True) if t.dim())
        raise InputError(f"{label}: the inputs differ in their number of rows ({each}); give as many of each")
    count = rows.pop()
    if not count or any(tensor.numel() == 0 for tensor in fit):
        raise InputError(f"{label} has no elements; give at least one row")
    made = []
    for start in range(0, min(count, limit), size):
        taken = torch.arange(start, start + size, device="cpu") % count
        part = [tensor[taken.to(tensor.device)] if tensor.dim() else tensor for tensor in fit]
        last = min(start + size, count) - 1
        which = f"row {start}" if last == start else f"rows {start}-{last}"
        made.append(Batch(label if count == size else f"{label} {which}", with_tensors(example, part)))
    return made, count


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "boolean"
    return "floating" if dtype.is_floating_point else "complex" if dtype.is_complex else "integer"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
