"""Counts a graph's operations by the same table that lifts them, so that every spelling counts alike."""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
from torch import fx, nn

from reparam.checks import CHECKS
from reparam.graph.constants import Constants
from reparam.graph.nodes import attribute, info, module_of
from reparam.graph.table import TABLE

_COUNTED = {
    "convolution": "convolutions",
    "transposed convolution": "convolutions",
    "batch normalisation": "batch_norms",
    "linear layer": "linears",
    "addition": "additions",
    "scale and shift": "additions",
}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def count_operations(graph: fx.Graph, root: nn.Module) -> dict[str, int]:
    """Operations, weights and multiply-adds of one call on the example inputs: the fields of `OperationCounts`."""
    constants = Constants(graph, root)
    counts = dict.fromkeys((*_COUNTED.values(), "dropouts"), 0)
    nodes = macs = 0
    weights = {}
    for node in graph.nodes:
        module = module_of(node, root)
        if module is not None:
            for layer in module.modules() if module._modules else (module,):
                weights.update({id(p): p.numel() for p in layer._parameters.values() if p is not None})
        elif node.op == "get_attr":
            value = attribute(root, str(node.target))
            if isinstance(value, nn.Parameter):
                weights[id(value)] = value.numel()
        if node.op not in ("call_module", "call_function", "call_method") or node in constants:
            continue
        if node.target in CHECKS:
            continue  # what the capture put there is no operation of the model
        nodes += 1
        row = TABLE.row(node, root)
        name = None if row is None else _name(node, root, row.name, constants)
        if row is not None and name in _COUNTED and info(node) is not None:
            counts[_COUNTED[name]] += 1
            macs += _macs(node, root, name, row.name)
        if isinstance(module, _DROPOUTS) or (node.op == "call_function" and "dropout" in _function_name(node)):
            counts["dropouts"] += 1
    return {**counts, "nodes": nodes, "parameters": sum(weights.values()), "macs": macs}


def _name(node: fx.Node, root: nn.Module, row: str, constants: Constants) -> str:
    """What an operation counts as: a product with a matrix of weights is a linear layer, one of activations none."""
    if row != "matrix product" or _second(node) not in constants:
        return row
    return "linear layer" if len(_shape(_second(node), root)) == 2 else row


def _second(node: fx.Node) -> Any:
    """The weights of an operation that is no module."""
    named = (node.kwargs.get(name) for name in ("weight", "other", "mat2"))
    return node.args[1] if len(node.args) > 1 else next((value for value in named if value is not None), None)


def _shape(weight: Any, root: nn.Module) -> tuple[int, ...]:
    """The shape of weights that are read or computed in the graph; () if it is not known."""
    if not isinstance(weight, fx.Node):
        return ()
    if (tensor := info(weight)) is not None:
        return tensor.shape
    held = attribute(root, str(weight.target)) if weight.op == "get_attr" else None  # a constant that export lifted
    return tuple(held.shape) if isinstance(held, torch.Tensor) else ()


def _function_name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", ""))


def _macs(node: fx.Node, root: nn.Module, name: str, row: str) -> int:
    out = info(node)
    if name not in ("convolution", "transposed convolution", "linear layer") or out is None:
        return 0
    module = module_of(node, root)
    shape = _shape(_second(node), root) if module is None else tuple(cast(torch.Tensor, module.weight).shape)
    if not shape:
        return 0
    if row == "matrix product":
        return out.numel * shape[0]
    if name != "transposed convolution":
        return out.numel * prod(shape[1:])
    source = info(node.all_input_nodes[0])
    return 0 if source is None else source.numel * prod(shape[1:])


__all__ = ["count_operations"]
