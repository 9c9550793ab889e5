"""Runs of scales and shifts, and which layers would absorb them.

A run is a chain of nodes that scale and shift each channel alone, each read by the next one only; together they compute

    y[c] = s[c] * x[c] + t[c]

A layer in front absorbs it into its rows, a layer behind into its columns (`reparam.algebra.then`). Asked here is only
whether that is exact, can be written as a layer, and survives rounding to the model's dtype; the collapse does it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from reparam.algebra import AffineMap, Inexact, from_scale_shift, then
from reparam.graph.commuting import COMMUTING, Commuting
from reparam.graph.constants import Constants
from reparam.graph.emit import layer_for, unwritable
from reparam.graph.formulas import layers
from reparam.graph.lift import CallTable, Found, Lifted, LiftTable
from reparam.graph.lifted import LiftedGraph
from reparam.graph.nodes import info
from reparam.graph.sizes import Sizes

_LAYERS = (layers.conv, layers.conv_transpose, layers.linear)


@dataclass(frozen=True, eq=False)
class Scaling:
    """A run.

    Attributes:
        nodes: its nodes, in order.
        source: what the first of them reads.
        scale, shift: float64, `[C]`, or `[1]` where they are the same in all channels.
        axis: the axis they vary along; None where they are the same in all channels.
    """

    nodes: tuple[fx.Node, ...]
    source: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor
    axis: int | None

    @property
    def result(self) -> fx.Node:
        """The node that carries `y`."""
        return self.nodes[-1]

    @property
    def shifts(self) -> bool:
        return bool(self.shift.any())

    @property
    def scales(self) -> bool:
        return bool((self.scale != 1).any())

    @property
    def scale_alone(self) -> Scaling:
        return replace(self, shift=torch.zeros_like(self.shift))

    def map(self, channels: int) -> AffineMap:
        """`y` as a map of `x`; `channels` matters only where all are alike."""
        scale = self.scale.expand(channels) if self.axis is None else self.scale
        return from_scale_shift(scale, self.shift.expand(scale.shape) if self.shifts else None)


class Surroundings:
    """What a graph's nodes are, looked up as far as it is asked for."""

    def __init__(
        self, graph: fx.Graph, root: nn.Module, table: LiftTable, commuting: CallTable[Commuting] = COMMUTING
    ) -> None:
        self._root = root
        self._table = table
        self._commuting = commuting
        self._constants = Constants(graph, root)
        self._graph = graph
        self._lifted = LiftedGraph(graph, root, table, self._constants)
        self._singles: dict[fx.Node, Scaling | None] = {}

    def forget(self) -> None:
        """Drops what is known of nodes, as they have changed. Constants made since then count as unknown."""
        self._lifted = LiftedGraph(self._graph, self._root, self._table, self._constants)
        self._singles.clear()

    @property
    def sizes(self) -> Sizes:
        """What is known of the sizes of the graph's tensors."""
        return self._lifted.sizes

    def lifted(self, node: fx.Node) -> Lifted | None:
        """The node as affine maps, or None if it is not affine."""
        found = self._lifted.lift(node)
        return found if isinstance(found, Lifted) and not found.via else None

    def look_up(self, table: CallTable[Found], node: fx.Node) -> Found | Inexact | None:
        """What another table says of a node."""
        return table.lift(node, self._root, self._constants, self._lifted.sizes)

    def commuting(self, node: fx.Node) -> Commuting | None:
        """What the node commutes with, or None if it is no such operation."""
        found = self._commuting.lift(node, self._root, self._constants, self._lifted.sizes)
        return found if isinstance(found, Commuting) else None

    def is_layer(self, node: fx.Node) -> bool:
        """Whether it is a convolution or linear layer in any spelling; says nothing about whether it is affine."""
        row = self._table.row(node, self._root)
        return row is not None and row.lift in _LAYERS

    def is_padding(self, node: fx.Node) -> bool:
        row = self._table.row(node, self._root)
        return row is not None and row.lift is layers.pad

    def is_affine(self, node: fx.Node) -> bool:
        return self.lifted(node) is not None

    def map_of(self, node: fx.Node) -> tuple[fx.Node, AffineMap, int | None] | None:
        """Operand, map and channel axis of an affine node with one operand."""
        lifted = self.lifted(node)
        if lifted is None or len(lifted.operands) != 1:
            return None
        tensor = info(lifted.operands[0])
        if tensor is None or (lifted.axis is not None and lifted.axis >= len(tensor.shape)):
            return None
        channels = 1 if lifted.axis is None else tensor.shape[lifted.axis]
        return lifted.operands[0], lifted.maps(channels)[0], lifted.axis

    def single(self, node: fx.Node) -> Scaling | None:
        """The node as a run of its own, or None if it does not scale and shift each channel alone."""
        if node not in self._singles:
            self._singles[node] = self._single(node)
        return self._singles[node]

    def _single(self, node: fx.Node) -> Scaling | None:
        if node.op not in ("call_module", "call_function", "call_method") or self.is_layer(node):
            return None
        found = self.map_of(node)
        if found is None or not found[1].geometry.is_diagonal:
            return None
        source, map_, axis = found
        weight, bias = map_.tensors()
        scale = weight.reshape(-1)
        shift = torch.zeros_like(scale) if bias is None else bias
        return _plain(Scaling((node,), source, scale, shift, axis))

    def run(self, head: fx.Node) -> Scaling | None:
        """The longest run that starts with a node; None if no run starts there."""
        run = self.single(head)
        if run is None:
            return None
        before = self.single(run.source) if only_reader(run.source) is head else None
        if before is not None and joined(before, run) is not None:
            return None
        while (reader := only_reader(run.result)) is not None:
            following = self.single(reader)
            longer = None if following is None else joined(run, following)
            if longer is None:
                break
            run = longer
        return run

    def absorbs_behind(
        self,
        node: fx.Node,
        reader: fx.Node,
        run: Scaling,
        axis: int | None,
        *,
        rounded: bool = False,
        layers_only: bool = False,
    ) -> bool | Inexact:
        """Whether the collapse merges a run that comes behind `node` and in front of `reader` into what makes `node`.

        Args:
            axis: the channel axis of `node`.
            rounded: whether the merged weights must also survive rounding, which takes computing them.
            layers_only: whether a scale may absorb it only into the layer behind it; so it is for summands.

        Returns:
            False if `node` is nothing that absorbs; a reason if it is, but not this run.
        """
        lifted = self.lifted(node)
        if lifted is None or only_reader(node) is not reader:
            return False
        if len(lifted.operands) > 1:
            summands = lifted.operands
            answers = [self.absorbs_behind(x, node, run, axis, rounded=rounded, layers_only=True) for x in summands]
            return next((answer for answer in answers if answer is not True), True)
        found = self.map_of(node)
        if found is None or found[1].is_identity or (None not in (axis, found[2]) and axis != found[2]):
            return False
        map_ = found[1]
        if map_.geometry.is_diagonal:
            return not layers_only or self.absorbs_behind(found[0], node, run, axis, rounded=rounded, layers_only=True)
        if not self.is_layer(node) or found[2] is None:
            return False
        return _writable(then(map_, run.map(map_.geometry.out_channels)), node, found[2], rounded)

    def absorbs_in_front(
        self, node: fx.Node, value: fx.Node, run: Scaling, axis: int | None, *, rounded: bool = False
    ) -> bool | Inexact:
        """Whether the collapse merges a run between `value` and its reader `node` into that reader.

        Padding in front of a layer is a part of it. Arguments and answers are those of `absorbs_behind`.
        """
        composed: AffineMap | None = None
        while True:
            found = self.map_of(node)
            if found is None or found[0] is not value or found[2] is None or axis not in (None, found[2]):
                return False
            map_ = found[1]
            if composed is None:
                composed = run.map(map_.geometry.in_channels)
            if len({composed.geometry.rank, map_.geometry.rank} - {0}) > 1:
                return False
            layer, reader = self.is_layer(node), only_reader(node)
            if not layer and (reader is None or not self.is_padding(node)):
                return False
            merged = then(composed, map_)
            if layer or isinstance(merged, Inexact) or reader is None:
                return _writable(merged, node, found[2], rounded)
            composed, value, node = merged, node, reader


def only_reader(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one; None if there are several, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def _plain(run: Scaling) -> Scaling:
    """One number where all channels are alike: it then has no axis, and no number of channels."""
    if run.scale.numel() and bool((run.scale == run.scale[0]).all()) and bool((run.shift == run.shift[0]).all()):
        return replace(run, scale=run.scale[:1], shift=run.shift[:1], axis=None)
    return run


def joined(first: Scaling, second: Scaling) -> Scaling | None:
    """The second run after the first; None if they vary along different axes."""
    if None not in (first.axis, second.axis) and first.axis != second.axis:
        return None
    if second.source is not first.result:
        return None
    axis = second.axis if first.axis is None else first.axis
    scale = first.scale * second.scale
    shift = (first.shift * second.scale + second.shift).expand(scale.shape)
    return _plain(Scaling((*first.nodes, *second.nodes), first.source, scale, shift, axis))


def _writable(merged: AffineMap | Inexact, like: fx.Node, axis: int, rounded: bool) -> bool | Inexact:
    """Whether a layer can be written with the merged weights, in the dtype of `like`."""
    tensor = info(like)
    if isinstance(merged, Inexact) or tensor is None:
        return merged if isinstance(merged, Inexact) else False
    why = unwritable(merged.geometry, len(tensor.shape), axis)
    if why is not None or not rounded:
        return why or True
    layer = layer_for(merged, tensor, axis, None if merged.bias is None else merged.bias.evaluate())
    if isinstance(layer, Inexact):
        return layer
    if not _keeps_digits(merged, tensor.dtype):
        return Inexact(f"its merged weights are too small for {tensor.dtype}", "fuse in a wider type")
    return True


def _keeps_digits(merged: AffineMap, dtype: torch.dtype) -> bool:
    """Whether the weights of each channel, in and out, keep the digits of the type: small numbers have fewer."""
    geometry = merged.geometry
    weight = merged.weight.evaluate().to(torch.float64)
    blocks = weight.reshape(geometry.groups, geometry.out_channels // geometry.groups, weight.shape[1], -1)
    error = blocks.to(dtype).to(torch.float64) - blocks
    eps = torch.finfo(dtype).eps
    return all(bool((_norm(error, axes) <= eps * _norm(blocks, axes)).all()) for axes in ((1, 3), (2, 3)))


def _norm(blocks: torch.Tensor, axes: tuple[int, int]) -> torch.Tensor:
    return blocks.square().sum(dim=axes).sqrt()
