"""Affine regions of a graph, and what a tensor is in terms of the tensors at their edges.

Every affine node is a sum of maps of its operands. Given which affine nodes are *real* (their tensors exist when the
model runs), each real node `v` has one form, found by substituting the nodes in between:

    v = sum_j A_j(u_j),      u_j real, or not affine at all

The *cone* of `v` is what is substituted: the affine nodes between `v` and those `u_j`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from reparam.algebra import AffineMap, Inexact, plus, then
from reparam.graph.constants import Constants
from reparam.graph.lift import Lifted, LiftTable
from reparam.graph.nodes import info


@dataclass(frozen=True)
class Affine:
    """An affine node: its operands, one map for each, and the axis its channels lie in."""

    operands: tuple[fx.Node, ...]
    maps: tuple[AffineMap, ...]
    axis: int


@dataclass(frozen=True)
class Term:
    """One summand of a form: a map of a source."""

    source: fx.Node
    map: AffineMap


@dataclass(frozen=True)
class Form:
    """`sum_j A_j(u_j)`; at most one term per source unless two of them cannot be added."""

    terms: tuple[Term, ...]


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
        table: what is affine.
        constants: what is constant.
        pays: whether two terms of one source are cheaper as the one map given last.
    """

    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        table: LiftTable,
        constants: Constants,
        pays: Callable[[Term, Term, AffineMap, int], bool],
    ) -> None:
        self._pays = pays
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.inexact: dict[fx.Node, Inexact] = {}
        lifted: dict[fx.Node, Lifted] = {}
        for node in graph.nodes:
            found = table.lift(node, root, constants)
            if isinstance(found, Inexact):
                self.inexact[node] = found
            elif found is not None:
                lifted[node] = found
        axes = _axes(lifted, self.order)
        self.affine: dict[fx.Node, Affine] = {}
        for node, found in lifted.items():
            axis = axes[node]
            shape = _shape(found.operands[0])
            if axis < len(shape):
                self.affine[node] = Affine(found.operands, found.maps(shape[axis]), axis)

    def __contains__(self, node: object) -> bool:
        return node in self.affine

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

    def form(self, cone: Iterable[fx.Node], real: set[fx.Node]) -> Form | Blocked:
        """The form of the last node of `cone`, or the first substitution that would not be exact."""
        forms: dict[fx.Node, Form] = {}
        node = None
        for node in cone:
            affine = self.affine[node]
            terms: list[Term] = []
            for operand, map_ in zip(affine.operands, affine.maps, strict=True):
                inner = forms.get(operand)
                if inner is None:
                    terms = self._with_term(terms, Term(operand, map_), affine.axis)
                    continue
                if self.affine[operand].axis != affine.axis:
                    return Blocked(operand, node, Inexact(_AXES, "give both layers one channel axis"))
                for index, term in enumerate(inner.terms):
                    # Of a sum, only one summand may carry the next map's shift.
                    composed = _composed(term.map, map_ if index == 0 else map_.linear_part)
                    if isinstance(composed, Inexact):
                        return Blocked(operand, node, composed)
                    terms = self._with_term(terms, Term(term.source, composed), affine.axis)
            forms[node] = Form(tuple(terms))
        assert node is not None
        return forms[node]

    def _with_term(self, terms: list[Term], new: Term, axis: int) -> list[Term]:
        for index, term in enumerate(terms):
            if term.source is new.source:
                merged = _added(term.map, new.map)
                if isinstance(merged, AffineMap) and self._pays(term, new, merged, axis):
                    return [*terms[:index], Term(term.source, merged), *terms[index + 1 :]]
        return [*terms, new]


_AXES = "its channels lie in another axis than those of the next layer"


def _composed(f: AffineMap, g: AffineMap) -> AffineMap | Inexact:
    ranks = {f.geometry.rank, g.geometry.rank} - {0}
    if len(ranks) > 1:
        return Inexact("the two layers have different numbers of spatial axes")
    return then(f, g)


def _added(f: AffineMap, g: AffineMap) -> AffineMap | Inexact:
    if len({f.geometry.rank, g.geometry.rank} - {0}) > 1:
        return Inexact("the branches have different numbers of spatial axes")
    return plus(f, g)


def _shape(node: fx.Node) -> tuple[int, ...]:
    tensor = info(node)
    return () if tensor is None else tensor.shape


def _axes(lifted: dict[fx.Node, Lifted], order: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """The channel axis of each node: its own, or that of its neighbours if any axis will do."""
    axes = {node: found.axis for node, found in lifted.items() if found.axis is not None}
    nodes = sorted(lifted, key=order.__getitem__)
    for _ in range(2):
        for sequence in (nodes, reversed(nodes)):
            for node in sequence:
                if node not in axes:
                    neighbours = [*lifted[node].operands, *node.users]
                    known = [axes[other] for other in neighbours if other in axes]
                    if known:
                        axes[node] = known[0]
    return {node: axes.get(node, min(1, len(_shape(node)) - 1)) for node in nodes}


def tensors_of(form: Form) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of each term in float64, shared parts computed once."""
    memo: dict[object, torch.Tensor] = {}
    return [term.map.tensors(memo) for term in form.terms]  # type: ignore[arg-type]
