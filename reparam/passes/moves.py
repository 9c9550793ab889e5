"""Moves constant scales and shifts of channels to a layer that absorbs them.

    s * op(A(x)) + t  =  op(s * A(x) + t)       backwards, to a layer A: s > 0, and t = 0 unless op is a maximum
    A(op(s * x + t))  =  A(s * op(x) + t)       forwards, likewise
    A(s * x + t)      =  A(s * (x + t/s))       scale only: A pads with zeros, so that t cannot enter it; s != 0

`op` is a chain of operations of `reparam.graph.commuting`, each read by the next one only. A run moves only where the
collapse is certain to merge what was moved into the layer it meets, so no operation is ever added; a run that the
collapse can merge where it stands is left to it. Forwards and scale only need every reader to absorb.

In the third identity `x + t/s` stays, one addition. Its rounding and that of `t/s`, times `s`, is that of `s * x + t`;
but what `A` loses of `s * W` is multiplied by `t/s`. So it is done only if `|t/s| <= 1/sqrt(eps)` of the model's dtype.

Not done: a scale that moves and leaves its shift behind an `op` (a cheaper operation, but not one fewer); channels that
are positive among others that are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx, nn

from reparam.algebra import Inexact
from reparam.capture.captured import TensorInfo
from reparam.graph.commuting import Commuting
from reparam.graph.emit import Layer, insert_layer, layer_for
from reparam.graph.lift import LiftTable
from reparam.graph.nodes import described, free_name, info, kind, place, stand_for
from reparam.graph.normal import eliminate_dead_code
from reparam.graph.table import TABLE
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.ledger import allowed
from reparam.passes.scaling import Scaling, Surroundings, joined, only_reader


@dataclass(frozen=True)
class Moves:
    """The pass. `table` says what is affine."""

    table: LiftTable = TABLE
    name = "moves"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        rewrites: list[Rewrite] = []
        # A shift that an earlier round left behind may have found its way since; if not, it stays as it was.
        decided = {node: node.meta.pop("stays") for node in graph.nodes if "stays" in node.meta}
        moved = True
        while moved:
            moved, gone = False, set[fx.Node]()
            left: dict[Scaling, Inexact] = {}
            surroundings = Surroundings(graph, root, self.table)
            for node in list(graph.nodes):
                plan = None if node in gone else _planned(node, surroundings)
                if isinstance(plan, _Plan):
                    rewrite = self._rewrite(plan, root)
                    if not allowed(rewrite, *plan.going):
                        continue
                    rewrites.append(rewrite)
                    _apply(plan, graph, root)
                    gone.update(plan.going)
                    surroundings.forget()
                    moved = True
                elif plan is not None:
                    left[plan[0]] = plan[1]
        for node, why in decided.items():
            node.meta["stays"] = why
        refusals = [self._refusal(run, why, root) for run, why in left.items() if _is_alone(run, surroundings)]
        eliminate_dead_code(graph)
        return rewrites, refusals

    def _rewrite(self, plan: _Plan, root: nn.Module) -> Rewrite:
        run = plan.run
        return Rewrite(
            self.name,
            place(run.result),
            tuple(described(node, root) for node in plan.going),
            plan.replacement(root),
            plan.identity,
        )

    def _refusal(self, run: Scaling, why: Inexact, root: nn.Module) -> Refusal:
        refusal = Refusal(self.name, place(run.nodes[0]), kind(run.nodes[0], root), why.reason, why.remedy)
        for node in run.nodes:
            node.meta["refused"] = refusal
        return refusal


@dataclass(frozen=True, eq=False)
class _Plan:
    """One move.

    Attributes:
        run: what moves.
        operations: what it crosses, in graph order.
        value: what the moved run reads.
        old: what its readers read now.
        readers: what it goes in front of.
        layer: the moved run.
        shift: what stays in front of it: an addition, or None.
        why: why it stays.
        merged: a run that it was merged with, backwards: `value` is what that one reads.
        backwards: the direction.
    """

    run: Scaling
    operations: tuple[tuple[fx.Node, Commuting], ...]
    value: fx.Node
    old: fx.Node
    readers: tuple[fx.Node, ...]
    layer: Layer
    shift: Layer | None = None
    why: Inexact | None = None
    merged: Scaling | None = None
    backwards: bool = False

    @property
    def going(self) -> tuple[fx.Node, ...]:
        return self.run.nodes if self.merged is None else (*self.merged.nodes, *self.run.nodes)

    @property
    def identity(self) -> str:
        names = list(dict.fromkeys(operation.name for _, operation in self.operations))
        shift = " + t" if self.run.shifts else ""
        crossed = f", op = {' and '.join(names)}, s > 0"
        if self.shift is not None:
            middle = "A(op(s * x + t)) = " if names else "A(s * x + t) = "
            return middle + ("A(s * (op(x) + t/s))" + crossed if names else "A(s * (x + t/s)), s != 0")
        sides = (f"s * op(x){shift}", f"op(s * x{shift})")
        return " = ".join(sides if self.backwards else sides[::-1]) + crossed

    def replacement(self, root: nn.Module) -> str:
        if self.merged is not None:
            return self.layer.description
        where = described(self.value, root) if self.backwards else ", ".join(described(r, root) for r in self.readers)
        moved = f"{self.layer.description} {'behind' if self.backwards else 'in front of'} {where}"
        return moved if self.shift is None else f"shift, and {moved}"


def _planned(head: fx.Node, surroundings: Surroundings) -> _Plan | tuple[Scaling, Inexact] | None:
    """The move of the run that starts with a node; the run and a reason if only its numbers forbid a move."""
    if any(surroundings.is_layer(other) and only_reader(other) is head for other in head.all_input_nodes):
        return None  # neighbours already; asked first because it is by far the most frequent case
    run = surroundings.run(head)
    if run is None or not (run.scales or run.shifts) or not bool(torch.isfinite(run.scale + run.shift).all()):
        return None
    if _is_absorbed(run, surroundings):
        return None
    backwards = _backwards(run, surroundings)
    forwards = None if isinstance(backwards, _Plan) else _forwards(run, surroundings)
    plan = forwards if isinstance(forwards, _Plan) else backwards or forwards
    return (run, plan) if isinstance(plan, Inexact) else plan


def _is_absorbed(run: Scaling, surroundings: Surroundings) -> bool:
    """Whether the collapse merges it where it stands."""
    if surroundings.absorbs_behind(run.source, run.nodes[0], run, run.axis) is True:
        return True
    reader = only_reader(run.result)
    return reader is not None and surroundings.absorbs_in_front(reader, run.result, run, run.axis) is True


def _is_alone(run: Scaling, surroundings: Surroundings) -> bool:
    """Whether nothing affine is beside it; the collapse knows more about the others."""
    return run.scales and not any(surroundings.is_affine(other) for other in (run.source, *run.result.users))


def _backwards(run: Scaling, surroundings: Surroundings) -> _Plan | Inexact | None:
    value, reader, axis = run.source, run.nodes[0], run.axis
    operations: list[tuple[fx.Node, Commuting]] = []
    while only_reader(value) is reader and (operation := surroundings.commuting(value)) is not None:
        if axis is not None:
            axis = operation.before(axis)
            if axis is None:
                return None
        operations.insert(0, (value, operation))
        value, reader = operation.operand, value
    if not operations:
        return None
    absorbed = surroundings.absorbs_behind(value, reader, run, axis)
    if absorbed is True:
        absorbed = _obstacle(run, operations, "in front of") or surroundings.absorbs_behind(
            value, reader, run, axis, rounded=True
        )
    if absorbed is not True:
        return absorbed or None
    merged = surroundings.single(value)
    whole = replace(run, source=value, axis=axis)
    if merged is not None:  # no layer, but a scale like itself: the two become one here
        both = joined(merged, whole)
        if both is None:
            return None
        whole = both
    layer = _layer(whole, value, whole.axis)
    if isinstance(layer, Inexact):
        return layer
    source = value if merged is None else merged.source
    return _Plan(run, tuple(operations), source, value, (reader,), layer, merged=merged, backwards=True)


def _forwards(run: Scaling, surroundings: Surroundings) -> _Plan | Inexact | None:
    value, axis = run.result, run.axis
    operations: list[tuple[fx.Node, Commuting]] = []
    while (reader := only_reader(value)) is not None and (operation := surroundings.commuting(reader)) is not None:
        if axis is not None:
            axis = operation.after(axis)
            if axis is None:
                return None
        operations.append((reader, operation))
        value = reader
    crossing = _Crossing(run, tuple(operations), value, tuple(value.users), axis)
    exact = crossing.absorbed(run, surroundings)
    if exact is False or (exact is True and not operations):
        return None
    obstacle = _obstacle(run, operations, "behind") if operations else None
    if obstacle is not None:
        return obstacle
    return _scale_only(crossing, exact, surroundings) if isinstance(exact, Inexact) else _whole(crossing, surroundings)


@dataclass(frozen=True)
class _Crossing:
    """A way forwards: the operations on it, the tensor behind them, its readers and its channel axis."""

    run: Scaling
    operations: tuple[tuple[fx.Node, Commuting], ...]
    value: fx.Node
    readers: tuple[fx.Node, ...]
    axis: int | None

    def absorbed(self, run: Scaling, surroundings: Surroundings, *, rounded: bool = False) -> bool | Inexact:
        """Whether every reader absorbs a run: False if one of them never does, else the first reason."""
        answers = [surroundings.absorbs_in_front(r, self.value, run, self.axis, rounded=rounded) for r in self.readers]
        if not answers or any(answer is False for answer in answers):
            return False
        return next((answer for answer in answers if answer is not True), True)


def _whole(crossing: _Crossing, surroundings: Surroundings) -> _Plan | Inexact | None:
    absorbed = crossing.absorbed(crossing.run, surroundings, rounded=True)
    if absorbed is not True:
        return absorbed or None
    layer = _layer(crossing.run, crossing.value, crossing.axis)
    if isinstance(layer, Inexact):
        return layer
    return _Plan(crossing.run, crossing.operations, crossing.value, crossing.value, crossing.readers, layer)


def _scale_only(crossing: _Crossing, why: Inexact, surroundings: Surroundings) -> _Plan | Inexact | None:
    """The scale alone; `why` the shift does not go with it."""
    run, value, axis = crossing.run, crossing.value, crossing.axis
    tensor = info(value)
    if not (run.scales and run.shifts) or tensor is None:
        return None
    scale = run.scale_alone
    absorbed = crossing.absorbed(scale, surroundings, rounded=True)
    if absorbed is not True:
        return absorbed or None
    offset = run.shift / run.scale
    if not bool((offset.abs() <= torch.finfo(tensor.dtype).eps ** -0.5).all()):
        return Inexact("its shift is too large beside its scale to be added in front of it", "fuse in a wider type")
    shift = _layer(replace(run, scale=torch.ones_like(run.scale), shift=offset), value, axis)
    layer = _layer(scale, value, axis)
    if isinstance(shift, Inexact) or isinstance(layer, Inexact):
        return shift if isinstance(shift, Inexact) else layer  # type: ignore[return-value]
    source = value if crossing.operations else run.source
    return _Plan(run, crossing.operations, source, value, crossing.readers, layer, shift, why)


def _obstacle(run: Scaling, operations: Sequence[tuple[fx.Node, Commuting]], where: str) -> Inexact | None:
    """Why a run does not commute with operations; `where` of them it would go."""
    name = operations[0][1].name
    for count, word in ((int((run.scale < 0).sum()), "negative"), (int((run.scale == 0).sum()), "zero")):
        if count:
            channels = f" in {count} of {run.scale.numel()} channels" if run.axis is not None else ""
            return Inexact(
                f"its scale is {word}{channels}, and {name} commutes with positive scales only",
                f"train it {where} {name}",
            )
    fixed = [operation.name for _, operation in operations if not operation.shifts]
    if run.shifts and fixed:
        return Inexact(f"its shift cannot cross {fixed[0]}, only a scale can", f"train it {where} {fixed[0]}")
    return None


def _layer(run: Scaling, like: fx.Node, axis: int | None) -> Layer | Inexact:
    tensor = info(like)
    if tensor is None:
        return Inexact("it is no tensor")
    map_ = run.map(run.scale.numel())
    return layer_for(map_, tensor, 0 if axis is None else axis, None if map_.bias is None else map_.bias.evaluate())


def _apply(plan: _Plan, graph: fx.Graph, root: nn.Module) -> None:
    run, value, tensor = plan.run, plan.value, info(plan.old)
    if plan.backwards:
        run.result.replace_all_uses_with(run.source)
    elif plan.operations:
        plan.operations[0][0].replace_input_with(run.result, run.source)
        for node, _ in plan.operations:
            node.meta.pop("in_place", None)  # it reads another tensor now, which it must not overwrite
    if plan.shift is not None:
        order = {node: index for index, node in enumerate(graph.nodes)}
        first = min(plan.readers, key=order.__getitem__)
        value = _inserted(graph, root, first, value, plan.shift, tensor, run)
        value.meta["stays"] = plan.why
    for reader in plan.readers:
        moved = _inserted(graph, root, reader, value, plan.layer, tensor, run)
        reader.replace_input_with(plan.old, moved)
    for node in reversed(plan.going):
        graph.erase_node(node)


def _inserted(
    graph: fx.Graph,
    root: nn.Module,
    before: fx.Node,
    source: fx.Node,
    layer: Layer,
    tensor: TensorInfo | None,
    run: Scaling,
) -> fx.Node:
    """A scale or shift of `source`, in front of a node; it stands for the run."""
    with graph.inserting_before(before):
        made = insert_layer(graph, root, source, layer, free_name(root, run.result))
    if made is not source:
        made.meta["tensor"] = tensor
        stand_for(made, run.result)
    return made
