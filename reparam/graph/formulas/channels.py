"""Operations that put channels together, take some of them, or change their order.

    cat(A(x), B(y)), split(x), x[:, a:b], x[:, [2, 0, 1]], and the channel shuffle view -> transpose -> reshape

All need an axis whose size is the same for every input. What is said of the channels' order is computed, not guessed:
a chain of reshapes is run on the numbers 0, 1, 2, ... at two sizes.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from reparam import algebra
from reparam.graph.formulas import carriers
from reparam.graph.lift import Call, Carried, Concatenated, Either, Lift, Lifted, Sliced
from reparam.graph.nodes import info
from reparam.graph.sizes import Dims, Size, Sizes

_LARGEST_TEST = 1 << 22


def concatenate(call: Call) -> Concatenated | None:
    """Tensors one after the other, along an axis that is as long for every input."""
    tensors, dim = call["tensors"], call["dim"]
    dim = 0 if dim is None else dim
    if not isinstance(tensors, (tuple, list)) or type(dim) is not int or len(tensors) < 2:
        return None
    axis = dim % call.ndim
    for tensor in tensors:
        known = info(tensor) if isinstance(tensor, fx.Node) and tensor not in call.constants else None
        if known is None or len(known.shape) != call.ndim or call.sizes.dims(tensor)[axis].literal is None:
            return None
    return Concatenated(tuple(tensors), axis)


def narrow(call: Call) -> Sliced | None:
    """`length` channels from `start` on."""
    x, axis, start, length = call.tensor(), call["dim"], call["start"], call["length"]
    if x is None or any(type(value) is not int for value in (axis, start, length)):
        return None
    return _sliced(call, x, axis % call.ndim, (start, start + length), ())


def index(call: Call) -> Lift | None:
    """`x[...]` and one of the parts of a split."""
    x = call["input"]
    if not isinstance(x, fx.Node):
        return None
    if info(x) is None:
        return _part_of_split(call, x)
    return _slices(call) or carriers.with_new_axes(call) or _chosen(call)


def _slices(call: Call) -> Lift | None:
    carried = carriers.positions(call)
    x = call.tensor()
    parts = carriers.full_index(call["index"], call.ndim)
    if x is None or parts is None:
        return None
    cut = [axis for axis, part in enumerate(parts) if part != slice(None)]
    if len(cut) == 1:
        size, part = call.sizes.dims(x)[cut[0]].literal, parts[cut[0]]
        if size is not None and all(value is None or type(value) is int for value in _bounds(part)):
            start, stop, step = part.indices(size)
            option: Lifted | Sliced | None
            if step == 1:
                option = _sliced(call, x, cut[0], (start, stop), ())
            else:
                option = _selected(x, cut[0], list(range(start, stop, step)))
            if option is not None:
                return option if carried is None else Either((option, carried))
    return _cropped(x, parts, carried)


def _cropped(x: fx.Node, parts: list[slice], carried: Carried | None) -> Lift | None:
    """`x[:, :, 1:-1]`: a padding that crops."""
    tensor = info(x)
    if carried is None or tensor is None or len(parts) < 3 or any(part != slice(None) for part in parts[:2]):
        return carried
    pads = []
    for part in parts[2:]:
        start, stop, step = _bounds(part)
        if not (start is None or (type(start) is int and start >= 0)) or step not in (None, 1):
            return carried
        if not (stop is None or (type(stop) is int and stop < 0)):
            return carried
        pads.append((-(start or 0), stop or 0))
    device = tensor.device
    return Lifted(
        (x,), lambda channels: (algebra.from_padding(channels, tuple(pads), "zeros", device),), 1, carried=carried
    )


def _chosen(call: Call) -> Lifted | None:
    """`x[:, index]` with a constant list or tensor of channels."""
    x, given = call.tensor(), call["index"]
    parts = list(given) if isinstance(given, tuple) else [given]
    if x is None or any(part is Ellipsis or part is None for part in parts):
        return None
    axes = [axis for axis, part in enumerate(parts) if not (isinstance(part, slice) and part == slice(None))]
    if len(axes) != 1:
        return None
    return _gathered(call, x, axes[0], parts[axes[0]])


def index_select(call: Call) -> Lifted | None:
    """Channels chosen by a constant index."""
    x, axis = call.tensor(), call["dim"]
    return None if x is None or type(axis) is not int else _gathered(call, x, axis % call.ndim, call["index"])


def flip(call: Call) -> Lift | None:
    """The channels in reverse order, or other axes flipped."""
    carried = carriers.turned(call)
    x, dims = call.tensor(), call["dims"]
    axes = list(dims) if isinstance(dims, (tuple, list)) else [dims]
    if x is None or len(axes) != 1 or type(axes[0]) is not int:
        return carried
    axis = axes[0] % call.ndim
    size = call.sizes.dims(x)[axis].literal
    if size is None or carried is None:
        return carried
    chosen = _selected(x, axis, list(reversed(range(size))))
    return carried if chosen is None else Either((chosen, carried))


def shuffle(call: Call) -> Lifted | None:
    """Channels in `groups` groups, one of each group in turn."""
    x, groups = call.tensor(), call["groups"]
    size = None if x is None or call.ndim < 3 else call.sizes.dims(x)[1].literal
    if x is None or size is None or type(groups) is not int or size % groups:
        return None
    return _selected(x, 1, torch.arange(size, device="cpu").view(groups, -1).t().flatten().tolist())


def reshape(call: Call) -> Lift | None:
    """A reshape; where it ends a chain that only permutes the channels, that permutation."""
    return _permutation(call) or carriers.reshape(call)


def flatten(call: Call) -> Lift | None:
    """A flattening; where it ends a chain that only permutes the channels, that permutation."""
    return _permutation(call) or carriers.flatten(call)


def _sliced(call: Call, x: fx.Node, axis: int, window: tuple[int, int], via: tuple[fx.Node, ...]) -> Sliced | None:
    size = call.sizes.dims(x)[axis].literal
    if x in call.constants or size is None or not 0 <= window[0] < window[1] <= size:
        return None
    return Sliced(x, axis, window, via)


def _part_of_split(call: Call, split: fx.Node) -> Sliced | None:
    """`chunk(x, n, dim)[i]`, `split(x, sizes, dim)[i]`."""
    name = split.target if isinstance(split.target, str) else getattr(split.target, "__name__", "")
    which = call["index"]
    if split.op not in ("call_function", "call_method") or name not in _SPLITS or type(which) is not int:
        return None
    x = split.args[0] if split.args else None
    arguments = dict(zip(_SPLITS[name], split.args[1:], strict=False)) | dict(split.kwargs)
    axis, parts = arguments.get("dim", 0), arguments.get(_SPLITS[name][0])
    if not isinstance(x, fx.Node) or info(x) is None or type(axis) is not int:
        return None
    axis %= len(info(x).shape)  # type: ignore[union-attr]
    size = call.sizes.dims(x)[axis].literal
    if size is None:
        return None
    lengths = _lengths(name, parts, size)
    if lengths is None or not -len(lengths) <= which < len(lengths):
        return None
    which %= len(lengths)
    start = sum(lengths[:which])
    return _sliced(call, x, axis, (start, start + lengths[which]), (split,))


_SPLITS = {
    "chunk": ("chunks", "dim"),
    "split": ("split_size_or_sections", "dim"),
    "split_with_sizes": ("split_sizes", "dim"),
    "tensor_split": ("indices_or_sections", "dim"),
}


def _lengths(name: str, parts: Any, size: int) -> list[int] | None:
    """How long the parts are: asked of torch itself."""
    if not (type(parts) is int or (isinstance(parts, (tuple, list)) and all(type(part) is int for part in parts))):
        return None
    try:
        return [len(part) for part in getattr(torch.empty(size, device="cpu"), name)(parts)]
    except (RuntimeError, TypeError, ValueError):
        return None


def _gathered(call: Call, x: fx.Node, axis: int, chosen: Any) -> Lifted | None:
    size = call.sizes.dims(x)[axis].literal
    if isinstance(chosen, fx.Node):
        chosen = call.constants.value(chosen) if chosen in call.constants else None
    if isinstance(chosen, (list, tuple)) and chosen and all(type(i) is int for i in chosen):
        chosen = torch.tensor(chosen, device="cpu")
    if size is None or not isinstance(chosen, torch.Tensor) or chosen.ndim != 1 or chosen.dtype != torch.int64:
        return None
    if chosen.numel() == 0 or chosen.min() < -size or chosen.max() >= size:
        return None
    return _selected(x, axis, (chosen % size).tolist())


def _selected(x: fx.Node, axis: int, chosen: list[int]) -> Lifted | None:
    tensor = info(x)
    if tensor is None or not chosen:
        return None
    made = algebra.from_selection(chosen, tensor.shape[axis], tensor.device)
    return Lifted((x,), lambda channels: (made,), axis)


def _permutation(call: Call) -> Lifted | None:
    """The chain of reshapes and transposes that ends here, if all it does is to permute the channels."""
    via: list[fx.Node] = []
    x = call.tensor()
    while x is not None and _rearranges(x) and len(x.users) == 1:
        via.insert(0, x)
        x = x.args[0] if x.args and isinstance(x.args[0], fx.Node) else None
        tensor = None if x is None else info(x)
        if x is None or tensor is None or x in call.constants or tensor.shape != call.shape or len(via) < 2:
            continue
        for axis, size in enumerate(call.sizes.dims(x)):
            if size.literal is not None and size.literal > 1:
                order = _order(x, [*via, call.node], axis, call.sizes)
                if order is not None:
                    made = algebra.from_selection(order, size.literal, tensor.device)
                    return Lifted((x,), lambda channels, made=made: (made,), axis, tuple(via))  # type: ignore[misc]
    return None


def _rearranges(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and (
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    ) in ("view", "reshape", "transpose", "permute", "swapaxes", "contiguous", "flatten", "unflatten")


def _order(x: fx.Node, chain: list[fx.Node], axis: int, sizes: Sizes) -> list[int] | None:
    """The order of channels that a chain of rearrangements gives at two sizes, if it is one and the same."""
    orders = [_order_at(x, chain, axis, sizes, offset) for offset in (2, 3)]
    return orders[0] if orders[0] is not None and orders[0] == orders[1] else None


def _order_at(x: fx.Node, chain: list[fx.Node], axis: int, sizes: Sizes, offset: int) -> list[int] | None:
    values: dict[Any, int] = {}

    def number(size: Size) -> int:
        for atom in size.atoms:
            values.setdefault(atom, offset + len(values))
        return size.number * prod(values[atom] for atom in size.atoms)

    def concrete(argument: fx.Node) -> Any:
        size = sizes.value(argument)
        return argument if size is None else number(size)

    dims: Dims = sizes.dims(x)
    shape = [number(size) for size in dims]
    if prod(shape) > _LARGEST_TEST:
        return None
    start = torch.arange(prod(shape), device="cpu").reshape(shape)
    tensor = start
    try:
        for node in chain:
            args = fx.node.map_arg(node.args[1:], concrete)
            kwargs = fx.node.map_arg(node.kwargs, concrete)
            name = node.target if isinstance(node.target, str) else node.target.__name__
            tensor = getattr(tensor, "reshape" if name == "view" else name)(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if tensor.shape != start.shape:
        return None
    inner = prod(shape[axis + 1 :])
    order = tensor.movedim(axis, 0).flatten(1)[:, 0] // inner % shape[axis]
    return order.tolist() if torch.equal(start.index_select(axis, order), tensor) else None


def _bounds(part: slice) -> tuple[Any, Any, Any]:
    return part.start, part.stop, part.step
