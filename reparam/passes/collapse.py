"""Collapses every affine region into the cheapest layers that compute it.

    v = sum_j A_j(u_j)  ->  one layer per source u_j that is not merely added

BatchNorm, scales, chains and parallel branches are all the same case: maps that compose (`then`) or add (`plus`).
Preconditions are those of the maps themselves (`reparam.algebra.borders`, `reparam.graph.table`). What stays real is
chosen by `reparam.passes.search`. Nothing is approximated; what cannot be exact stays, with a `Refusal`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from reparam.algebra import Inexact
from reparam.algebra.compose import added_bias
from reparam.graph.constants import Constants
from reparam.graph.emit import Layer, insert, layer_for
from reparam.graph.lift import LiftTable
from reparam.graph.nodes import described, info, module_of, place
from reparam.graph.normal import eliminate_dead_code
from reparam.graph.table import TABLE
from reparam.passes.base import Cost, Refusal, Rewrite
from reparam.passes.cost import CostModel
from reparam.passes.reasons import reasons
from reparam.passes.region import Blocked, Form, Region, Term
from reparam.passes.search import Search, merging_pays


@dataclass(frozen=True)
class Collapse:
    """The pass. `table` says what is affine, `cost` what is cheap."""

    table: LiftTable = TABLE
    cost: CostModel = field(default_factory=CostModel)
    name = "collapse"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        region = Region(graph, root, self.table, Constants(graph, root), merging_pays(self.cost))
        search = Search(region, root, self.cost)
        names = _Names(graph, _going(region, search))
        rewrites: list[Rewrite] = []
        failed: dict[fx.Node, Inexact] = {}
        replaced: dict[fx.Node, fx.Node] = {}
        for node in sorted(search.real, key=region.order.__getitem__):
            cone = search.cone(node)
            if len(cone) == 1:
                continue
            plan = _planned(node, cone, region, search)
            if isinstance(plan, Inexact):
                failed[node] = plan
                continue
            rewrites.append(self._rewrite(plan, root, search, region))
            parts = [(replaced.get(source, source), layer) for source, layer in plan.parts]
            paths = names.for_cone(cone, root, sum(layer is not None for _, layer in parts))
            named = [(source, layer, paths.pop(0) if layer is not None else "") for source, layer in parts]
            replaced[node] = insert(graph, root, node, named)
            node.replace_all_uses_with(replaced[node])
        refusals = reasons(region, search, root, failed)
        eliminate_dead_code(graph)
        return rewrites, refusals

    def _rewrite(self, plan: _Plan, root: nn.Module, search: Search, region: Region) -> Rewrite:
        node = plan.cone[-1]
        return Rewrite(
            self.name,
            place(node),
            tuple(described(other, root) for other in plan.cone),
            " + ".join("x" if layer is None else layer.description for _, layer in plan.parts),
            _identity(plan.form, plan.cone),
            sum((search.native(other) for other in plan.cone), Cost()),
            search.price(node, plan.form),
        )


@dataclass(frozen=True)
class _Plan:
    """What will stand for the last node of a cone."""

    cone: list[fx.Node]
    form: Form
    parts: list[tuple[fx.Node, Layer | None]]


def _planned(node: fx.Node, cone: list[fx.Node], region: Region, search: Search) -> _Plan | Inexact:
    form = region.form(cone, search.real)
    if isinstance(form, Blocked):
        return form.why
    parts = _parts(form, node, region.affine[node].axis)
    return parts if isinstance(parts, Inexact) else _Plan(cone, form, parts)


def _parts(form: Form, node: fx.Node, axis: int) -> list[tuple[fx.Node, Layer | None]] | Inexact:
    """Source and layer of each summand; all shifts go into the first real layer."""
    like = info(node)
    assert like is not None
    terms = sorted(form.terms, key=_lightness)
    deferred = None
    for term in terms:
        deferred = added_bias(deferred, term.map.bias)
    bias: torch.Tensor | None = None if deferred is None else deferred.evaluate()
    parts: list[tuple[fx.Node, Layer | None]] = []
    for term in terms:
        if term.map.is_identity and bias is None:
            parts.append((term.source, None))
            continue
        layer = layer_for(term.map, like, axis, bias)
        if isinstance(layer, Inexact):
            return layer
        bias = None
        plain = layer.module is None and layer.scale is None and layer.shift is None
        parts.append((term.source, None if plain else layer))
    return parts


def _lightness(term: Term) -> tuple[bool, bool]:
    return (term.map.is_identity, term.map.geometry.is_diagonal)


def _identity(form: Form, cone: list[fx.Node]) -> str:
    sums = any(len({o for o in node.all_input_nodes if o in set(cone)}) > 1 for node in cone)
    if len(form.terms) > 1:
        return "sum_j A_j(u_j): each summand is one layer of its source"
    if sums:
        return "A(x) + B(x) = (A + B)(x), kernels aligned and added; B(A(x)) = (BA)(x)"
    return "B(A(x)) = (BA)(x): W' = W_B W_A, b' = W_B b_A + b_B"


def _going(region: Region, search: Search) -> set[fx.Node]:
    """Every node that the rewrites replace."""
    staying = {node for node in search.real if len(search.cone(node)) == 1}
    return set(region.affine) - staying


class _Names:
    """Qualified names for new layers: that of the largest layer they replace, unless something else still uses it."""

    def __init__(self, graph: fx.Graph, going: set[fx.Node]) -> None:
        self._used: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            if node in going or (node.op == "get_attr" and all(user in going for user in node.users)):
                continue
            parts = str(node.target).split(".")
            self._used.update(".".join(parts[: i + 1]) for i in range(len(parts)))

    def for_cone(self, cone: list[fx.Node], root: nn.Module, count: int) -> list[str]:
        """`count` names, marked as used."""
        wanted = sorted((self._candidate(node, root) for node in cone), key=lambda c: (-c[0], c[1]))
        names: list[str] = []
        for _ in range(count):
            base = next((name for _, name in wanted if name and not self._used[name]), None)
            if base is None:
                stem = next((name for _, name in wanted if name), cone[-1].name)
                index = 0
                while self._used[base := f"{stem}_fused{index or ''}"]:
                    index += 1
            self._used[base] += 1
            names.append(base)
        return names

    @staticmethod
    def _candidate(node: fx.Node, root: nn.Module) -> tuple[int, str]:
        module = module_of(node, root)
        if module is not None:
            return sum(p.numel() for p in module.parameters(recurse=False)), str(node.target)
        sizes = [(t.numel, o) for o in node.all_input_nodes if o.op == "get_attr" and (t := info(o)) is not None]
        if not sizes:
            return 0, ""
        size, weight = max(sizes, key=lambda pair: pair[0])
        return size, str(weight.target).rpartition(".")[0]
