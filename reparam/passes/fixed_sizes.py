"""Sizes as numbers, for a model that is to run at the example's sizes only: masks and positions become constants.

`torch.arange(x.shape[1])`, a position embedding resized to `x.shape[-2:]`, a causal mask of `n` by `n`: all depend on
parameters and on sizes. Where the sizes are the example's for every input that is let in, they are literals, and what
is made of them is constant. It is asked for, and the sizes of the inputs are checked in the fused model.

Precondition: a size becomes a literal only if it follows from sizes of the inputs other than their first axis, which is
taken for the batch. What depends on the batch, or is not understood, is left to run time.

`KnownSizes` does the same, always, with the sizes that are alike for every input, because a layer's weights fix them:
`1 / math.sqrt(q.shape[-1])`, `kernel.repeat(x.shape[1], 1, 1, 1)`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx, nn

from reparam.checks import CHECKS, require_sizes
from reparam.graph.constants import Constants
from reparam.graph.lift import LiftTable
from reparam.graph.lifted import LiftedGraph
from reparam.graph.nodes import described, info, kind, place, replace_by_literal
from reparam.graph.sizes import Atom, Size, axes_read, size_read, spell_out
from reparam.graph.table import TABLE
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.ledger import all_allowed

_WINDOWED = ("conv", "pool", "pad", "interpolate", "upsample", "pixelshuffle", "pixel_shuffle", "pixelunshuffle")
"""Parts of the names of operations that treat each image of a batch alike, whose sizes make those of the result."""


_Value: TypeAlias = "int | float | bool | tuple[int, ...]"

_IDENTITY = "a size of the inputs, which are checked for it, or computed from such sizes"


@dataclass(frozen=True)
class FixedSizes:
    """The pass. `table` says what is affine, which tells sizes."""

    table: LiftTable = TABLE
    name = "fixed sizes"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        spell_out(graph)
        fixed = _fixed(graph, root, self.table, of_inputs=True)
        found = fixed.values(graph)
        rewrites = {}
        for node, value in found.items():
            if any(user not in found and user.target not in CHECKS for user in node.users):
                rewrites[node] = Rewrite(self.name, place(node), (described(node, root),), str(value), _IDENTITY)
        if not all_allowed([(rewrite, (node,)) for node, rewrite in rewrites.items()]):
            return [], []  # they hang together
        _write(found, graph)
        for source in fixed.inputs:
            check_sizes(source, graph)
        return list(rewrites.values()), []


@dataclass(frozen=True)
class KnownSizes:
    """The pass. `table` says what is affine, which tells sizes. It changes no tensor, and reports nothing."""

    table: LiftTable = TABLE
    name = "known sizes"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        if any("number" in node.meta for node in graph.nodes):
            _write(_fixed(graph, root, self.table, of_inputs=False).values(graph), graph)
        return [], []


def _fixed(graph: fx.Graph, root: nn.Module, table: LiftTable, *, of_inputs: bool) -> _Fixed:
    return _Fixed(graph, root, LiftedGraph(graph, root, table, Constants(graph, root)), of_inputs)


def _write(found: dict[fx.Node, _Value], graph: fx.Graph) -> None:
    """Puts the numbers where they were read, and what Python computes of numbers alone where that was read."""
    for node, value in reversed(found.items()):
        _drop_checks(node)
        replace_by_literal(node, value)
    for node in list(graph.nodes):
        home = getattr(node.target, "__module__", None)
        if node.op != "call_function" or node.all_input_nodes or home not in ("math", "_operator"):
            continue
        try:
            result = node.target(*node.args, **node.kwargs)
        except Exception:
            continue  # it then fails when the model runs, as the original does
        if type(result) in (int, float, bool):
            _drop_checks(node)
            replace_by_literal(node, result)


class _Fixed:
    """Which sizes are alike for every input, or (`of_inputs`) follow from those of the inputs but their first axis.

    Attributes:
        inputs: whose sizes were used.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, lifted: LiftedGraph, of_inputs: bool) -> None:
        self._root, self._lifted, self._of_inputs = root, lifted, of_inputs
        self._free: dict[Atom, bool] = {}
        self.inputs: dict[fx.Node, None] = {}
        for node in graph.nodes:  # in order, because a graph can be deeper than Python's stack
            for axis in range(-1, len(tensor.shape) if (tensor := info(node)) is not None else 0):
                self._free[node, axis] = self._is_free(node, axis)

    def values(self, graph: fx.Graph) -> dict[fx.Node, _Value]:
        """The numbers and sizes of all nodes that have some."""
        return {node: value for node in graph.nodes if (value := self.value(node)) is not None}

    def value(self, node: fx.Node) -> _Value | None:
        """The number, or the sizes, that the node has for every input that is let in."""
        sizes = self._stands_for(node)
        if not sizes or not self._known(sizes):
            return None
        self.inputs.update(dict.fromkeys(source for size in sizes for atom in size.atoms for source in _sources(atom)))
        tensor, axes = axes_read(node)
        shape = () if tensor is None else info(tensor).shape  # type: ignore[union-attr]
        return node.meta["number"] if tensor is None else tuple(shape[axis] for axis in axes)

    def _stands_for(self, node: fx.Node) -> list[Size] | None:
        """The sizes that a node reads together, or the number that it computes; None if it is neither."""
        tensor, axes = axes_read(node)
        if tensor is not None:
            return [self._lifted.sizes.dims(tensor)[axis] for axis in axes]
        size = self._lifted.sizes.value(node) if type(node.meta.get("number")) in (int, float, bool) else None
        return None if size is None else [size]

    def _is_free(self, node: fx.Node, axis: int) -> bool:
        if axis < 0:
            return self._is_free_number(node)
        if _is_input(node):
            return axis > 0 and self._of_inputs
        name = kind(node, self._root).lower()
        image = node.args[0] if node.args else None
        if axis == 0 or not isinstance(image, fx.Node) or info(image) is None:
            return False
        if not any(part in name for part in _WINDOWED):
            return False
        others = [other for other in node.all_input_nodes if other is not image and other.op != "get_attr"]
        return all(map(self._is_free_value, others)) and self._known(list(self._lifted.sizes.dims(image)[1:]))

    def _is_free_number(self, node: fx.Node) -> bool:
        """A number that Python computes of sizes, each of which is fixed."""
        if "number" not in node.meta or node.op != "call_function":
            return False
        read = size_read(node)
        if read is not None:
            return self._known([self._lifted.sizes.dims(read[0])[read[1]]])
        return bool(node.all_input_nodes) and all(map(self._is_free_value, node.all_input_nodes))

    def _is_free_value(self, node: fx.Node) -> bool:
        sizes = self._stands_for(node)
        return sizes is not None and self._known(sizes)

    def _known(self, sizes: list[Size]) -> bool:
        return all(self._free.get(atom, False) for size in sizes for atom in size.atoms)


def _sources(atom: Atom) -> set[fx.Node]:
    """The inputs that a size follows from."""
    pending, seen, found = [atom[0]], {atom[0]}, set()
    while pending:
        node = pending.pop()
        if _is_input(node):
            found.add(node)
            continue
        new = [other for other in node.all_input_nodes if other not in seen]
        seen.update(new)
        pending += new
    return found


def _is_input(node: fx.Node) -> bool:
    """Whether it is a tensor that the caller gives: an argument, or an element of one."""
    if info(node) is None:
        return False
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node) and info(node.args[0]) is None:
        node = node.args[0]
    return node.op == "placeholder"


def _drop_checks(node: fx.Node) -> None:
    """Takes out checks of what the check of the inputs has made sure of."""
    for user in list(node.users):
        if user.target in CHECKS and user.all_input_nodes == [node]:
            user.graph.erase_node(user)


def check_sizes(source: fx.Node, graph: fx.Graph) -> None:
    """Makes the model stop where a tensor has other sizes than in the example, the batch apart."""
    tensor = info(source)
    if tensor is None or source.op == "get_attr" or any(user.target is require_sizes for user in source.users):
        return
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first if source.op == "placeholder" else source.next):
        check = graph.call_function(require_sizes, (source, tensor.shape[1:]))
    check.meta.update({key: source.meta.get(key) for key in ("module_path", "source")})
    check.meta["pinned"] = "it checks the inputs"
