"""Which tensors of a region stay real: the cheapest cut.

Every consumer that is not affine forces its operand to be real. Between forced tensors the search compares, for each
real node and its cone: collapsing all of it; keeping it as it is; summing separately collapsed operands; and cutting a
chain in two where both halves are worth a layer. A tensor shared by several regions starts real and is substituted into
all of them if that is cheaper. On a tie the form nearer to the original wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx, nn

from reparam.algebra import AffineMap, Inexact
from reparam.graph.emit import unwritable
from reparam.graph.nodes import info
from reparam.passes.base import Cost
from reparam.passes.cost import CostModel
from reparam.passes.region import Blocked, Form, Region, Term

_MOST_CUTS = 8
_DEEPEST_CUT = 2
_LARGEST_CONE = 400


_NO_WEIGHTS = Inexact("it is no layer with weights, and would become a convolution only to save a cheap operation")


@dataclass(frozen=True)
class Solution:
    """The real nodes inside one cone, and what running them costs."""

    cost: Cost
    real: frozenset[fx.Node]


class Search:
    """Chooses the real nodes of a graph."""

    def __init__(self, region: Region, root: nn.Module, cost: CostModel) -> None:
        self._region = region
        self._root = root
        self._cost = cost
        self._native: dict[fx.Node, Cost] = {}
        self.blocked: dict[tuple[fx.Node, fx.Node], Inexact] = {}
        self.forced = {node for node in region.affine if any(user not in region for user in node.users)}
        self.real = self._choose()

    def cone(self, node: fx.Node) -> list[fx.Node]:
        """What a real node is made of."""
        return self._region.cone(node, self.real)

    def native(self, node: fx.Node) -> Cost:
        """Cost of a node as it stands."""
        if node not in self._native:
            affine = self._region.affine[node]
            self._native[node] = self._cost.of_node(node, self._root, affine.maps, affine.axis)
        return self._native[node]

    def price(self, node: fx.Node, form: Form) -> Cost:
        """Cost of computing a node from its form."""
        axis = self._region.affine[node].axis
        tensor = info(node)
        total = Cost()
        for term in form.terms:
            source = info(term.source)
            if source is not None and not term.map.is_identity:
                total += self._cost.of_map(term.map.geometry, source, axis)
        if tensor is not None:
            for _ in form.terms[1:]:
                total += self._cost.of_sum(tensor.numel, tensor.dtype.itemsize)
        return total

    def _choose(self) -> set[fx.Node]:
        nodes = sorted(self._region.affine, key=self._region.order.__getitem__)
        shared = self._shared(nodes)
        real = self.forced | shared
        for node in [node for node in nodes if node in real]:
            real |= self._solve(node, real).real
        for node in reversed([node for node in nodes if node in shared and node not in self.forced]):
            real = self._without(node, real)
        return real

    def _shared(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """Nodes that reach more than one real node: each other node belongs to the one it reaches."""
        owner: dict[fx.Node, fx.Node] = {}
        shared = set()
        for node in reversed(nodes):
            owners = set() if node in self.forced else {owner[user] for user in node.users}
            if len(owners) != 1:
                owner[node] = node
                shared.add(node)
            else:
                owner[node] = owners.pop()
        return shared - self.forced

    def _without(self, node: fx.Node, real: set[fx.Node]) -> set[fx.Node]:
        """The real nodes with a shared one substituted into all its consumers, if that is exact and cheaper."""
        consumers = self._consumers(node, real)
        if not consumers:
            return real
        before = sum((self._now(other, real) for other in consumers), self._now(node, real))
        fewer = real - {node}
        after, added = Cost(), set[fx.Node]()
        for other in consumers:
            solution = self._solve(other, fewer)
            if node in solution.real:
                return real
            after += solution.cost
            added |= solution.real
        model = self._cost
        cheaper = model.key(after) < model.key(before) and model.is_lean(after, before)
        return fewer | added if cheaper and model.no_slower(after, before) else real

    def _consumers(self, node: fx.Node, real: set[fx.Node]) -> list[fx.Node]:
        """The real nodes whose cones read this one."""
        found, pending, seen = [], list(node.users), set()
        while pending:
            user = pending.pop()
            if user in seen:
                continue
            seen.add(user)
            if user in real:
                found.append(user)
            else:
                pending.extend(user.users)
        return sorted(found, key=self._region.order.__getitem__)

    def _now(self, node: fx.Node, real: set[fx.Node]) -> Cost:
        cone = self._region.cone(node, real)
        form = None if len(cone) == 1 else self._region.form(cone, real)
        return self.native(node) if form is None or isinstance(form, Blocked) else self.price(node, form)

    def _solve(self, node: fx.Node, real: set[fx.Node] | frozenset[fx.Node], depth: int = 0) -> Solution:
        cone = self._region.cone(node, set(real))
        if len(cone) == 1:
            return Solution(self.native(node), frozenset({node}))
        as_it_is = Solution(sum((self.native(n) for n in cone), Cost()), frozenset(cone))
        if len(cone) > _LARGEST_CONE:
            return as_it_is
        form = self._region.form(cone, set(real))
        blocked = form if isinstance(form, Blocked) else self._unwritable(node, form, cone)
        if blocked is not None:
            self.blocked[(blocked.node, blocked.user)] = blocked.why
            return _best([as_it_is, self._cut(node, real, {blocked.node}, depth)], self._cost)
        assert isinstance(form, Form)
        collapsed = Solution(self.price(node, form), frozenset({node}))
        if len(form.terms) == 1 and self._no_dearer_than_one(collapsed.cost, cone):
            return collapsed
        options = [as_it_is]
        if len(form.terms) > 1:
            operands = self._operands_of_first_sum(node, cone)
            if operands:
                options.append(self._cut(node, real, operands, depth))
        if depth < _DEEPEST_CUT:
            options += [self._cut(node, real, {cut}, depth + 1) for cut in self._places_to_cut(node, cone)]
        return _best([*options, collapsed], self._cost)

    def _no_dearer_than_one(self, cost: Cost, cone: list[fx.Node]) -> bool:
        """Whether the whole cone costs no more than its largest operation does alone, so that nothing can beat it."""
        model, alone = self._cost, [self.native(node) for node in cone]
        slowest, largest = max(alone, key=lambda one: one.seconds), max(alone, key=lambda one: one.macs)
        if not (model.no_slower(cost, slowest) and model.is_lean(cost, largest)):
            return False
        return model.key(cost) <= max(map(model.key, alone))

    def _cut(self, node: fx.Node, real: set[fx.Node] | frozenset[fx.Node], cuts: set[fx.Node], depth: int) -> Solution:
        """The cone of `node` with `cuts` real: what is above them, and each of them in turn."""
        inner = frozenset(real) | cuts
        cost, found = Cost(), frozenset[fx.Node]()
        for part in [*sorted(cuts, key=self._region.order.__getitem__), node]:
            solution = self._solve(part, inner, depth)
            cost += solution.cost
            found |= solution.real
            inner |= solution.real
        return Solution(cost, found)

    def _unwritable(self, node: fx.Node, form: Form, cone: list[fx.Node]) -> Blocked | None:
        tensor = info(node)
        axis = self._region.affine[node].axis
        for term in form.terms:
            why = unwritable(term.map.geometry, len(tensor.shape) if tensor else 0, axis)
            if why is None and not term.map.geometry.is_diagonal and not any(map(self._has_weights, cone)):
                why = _NO_WEIGHTS
            if why is not None:
                operand = next(o for o in reversed(cone[:-1]) if o in self._region.affine[node].operands)
                return Blocked(operand, node, why)
        return None

    def _has_weights(self, node: fx.Node) -> bool:
        maps = self._region.affine[node].maps
        return any(map_.has_weights and not map_.geometry.is_diagonal for map_ in maps)

    def _operands_of_first_sum(self, node: fx.Node, cone: list[fx.Node]) -> set[fx.Node]:
        """The operands inside the cone of the sum that `node` is, or is a chain of single operations over."""
        inside = set(cone)
        while len(self._region.affine[node].operands) == 1:
            (node,) = self._region.affine[node].operands
            if node not in inside:
                return set()
        return {operand for operand in self._region.affine[node].operands if operand in inside}

    def _places_to_cut(self, node: fx.Node, cone: list[fx.Node]) -> list[fx.Node]:
        """Where a chain may be cut: in front of operations that mix channels or positions, largest tensors last."""
        places = []
        for other in cone[:-1]:
            users = [user for user in other.users if user in self._region]
            if any(not _only_scales(self._region.affine[user].maps) for user in users) or len(users) > 1:
                tensor = info(other)
                places.append((tensor.numel if tensor else 0, self._region.order[other], other))
        return [other for _, _, other in sorted(places)[:_MOST_CUTS]]


def _best(options: list[Solution], model: CostModel) -> Solution:
    """The best under the objective of those that are no slower than the first, the original; on a tie the nearest."""
    kept = [option for option in options if model.no_slower(option.cost, options[0].cost)]
    leanest = min((option.cost for option in kept), key=lambda cost: cost.macs)
    lean = [option for option in kept if model.is_lean(option.cost, leanest)]
    return min(lean, key=lambda option: (model.key(option.cost), -len(option.real)))


def _only_scales(maps: tuple[AffineMap, ...]) -> bool:
    return all(map_.geometry.is_diagonal for map_ in maps)


def merging_pays(cost: CostModel) -> Callable[[Term, Term, AffineMap, int], bool]:
    """Whether two terms of one source are cheaper as one map; for `Region`."""

    def pays(first: Term, second: Term, merged: AffineMap, axis: int) -> bool:
        source = info(first.source)
        if source is None:
            return True
        apart = Cost()
        for term in (first, second):
            if not term.map.is_identity:
                apart += cost.of_map(term.map.geometry, source, axis)
        one = cost.of_map(merged.geometry, source, axis)
        return cost.key(one) <= cost.key(apart + cost.of_sum(source.numel, source.dtype.itemsize))

    return pays
