"""The scale and shift of a LayerNorm, GroupNorm or RMSNorm go into every layer that reads it, where that pays.

    A(g * n(x) + b) = (A g)(n(x)) + A(b)      n: the norm without weights

Preconditions: the weights vary along the channels that the layers read (one normalised axis, the last one; for
GroupNorm axis 1); every reader is a layer that absorbs scale and shift whole, without padding that the shift would have
to cross. The norm itself stays, and stays one operation.

So it saves numbers and no time: a norm with weights is launched once and reads and writes the same tensor. Under
`objective="latency"` and `"macs"` it is a tie, and a tie goes to the form nearer to the original; under
`objective="parameters"` it pays. A norm that is written as arithmetic has its scale as an operation of its own, which
the collapse merges whatever the objective.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from reparam.algebra import Inexact
from reparam.graph.emit import Layer, insert_layer, layer_for
from reparam.graph.lift import Call, CallRow, CallTable, LiftTable
from reparam.graph.nodes import (
    described,
    free_name,
    info,
    is_parametrized,
    kind,
    module_of,
    place,
    set_module,
    stand_for,
)
from reparam.graph.table import TABLE
from reparam.passes.base import Cost, Refusal, Rewrite
from reparam.passes.cost import CostModel
from reparam.passes.ledger import allowed
from reparam.passes.scaling import Scaling, Surroundings


@dataclass(frozen=True)
class _Weights:
    """Of one call of a norm: `operand`, scale and shift as they are given, the axis they vary along."""

    operand: fx.Node
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    axis: int


def _vector(value: Any) -> bool:
    return value is None or (isinstance(value, torch.Tensor) and value.ndim == 1)


def _over_last_axis(call: Call) -> _Weights | None:
    x, shape = call.tensor(), call["normalized_shape"]
    shape = (shape,) if isinstance(shape, int) else shape
    if x is None or not isinstance(shape, (tuple, list)) or len(shape) != 1 or type(shape[0]) is not int:
        return None
    return _found(call, x, call.ndim - 1)


def _over_groups(call: Call) -> _Weights | None:
    x = call.tensor()
    return None if x is None or type(call["num_groups"]) is not int else _found(call, x, 1)


def _found(call: Call, x: fx.Node, axis: int) -> _Weights | None:
    scale, shift = call["weight"], call["bias"]
    if (scale is None and shift is None) or not (_vector(scale) and _vector(shift)) or call.ndim < 2:
        return None
    return _Weights(x, scale, shift, axis)


def _reader(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda module: {name: _value(getattr(module, name, None)) for name in names}


def _value(attribute: Any) -> Any:
    return attribute.detach() if isinstance(attribute, torch.Tensor) else attribute


_LAYER = ("input", "normalized_shape", "weight", "bias", "eps")
_RMS = ("input", "normalized_shape", "weight", "eps")
_GROUP = ("input", "num_groups", "weight", "bias", "eps")

NORMS: CallTable[_Weights] = CallTable(
    (
        CallRow(
            "layer norm",
            _over_last_axis,
            _LAYER,
            (F.layer_norm, torch.layer_norm),
            (nn.LayerNorm,),
            _reader(*_LAYER[1:]),
        ),
        CallRow("RMS norm", _over_last_axis, _RMS, (F.rms_norm, torch.rms_norm), (nn.RMSNorm,), _reader(*_RMS[1:])),
        CallRow(
            "group norm",
            _over_groups,
            _GROUP,
            (F.group_norm, torch.group_norm),
            (nn.GroupNorm,),
            _reader(*_GROUP[1:]),
        ),
    )
)


@dataclass(frozen=True)
class NormWeights:
    """The pass. `table` says what is affine, `cost` what is cheap."""

    table: LiftTable = TABLE
    cost: CostModel = field(default_factory=CostModel)
    name = "norm weights"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        candidates = [node for node in graph.nodes if NORMS.row(node, root) is not None and node.users]
        if not candidates:
            return [], []
        rewrites: list[Rewrite] = []
        refusals: list[Refusal] = []
        surroundings = Surroundings(graph, root, self.table)
        for node in candidates:
            module = module_of(node, root)
            weights = surroundings.look_up(NORMS, node)
            if not isinstance(weights, _Weights) or (module is not None and is_parametrized(module)):
                continue
            run = _as_run(weights, node)
            answers = [surroundings.absorbs_in_front(reader, node, run, weights.axis) for reader in node.users]
            if any(answer is not True for answer in answers):
                continue
            before, after = self._costs(node, run)
            if not (self.cost.key(after) < self.cost.key(before) and self.cost.no_slower(after, before)):
                refusals.append(self._does_not_pay(node, root))
                continue
            layer = _written(run, node)
            readers = [surroundings.absorbs_in_front(r, node, run, weights.axis, rounded=True) for r in node.users]
            if not isinstance(layer, Layer) or any(answer is not True for answer in readers):
                continue
            rewrite = self._rewrite(node, run, before, after, root)
            if allowed(rewrite, node):
                rewrites.append(rewrite)
                _separate(node, layer, graph, root)
        return rewrites, refusals

    def _costs(self, node: fx.Node, run: Scaling) -> tuple[Cost, Cost]:
        """Of the norm with its weights and without: the same tensor is read and written, in one launch."""
        tensor = info(node)
        assert tensor is not None
        moved = 2 * tensor.numel * tensor.dtype.itemsize
        return self.cost.priced(0, moved, 1, run.scale.numel()), self.cost.priced(0, moved, 1)

    def _does_not_pay(self, node: fx.Node, root: nn.Module) -> Refusal:
        return Refusal(
            self.name,
            place(node),
            f"weights of {kind(node, root)}",
            "merging them into the layers behind it is exact, but saves no time: it is one operation with and without",
            "" if self.cost.objective == "parameters" else "fuse with objective='parameters' for fewer weights",
        )

    def _rewrite(self, node: fx.Node, run: Scaling, before: Cost, after: Cost, root: nn.Module) -> Rewrite:
        readers = ", ".join(described(reader, root) for reader in node.users)
        return Rewrite(
            self.name,
            place(node),
            (f"{place(node).module}: weights of {kind(node, root)}",),
            f"{'scale and shift' if run.shifts else 'scale'} in front of {readers}",
            "A(g * n(x) + b) = (A g)(n(x)) + A(b)",
            before,
            after,
        )


def _as_run(weights: _Weights, node: fx.Node) -> Scaling:
    given = weights.scale if weights.scale is not None else weights.shift
    assert given is not None
    scale = torch.ones_like(given) if weights.scale is None else weights.scale
    shift = torch.zeros_like(given) if weights.shift is None else weights.shift
    return Scaling((node,), weights.operand, scale.to(torch.float64), shift.to(torch.float64), weights.axis)


def _written(run: Scaling, node: fx.Node) -> Layer | Inexact:
    """Scale and shift as they stand in a graph."""
    tensor, map_ = info(node), run.map(run.scale.numel())
    assert tensor is not None
    assert run.axis is not None
    return layer_for(map_, tensor, run.axis, None if map_.bias is None else map_.bias.evaluate())


def _separate(node: fx.Node, layer: Layer, graph: fx.Graph, root: nn.Module) -> None:
    """Writes the norm without weights, and its scale and shift behind it."""
    row, module = NORMS.row(node, root), module_of(node, root)
    assert row is not None
    with graph.inserting_after(node):
        bare = _without_weights(node, module, row, graph, root)
    with graph.inserting_after(bare):
        made = insert_layer(graph, root, bare, layer, free_name(root, node))
    for constant in made.all_input_nodes:
        if constant.op == "get_attr":
            made.prepend(constant)
    for new in (bare, made):
        stand_for(new, node)
        new.meta["tensor"] = info(node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _without_weights(
    node: fx.Node, module: nn.Module | None, row: CallRow[_Weights], graph: fx.Graph, root: nn.Module
) -> fx.Node:
    if module is not None:
        twin = copy.copy(module)
        twin._parameters = dict.fromkeys(module._parameters)
        path = f"{free_name(root, node)}_norm"
        set_module(root, path, twin)
        return graph.call_module(path, node.args, dict(node.kwargs))
    args = [
        None if name in ("weight", "bias") else value for name, value in zip(row.signature, node.args, strict=False)
    ]
    kwargs = {name: value for name, value in node.kwargs.items() if name not in ("weight", "bias")}
    return graph.call_function(node.target, tuple(args), kwargs)  # type: ignore[arg-type]


__all__ = ["NormWeights"]
