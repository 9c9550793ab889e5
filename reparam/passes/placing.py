"""Where the layer of a term stands, and what the term costs.

A map that acts on each position alone commutes with the chain in front of it. It stands where it is cheapest: behind an
average over all positions, say, and not in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from reparam.algebra import Inexact
from reparam.capture.captured import TensorInfo
from reparam.graph.emit import unwritable
from reparam.graph.nodes import info
from reparam.passes.base import Cost
from reparam.passes.cost import CostModel
from reparam.passes.form import Form, Step, Term


@dataclass(frozen=True)
class Placement:
    """A term whose layer has its place.

    Attributes:
        term: the term.
        at: how many steps of `term.before` run in front of the layer.
        like: what the layer returns, for the example inputs.
        axis: the axis that carries channels there.
        cost: of all of it.
    """

    term: Term
    at: int
    like: TensorInfo
    axis: int
    cost: Cost


def placement(term: Term, model: CostModel) -> Placement | Inexact:
    """The cheapest place for the term's layer, or why it is no layer of `torch.nn` anywhere."""
    if model not in term.memo:
        term.memo[model] = _placement(term, model)
    found: Placement | Inexact = term.memo[model]
    return found


def _placement(term: Term, model: CostModel) -> Placement | Inexact:
    options = [
        _placed(one, at, model)
        for one in (term, term.otherwise)
        if one is not None
        for at in sorted(_places(one), key=lambda at, one=one: _distance(one, at))  # type: ignore[misc]
    ]
    found = [option for option in options if isinstance(option, Placement)]
    return model.best(found, lambda option: option.cost) if found else options[0]


def _distance(term: Term, at: int) -> tuple[bool, int]:
    """How far a place is from where the layers stood: whether the layer would be of another kind, then the steps."""
    return _is_last(term, at) != _is_last(term, term.stood), abs(at - term.stood)


def _is_last(term: Term, at: int) -> bool:
    """Whether the channels lie in the last axis behind some steps, so that the layer is a `Linear`."""
    axis = term.before[at - 1].axis_after if at else term.axis
    return axis == len(tensor_before(term, at).shape) - 1


def priced(form: Form, node: fx.Node, model: CostModel) -> Cost | Inexact:
    """What it costs to compute `node` from its form, or why there is no layer for one of its terms."""
    tensor = info(node)
    assert tensor is not None
    total = Cost()
    for term in form.terms:
        found = placement(term, model)
        if isinstance(found, Inexact):
            return found
        total += found.cost
    size = tensor.dtype.itemsize
    windows = form.windows
    whole = sum(term.rows is None for term in form.terms) + bool(windows)
    for _ in range(whole - 1):
        total += model.of_sum(tensor.numel, size)
    for start, stop in windows:
        inside = sum(term.rows == (start, stop) for term in form.terms)
        for _ in range(inside - 1):
            total += model.of_sum(tensor.numel * (stop - start) // form.channels, size)
    if windows:
        total += model.of_copy(tensor.numel, size)
    if form.bias is not None and all(term.map.is_identity for term in form.terms):
        total += model.of_sum(tensor.numel, size)
    return total


def repeated_steps(forms: Sequence[Form], model: CostModel) -> Cost:
    """What is priced more than once: the same steps in front of the layers of several terms are written once."""
    seen: set[object] = set()
    total = Cost()
    for form in forms:
        for term in form.terms:
            found = placement(term, model)
            if isinstance(found, Inexact):
                continue
            term = found.term
            current = tensor_before(term, 0)
            for index, step in enumerate(term.before[: found.at]):
                result = tensor_before(term, index + 1)
                key = (term.source, term.columns, *(other.key for other in term.before[: index + 1]))
                if key in seen:
                    total += model.of_view() if step.carried.free else model.of_move(current, result)
                seen.add(key)
                current = result
    return total


def tensor_before(term: Term, steps: int) -> TensorInfo:
    """The tensor behind some steps of `term.before`, its channels being those that the term reads."""
    if not steps:
        tensor = info(term.source)
        assert tensor is not None
        return with_channels(tensor, term.axis, term.reads[1] - term.reads[0])
    step = term.before[steps - 1]
    channels = term.reads[1] - term.reads[0]
    for other in term.before[:steps]:
        channels *= other.repeat
    return _behind(step, channels)


def with_channels(tensor: TensorInfo, axis: int, channels: int) -> TensorInfo:
    """The same tensor with another number of channels."""
    shape = list(tensor.shape)
    shape[axis] = channels
    return replace(tensor, shape=tuple(shape))


def _behind(step: Step, channels: int) -> TensorInfo:
    tensor = info(step.node)
    assert tensor is not None
    return with_channels(tensor, step.axis_after, channels)


def _places(term: Term) -> list[int]:
    """Numbers of steps that may run in front of the map; the last one first."""
    places = [len(term.before)]
    if term.is_free and not term.map.is_identity:
        while places[-1] > 0 and term.before[places[-1] - 1].repeat == 1:
            places.append(places[-1] - 1)
    return places


def _placed(term: Term, at: int, model: CostModel) -> Placement | Inexact:
    before = tensor_before(term, at)
    axis = term.before[at - 1].axis_after if at else term.axis
    geometry = term.map.geometry
    why = unwritable(geometry, len(before.shape), axis)
    if why is not None:
        return why
    like = with_channels(before, axis, geometry.out_channels)
    if geometry.rank:
        like = replace(like, shape=(*like.shape[:2], *geometry.output_size(like.shape[2:])))
    cost = Cost() if term.map.is_identity else model.of_map(geometry, before, axis)
    if term.columns is not None:
        cost += model.of_view()
    current = like if at == 0 else tensor_before(term, 0)
    for index, step in enumerate((*term.before, *term.after)):
        channels = current.shape[step.axis] * step.repeat if index < at else geometry.out_channels
        result = _behind(step, channels)
        cost += model.of_view() if step.carried.free else model.of_move(current, result)
        current = result
        if index + 1 == at:
            current = like
    return Placement(term, at, like, axis, cost)
