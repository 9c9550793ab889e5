"""Joins parallel layers of one input into one layer whose output is split.

    [A; B](x) = cat(A(x), B(x)):    a, b = split([A; B](x))

Convolutions and linear layers that read their input alike (`reparam.algebra.join`): query, key and value of attention,
the pointwise branches of a block. It computes no less; what it saves is launching layers, so it pays for small tensors
only. The rule, as `benchmarks/join.py` measured it:

- the launches saved, less the split, are at least `least` of what the layers take apart;
- every reader of a part can do with a slice, without a copy and for every size (`reparam.passes.readers`);
- it costs nothing on the machines of `elsewhere`, where the exported file may run. A runtime without views copies the
  parts out.

A layer that shares its weight with another call stays: joined, there would be two copies of that weight.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import fx, nn

from reparam.algebra import AffineMap, Inexact
from reparam.algebra.join import stacked
from reparam.capture.captured import TensorInfo
from reparam.graph.constants import Constants
from reparam.graph.emit import Layer, exact_layer_for, insert_layer, layer_for
from reparam.graph.lift import Lifted, LiftTable
from reparam.graph.lifted import LiftedGraph
from reparam.graph.nodes import attribute, described, info, kind, module_of, place, stand_for
from reparam.graph.normal import eliminate_dead_code
from reparam.graph.sizes import Sizes
from reparam.graph.table import TABLE
from reparam.passes.base import Cost, Refusal, Rewrite
from reparam.passes.cost import CostModel
from reparam.passes.ledger import allowed
from reparam.passes.machines import ONNXRUNTIME_CPU, Machine
from reparam.passes.readers import needs_whole

_JOINED = ("convolution", "linear layer", "matrix product")


@dataclass(frozen=True)
class Join:
    """The pass. `table` says what is affine, `cost` what is cheap.

    Attributes:
        elsewhere: machines on which the same model may run too, and must not be slower.
        least: the share of the layers' seconds that joining them has to save.
    """

    table: LiftTable = TABLE
    cost: CostModel = field(default_factory=CostModel)
    elsewhere: tuple[Machine, ...] = (ONNXRUNTIME_CPU,)
    least: float = 0.1
    name = "join"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        candidates = _with_company(graph, root, self.table)
        if not candidates:
            return [], []
        lifted = LiftedGraph(graph, root, self.table, Constants(graph, root))
        shared = shared_weights(graph, root)
        rewrites: list[Rewrite] = []
        refusals: list[Refusal] = []
        for group in _groups(candidates, lifted):
            joined = self._joined(group, shared, root, lifted.sizes)
            made = joined if isinstance(joined, Inexact) else _layer(joined)
            if isinstance(joined, Inexact) or isinstance(made, Inexact):
                why = joined if isinstance(joined, Inexact) else cast(Inexact, made)
                kinds = {kind(branch.node, root) for branch in group}
                subject = f"{len(group)} parallel {kinds.pop() if len(kinds) == 1 else 'layers'}"
                refusals.append(Refusal(self.name, place(group[0].node), subject, why.reason, why.remedy))
                continue
            rewrite = self._rewrite(joined, made, root)
            if not allowed(rewrite, *(branch.node for branch in joined)):
                continue
            rewrites.append(rewrite)
            _replace(joined, made, graph, root)
        eliminate_dead_code(graph)
        return rewrites, refusals

    def _joined(
        self, group: list[Branch], shared: set[fx.Node], root: nn.Module, sizes: Sizes
    ) -> list[Branch] | Inexact:
        """The branches to join, or why there are none."""
        alone = [branch for branch in group if branch.node not in shared]
        if len(alone) < 2:
            return Inexact("their weights are used in other calls too", "give each call a layer of its own")
        why = self._does_not_pay(alone)
        if why is not None:
            return why
        readers = [needs_whole(branch.node, branch.axis, root, sizes) for branch in alone]
        joined = [branch for branch, reader in zip(alone, readers, strict=True) if reader is None]
        if len(joined) < 2:
            reader = next(reader for reader in readers if reader is not None)
            return Inexact(f"{_named(reader, root)} cannot read a part of a joined tensor without a copy")
        return self._does_not_pay(joined) or joined

    def _does_not_pay(self, group: list[Branch]) -> Inexact | None:
        """Why joining saves too little on the machine, or costs time on one of the others."""
        one, fewer = self.cost.machine, len(group) - 1
        saved = fewer * one.dense(0, 0) - self.cost.of_view().seconds
        if saved < self.least * self._apart(group).seconds:
            return Inexact(f"joining them is exact, but would save less than {self.least:.0%} of their time")
        if any(_loses_on(other, group) for other in self.elsewhere):
            return Inexact(
                "joining them is exact, but slower in a runtime that copies the parts of the joined layer out"
            )
        return None

    def _apart(self, group: list[Branch]) -> Cost:
        return sum((self.cost.of_map(branch.map.geometry, branch.read, branch.axis) for branch in group), Cost())

    def _rewrite(self, group: list[Branch], made: Layer, root: nn.Module) -> Rewrite:
        first = group[0]
        geometry = replace(first.map.geometry, out_channels=sum(branch.channels for branch in group))
        return Rewrite(
            self.name,
            place(first.node),
            tuple(described(branch.node, root) for branch in group),
            f"{made.description}, split in {len(group)}",
            "[A; B](x) = cat(A(x), B(x)): W' = [W_A; W_B], b' = [b_A; b_B]",
            self._apart(group),
            self.cost.of_map(geometry, first.read, first.axis) + self.cost.of_view(),
        )


@dataclass(frozen=True)
class Branch:
    """One of several parallel layers.

    Attributes:
        node: the layer's call.
        source: what it reads.
        map: what it computes.
        axis: the axis that carries its channels.
        read, result: shape and type of what it reads and of its value.
    """

    node: fx.Node
    source: fx.Node
    map: AffineMap
    axis: int
    read: TensorInfo
    result: TensorInfo

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return self.map.geometry.out_channels

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer, not a convolution."""
        return self.axis == len(self.result.shape) - 1

    @property
    def alike(self) -> tuple[object, ...]:
        """Equal for branches that can be joined."""
        return (
            self.source,
            replace(self.map.geometry, out_channels=1),
            self.axis,
            self.result.dtype,
            self.result.device,
        )

    def exact(self) -> AffineMap:
        """The map with its numbers as they were before they were rounded."""
        make = self.node.meta.get("float64")
        layer = None if make is None else make()
        if not isinstance(layer, Layer) or layer.module is None:
            return self.map
        weight = cast(torch.Tensor, layer.module.weight).reshape(self.map.geometry.weight_shape)
        return AffineMap.of(self.map.geometry, weight, cast("torch.Tensor | None", layer.module.bias))


def _loses_on(machine: Machine, group: list[Branch]) -> bool:
    """Whether a runtime that has no views of tensors would be slower with the layers joined.

    It copies the parts. Of a tensor with more than two axes, a linear layer is a product and a sum there, so that more
    launches are saved; a convolution is fused with the activation behind it, which a split in between prevents.
    """
    first, fewer = group[0], len(group) - 1
    launches = 2 if first.is_linear and len(first.result.shape) > 2 and first.map.bias is not None else 1
    moved = 2 * sum(branch.result.numel * branch.result.dtype.itemsize for branch in group)
    copies = machine.elementwise(moved)
    if not first.is_linear:
        copies += machine.elementwise(moved, len(group))
    return fewer * launches * machine.dense(0, 0) < copies


def _with_company(graph: fx.Graph, root: nn.Module, table: LiftTable) -> list[fx.Node]:
    """The layers that are not the only one to read their input; cheap, because most graphs have none."""
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        row = table.row(node, root)
        if row is not None and row.name in _JOINED and node.all_input_nodes:
            source = node.args[0] if node.args else node.kwargs.get("input")
            if isinstance(source, fx.Node):
                found.setdefault(source, []).append(node)
    return [node for nodes in found.values() if len(nodes) > 1 for node in nodes]


def _groups(candidates: list[fx.Node], lifted: LiftedGraph) -> Iterator[list[Branch]]:
    """The branches that can be joined, at least two at a time."""
    groups: dict[tuple[object, ...], list[Branch]] = {}
    for node in candidates:
        branch = _branch(node, lifted)
        if branch is not None:
            groups.setdefault(branch.alike, []).append(branch)
    yield from (group for group in groups.values() if len(group) > 1)


def _branch(node: fx.Node, lifted: LiftedGraph) -> Branch | None:
    found = lifted.lift(node)
    if not isinstance(found, Lifted) or len(found.operands) != 1 or found.axis is None or found.via:
        return None
    source = found.operands[0]
    read, result = info(source), info(node)
    if read is None or result is None or not node.users:
        return None
    (map_,) = found.maps(read.shape[found.axis])
    geometry = map_.geometry
    one_sided = any(low != high for low, high in geometry.padding)
    if geometry.groups > 1 or geometry.is_diagonal or geometry.is_transposed or one_sided:
        return None
    return Branch(node, source, map_, found.axis, read, result)


def shared_weights(graph: fx.Graph, root: nn.Module) -> set[fx.Node]:
    """The nodes that read a parameter which another node reads too."""
    read: dict[fx.Node, list[int]] = {}
    for node in graph.nodes:
        module = module_of(node, root)
        if module is not None:
            read[node] = [id(parameter) for parameter in module.parameters()]
        elif node.op == "get_attr":
            for user in node.users:
                read.setdefault(user, []).append(id(attribute(root, str(node.target))))
    uses = Counter(one for each in read.values() for one in set(each))
    return {node for node, each in read.items() if any(uses[one] > 1 for one in each)}


def _layer(group: list[Branch]) -> Layer | Inexact:
    """The joined layer, and how to make it from the exact weights."""
    made = _layer_of(group, [branch.map for branch in group], layer_for)
    if isinstance(made, Inexact) or group[0].result.dtype == torch.float64:
        return made

    def exact() -> Layer | Inexact:
        return _layer_of(group, [branch.exact() for branch in group], exact_layer_for)

    return replace(made, float64=exact)


def _layer_of(group: list[Branch], maps: list[AffineMap], make: Callable[..., Layer | Inexact]) -> Layer | Inexact:
    one = stacked(maps)
    if isinstance(one, Inexact):
        return one
    first = group[0]
    shape = list(first.result.shape)
    shape[first.axis] = one.geometry.out_channels
    like = replace(first.result, shape=tuple(shape))
    return make(one.linear_part, like, first.axis, None if one.bias is None else one.bias.evaluate())


def _replace(group: list[Branch], made: Layer, graph: fx.Graph, root: nn.Module) -> None:
    """Puts the joined layer in front of the first branch, and the parts of its value where the branches' were read."""
    first = group[0]
    shape = list(first.result.shape)
    shape[first.axis] = sum(branch.channels for branch in group)
    path = _name([_path(branch.node, root) for branch in group], root)
    with graph.inserting_before(first.node):
        whole = insert_layer(graph, root, first.source, made, path)
        parts = graph.call_function(torch.split_with_sizes, (whole, [branch.channels for branch in group], first.axis))
        slices = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(group))]
    for new in (whole, parts, *slices):
        stand_for(new, first.node)
    whole.meta["tensor"] = replace(first.result, shape=tuple(shape))
    parts.meta["aliases"] = (whole,)
    for branch, part in zip(group, slices, strict=True):
        part.meta["tensor"] = branch.result
        part.meta["aliases"] = (parts,)
        branch.node.replace_all_uses_with(part)


def _path(node: fx.Node, root: nn.Module) -> str:
    """The qualified name of a layer, or of what owns its weight."""
    if node.op == "call_module":
        return str(node.target)
    weights = [other for other in node.all_input_nodes if other.op == "get_attr"]
    return str(weights[0].target).rpartition(".")[0] or node.name if weights else node.name


def _name(paths: list[str], root: nn.Module) -> str:
    """`attn.q`, `attn.k`, `attn.v` -> `attn.q_k_v`; not the name of anything that there is."""
    split = [path.split(".") for path in paths]
    common = 0
    while all(len(parts) > common + 1 and parts[common] == split[0][common] for parts in split):
        common += 1
    own = ["_".join(parts[common:]) for parts in split]
    leaf = "_".join(own if len(own) <= _MOST_NAMES else [own[0], "to", own[-1]])
    owner: object = root
    for name in split[0][:common]:
        owner = getattr(owner, name, None)
    name, index = leaf, 0
    while hasattr(owner, name):
        index += 1
        name = f"{leaf}_joined{index if index > 1 else ''}"
    return ".".join([*split[0][:common], name])


def _named(node: fx.Node, root: nn.Module) -> str:
    return kind(node, root) if node.op in ("placeholder", "output") else f"{kind(node, root)} in {place(node)}"


_MOST_NAMES = 4
