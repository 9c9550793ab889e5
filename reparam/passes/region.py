"""Affine regions of a graph, and what a tensor is in terms of the tensors at their edges.

Every affine node is a sum of maps of its operands, a concatenation, a slice, or a step of a chain that maps commute
with. Given which affine nodes are *real* (their tensors exist when the model runs), each real node has one `Form`,
found by substituting the nodes in between. The *cone* of a node is what is substituted: the affine nodes between it and
the real ones that its form is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

from reparam import algebra
from reparam.algebra import AffineMap, Inexact
from reparam.graph.lift import Carried, Concatenated, Either, Lifted, Moved, One, Sliced
from reparam.graph.lifted import LiftedGraph
from reparam.graph.nodes import info, module_of
from reparam.passes.form import Form, Merge, Step, Term, added, carried, concatenated, either, mapped, sliced


@dataclass(frozen=True)
class Affine:
    """An affine node.

    Attributes:
        lift: what it is.
        operands: the tensors it is affine in.
        maps: one map for each operand; empty if it is no sum of maps.
        operand_axis, axis: the axis that carries channels, in the operands and in the result.
    """

    lift: One
    operands: tuple[fx.Node, ...]
    maps: tuple[AffineMap, ...]
    operand_axis: int
    axis: int


@dataclass(frozen=True)
class Blocked:
    """A substitution that would not be exact: operand `node` stays real for its consumer `user`."""

    node: fx.Node
    user: fx.Node
    why: Inexact


class Region:
    """All affine nodes of a graph.

    Args:
        graph, root: the graph and the module its targets refer to.
        lifted: what its nodes are.
        pays: whether two terms are cheaper as the one map given last.
        shifts: whether maps have their shifts, or are taken without.
    """

    def __init__(
        self, graph: fx.Graph, root: nn.Module, lifted: LiftedGraph, pays: Merge, *, shifts: bool = True
    ) -> None:
        self._pays = pays
        self._shifts = shifts
        self._forms: dict[tuple[fx.Node, ...], Form | Blocked] = {}
        self._root = root
        self._sizes = lifted.sizes
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.inexact: dict[fx.Node, Inexact] = {}
        options: dict[fx.Node, tuple[One, ...]] = {}
        for node in graph.nodes:
            found = lifted.lift(node)
            if isinstance(found, Inexact):
                self.inexact[node] = found
            elif found is not None:
                options[node] = found.options if isinstance(found, Either) else (found,)
        self._options = options
        self.affine: dict[fx.Node, Affine] = {}
        for node, (one, before, after) in _axes(options, self.order).items():
            made = self._affine(node, one, before, after)
            if made is not None:
                self.affine[node] = made
        self._ends: dict[fx.Node, list[fx.Node]] = {}
        for node, affine in self.affine.items():
            if isinstance(affine.lift, (Lifted, Sliced)) and affine.lift.via:
                self._ends.setdefault(affine.lift.via[0], []).append(node)

    def __contains__(self, node: object) -> bool:
        return node in self.affine

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Who reads the node's tensor; of a split that is a part of affine nodes, its parts."""
        found: list[fx.Node] = []
        for user in node.users:
            ends = self._ends.get(user, [])
            whole = ends and (len(ends) == len(user.users) or len(user.users) == 1)
            found.extend(end for end in (ends if whole else [user]) if end not in found)
        return found

    def cone(self, node: fx.Node, real: set[fx.Node]) -> list[fx.Node]:
        """The affine nodes that `node` is made of, down to real ones; in graph order, `node` last."""
        found = {node}
        pending = [node]
        while pending:
            for operand in self.affine[pending.pop()].operands:
                if operand in self.affine and operand not in real and operand not in found:
                    found.add(operand)
                    pending.append(operand)
        return sorted(found, key=self.order.__getitem__)

    def form(self, cone: Iterable[fx.Node]) -> Form | Blocked:
        """The form of the last node of `cone`, or the first substitution that would not be exact."""
        key = tuple(cone)
        if key not in self._forms:
            self._forms[key] = self._form(key)
        return self._forms[key]

    def _form(self, cone: Iterable[fx.Node]) -> Form | Blocked:
        forms: dict[fx.Node, Form] = {}
        node = None
        for node in cone:
            affine = self.affine[node]
            parts: list[Form] = []
            for index, operand in enumerate(affine.operands):
                inner = forms.get(operand)
                if inner is None:
                    inner = self._source(operand, affine.operand_axis)
                elif self.affine[operand].axis != affine.operand_axis:
                    return Blocked(operand, node, Inexact(_AXES, "give both layers one channel axis"))
                part = self._behind(inner, node, affine, index)
                if isinstance(part, Inexact):
                    return Blocked(self._inner(affine.operands, operand, forms), node, part)
                parts.append(part)
            whole = self._together(parts, affine)
            if isinstance(whole, Inexact):
                return Blocked(self._inner(affine.operands, affine.operands[0], forms), node, whole)
            forms[node] = whole
        assert node is not None
        return forms[node]

    def _inner(self, operands: Sequence[fx.Node], operand: fx.Node, forms: dict[fx.Node, Form]) -> fx.Node:
        """The operand to keep real: the one at fault, or one that was substituted at all."""
        return operand if operand in forms else next((other for other in operands if other in forms), operand)

    def _source(self, node: fx.Node, axis: int) -> Form:
        tensor = info(node)
        assert tensor is not None
        channels = tensor.shape[axis]
        return Form((Term(node, axis, channels, algebra.identity(channels, tensor.device)),), channels)

    def _behind(self, inner: Form, node: fx.Node, affine: Affine, index: int) -> Form | Inexact:
        """One operand's form behind its part of the operation."""
        if isinstance(affine.lift, Carried):
            return carried(inner, self._step(node, affine, affine.lift), self._cancelled)
        if isinstance(affine.lift, Sliced):
            return sliced(inner, affine.lift.window)
        if isinstance(affine.lift, Concatenated):
            return inner
        made = mapped(inner, affine.maps[index], self._pays)
        if affine.lift.carried is None:
            return made
        other = carried(inner, self._step(node, affine, affine.lift.carried), self._cancelled)
        return either(made, other) if isinstance(made, Form) else other

    def _together(self, parts: list[Form], affine: Affine) -> Form | Inexact:
        if isinstance(affine.lift, Concatenated):
            return concatenated(parts, self._pays)
        whole: Form | Inexact = parts[0]
        for part in parts[1:]:
            if isinstance(whole, Form):
                whole = added(whole, part, self._pays)
        return whole

    def _step(self, node: fx.Node, affine: Affine, lift: Carried) -> Step:
        module = module_of(node, self._root)
        name: object = node.target if module is None else (type(module), module.extra_repr())
        rest = (node.args[1:], {key: value for key, value in node.kwargs.items() if key != "input"})
        return Step(node, lift, affine.operand_axis, (node.op, name, str(rest)))

    def _cancelled(self, chain: Sequence[Step]) -> int:
        """How many last steps of a chain come to nothing: permutations undone, or a reshape back to what was."""
        for start in reversed(range(len(chain))):
            tail = chain[start:]
            kinds = {step.carried.kind for step in tail}
            if kinds == {"permutation"}:
                order = list(range(len(tail[0].carried.order)))
                for step in tail:
                    order = [order[axis] for axis in step.carried.order]
                if order == sorted(order):
                    return len(tail)
            elif kinds == {"reshape"}:
                if any(step.repeat != 1 for step in tail) or tail[-1].axis_after != tail[0].axis:
                    continue
                first, last = list(self._sizes.dims(tail[0].carried.operand)), list(tail[-1].carried.sizes)
                del first[tail[0].axis], last[tail[-1].axis_after]
                if first == last:
                    return len(tail)
            elif kinds == {"other"} or len(kinds) > 1:
                return 0
        return 0

    def _affine(self, node: fx.Node, one: One, before: int, after: int) -> Affine | None:
        operands = one.operands if isinstance(one, (Lifted, Concatenated)) else (one.operand,)
        shape = _shape(operands[0])
        if before >= len(shape):
            return None
        if isinstance(one, Carried):
            moved = one.moved[before]
            if moved is not None and moved.repeat > 1 and not self._fixes_size(node):
                return None
        maps = one.maps(shape[before]) if isinstance(one, Lifted) else ()
        return Affine(one, operands, maps if self._shifts else tuple(map_.linear_part for map_ in maps), before, after)

    def _fixes_size(self, node: fx.Node) -> bool:
        """Whether every reader has weights for each channel, so that their number is the same for every input."""
        return bool(node.users) and all(self._has_weights(user) for user in node.users)

    def _has_weights(self, node: fx.Node) -> bool:
        return any(
            map_.has_weights and not map_.geometry.is_diagonal
            for one in self._options.get(node, ())
            if isinstance(one, Lifted) and one.axis is not None
            for map_ in one.maps(_shape(one.operands[0])[one.axis])
        )


_AXES = "its channels lie in another axis than those of the next layer"


def _shape(node: fx.Node) -> tuple[int, ...]:
    tensor = info(node)
    return () if tensor is None else tensor.shape


def _axes(options: dict[fx.Node, tuple[One, ...]], order: dict[fx.Node, int]) -> dict[fx.Node, tuple[One, int, int]]:
    """What each node is, and its channel axes before and behind: its own, or those of its neighbours if any will do."""
    found: dict[fx.Node, tuple[One, int, int]] = {}
    for node, alternatives in options.items():
        one = alternatives[0]
        if len(alternatives) == 1 and not isinstance(one, Carried) and one.axis is not None:
            found[node] = (one, one.axis, one.axis)
    nodes = sorted(options, key=order.__getitem__)
    for sequence in (nodes, nodes[::-1], nodes, nodes[::-1]):
        for node in sequence:
            if node not in found:
                fit = _fitted(node, options[node], found)
                if fit is not None:
                    found[node] = fit
    for node in nodes:
        if node not in found:
            fit = _fitted(node, options[node], found) or _with_axis_before(options[node], 1, node)
            if fit is not None:
                found[node] = fit
    return found


def _fitted(
    node: fx.Node, alternatives: tuple[One, ...], found: dict[fx.Node, tuple[One, int, int]]
) -> tuple[One, int, int] | None:
    """What a node is beside neighbours whose axes are known."""
    operands = (
        alternatives[0].operands if isinstance(alternatives[0], (Lifted, Concatenated)) else (alternatives[0].operand,)
    )
    for operand in operands:
        if operand in found:
            fit = _with_axis_before(alternatives, found[operand][2], node)
            if fit is not None:
                return fit
    for user in node.users:
        if user in found:
            wanted = found[user][1]
            for one in alternatives:
                if not isinstance(one, Carried):
                    if one.axis in (None, wanted):
                        return one, wanted, wanted
                    continue
                for axis, moved in enumerate(one.moved):
                    if moved is not None and moved.axis == wanted:
                        return one, axis, wanted
    return None


def _with_axis_before(alternatives: tuple[One, ...], axis: int, node: fx.Node) -> tuple[One, int, int] | None:
    for one in alternatives:
        if isinstance(one, Carried):
            moved: Moved | None = one.moved[axis] if axis < len(one.moved) else None
            if moved is not None:
                return one, axis, moved.axis
        elif one.axis in (None, axis):
            own = axis if axis < max(len(_shape(node)), 1) else 0
            return one, own, own
    return None
