"""From the form of a tensor to the layers that compute it.

v = cat over row windows (sum of terms) + whole terms,    the shift going into one layer of each sum
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx, nn

from reparam.algebra import Inexact
from reparam.algebra.windows import Window
from reparam.graph.emit import Layer, insert_copy, insert_layer, layer_for
from reparam.graph.nodes import info
from reparam.passes.cost import CostModel
from reparam.passes.form import Form, Step, Term
from reparam.passes.placing import Placement, placement, with_channels

Written: TypeAlias = "dict[object, fx.Node]"


@dataclass(frozen=True)
class Part:
    """One summand: a term with its layer, or without one if its map is the identity and no shift goes with it."""

    placement: Placement
    layer: Layer | None

    @property
    def description(self) -> str:
        """What a person would call it."""
        return "x" if self.layer is None else self.layer.description


@dataclass(frozen=True)
class Plan:
    """What will stand for a node.

    Attributes:
        node: the node.
        form: its form.
        axis: the axis that carries its channels.
        parts: one for each term.
    """

    node: fx.Node
    form: Form
    axis: int
    parts: tuple[Part, ...]

    @property
    def steps(self) -> int:
        """How many steps its chains have."""
        terms = [part.placement.term for part in self.parts]
        return sum(len(term.before) + len(term.after) + (term.columns is not None) for term in terms)

    @property
    def layers(self) -> list[Layer]:
        """The new layers, in the order they are written in."""
        return [part.layer for part in self.parts if part.layer is not None]


def planned(form: Form, node: fx.Node, model: CostModel) -> Plan | Inexact:
    """The layers that compute `node` from its form, or why there are none."""
    bias = None if form.bias is None else form.bias.evaluate()
    parts: list[Part] = []
    axis = 1
    whole = sorted((term for term in form.terms if term.rows is None), key=_lightness)
    carries_all = bool(whole) and (not form.windows or not whole[0].map.is_identity)
    for window in (None, *form.windows):
        terms = whole if window is None else sorted((t for t in form.terms if t.rows == window), key=_lightness)
        shift = _share(bias, window, carries_all)
        for term in terms:
            made = _part(term, shift, model)
            if isinstance(made, Inexact):
                return made
            parts.append(made)
            axis = _axis_of(term)
            shift = None
    return Plan(node, form, axis, tuple(parts))


def _share(bias: torch.Tensor | None, window: Window | None, carries_all: bool) -> torch.Tensor | None:
    """The part of the shift that goes with the terms of a window."""
    if bias is None or carries_all != (window is None):
        return None
    share = bias if window is None else bias[window[0] : window[1]]
    return share if window is None or bool(share.any()) else None


def _part(term: Term, shift: torch.Tensor | None, model: CostModel) -> Part | Inexact:
    found = placement(term, model)
    if isinstance(found, Inexact):
        return found
    term = found.term
    if term.map.is_identity and shift is None:
        return Part(found, None)
    layer = layer_for(term.map, found.like, found.axis, shift)
    if isinstance(layer, Inexact):
        return layer
    plain = layer.module is None and layer.scale is None and layer.shift is None
    return Part(found, None if plain else layer)


def _lightness(term: Term) -> tuple[bool, bool]:
    return (term.map.is_identity, term.map.geometry.is_diagonal)


def _axis_of(term: Term) -> int:
    chain = (*term.before, *term.after)
    return chain[-1].axis_after if chain else term.axis


def write(
    plan: Plan,
    graph: fx.Graph,
    root: nn.Module,
    replaced: dict[fx.Node, fx.Node],
    names: Sequence[str],
    written: Written,
) -> fx.Node:
    """Writes the plan in front of its node and returns the node whose value stands for it now.

    Args:
        replaced: what stands for nodes that were written before.
        names: qualified names for the new layers.
        written: steps that stand in the graph already, by what they read and what they do; extended.
    """
    node, waiting = plan.node, list(names)
    anchor = node.prev
    with graph.inserting_before(node):
        values: dict[Window | None, list[fx.Node]] = {}
        for part in plan.parts:
            path = waiting.pop(0) if part.layer is not None else ""
            source = part.placement.term.source
            value = _written(part, graph, root, replaced.get(source, source), path, written)
            values.setdefault(part.placement.term.rows, []).append(value)
        sums = {window: _sum(graph, terms) for window, terms in values.items()}
        whole = [sums.pop(None)] if None in sums else []
        if sums:
            parts = [sums[window] for window in sorted(w for w in sums if w is not None)]
            whole.insert(0, parts[0] if len(parts) == 1 else graph.call_function(torch.cat, (parts, plan.axis)))
        total = _sum(graph, whole)
    new = node.prev
    while new is not anchor:
        new.meta.setdefault("tensor", info(node))
        new.meta.setdefault("module_path", node.meta.get("module_path", ""))
        new.meta.setdefault("source", node.meta.get("source"))
        new.meta.setdefault("stands_for", node.name)
        new = new.prev
    return total


def _sum(graph: fx.Graph, values: Sequence[fx.Node]) -> fx.Node:
    total = values[0]
    for value in values[1:]:
        tensor = info(total)
        total = graph.call_function(torch.add, (total, value))
        if tensor is not None:
            total.meta["tensor"] = tensor
    return total


def _written(part: Part, graph: fx.Graph, root: nn.Module, value: fx.Node, path: str, written: Written) -> fx.Node:
    term, at = part.placement.term, part.placement.at
    tensor = info(term.source)
    assert tensor is not None
    if term.columns is not None:
        start, stop = term.columns
        narrowed = graph.call_function(torch.narrow, (value, term.axis, start, stop - start))
        narrowed.meta["tensor"] = with_channels(tensor, term.axis, stop - start)
        narrowed.meta["aliases"] = (value,)
        value = narrowed
    chain = (*term.before, *term.after)
    for index in range(len(chain) + 1):
        if index == at and part.layer is not None:
            value = insert_layer(graph, root, value, part.layer, path)
            value.meta["tensor"] = part.placement.like
        if index < len(chain):
            key = (value, chain[index].key, chain[index].axis)
            if key not in written:
                written[key] = _copied(graph, value, chain[index])
            value = written[key]
    return value


def _copied(graph: fx.Graph, value: fx.Node, step: Step) -> fx.Node:
    source, result = info(value), info(step.node)
    assert source is not None
    assert result is not None
    like = with_channels(result, step.axis_after, source.shape[step.axis] * step.repeat)
    return insert_copy(graph, value, step.node, like, step.axis_after, step.carried.free)
