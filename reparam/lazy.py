"""Wide weights that are never held: a parameter that looks like float64 and is made when an operation reads it.

A float64 copy of a model is twice as large as the model. `Lazy` stands for such a weight and holds only what it is made
from; an operation gets its value, and nothing keeps it. Matrix products, convolutions and look-ups get large ones block
by block, so that a model which is one huge layer needs no float64 copy either.
"""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from reparam.quiet import without_copying_warnings

SMALLEST = 1 << 16
"""Elements from which on a weight is worth being lazy."""
_BLOCK = 1 << 16  # elements; a float64 block of this size stays in the second-level cache
_LARGEST_BLOCK = 1 << 20  # elements
_OWN_PAGES = 1 << 21  # bytes: a huge page
_aten = torch.ops.aten


def passing(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor for a large value that is needed once.

    On the CPU it has pages of its own, which are given back with it. The allocator would keep large blocks that come
    and go between small ones that stay, and not always use them again.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _OWN_PAGES or sys.platform == "win32":
        return torch.empty(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # of Linux: a page at a time takes several times as long as the cast itself
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).reshape(shape)


def widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)` for a value that is needed once."""
    return passing(tuple(tensor.shape), dtype, tensor.device).copy_(tensor)


class Source(Protocol):
    """What a lazy weight is made from."""

    def whole(self) -> torch.Tensor:
        """All of it."""

    def reader(self) -> Callable[[slice], torch.Tensor]:
        """Makes some of its rows; what several calls need is computed once."""

    def reshaped(self, shape: tuple[int, ...]) -> Source:
        """The same rows in another shape."""


class Cast:
    """An existing tensor in another dtype."""

    def __init__(self, held: torch.Tensor, dtype: torch.dtype) -> None:
        self.held, self.dtype = held.detach(), dtype

    def whole(self) -> torch.Tensor:
        """All of it."""
        return widened(self.held, self.dtype)

    def reader(self) -> Callable[[slice], torch.Tensor]:
        """Makes some of its rows."""
        return lambda block: widened(self.held[block], self.dtype)

    def reshaped(self, shape: tuple[int, ...]) -> Cast:
        """The same rows in another shape."""
        return Cast(self.held.reshape(shape), self.dtype)


class WrittenError(RuntimeError):
    """Somebody writes to a weight that is not his alone."""


class Lazy(torch.Tensor):
    """A tensor that is made from its source whenever an operation reads it; it cannot be written to.

    Attributes:
        source: what it is made from.
        flipped: whether it is the transpose of that.
    """

    source: Source
    flipped: bool

    @staticmethod
    def __new__(
        cls, source: Source, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, flipped: bool = False
    ) -> Lazy:
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        sizes = tuple(reversed(shape)) if flipped else tuple(shape)
        made: Lazy = torch.Tensor._make_wrapper_subclass(
            cls, sizes, strides=tuple(reversed(strides)) if flipped else tuple(strides), dtype=dtype, device=device
        )
        made.source, made.flipped = source, flipped
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Lazy({list(self.shape)}, {self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Lazy:
        return self  # it never changes

    def whole(self) -> torch.Tensor:
        """Its value."""
        value = self.source.whole()
        return value.t() if self.flipped else value

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet in (_aten.detach, _aten.alias):
            return _like(args[0], args[0].flipped)
        if packet is _aten.t and args[0].dim() == 2:
            return _like(args[0], not args[0].flipped)
        if packet is _aten.view and not kwargs and (reshaped := _reshaped(*args)) is not None:
            return reshaped
        require_unwritten(func, args, kwargs, lambda tensor: isinstance(tensor, Lazy))
        blockwise = _BLOCKWISE.get(packet)
        made = None if blockwise is None or kwargs else blockwise(*args)
        if made is not None:
            return made
        args, kwargs = tree_map_only(Lazy, Lazy.whole, (args, kwargs))
        return func(*args, **kwargs)


def lazy_cast(tensor: torch.Tensor, dtype: torch.dtype) -> Lazy:
    """`tensor.to(dtype)`, made when it is read."""
    return Lazy(Cast(tensor, dtype), tuple(tensor.shape), dtype, tensor.device)


def require_unwritten(func: Any, args: Any, kwargs: Any, is_shared: Callable[[torch.Tensor], bool]) -> None:
    """Raises before an operation writes to a tensor that is shared.

    Raises:
        WrittenError: it would.
    """
    if not func._schema.is_mutable:
        return
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        if any(isinstance(leaf, torch.Tensor) and is_shared(leaf) for leaf in tree_leaves(value)):
            raise WrittenError(f"{func} writes to a weight")


def row_blocks(shape: tuple[int, ...], elements: int = _BLOCK) -> Iterator[slice]:
    """Blocks of rows of a tensor of this shape, with about so many elements each."""
    rows = shape[0] if shape else 0
    count = max(1, elements * rows // max(math.prod(shape), 1))
    return (slice(start, start + count) for start in range(0, rows, count))


def pairs_of_blocks(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rows of two tensors of one shape, lazy or not, block by block; without rows they are one block."""
    if not a.dim():
        return iter(((_value(a), _value(b)),))
    first, second = _reader(a), _reader(b)
    elements = _BLOCK if a.device.type == "cpu" else _LARGEST_BLOCK
    return ((first(block), second(block)) for block in row_blocks(tuple(a.shape), elements))


def lean_copy(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module | None:
    """A deep copy that shares the large weights of `module`: nobody may write to them.

    Args:
        dtype: floating-point weights and attributes are cast to it; large weights when they are read.

    Returns:
        None for a module that cannot be copied so.
    """
    own = any(_casts_in_its_own_way(type(part)) for part in module.modules())
    if isinstance(module, torch.jit.ScriptModule) or (own and dtype is not None):
        return None
    stand_ins = {id(parameter): _stand_in(parameter, dtype) for parameter in module.parameters()}
    expected = set(map(id, stand_ins.values()))
    with without_copying_warnings():
        duplicate: nn.Module = copy.deepcopy(module, cast(Any, results_held(module) | stand_ins))
    if any(id(parameter) not in expected for parameter in duplicate.parameters()):
        return None
    if dtype is not None:
        cast_rest(duplicate, dtype)
    return duplicate


def results_held(module: nn.Module) -> dict[int, Any]:
    """For `copy.deepcopy`, copies of the attributes that it would not copy itself.

    Results with gradients (a hook may have left one there, as that of `torch.nn.utils.weight_norm` does), and functions
    of TorchScript, which hold nothing.
    """
    held = [value for part in module.modules() for value in vars(part).values()]
    tensors = (value for value in held if isinstance(value, torch.Tensor))
    results = {id(value): value.detach().clone() for value in tensors if value.grad_fn is not None}
    return {**results, **{id(value): value for value in held if isinstance(value, torch.jit.ScriptFunction)}}


def cast_rest(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the buffers, and the tensors that are plain attributes."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for held in (part._buffers, vars(part)):
            for name, value in held.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    if id(value) not in made:
                        made[id(value)] = value.detach().to(dtype)
                    held[name] = made[id(value)]


def shared_storages(copied: nn.Module) -> frozenset[int]:
    """The storages that a lean copy shares, as `Guarded` knows them."""
    plain = (parameter for parameter in copied.parameters() if not isinstance(parameter, Lazy))
    return frozenset(parameter.untyped_storage()._cdata for parameter in plain)


class Guarded(TorchDispatchMode):
    """Inside, nothing is written to some storages: `WrittenError` is raised before it would be.

    So it is in the functions that operators call (`torch.cond`).
    """

    supports_higher_order_operators = True

    def __init__(self, storages: frozenset[int]) -> None:
        super().__init__()
        self._storages = storages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not isinstance(func, HigherOrderOperator):
            require_unwritten(func, args, kwargs or {}, self._is_shared)
        elif "mutation" in func.name():
            raise WrittenError(f"{func.name()} may write to its arguments")
        else:
            args = tuple(self._guarding(one) if callable(one) else one for one in args)
        return func(*args, **(kwargs or {}))

    def _guarding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Torch leaves the mode while it is asked what to do."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return call

    def _is_shared(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, Lazy) and tensor.untyped_storage()._cdata in self._storages


def _casts_in_its_own_way(cls: type[nn.Module]) -> bool:
    return cls._apply is not nn.Module._apply and not cls.__module__.startswith("torch.")


def _stand_in(parameter: nn.Parameter, dtype: torch.dtype | None) -> nn.Parameter:
    """What stands for a parameter in a lean copy."""
    if isinstance(parameter, Lazy):
        return parameter
    value = parameter.detach()
    plain = type(parameter) is nn.Parameter and value.layout is torch.strided and value.is_contiguous()
    large = plain and value.numel() >= SMALLEST
    if dtype is None or not value.is_floating_point() or value.dtype == dtype:
        made = nn.Parameter(value if large else value.clone(), parameter.requires_grad)
    elif large:
        made = nn.Parameter(lazy_cast(value, dtype), requires_grad=False)
    else:
        made = nn.Parameter(value.to(dtype), parameter.requires_grad)
    made.__dict__.update(parameter.__dict__)
    return made


def _reader(tensor: torch.Tensor) -> Callable[[slice], torch.Tensor]:
    return tensor.source.reader() if isinstance(tensor, Lazy) and not tensor.flipped else _value(tensor).__getitem__


def _blocks(weight: Lazy, elements: int = _LARGEST_BLOCK) -> Iterator[torch.Tensor]:
    """The rows of a weight that is not flipped, or the columns of one that is."""
    shape = tuple(reversed(weight.shape)) if weight.flipped else tuple(weight.shape)
    return map(weight.source.reader(), row_blocks(shape, elements))


def _reshaped(tensor: Lazy, size: Any) -> Lazy | None:
    """A view that leaves the rows what they are."""
    if tensor.flipped or not tensor.dim() or not size or not tensor.numel():
        return None
    known = math.prod(side for side in size if side != -1)
    shape = tuple(tensor.numel() // known if side == -1 else side for side in size)
    if shape[0] != tensor.shape[0]:
        return None
    return Lazy(tensor.source.reshaped(shape), shape, tensor.dtype, tensor.device)


def _like(tensor: Lazy, flipped: bool) -> Lazy:
    shape = tuple(reversed(tensor.shape)) if tensor.flipped else tuple(tensor.shape)
    return Lazy(tensor.source, shape, tensor.dtype, tensor.device, flipped)


def _is_large(weight: Any, elements: int = _LARGEST_BLOCK) -> bool:
    return isinstance(weight, Lazy) and weight.numel() > elements


def _value(tensor: Any) -> Any:
    return tensor.whole() if isinstance(tensor, Lazy) else tensor


def _product(x: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    """`x @ weight + bias` for the transpose of a large weight, columns by columns."""
    if not isinstance(weight, Lazy) or not weight.flipped:
        return None
    return _linear(x, _like(weight, flipped=False), bias)


def _linear(x: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    """`x @ weight.t() + bias` for a large weight, rows by rows: a few where `x` is small, since each reads it anew."""
    if isinstance(x, Lazy):
        return None
    on_cpu = x.device.type == "cpu"  # elsewhere there is no cache to stay in, and every block is a launch
    elements = min(max(2 * _BLOCK, 4 * x.numel()), _LARGEST_BLOCK) if on_cpu else _LARGEST_BLOCK
    if not _is_large(weight, elements) or weight.flipped:
        return None
    out = _gathered((x @ block.t() for block in _blocks(weight, elements)), -1, weight.shape[0])
    return out if bias is None else out.add_(_value(bias))


def _convolution(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, extra: Any, groups: int
) -> torch.Tensor | None:
    """An ordinary convolution with a large weight, output channels by output channels."""
    if not _is_large(weight) or transposed or groups != 1 or isinstance(x, Lazy):
        return None
    parts = (torch.convolution(x, block, None, stride, padding, dilation, False, extra, 1) for block in _blocks(weight))
    out = _gathered(parts, 1, weight.shape[0])
    return out if bias is None else out.add_(_value(bias).reshape(-1, *(1,) * (out.dim() - 2)))


def _gathered(parts: Iterator[torch.Tensor], axis: int, size: int) -> torch.Tensor:
    """The concatenation of parts that are made one by one."""
    out, start = None, 0
    for part in parts:
        if out is None:
            shape = list(part.shape)
            shape[axis] = size
            out = part.new_empty(shape)
        out.narrow(axis, start, part.shape[axis]).copy_(part)
        start += part.shape[axis]
    assert out is not None
    return out


def _embedding(weight: Any, index: Any, *_: Any) -> torch.Tensor | None:
    if not isinstance(weight, Lazy) or weight.flipped or not isinstance(weight.source, Cast):
        return None
    return weight.source.held[index].to(weight.dtype)


_BLOCKWISE: dict[Any, Callable[..., torch.Tensor | None]] = {
    _aten.addmm: lambda bias, x, weight: _product(x, weight, bias),
    _aten.mm: _product,
    _aten.linear: _linear,
    _aten.convolution: _convolution,
    _aten.embedding: _embedding,
}
