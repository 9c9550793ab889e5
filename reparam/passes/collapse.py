"""Collapses every affine region into the cheapest layers that compute it.

    v = sum_j A_j(u_j)  ->  one layer per source u_j that is not merely added

BatchNorm, scales, chains and parallel branches are all the same case: maps that compose (`then`) or add (`plus`).
Preconditions are those of the maps themselves (`reparam.algebra.borders`, `reparam.graph.table`). What stays real is
chosen by `reparam.passes.search`. Nothing is approximated; what cannot be exact stays, with a `Refusal`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx, nn

from reparam.algebra import Inexact
from reparam.graph.constants import Constants
from reparam.graph.lift import LiftTable
from reparam.graph.lifted import LiftedGraph
from reparam.graph.nodes import described, info, pinned, place
from reparam.graph.normal import eliminate_dead_code
from reparam.graph.sizes import read_elsewhere, spell_out
from reparam.graph.table import TABLE
from reparam.passes.base import Choice, Cost, Refusal, Rewrite
from reparam.passes.cost import CostModel
from reparam.passes.explain import Recorder, explained, not_written
from reparam.passes.form import Form
from reparam.passes.ledger import allowed
from reparam.passes.naming import Names, going
from reparam.passes.plan import Plan, Written, planned, write
from reparam.passes.reasons import reasons
from reparam.passes.region import Blocked, Region
from reparam.passes.search import Search, merging_pays
from reparam.passes.standing import Standing


@dataclass(frozen=True)
class Collapse:
    """The pass. `table` says what is affine, `cost` what is cheap; `explain` is called with the choices of each run."""

    table: LiftTable = TABLE
    cost: CostModel = field(default_factory=CostModel)
    explain: Callable[[list[Choice]], None] | None = None
    name = "collapse"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        spell_out(graph)
        lifted = LiftedGraph(graph, root, self.table, Constants(graph, root))
        read_elsewhere(graph, lifted.sizes, lifted.is_affine)
        region = Region(graph, root, lifted, merging_pays(self.cost))
        recorder = None if self.explain is None else Recorder()
        search = Search(region, root, self.cost, recorder)
        choices = [] if recorder is None else explained(search, region, root, self.cost, recorder)
        plans, failed = self._planned(search, region)
        refusals = reasons(Standing(region, search, root, self.cost), failed)
        rewrites: list[Rewrite] = []
        replaced: dict[fx.Node, fx.Node] = {}
        written: Written = {}
        names = Names(graph, going(region, search, plans))
        for node, plan in plans.items():
            cone = search.cone(node)
            rewrite = self._rewrite(plan, cone, root, search)
            if not allowed(rewrite, *cone):
                continue
            rewrites.append(rewrite)
            replaced[node] = write(plan, graph, root, replaced, names.for_cone(cone, root, len(plan.layers)), written)
            node.replace_all_uses_with(replaced[node])
        if self.explain is not None:
            self.explain([not_written(made, failed[node]) if node in failed else made for node, made in choices])
        eliminate_dead_code(graph)
        if rewrites:
            _relax_views(graph)
        return rewrites, refusals

    def _planned(self, search: Search, region: Region) -> tuple[dict[fx.Node, Plan], dict[fx.Node, Inexact]]:
        """What will be written, in graph order, and the nodes that no layers can be made for."""
        plans: dict[fx.Node, Plan] = {}
        failed: dict[fx.Node, Inexact] = {}
        for node in sorted(search.real, key=region.order.__getitem__):
            cone = search.cone(node)
            if len(cone) == 1:
                continue
            form = region.form(cone)
            plan = form.why if isinstance(form, Blocked) else planned(form, node, self.cost)
            if isinstance(plan, Inexact):
                failed[node] = plan
            elif plan.layers or plan.steps != len(cone) or not all(map(search.is_view, cone)):
                plans[node] = plan  # else views, and nothing between them: they are what they were
        return plans, failed

    def _rewrite(self, plan: Plan, cone: list[fx.Node], root: nn.Module, search: Search) -> Rewrite:
        return Rewrite(
            self.name,
            place(plan.node),
            tuple(described(other, root) for other in cone),
            " + ".join(part.description for part in plan.parts),
            _identity(plan.form, cone),
            sum((search.native(other) for other in cone), Cost()),
            search.price(plan.node, plan.form),
        )


def _relax_views(graph: fx.Graph) -> None:
    """A view of a tensor that lies differently in memory now would fail; a reshape is a view wherever one will do."""
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view" and pinned(node) is None and info(node) is not None:
            sizes = node.args[1:]
            if not any(isinstance(size, torch.dtype) for size in sizes) and "dtype" not in node.kwargs:
                node.target = "reshape"


def _identity(form: Form, cone: list[fx.Node]) -> str:
    sums = any(len({o for o in node.all_input_nodes if o in set(cone)}) > 1 for node in cone)
    if len(form.terms) > 1:
        return "sum_j A_j(u_j): each summand is one layer of its source"
    if sums:
        return "A(x) + B(x) = (A + B)(x), kernels aligned and added; B(A(x)) = (BA)(x)"
    return "B(A(x)) = (BA)(x): W' = W_B W_A, b' = W_B b_A + b_B"
