"""Which tensors of a region stay real: the cheapest cut.

Every consumer that is not affine forces its operand to be real. Between forced tensors the search compares, for each
real node and its cone: collapsing all of it; keeping it as it is; summing separately collapsed operands; and cutting a
chain in two where both halves are worth a layer. A tensor shared by several regions starts real and is substituted into
all of them if that is cheaper. On a tie the form nearer to the original wins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import fx, nn

from reparam.algebra import AffineMap, Inexact
from reparam.graph.lift import Concatenated, Lifted, is_view
from reparam.graph.nodes import info
from reparam.passes.base import Cost
from reparam.passes.cost import CostModel
from reparam.passes.form import Form, Merge, Term
from reparam.passes.placing import Placement, placement, priced, repeated_steps
from reparam.passes.region import Blocked, Region

if TYPE_CHECKING:
    from reparam.passes.explain import Recorder

_MOST_CUTS = 8
_DEEPEST_CUT = 2
_LARGEST_CONE = 400


_NO_WEIGHTS = Inexact("it is no layer with weights, and would become a convolution only to save a cheap operation")


@dataclass(frozen=True)
class Solution:
    """The real nodes inside one cone, what running them costs, and the solutions of its parts if it was cut."""

    cost: Cost
    real: frozenset[fx.Node]
    parts: tuple[tuple[fx.Node, Solution], ...] = ()


class Search:
    """Chooses the real nodes of a graph. A `recorder` is told what was compared."""

    def __init__(self, region: Region, root: nn.Module, cost: CostModel, recorder: Recorder | None = None) -> None:
        self._recorder = recorder
        self.region = region
        self._root = root
        self._cost = cost
        self._native: dict[fx.Node, Cost] = {}
        self.blocked: dict[tuple[fx.Node, fx.Node], Inexact] = {}
        self.forced = {node for node in region.affine if any(user not in region for user in region.readers(node))}
        self.real = self._choose()

    def cone(self, node: fx.Node) -> list[fx.Node]:
        """What a real node is made of."""
        return self.region.cone(node, self.real)

    def native(self, node: fx.Node) -> Cost:
        """Cost of a node as it stands."""
        if node not in self._native:
            affine = self.region.affine[node]
            self._native[node] = (
                self._cost.of_view()
                if self.is_view(node)
                else self._cost.of_node(node, self._root, affine.maps, affine.axis)
            )
        return self._native[node]

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node only looks at its operand in another way."""
        return is_view(self.region.affine[node].lift)

    def price(self, node: fx.Node, form: Form) -> Cost:
        """Cost of computing a node from its form."""
        cost = priced(form, node, self._cost)
        assert isinstance(cost, Cost), cost
        return cost

    def _choose(self) -> set[fx.Node]:
        nodes = sorted(self.region.affine, key=self.region.order.__getitem__)
        shared = self._shared(nodes)
        ends = self.forced | shared
        solutions: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in nodes:
            if node in ends:
                solutions[node] = self._solve(node, ends).real
        for node in reversed(nodes):
            if node in solutions and node not in self.forced:
                self._try_without(node, solutions)
        self.ends = frozenset(solutions)
        return self._consistent(set().union(*solutions.values()))

    def _consistent(self, real: set[fx.Node]) -> set[fx.Node]:
        """Makes real what a chosen tensor turns out to need, beside what was chosen for others after it."""
        checked: set[tuple[fx.Node, ...]] = set()
        pending = True
        while pending:
            pending = False
            for node in sorted(real, key=self.region.order.__getitem__):
                cone = tuple(self.region.cone(node, real))
                if len(cone) == 1 or cone in checked:
                    continue
                checked.add(cone)
                form = self.region.form(cone)
                if isinstance(form, Blocked) or self._unwritable(node, form, list(cone)) is not None:
                    real |= self._solve(node, real).real
                    pending = True
        return real

    def _shared(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """Nodes that reach more than one real node: each other node belongs to the one it reaches."""
        owner: dict[fx.Node, fx.Node] = {}
        shared = set()
        for node in reversed(nodes):
            owners = set() if node in self.forced else {owner[user] for user in self.region.readers(node)}
            if len(owners) != 1:
                owner[node] = node
                shared.add(node)
            else:
                owner[node] = owners.pop()
        return shared - self.forced

    def _try_without(self, node: fx.Node, solutions: dict[fx.Node, frozenset[fx.Node]]) -> None:
        """Substitutes a shared node into all its consumers, if that is exact and cheaper.

        Args:
            solutions: the real nodes that compute each end, the shared ones among them; changed in place.
        """
        ends = set(solutions)
        fewer = ends - {node}
        cones = {end: set(self.region.cone(end, fewer)) for end in self._consumers(node, ends)}
        added: set[fx.Node] = set()
        found: dict[fx.Node, frozenset[fx.Node]] = {}
        for end in cones:
            found[end] = self._solve(end, fewer | added).real
            if node in found[end]:
                self._tried(node, cones, solutions, needed_by=end)
                return
            added |= found[end]
        if not found:
            return
        area = set().union(*cones.values())
        before = area & set().union(*solutions.values())
        outside = set().union(*solutions.values()) - area
        old, new = self.total(before, outside), self.total(added, outside)
        model = self._cost
        better = model.key(new) < model.key(old)
        tie = self.is_view(node) and model.key(new) == model.key(old)  # a view hides what is before and behind it
        merged = (better or tie) and model.is_lean(new, old) and model.no_slower(new, old)
        self._tried(node, cones, solutions, new, merged)
        if not merged:
            return
        del solutions[node]
        solutions.update(found)
        for other in added - set(found):
            if sum(other in cone for cone in cones.values()) > 1:
                solutions[other] = frozenset(added & self._region_of(other, fewer))

    def _tried(
        self,
        node: fx.Node,
        cones: dict[fx.Node, set[fx.Node]],
        solutions: dict[fx.Node, frozenset[fx.Node]],
        new: Cost | None = None,
        merged: bool = False,
        needed_by: fx.Node | None = None,
    ) -> None:
        """Records how it would be, or is, without a shared node."""
        if self._recorder is not None:
            area, real = set().union(*cones.values()), set().union(*solutions.values())
            self._recorder.tried(node, tuple(cones), self.total(area & real, real - area), new, merged, needed_by)

    def solved(self, end: fx.Node, ends: set[fx.Node] | frozenset[fx.Node] | None = None) -> Solution:
        """The solution of one end between others, or between those that were chosen; found and recorded once more."""
        return self._solve(end, self.ends if ends is None else ends)

    def _region_of(self, node: fx.Node, ends: set[fx.Node]) -> set[fx.Node]:
        return set(self.region.cone(node, ends))

    def total(self, real: set[fx.Node], outside: set[fx.Node]) -> Cost:
        """What some real nodes cost, given the real nodes around them."""
        total, forms = Cost(), []
        for node in real:
            cone = self.region.cone(node, real | outside)
            form = None if len(cone) == 1 else self.region.form(cone)
            if isinstance(form, Form):
                forms.append(form)
                total += self.price(node, form)
            else:
                total += self.native(node)
        return total - repeated_steps(forms, self._cost)

    def _consumers(self, node: fx.Node, ends: set[fx.Node]) -> list[fx.Node]:
        """The ends whose cones read this one."""
        found, pending, seen = [], self.region.readers(node), set()
        while pending:
            user = pending.pop()
            if user in seen:
                continue
            seen.add(user)
            if user in ends:
                found.append(user)
            else:
                pending.extend(self.region.readers(user))
        return sorted(found, key=self.region.order.__getitem__)

    def _solve(self, node: fx.Node, real: set[fx.Node] | frozenset[fx.Node], depth: int = 0) -> Solution:
        cone = self.region.cone(node, set(real))
        if len(cone) == 1:
            return Solution(self.native(node), frozenset({node}))
        as_it_is = Solution(sum((self.native(n) for n in cone), Cost()), frozenset(cone))
        if len(cone) > _LARGEST_CONE:
            return self._decided(node, real, None, [as_it_is], as_it_is)
        form = self.region.form(cone)
        blocked = form if isinstance(form, Blocked) else self._unwritable(node, form, cone)
        if blocked is not None:
            self.blocked[(blocked.node, blocked.user)] = blocked.why
            cuts = dict.fromkeys((blocked.node, self._viewed(blocked.node, cone)))
            options = [as_it_is, *(self._cut(node, real, {cut}, depth) for cut in cuts)]
            return self._decided(node, real, blocked, options)
        assert isinstance(form, Form)
        collapsed = Solution(self.price(node, form), frozenset({node}))
        if len(form.terms) == 1 and self._no_dearer_than_one(collapsed.cost, cone, form):
            return self._decided(node, real, form, [as_it_is, collapsed], collapsed)
        options = [as_it_is]
        if len(form.terms) > 1:
            operands = self._operands_of_first_sum(node, cone)
            if operands:
                options.append(self._cut(node, real, operands, depth))
        if depth < _DEEPEST_CUT:
            options += [self._cut(node, real, {cut}, depth + 1) for cut in self._places_to_cut(node, cone)]
        return self._decided(node, real, form, [*options, collapsed])

    def _decided(
        self,
        node: fx.Node,
        real: set[fx.Node] | frozenset[fx.Node],
        form: Form | Blocked | None,
        options: list[Solution],
        certain: Solution | None = None,
    ) -> Solution:
        """The best of the options, the first of which is the original, unless it is certain before comparing."""
        chosen = _best(options, self._cost, self.is_view) if certain is None else certain
        if self._recorder is not None:
            self._recorder.decided(node, real, form, options, chosen, certain is not None)
        return chosen

    def _viewed(self, node: fx.Node, cone: list[fx.Node]) -> fx.Node:
        """What a chain of views looks at; cut there, other views of it are spared too."""
        while self.is_view(node) and self.region.affine[node].operands[0] in cone:
            node = self.region.affine[node].operands[0]
        return node

    def _no_dearer_than_one(self, cost: Cost, cone: list[fx.Node], form: Form) -> bool:
        """Whether the whole cone costs no more than its largest operation does alone, so that nothing can beat it.

        A cut where the tensor is narrower than both ends could, as in a low-rank pair.
        """
        ends = form.terms[0].map.geometry
        if any(self._channels(node) < min(ends.in_channels, ends.out_channels) for node in cone):
            return False
        model, alone = self._cost, [self.native(node) for node in cone]
        slowest, largest = max(alone, key=lambda one: one.seconds), max(alone, key=lambda one: one.macs)
        if not (model.no_slower(cost, slowest) and model.is_lean(cost, largest)):
            return False
        return model.key(cost) <= max(map(model.key, alone))

    def _channels(self, node: fx.Node) -> int:
        tensor = info(node)
        assert tensor is not None
        return tensor.shape[self.region.affine[node].axis]

    def _cut(self, node: fx.Node, real: set[fx.Node] | frozenset[fx.Node], cuts: set[fx.Node], depth: int) -> Solution:
        """The cone of `node` with `cuts` real: what is above them, and each of them in turn."""
        inner = frozenset(real) | cuts
        cost, found = Cost(), frozenset[fx.Node]()
        parts: list[tuple[fx.Node, Solution]] = []
        for part in [*sorted(cuts, key=self.region.order.__getitem__), node]:
            solution = self._solve(part, inner, depth)
            cost += solution.cost
            found |= solution.real
            inner |= solution.real
            parts.append((part, solution))
        return Solution(cost, found, tuple(parts))

    def _unwritable(self, node: fx.Node, form: Form, cone: list[fx.Node]) -> Blocked | None:
        cost = priced(form, node, self._cost)
        why = cost if isinstance(cost, Inexact) else None
        if why is None and not self._may_become_a_layer(cone):
            why = None if all(map(self._only_scales_as_placed, form.terms)) else _NO_WEIGHTS
        if why is None:
            return None
        operands = self.region.affine[node].operands
        return Blocked(next(other for other in reversed(cone[:-1]) if other in operands), node, why)

    def _only_scales_as_placed(self, term: Term) -> bool:
        found = placement(term, self._cost)
        return isinstance(found, Placement) and found.term.map.geometry.is_diagonal

    def _has_weights(self, node: fx.Node) -> bool:
        maps = self.region.affine[node].maps
        return any(map_.has_weights and not map_.geometry.is_diagonal for map_ in maps)

    def _scales_channels(self, node: fx.Node) -> bool:
        """Whether it has a weight for each channel, which fixes their number."""
        affine = self.region.affine[node]
        varies = isinstance(affine.lift, Lifted) and affine.lift.axis is not None
        return varies and any(map_.has_weights for map_ in affine.maps)

    def _may_become_a_layer(self, cone: list[fx.Node]) -> bool:
        """Whether there is a layer among the nodes, or a sum of operations with a weight for each channel."""
        sums = any(len(self.region.affine[node].operands) > 1 for node in cone)
        return any(map(self._has_weights, cone)) or (sums and any(map(self._scales_channels, cone)))

    def _operands_of_first_sum(self, node: fx.Node, cone: list[fx.Node]) -> set[fx.Node]:
        """The operands inside the cone of the sum that `node` is, or is a chain of single operations over."""
        inside = set(cone)
        while len(self.region.affine[node].operands) == 1:
            (node,) = self.region.affine[node].operands
            if node not in inside:
                return set()
        return {operand for operand in self.region.affine[node].operands if operand in inside}

    def _places_to_cut(self, node: fx.Node, cone: list[fx.Node]) -> list[fx.Node]:
        """Where a chain may be cut: in front of operations that mix channels or positions, largest tensors last."""
        places: list[fx.Node] = []
        for other in cone[:-1]:
            users = [user for user in self.region.readers(other) if user in self.region]
            joins = isinstance(self.region.affine[other].lift, Concatenated)
            mixed = any(not _only_scales(self.region.affine[user].maps) for user in users)
            if mixed or joins or len(users) > 1:
                places += [other, *self._before_scales(other, cone)]
        sizes = {place: tensor.numel if (tensor := info(place)) else 0 for place in places}
        return sorted(sizes, key=lambda place: (sizes[place], self.region.order[place]))[:_MOST_CUTS]

    def _before_scales(self, node: fx.Node, cone: list[fx.Node]) -> list[fx.Node]:
        """What scales that end in `node` read, if it is a sum: cut there, they go into one layer, not each term."""
        start, inside = node, set(cone)
        while self._scales_channels(node) and _only_scales(self.region.affine[node].maps):
            node = self.region.affine[node].operands[0]
            if node not in inside:
                return []
        return [node] if node is not start and self._operands_of_first_sum(node, cone) else []


def _best(
    options: list[Solution], model: CostModel, is_view: Callable[[fx.Node], bool] = lambda node: False
) -> Solution:
    """The best under the objective of those that are no slower than the first, the original.

    On a tie the one nearer to the original, and with fewer views, which hide what is before and behind them.
    """

    def rank(option: Solution) -> tuple[float, ...]:
        views = sum(map(is_view, option.real))
        return (*model.key(option.cost), views - len(option.real), views)

    kept = [option for option in options if model.no_slower(option.cost, options[0].cost)]
    leanest = min((option.cost for option in kept), key=lambda cost: cost.macs)
    return min((option for option in kept if model.is_lean(option.cost, leanest)), key=rank)


def _only_scales(maps: tuple[AffineMap, ...]) -> bool:
    return all(map_.geometry.is_diagonal for map_ in maps)


def merging_pays(model: CostModel) -> Merge:
    """Whether two terms are cheaper as one; for `Region`."""

    def pays(first: Term, second: Term, merged: Term) -> bool:
        apart, one = [placement(first, model), placement(second, model)], placement(merged, model)
        if isinstance(one, Inexact):
            return False
        total = Cost()
        for found in apart:
            if isinstance(found, Inexact):
                return True
            total += found.cost
        if not model.is_lean(one.cost, total):
            return False
        return model.key(one.cost) <= model.key(total + model.of_sum(one.like.numel, one.like.dtype.itemsize))

    return pays
