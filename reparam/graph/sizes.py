"""Sizes that the graph's tensors have for every input: products of a number and of sizes that are not known.

A layer with weights fixes the number of its channels; most operations keep most of the sizes of what they read. So
`x.view(B, H * W, C)` can be told from a view that mixes positions with channels, for every input size and not by the
example alone. A size that is not understood is an atom of its own, equal to itself only.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias
from weakref import WeakMethod

from torch import fx

from reparam.checks import require_sizes
from reparam.graph.nodes import info, pinned, replace_by_literal

Atom: TypeAlias = "tuple[fx.Node, int]"
"""The size of a tensor's axis; or, with axis -1, a number that a node computes."""


@dataclass(frozen=True)
class Size:
    """`number * product of atoms`."""

    number: int
    atoms: tuple[Atom, ...] = ()

    @property
    def literal(self) -> int | None:
        """The size if it is the same for every input."""
        return None if self.atoms else self.number

    def __mul__(self, other: Size) -> Size:
        return Size(self.number * other.number, _sorted((*self.atoms, *other.atoms)))

    def over(self, other: Size) -> Size | None:
        """The quotient if it is certain to be exact."""
        rest = Counter(self.atoms)
        rest.subtract(other.atoms)
        if other.number == 0 or self.number % other.number or any(count < 0 for count in rest.values()):
            return None
        return Size(self.number // other.number, _sorted(rest.elements()))


Dims: TypeAlias = "tuple[Size, ...]"


def own_sizes(node: fx.Node) -> Dims:
    """Sizes of a tensor that nothing is known about."""
    tensor = info(node)
    return tuple(Size(1, ((node, axis),)) for axis in range(0 if tensor is None else len(tensor.shape)))


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes."""
    total = Size(1)
    for size in sizes:
        total = total * size
    return total


class Sizes:
    """The sizes of a graph's tensors.

    Args:
        graph: the graph.
        rule: the sizes of a node's tensor as its operation tells them, or None for a node it knows nothing about.
        demanded: the size of an axis that an operation which reads the tensor demands, or None.

    Both are methods of what holds this, and are not kept alive: in a cycle, the weights that their owner has widened
    would outlive it.
    """

    def __init__(
        self,
        graph: fx.Graph,
        rule: Callable[[fx.Node, Sizes], Dims | None],
        demanded: Callable[[fx.Node, int], int | None],
    ) -> None:
        self._rule = WeakMethod(rule)
        self._demanded = WeakMethod(demanded)
        self._dims: dict[fx.Node, Dims] = {}
        self._pending = iter(list(graph.nodes))

    def dims(self, node: fx.Node) -> Dims:
        """Sizes of the node's tensor, one per axis; never wrong, but not always known further than "its own size"."""
        while node not in self._dims:  # in the graph's order, because a graph can be deeper than Python's stack
            other = next(self._pending, node)
            if other not in self._dims:
                self._dims[other] = self._known(other)
        return self._dims[node]

    def _known(self, node: fx.Node) -> Dims:
        tensor = info(node)
        shape = () if tensor is None else tensor.shape
        if node.op == "get_attr":
            return tuple(Size(size) for size in shape)
        rule, demanded = self._rule(), self._demanded()
        assert rule is not None
        assert demanded is not None
        found = rule(node, self) if shape else None
        dims = found if found is not None and _fits(found, shape) else own_sizes(node)
        # On any other input the original fails: a layer with weights reads it.
        wanted = [demanded(node, axis) if dims[axis].atoms else None for axis in range(len(shape))]
        if any(user.target is require_sizes for user in node.users):
            wanted[1:] = shape[1:]
        return tuple(size if number is None else Size(number) for size, number in zip(dims, wanted, strict=True))

    def value(self, argument: Any) -> Size | None:
        """The size that an argument stands for: a number, or a node that computes one. None if it is neither."""
        if isinstance(argument, bool):
            return None
        if isinstance(argument, int):
            return Size(argument)
        if not isinstance(argument, fx.Node) or "number" not in argument.meta:
            return None
        read = size_read(argument)
        if read is not None:
            return self.dims(read[0])[read[1]]
        if argument.op == "call_function" and argument.target in (operator.mul, operator.floordiv):
            a, b = (self.value(part) for part in argument.args)
            if a is not None and b is not None:
                exact = a * b if argument.target is operator.mul else a.over(b)
                if exact is not None:
                    return exact
        return Size(1, ((argument, -1),))


def size_read(node: fx.Node) -> Atom | None:
    """The tensor and the axis whose size a node reads (`x.size(1)`, `x.shape[1]`, `x.size()[1]`), or None."""
    if node.op == "call_method" and node.target == "size" and (len(node.args) == 2 or "dim" in node.kwargs):
        tensor, axis = node.args[0], node.args[1] if len(node.args) == 2 else node.kwargs["dim"]
    elif node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        read, axes = axes_read(node.args[0])
        if read is None or type(node.args[1]) is not int or not -len(axes) <= node.args[1] < len(axes):
            return None
        tensor, axis = read, axes[node.args[1]]
    else:
        return None
    known = info(tensor) if isinstance(tensor, fx.Node) else None
    if known is None or type(axis) is not int or not -len(known.shape) <= axis < len(known.shape):
        return None
    return tensor, axis % len(known.shape)  # type: ignore[return-value]


def shape_read(node: fx.Node) -> fx.Node | None:
    """The tensor whose whole shape a node reads (`x.shape`, `x.size()`), or None."""
    reads = (node.op == "call_function" and node.target is getattr and node.args[1] == "shape") or (
        node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs
    )
    return node.args[0] if reads and isinstance(node.args[0], fx.Node) else None


def axes_read(node: fx.Node) -> tuple[fx.Node | None, list[int]]:
    """The tensor some of whose sizes a node reads together, and the axes (`x.shape`, `x.shape[:2]`)."""
    whole = shape_read(node)
    if whole is not None:
        tensor = info(whole)
        return (None, []) if tensor is None else (whole, list(range(len(tensor.shape))))
    if node.op == "call_function" and node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        part = node.args[1]
        if isinstance(part, slice) and shape_read(node.args[0]) is not None:
            tensor_read, axes = axes_read(node.args[0])
            if all(value is None or type(value) is int for value in (part.start, part.stop, part.step)):
                return tensor_read, axes[part]
    return None, []


def spell_out(graph: fx.Graph) -> None:
    """Writes `y.view_as(x)`, `y.reshape(x.shape)` and their like as a reshape to sizes that are read one by one.

    A tensor of which only sizes are read need not exist if another one has the same sizes.
    """
    for node in list(graph.nodes):
        like = _like(node)
        tensor = None if like is None else info(like)
        if like is None or tensor is None or info(node) is None or pinned(node) is not None:
            continue
        with graph.inserting_before(node):
            sizes = []
            for axis, size in enumerate(tensor.shape):
                sizes.append(graph.call_method("size", (like, axis)))
                sizes[-1].meta = {"number": size, **{k: node.meta.get(k) for k in ("module_path", "source")}}
            wide = graph.call_method("reshape", (node.args[0], tuple(sizes)))
        wide.meta = {"stands_for": node.name, **node.meta}
        node.replace_all_uses_with(wide)
        graph.erase_node(node)


def _like(node: fx.Node) -> fx.Node | None:
    """The tensor whose shape a reshape gives its own tensor."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    other = node.args[1]
    if not isinstance(other, fx.Node):
        return None
    if node.op == "call_method" and name in ("view_as", "reshape_as"):
        return other
    return shape_read(other) if name in ("view", "reshape") else None


def read_elsewhere(graph: fx.Graph, sizes: Sizes, affine: Callable[[fx.Node], bool]) -> None:
    """Lets reads of a size ask a tensor that exists in any case, so that reading it keeps no other alive.

    Args:
        affine: whether a node's tensor may go.
    """
    reads = [(node, read) for node in graph.nodes if (read := size_read(node)) is not None]
    if not reads:
        return
    holders: Holders = {}
    waiting = iter(reads)
    node, read = next(waiting)
    for other in list(graph.nodes):
        if other is node:
            _redirect(node, read, sizes.dims(read[0])[read[1]], holders)
            node, read = next(waiting, (graph._root, read))
        if info(other) is None:
            continue
        stays = _stays(other, affine)
        for axis, size in enumerate(sizes.dims(other)) if stays is not None else ():
            if size not in holders or (stays and not holders[size][0]):
                holders[size] = (bool(stays), other, axis)
    for other in reversed(list(graph.nodes)):
        if not other.users and other.op != "output" and axes_read(other)[0] is not None:
            graph.erase_node(other)


def _stays(node: fx.Node, affine: Callable[[fx.Node], bool]) -> bool | None:
    """Whether a tensor exists in any case; None if it is one that a single operation reads, which may well go."""
    if not affine(node):
        return True
    readers = [user for user in node.users if size_read(user) is None and axes_read(user)[0] is None]
    if any(not affine(user) for user in readers):
        return True
    return False if len(readers) > 1 else None


Holders: TypeAlias = "dict[Size, tuple[bool, fx.Node, int]]"


def _redirect(node: fx.Node, read: Atom, size: Size, holders: Holders) -> None:
    literal = size.literal
    if literal is not None:
        replace_by_literal(node, literal)
        return
    factors = [Size(1, (atom,)) for atom in size.atoms]
    sure = size in holders and holders[size][0]
    if not sure and len(factors) > 1 and all(factor in holders for factor in factors):
        early = _product_read(node, size, [holders[factor] for factor in factors])
    elif size in holders and holders[size][1] is not read[0]:
        early = _read(node, holders[size])
    else:
        return
    node.replace_all_uses_with(early)
    node.graph.erase_node(node)


def _product_read(node: fx.Node, size: Size, held: list[tuple[bool, fx.Node, int]]) -> fx.Node:
    total = _read(node, held[0])
    number: int = total.meta["number"]
    others: list[tuple[Any, int]] = [(early := _read(node, holder), early.meta["number"]) for holder in held[1:]]
    if size.number != 1:
        others.append((size.number, size.number))
    for factor, value in others:
        number *= value
        with node.graph.inserting_before(node):
            total = node.graph.call_function(operator.mul, (total, factor))
        total.meta = {**node.meta, "number": number}
    return total


def _read(node: fx.Node, holder: tuple[bool, fx.Node, int]) -> fx.Node:
    _, tensor, axis = holder
    with node.graph.inserting_before(node):
        early = node.graph.call_method("size", (tensor, axis))
    early.meta = {**node.meta, "number": info(tensor).shape[axis]}  # type: ignore[union-attr]
    return early


def _fits(dims: Dims, shape: tuple[int, ...]) -> bool:
    """Whether what is known agrees with the example; a rule that does not is not believed."""
    return len(dims) == len(shape) and all(
        _example(size) in (None, actual) for size, actual in zip(dims, shape, strict=True)
    )


def _example(size: Size) -> int | None:
    values = []
    for atom in size.atoms:
        value = example_size(atom)
        if value is None:
            return None
        values.append(value)
    return size.number * prod(values)


def example_size(atom: Atom) -> int | None:
    """What an atom is for the example, if that is known."""
    node, axis = atom
    tensor = info(node)
    return node.meta.get("number") if axis < 0 else tensor.shape[axis] if tensor is not None else None


def _sorted(atoms: Iterable[Atom]) -> tuple[Atom, ...]:
    return tuple(sorted(atoms, key=lambda atom: (atom[0].name, atom[1])))
