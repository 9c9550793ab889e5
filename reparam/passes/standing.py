"""What stands in a graph once its real tensors are chosen: layers, scales, and weightless operations between them.

Every real tensor is the sum of its form's terms. A tensor is a *layer* if one of them mixes channels or positions with
weights, a *scale* if it only scales or shifts channels, else *plain*: a view, a pooling, a padding, a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import fx, nn

from reparam.graph.formulas.layers import product
from reparam.graph.lift import Lifted
from reparam.graph.nodes import attribute, is_floating, module_of
from reparam.graph.sizes import shape_read, size_read
from reparam.graph.table import TABLE
from reparam.passes.base import Cost
from reparam.passes.cost import CostModel
from reparam.passes.form import Form, Term
from reparam.passes.placing import Placement, placement
from reparam.passes.region import Blocked, Region
from reparam.passes.search import Search

Sort = Literal["layer", "scale", "plain"]


@dataclass(frozen=True)
class Way:
    """A way through plain operations.

    Attributes:
        ends: the layers and scales it leads to.
        others: what else it leads to: tensors that no affine operation makes, or reads.
        crossed: the plain operations on it.
        borders: operations on it that move channels and positions in a way that no layer is known to commute with.
    """

    ends: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    crossed: tuple[fx.Node, ...]
    borders: tuple[fx.Node, ...]


class Standing:
    """The real tensors of a graph and who reads them, before anything is rewritten.

    Args:
        region, search: the affine operations, and which of their tensors are real.
        root: the module that the graph's targets refer to.
        cost: the prices that they were chosen by.
    """

    def __init__(self, region: Region, search: Search, root: nn.Module, cost: CostModel) -> None:
        self.region, self.search, self.root, self.cost = region, search, root, cost
        self._direct = {
            node: [user for user in region.readers(node) if not _reads_sizes(user)] for node in region.affine
        }
        self._forms: dict[fx.Node, Form | Blocked] = {}
        self.apart: set[fx.Node] = set()

    def keep_apart(self, nodes: Sequence[fx.Node]) -> None:
        """Makes everything that these nodes are made of real: their rewrites failed."""
        for node in nodes:
            self.apart.update(self.search.cone(node))

    @cached_property
    def real(self) -> set[fx.Node]:
        """The tensors that exist when the model runs; ask after `keep_apart`."""
        return self.search.real | self.apart

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """The real tensors that anybody reads, in graph order."""
        return sorted((node for node in self.real if self._direct[node]), key=self.region.order.__getitem__)

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The real tensors, and operations that are not affine, that read a real tensor."""
        found: list[fx.Node] = []
        pending, seen = list(reversed(self._direct[node])), set()
        while pending:
            user = pending.pop()
            if user in seen:
                continue
            seen.add(user)
            if user in self.region and user not in self.real:
                pending.extend(reversed(self._direct[user]))
            else:
                found.append(user)
        return found

    def sizes_are_read(self, node: fx.Node) -> bool:
        """Whether something reads the sizes of a tensor, for which it has to exist."""
        return any(map(_reads_sizes, self.region.readers(node)))

    def cone(self, node: fx.Node) -> list[fx.Node]:
        """What a real tensor is made of."""
        return self.region.cone(node, self.real)

    def terms(self, node: fx.Node) -> tuple[Term, ...]:
        """The terms of a real tensor."""
        if node not in self._forms:
            self._forms[node] = self.region.form(self.cone(node))
        form = self._forms[node]
        return tuple(map(self._written, form.terms)) if isinstance(form, Form) else ()

    def _written(self, term: Term) -> Term:
        """A term as it is written, if it could be written in two ways."""
        found = placement(term, self.cost) if term.otherwise is not None else term
        return found.term if isinstance(found, Placement) else term

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """What a real tensor is computed from."""
        found = [term.source for term in self.terms(node)] or list(self.region.affine[node].operands)
        return list(dict.fromkeys(found))

    def sort(self, node: fx.Node) -> Sort:
        """What a real tensor is."""
        cone = self.cone(node)
        if any(map(self.is_layer, cone)):
            return "layer"
        return "scale" if any(map(self.is_scale, cone)) else "plain"

    def is_layer(self, node: fx.Node) -> bool:
        """Whether a node mixes channels or positions with weights."""
        maps = self.region.affine[node].maps
        return any(map_.has_weights and not map_.geometry.is_diagonal for map_ in maps)

    def is_scale(self, node: fx.Node) -> bool:
        """Whether a node scales or shifts its operand by constants."""
        affine = self.region.affine[node]
        one = isinstance(affine.lift, Lifted) and len(affine.operands) == 1
        return one and all(map_.has_weights and map_.geometry.is_diagonal for map_ in affine.maps)

    def varies_by_channel(self, node: fx.Node) -> bool:
        """Whether a scale has a number for each channel."""
        lift = self.region.affine[node].lift
        return isinstance(lift, Lifted) and lift.axis is not None

    def main(self, node: fx.Node) -> fx.Node:
        """What a user would call a real tensor's layer: the largest layer it is made of, else its last scale."""
        cone = self.cone(node)
        layers = [other for other in cone if self.is_layer(other)]
        if layers:
            return max(layers, key=self._size)
        return next((other for other in reversed(cone) if self.is_scale(other)), node)

    def native(self, node: fx.Node) -> Cost:
        """What a real tensor costs as it is computed now."""
        form = self._forms.get(node) if self.terms(node) else None
        if len(self.cone(node)) == 1 or not isinstance(form, Form):
            return self.search.native(node)
        return self.search.price(node, form)

    def before(self, node: fx.Node, *, borders: bool = True) -> Way:
        """The way from a real tensor back to the layers and scales in front of it; through borders or up to them."""
        return self._way(self.sources(node), backwards=True, through=borders)

    def before_term(self, term: Term) -> Way:
        """The way back from the source of a term."""
        return self._way([term.source], backwards=True, through=False)

    def around(self, node: fx.Node) -> list[fx.Node]:
        """The layers and scales beside an operation that is not affine; also such whose own call is not affine."""
        sources = [other for other in node.all_input_nodes if not _reads_sizes(other)]
        ways = self._way(sources, backwards=True), self._way(list(node.users), backwards=False)
        made = [other for other in self.nodes if node in self.sources(other) and self.sort(other) != "plain"]
        calls = [other for way in ways for other in way.others if self.is_weighted_call(other)]
        return [*ways[0].ends, *ways[1].ends, *made, *calls]

    def is_weighted_call(self, node: fx.Node) -> bool:
        """Whether it is a layer whose call is not affine."""
        row = TABLE.row(node, self.root)
        return node in self.region.inexact and row is not None and bool(row.modules) and "weight" in row.signature

    def scales_of(self, node: fx.Node, source: fx.Node) -> list[fx.Node]:
        """The last scale that a real tensor is made of and that a source goes through; none if there is none."""
        reached, found = {source}, []
        for part in self.cone(node):
            if not reached.isdisjoint(self.region.affine[part].operands):
                reached.add(part)
                found += [part] if self.is_scale(part) else []
        return found[-1:]

    def behind(self, node: fx.Node) -> Way:
        """The way from a real tensor on to the layers and scales that read it."""
        return self._way(self.readers(node), backwards=False)

    def _way(self, start: Sequence[fx.Node], *, backwards: bool, through: bool = True) -> Way:
        ends: list[fx.Node] = []
        others: list[fx.Node] = []
        crossed: list[fx.Node] = []
        borders: list[fx.Node] = []
        pending, seen = list(reversed(start)), set[fx.Node]()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node not in self.real:
                if through and self._is_border(node):
                    borders.append(node)
                    beside = node.all_input_nodes if backwards else list(node.users)
                    pending.extend(other for other in reversed(beside) if not _reads_sizes(other))
                else:
                    others.append(node)
            elif self.joins(node) and len(self.readers(node)) > 1:
                others.append(node)  # a sum that more than one reads, as a residual stream: it has to exist
            elif self.sort(node) != "plain":
                ends.append(node)
            else:
                crossed.append(node)
                pending.extend(reversed(self.sources(node) if backwards else self.readers(node)))
        return Way(tuple(ends), tuple(others), tuple(crossed), tuple(borders))

    def _is_border(self, node: fx.Node) -> bool:
        """Whether it is an operation on views or parts, in a call that is not affine; a residual stream is none."""
        row = TABLE.row(node, self.root)
        is_of_views = row is not None and row.raw and row.lift is not product
        return is_of_views and node not in self.region and is_floating(node)

    def joins(self, node: fx.Node) -> bool:
        """Whether a real tensor is computed from several."""
        return len(self.sources(node)) > 1

    def _size(self, node: fx.Node) -> int:
        module = module_of(node, self.root)
        if module is not None:
            return sum(parameter.numel() for parameter in module.parameters(recurse=False))
        held = [attribute(self.root, str(o.target)) for o in node.all_input_nodes if o.op == "get_attr"]
        return sum(value.numel() for value in held if hasattr(value, "numel"))


def _reads_sizes(user: fx.Node) -> bool:
    return "number" in user.meta or size_read(user) is not None or shape_read(user) is not None
