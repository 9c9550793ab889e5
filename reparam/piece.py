"""One captured graph, fused: what `fuse` makes of a whole model, or of a part of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import fx, nn

from reparam.capture.captured import Captured
from reparam.graph.build import built
from reparam.graph.count import count_operations
from reparam.graph.draws import refuse_random
from reparam.graph.emit import Constant
from reparam.graph.nodes import attribute, pinned
from reparam.graph.normal import normalise, restore_in_place
from reparam.passes import ASKING, Pass
from reparam.passes.base import Place, Refusal, Rewrite
from reparam.passes.ledger import allowed, current
from reparam.picture import side_by_side, taken
from reparam.report import GraphView, OperationCounts

Change = TypeVar("Change", Rewrite, Refusal)


@dataclass(frozen=True)
class Piece:
    """A fused graph, and what happened to it.

    Attributes:
        module: in eval mode; shares no tensor with the model.
        captured: the graph it was made from.
        rewrites, refusals: by the passes.
        before, after: operations.
        graph: both graphs, for the report.
    """

    module: fx.GraphModule
    captured: Captured
    rewrites: tuple[Rewrite, ...]
    refusals: tuple[Refusal, ...]
    before: OperationCounts
    after: OperationCounts
    graph: GraphView


def fused(captured: Captured, model: nn.Module, passes: Sequence[Pass]) -> Piece:
    """Runs the passes over a captured graph of `model` and builds the module. The graph is used up.

    Raises:
        UnfitModelError: the result depends on random numbers that the graph draws.
    """
    graph, root = captured.graph, captured.root
    with torch.no_grad():
        normalise(graph, root)
        _round_literals(graph, root)
        refuse_random(graph, root, model)
        before, first = OperationCounts(**count_operations(graph, root)), taken(graph, root)
        rewrites: list[Rewrite] = []
        refusals: list[Refusal] = []
        ledger = current()
        with ledger.watching(graph, root, captured.inputs):
            for step in passes:
                ledger.next_pass()
                if not isinstance(step, ASKING) and not allowed(_whole(step)):
                    continue
                made, left = step.run(graph, root)
                rewrites += made
                refusals += left
        after, last = OperationCounts(**count_operations(graph, root)), taken(graph, root)
        restore_in_place(graph, root)
        module = built(root, graph, model)
        _lay_out_as(module, model)
    view = side_by_side(first, last, rewrites)
    return Piece(module, captured, tuple(rewrites), tuple(refusals), before, after, view)


def _whole(step: Pass) -> Rewrite:
    """A pass that does not ask for each rewrite, as one."""
    return Rewrite(step.name, Place("", None), (), "", "all that this pass does")


def _lay_out_as(module: nn.Module, model: nn.Module) -> None:
    """Merged kernels in the memory layout of the model's: a conv that gets another one converts it in every call."""
    for rank, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        kernels = [p for p in model.parameters() if p.dim() == rank and not p.is_contiguous()]
        if kernels and all(kernel.is_contiguous(memory_format=layout) for kernel in kernels):
            for parameter in module.parameters():
                if parameter.dim() == rank:
                    parameter.data = parameter.data.contiguous(memory_format=layout)


def _round_literals(graph: fx.Graph, root: nn.Module) -> None:
    """Puts the exact values of literal tensors, rounded once, where those stand that the forward made step by step."""
    for node in graph.find_nodes(op="get_attr"):
        exact = node.meta.pop("exact", None)
        if exact is None or pinned(node) is not None:
            continue
        value = attribute(root, str(node.target))
        setattr(root, str(node.target), exact.to(value.dtype))
        node.meta["float64"] = partial(Constant, exact)


def under(path: str, changes: Sequence[Change]) -> tuple[Change, ...]:
    """Changes of a part with places as seen from the whole model."""
    return tuple(replace(one, place=one.place.under(path)) for one in changes)


def total(counts: Sequence[OperationCounts]) -> OperationCounts:
    """The sum of counts."""
    fields = OperationCounts.__dataclass_fields__
    return OperationCounts(**{name: sum(getattr(one, name) for one in counts) for name in fields})
