"""Operations that move or average positions and leave channels alone; scales and linear layers commute with them.

    c(A(x)) = A(c(x))   for every A that acts on each position alone, if c treats all channels alike and keeps constants

These are permutations of axes, reshapes that keep the channels an axis of their own, averages over positions without
padding, interpolation, and slices, flips and rolls of other axes. Each formula answers with None where the channels
would be mixed with anything else, or where this is not certain for every input size.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from reparam.graph.lift import Call, Carried, Moved
from reparam.graph.nodes import info
from reparam.graph.sizes import Dims, Size, own_sizes, product


def permute(call: Call) -> Carried | None:
    """Any order of axes."""
    order = call["dims"]
    if not isinstance(order, (tuple, list)) or any(type(axis) is not int for axis in order):
        return None
    return _permuted(call, [axis % len(order) for axis in order])


def transpose(call: Call) -> Carried | None:
    """Two axes exchanged."""
    rank, a, b = call.ndim, call["dim0"], call["dim1"]
    if type(a) is not int or type(b) is not int:
        return None
    order = list(range(rank))
    order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return _permuted(call, order)


def movedim(call: Call) -> Carried | None:
    """One axis moved to another place."""
    rank, source, destination = call.ndim, call["source"], call["destination"]
    if type(source) is not int or type(destination) is not int:
        return None
    order = [axis for axis in range(rank) if axis != source % rank]
    order.insert(destination % rank, source % rank)
    return _permuted(call, order)


def attribute(call: Call) -> Carried | None:
    """`x.mT`, and `x.T` of a matrix."""
    rank = call.ndim
    if call["name"] != "mT" and not (call["name"] == "T" and rank == 2):
        return None
    return _permuted(call, [*range(rank - 2), rank - 1, rank - 2])


def _permuted(call: Call, order: Sequence[int]) -> Carried | None:
    x, dims = _operand(call)
    if x is None or sorted(order) != list(range(len(dims))):
        return None
    moved = tuple(Moved(list(order).index(axis)) for axis in range(len(dims)))
    return Carried(x, moved, tuple(dims[axis] for axis in order), "permutation", tuple(order), free=True)


def flatten(call: Call) -> Carried | None:
    """Some neighbouring axes made one."""
    x, dims = _operand(call)
    if x is None:
        return None
    start, end = (0 if call["start_dim"] is None else call["start_dim"], call["end_dim"])
    end = -1 if end is None else end
    if type(start) is not int or type(end) is not int or not dims:
        return None
    start, end = start % len(dims), end % len(dims)
    return _reshaped(call, x, dims, (*dims[:start], product(dims[start : end + 1]), *dims[end + 1 :]))


def reshape(call: Call) -> Carried | None:
    """Sizes given one by one, at most one of them -1."""
    x, dims = _operand(call)
    entries = call["shape"]
    if x is None or not isinstance(entries, (tuple, list)) or len(entries) != call.ndim:
        return None
    known = [None if entry == -1 else call.sizes.value(entry) for entry in entries]
    if any(size is None and entry != -1 for size, entry in zip(known, entries, strict=True)):
        return None
    return _reshaped(call, x, dims, tuple(known))


def unflatten(call: Call) -> Carried | None:
    """One axis divided into several."""
    x, dims = _operand(call)
    axis, entries = call["dim"], call["sizes"]
    if x is None or type(axis) is not int or not isinstance(entries, (tuple, list)):
        return None
    axis %= len(dims)
    inner = [None if entry == -1 else call.sizes.value(entry) for entry in entries]
    return _reshaped(call, x, dims, (*dims[:axis], *inner, *dims[axis + 1 :]))


def squeeze(call: Call) -> Carried | None:
    """Axes dropped that have one element for certain."""
    x, dims = _operand(call)
    axes = _axes(call["dim"], len(dims))
    if x is None or axes is None or any(dims[axis].literal != 1 for axis in axes):
        return None
    return _reshaped(call, x, dims, tuple(size for axis, size in enumerate(dims) if axis not in axes))


def unsqueeze(call: Call) -> Carried | None:
    """An axis of one element added."""
    x, dims = _operand(call)
    axis = call["dim"]
    if x is None or type(axis) is not int:
        return None
    axis %= len(dims) + 1
    return _reshaped(call, x, dims, (*dims[:axis], Size(1), *dims[axis:]))


def _reshaped(call: Call, x: fx.Node, dims: Dims, target: tuple[Size | None, ...]) -> Carried | None:
    """A reshape to `target`, None standing for the size that follows from the others."""
    if target.count(None) > 1:
        return None
    moved = tuple(_moved(axis, dims, target, info(x).shape) for axis in range(len(dims)))  # type: ignore[union-attr]
    if None in target:
        rest = product(dims).over(product(size for size in target if size is not None))
        own = own_sizes(call.node)
        target = tuple(
            (own[axis] if rest is None else rest) if size is None else size for axis, size in enumerate(target)
        )
    sizes: Dims = tuple(size for size in target if size is not None)
    return Carried(x, moved, sizes, "reshape", free=True)


def _moved(axis: int, dims: Dims, target: tuple[Size | None, ...], shape: tuple[int, ...]) -> Moved | None:
    """Where an axis goes in a reshape: two of the three parts before, at and behind it agree; the third follows."""
    for index, size in enumerate(target):
        before = _agree(dims[:axis], target[:index])
        behind = _agree(dims[axis + 1 :], target[index + 1 :])
        if before + behind + (size == dims[axis]) >= 2:
            return Moved(index)
        last = index == len(target) - 1
        if before and last and (size is None or size == product(dims[axis:])):
            return Moved(index, prod(shape[axis + 1 :]))
    return None


def _agree(dims: Dims, target: tuple[Size | None, ...]) -> bool:
    """Whether two stretches of axes are certain to hold equally many elements."""
    return None not in target and product(dims) == product(size for size in target if size is not None)


def mean(call: Call) -> Carried | None:
    """The average over some axes."""
    x, dims = _operand(call)
    if x is None or call["dim"] is None or call["dtype"] is not None:
        return None
    axes = _axes(call["dim"], len(dims))
    keep = bool(call["keepdim"])
    if not axes:
        return None
    kept = [axis for axis in range(len(dims)) if axis not in axes]
    moved = tuple(None if axis in axes else Moved(axis if keep else kept.index(axis)) for axis in range(len(dims)))
    sizes = tuple(Size(1) if axis in axes else size for axis, size in enumerate(dims) if keep or axis not in axes)
    return Carried(x, moved, sizes)


def adaptive_average_pool(call: Call) -> Carried | None:
    """The average over windows that cover the image evenly: every window is inside of it."""
    wanted = call["output_size"]
    if isinstance(wanted, fx.Node):
        return None  # an argument of the model
    return _spatial(call, [wanted] if isinstance(wanted, int) else list(wanted or []))


def inner_average_pool(call: Call) -> Carried | None:
    """Average pooling each of whose windows is divided by the number of its elements inside of the image."""
    return _spatial(call, [])


def interpolate(call: Call) -> Carried | None:
    """Interpolation: weights that sum to 1."""
    mode = call["mode"] or "nearest"
    if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area"):
        return None
    return _spatial(call, [])


def _spatial(call: Call, sizes: list[Any]) -> Carried | None:
    """An operation on the axes from 2 on."""
    x, dims = _operand(call)
    if x is None or len(dims) < 3 or call.ndim != len(dims):
        return None
    own = own_sizes(call.node)
    wanted = (sizes * (len(dims) - 2) if len(sizes) == 1 else sizes) or [-1] * (len(dims) - 2)
    if len(wanted) != len(dims) - 2:
        return None
    result = [dims[axis] if size is None else Size(size) if type(size) is int and size > 0 else own[axis]
              for axis, size in enumerate(wanted, start=2)]  # fmt: skip
    moved = (None, Moved(1), *(None,) * (len(dims) - 2))
    return Carried(x, moved, (dims[0], dims[1], *result))


def same(call: Call) -> Carried | None:
    """A copy, or a change of the layout in memory."""
    x, dims = _operand(call)
    return None if x is None else Carried(x, tuple(Moved(axis) for axis in range(len(dims))), dims)


def turned(call: Call) -> Carried | None:
    """Axes flipped or rolled."""
    x, dims = _operand(call)
    axes = _axes(call["dims"], len(dims))
    if x is None or not axes:
        return None
    return Carried(x, tuple(None if axis in axes else Moved(axis) for axis in range(len(dims))), dims)


def with_new_axes(call: Call) -> Carried | None:
    """`x[:, :, None]`: axes of one element added."""
    x, dims = _operand(call)
    given = call["index"]
    parts = list(given) if isinstance(given, tuple) else [given]
    if x is None or not any(part is None for part in parts):
        return None
    if not all(part is None or part is Ellipsis or part == slice(None) for part in parts if not _is_node(part)):
        return None
    if any(_is_node(part) for part in parts) or parts.count(Ellipsis) > 1:
        return None
    missing = len(dims) - sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    at = parts.index(Ellipsis)
    parts[at : at + 1] = [slice(None)] * missing
    old = iter(dims)
    return _reshaped(call, x, dims, tuple(Size(1) if part is None else next(old) for part in parts))


def _is_node(part: Any) -> bool:
    return isinstance(part, (fx.Node, torch.Tensor))


def positions(call: Call) -> Carried | None:
    """Slices `x[:, :, ::2, 1:]` of axes that do not carry the channels."""
    x, dims = _operand(call)
    index = full_index(call["index"], len(dims))
    if x is None or index is None:
        return None
    untouched = [part == slice(None) for part in index]
    if all(untouched):
        return None
    own = own_sizes(call.node)
    moved = tuple(Moved(axis) if whole else None for axis, whole in enumerate(untouched))
    sizes = tuple(
        dims[axis] if whole else _length(index[axis], dims[axis]) or own[axis] for axis, whole in enumerate(untouched)
    )
    return Carried(x, moved, sizes, free=True)


def _length(part: slice, size: Size) -> Size | None:
    """How many positions a slice takes, if that is the same for every input."""
    if size.literal is None or any(isinstance(value, fx.Node) for value in (part.start, part.stop, part.step)):
        return None
    return Size(len(range(*part.indices(size.literal))))


def full_index(index: Any, rank: int) -> list[slice] | None:
    """An index of slices only, one for each axis; None if it holds anything else."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is Ellipsis or isinstance(part, slice) for part in parts):
        return None
    dots = [at for at, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        return None
    for at in dots:
        parts[at : at + 1] = [slice(None)] * (rank - len(parts) + 1)
    return [*parts, *[slice(None)] * (rank - len(parts))]


def _operand(call: Call) -> tuple[fx.Node | None, Dims]:
    x = call.tensor()
    tensor = None if x is None else info(x)
    if x is None or tensor is None or x in call.constants or not tensor.shape:
        return None, ()
    return x, call.sizes.dims(x)


def _axes(value: Any, rank: int) -> list[int] | None:
    axes = list(value) if isinstance(value, (tuple, list)) else [value]
    if any(type(axis) is not int for axis in axes):
        return None
    return [axis % rank for axis in axes] if rank else None
