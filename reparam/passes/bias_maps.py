"""A shift that meets zero padding, as one constant per position: what no layer can hold, a fixed image size can.

    A(x) + c  read with zeros around it:   B(A(x) + c) = (BA)(x) + B(c),   B(c) = a map of shape [1, channels, *sizes]

`B(c)` differs at the border from the interior, so it is no bias of a layer; but the linear parts merge. Everything
affine in front of a tensor is taken without its shifts, and the shifts come back as one added constant, which is the
value that the region has for zeros. It fixes the image size, so it is asked for, and checked in the fused model; and it
is done only where layers become fewer for it and the cost model says that it is faster. Where a region also pools,
flattens or resizes, it is done for what stands in front of that and behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch
from torch import fx, nn

from reparam.graph.constants import Constants
from reparam.graph.emit import Constant, insert_constant
from reparam.graph.lift import Carried, Concatenated, LiftTable, Sliced
from reparam.graph.lifted import LiftedGraph
from reparam.graph.nodes import described, info, place, stand_for
from reparam.graph.normal import eliminate_dead_code
from reparam.graph.sizes import read_elsewhere, spell_out
from reparam.graph.table import TABLE
from reparam.passes.base import Cost, Refusal, Rewrite
from reparam.passes.cost import CostModel
from reparam.passes.fixed_sizes import check_sizes
from reparam.passes.ledger import allowed
from reparam.passes.naming import Names
from reparam.passes.plan import Plan, Written, planned, write
from reparam.passes.region import Blocked, Region
from reparam.passes.search import Search, merging_pays


@dataclass(frozen=True)
class _Unshifted:
    """The layers of a part of a region without its shifts.

    Attributes:
        plans: the layers, in order.
        before, cost: what the region costs now, and what with them and the map.
    """

    plans: list[Plan]
    before: Cost
    cost: Cost


@dataclass(frozen=True)
class _Part:
    """Layers on images inside of a region.

    Attributes:
        end: the last of them.
        cone: all of them.
        ends: where regions end if this part is one by itself.
        rest: the ends of what else the whole region is then made of.
    """

    end: fx.Node
    cone: list[fx.Node]
    ends: set[fx.Node]
    rest: list[fx.Node]


@dataclass(frozen=True)
class BiasMaps:
    """The pass. `most` is how many bytes one map may have."""

    table: LiftTable = TABLE
    cost: CostModel = field(default_factory=CostModel)
    most: int = 4 << 20
    name = "bias maps"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        with _nothing_stays(graph):
            return self._run(graph, root), []

    def _run(self, graph: fx.Graph, root: nn.Module) -> list[Rewrite]:
        spell_out(graph)
        lifted = LiftedGraph(graph, root, self.table, Constants(graph, root))
        read_elsewhere(graph, lifted.sizes, lifted.is_affine)
        region = Region(graph, root, lifted, merging_pays(self.cost))
        search = Search(region, root, self.cost)
        unshifted = Region(graph, root, lifted, merging_pays(self.cost), shifts=False)
        without = Search(unshifted, root, self.cost)
        rewrites = []
        replaced: dict[fx.Node, fx.Node] = {}
        for end in sorted(search.ends, key=region.order.__getitem__):
            for part in _parts(end, region, set(search.ends)):
                found = self._better(part, end, search, without)
                rewrite = None if found is None else self._rewrite(found, part, root)
                if found is not None and rewrite is not None and allowed(rewrite, *part.cone):
                    rewrites.append(rewrite)
                    _check_sizes(part.cone, region, replaced, graph)
                    exact = _value_for_zeros(part.end, part.cone, region)
                    _write(part.end, part.cone, found.plans, exact, replaced, graph, root)
        eliminate_dead_code(graph)
        return rewrites

    def _better(self, part: _Part, whole: fx.Node, search: Search, without: Search) -> _Unshifted | None:
        """A part of the region that ends in `whole` without its shifts, if that is cheaper with the map added."""
        tensor = info(part.end)
        assert tensor is not None
        size = tensor.dtype.itemsize * prod(tensor.shape[1:])
        if len(part.cone) == 1 or len(tensor.shape) < 3 or size > self.most:
            return None
        before, linear = search.solved(whole).cost, without.solved(part.end, part.ends)
        rest = sum((search.solved(node, part.ends).cost for node in part.rest), Cost())
        moved = tensor.dtype.itemsize * 2 * tensor.numel + size
        after = linear.cost + rest + self.cost.priced(0, moved, 1)
        model = self.cost
        if not (model.key(after) < model.key(before) and model.is_lean(after, before)):
            return None
        if not model.no_slower(after, before):
            return None
        plans = _plans(linear.real, part.ends, without, self.cost)
        return None if plans is None else _Unshifted(plans, before, after)

    def _rewrite(self, found: _Unshifted, part: _Part, root: nn.Module) -> Rewrite:
        return Rewrite(
            self.name,
            place(part.end),
            tuple(described(node, root) for node in part.cone),
            " + ".join([*(layer.description for plan in found.plans for layer in plan.parts), "a constant map"]),
            "B(A(x) + c) = (BA)(x) + B(c), B(c) for this image size",
            found.before,
            found.cost,
        )


@contextmanager
def _nothing_stays(graph: fx.Graph) -> Iterator[None]:
    """Within it, shifts that the moves left in front of a padding are affine like any other."""
    held = {node: node.meta.pop("stays") for node in graph.nodes if "stays" in node.meta}
    yield
    for node, why in held.items():
        node.meta["stays"] = why


def _parts(end: fx.Node, region: Region, ends: set[fx.Node]) -> Iterator[_Part]:
    """The largest parts on images of the region that ends in `end`; mostly it is one itself."""
    whole = region.cone(end, ends)
    others = {node for node in whole if not _is_on_images(node, region)}
    covered: set[fx.Node] = set()
    for node in reversed(whole):
        if node in others or node in covered:
            continue
        cone = region.cone(node, ends | others)
        covered.update(cone)
        if _is_read_elsewhere(cone, node, region):
            continue
        operands = {operand for part in cone for operand in region.affine[part].operands}
        cut = (operands & others) | ({end} - {node})
        yield _Part(node, cone, ends | operands & others | {node}, sorted(cut, key=region.order.__getitem__))


def _is_on_images(node: fx.Node, region: Region) -> bool:
    """Whether a node is a map of images: channels in axis 1, behind a batch."""
    affine = region.affine[node]
    return not isinstance(affine.lift, Carried) and (affine.axis, affine.operand_axis) == (1, 1)


def _is_read_elsewhere(cone: list[fx.Node], end: fx.Node, region: Region) -> bool:
    inside = set(cone)
    return any(user not in inside for node in cone if node is not end for user in region.readers(node))


def _plans(real: frozenset[fx.Node], ends: set[fx.Node], without: Search, model: CostModel) -> list[Plan] | None:
    region, plans = without.region, []
    for node in sorted(real, key=region.order.__getitem__):
        form = region.form(region.cone(node, ends | real))
        plan = form if isinstance(form, Blocked) else planned(form, node, model)
        if not isinstance(plan, Plan):
            return None
        plans.append(plan)
    return plans


def _value_for_zeros(end: fx.Node, cone: list[fx.Node], region: Region) -> torch.Tensor:
    """What a region makes of zeros, `[1, channels, *sizes]` in float64: its shifts, and what became of them."""
    values: dict[fx.Node, torch.Tensor] = {}
    for node in cone:
        affine = region.affine[node]
        parts = []
        for operand in affine.operands:
            tensor = info(operand)
            assert tensor is not None
            zeros = torch.zeros(1, *tensor.shape[1:], dtype=torch.float64, device=tensor.device)
            parts.append(values.get(operand, zeros))
        if isinstance(affine.lift, Concatenated):
            values[node] = torch.cat(parts, 1)
        elif isinstance(affine.lift, Sliced):
            start, stop = affine.lift.window
            values[node] = parts[0][:, start:stop]
        else:
            made = [map_.apply(part) for map_, part in zip(affine.maps, parts, strict=True)]
            values[node] = torch.stack(made).sum(0)
    return values[end]


def _check_sizes(cone: list[fx.Node], region: Region, replaced: dict[fx.Node, fx.Node], graph: fx.Graph) -> None:
    """Makes the model stop where what the region reads has other sizes than in the example."""
    read = dict.fromkeys(operand for node in cone for operand in region.affine[node].operands)
    for source in (replaced.get(node, node) for node in read if node not in cone):
        check_sizes(source, graph)


def _write(
    end: fx.Node,
    cone: list[fx.Node],
    plans: list[Plan],
    exact: torch.Tensor,
    replaced: dict[fx.Node, fx.Node],
    graph: fx.Graph,
    root: nn.Module,
) -> None:
    """Writes the layers without shifts and adds the map to what `end` is now.

    Args:
        replaced: what stands for nodes that were written before; extended.
    """
    tensor = info(end)
    assert tensor is not None
    names = Names(graph, set(cone))
    written: Written = {}
    for plan in plans:
        own = names.for_cone(cone, root, len(plan.layers))
        replaced[plan.node] = write(plan, graph, root, replaced, own, written)
    value = exact.to(tensor.dtype).to(tensor.device).contiguous()
    with graph.inserting_before(end):
        constant = insert_constant(graph, root, end.name, value, lambda: Constant(exact))
        total = graph.call_function(torch.add, (replaced[end], constant))
    for node in (constant, total):
        stand_for(node, end)
    total.meta["tensor"] = tensor
    replaced[end] = total
    end.replace_all_uses_with(total)
