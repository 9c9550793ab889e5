"""Values of the graph that depend on parameters, buffers and literals only.

They are evaluated on demand and in float64, because they feed weights that are combined in float64. A cast to the
model's own precision is none then. One to less than that is meant to round, so what it makes is left to run time.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.graph.emit import Constant
from reparam.graph.nodes import attribute, info, module_of, pinned
from reparam.graph.normal import mutated

_CASTS = ("float", "double", "half", "bfloat16")
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal", "poisson", "exponential", "empty", "uniform")


class Constants:
    """Which nodes are constant, and their values.

    Args:
        graph, root: the graph, and the module that its targets refer to.
        layers: whether a layer of torch that reads a constant makes one.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, *, layers: bool = False) -> None:
        self._root = root
        self._layers = layers
        self._precision = _precision_of(root)
        self._values: dict[fx.Node, Any] = {}
        self._constant: set[fx.Node] = set()
        for node in graph.nodes:
            if self._is_constant(node):
                self._constant.add(node)

    def __contains__(self, node: object) -> bool:
        return node in self._constant

    def value(self, argument: Any) -> Any:
        """The value of a constant node, float64 where it is floating; anything else is returned as it is."""
        if not isinstance(argument, fx.Node):
            return argument
        pending = [argument]
        while pending:
            node = pending[-1]
            missing = [other for other in node.all_input_nodes if other not in self._values]
            if node in self._values or not missing:
                pending.pop()
                if node not in self._values:
                    self._values[node] = self._evaluate(node)
            else:
                pending.extend(missing)
        return self._values[argument]

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return pinned(node) is None
        if node.op in ("placeholder", "output") or pinned(node) or mutated(node, self._root) is not None:
            return False
        if node.op == "call_module" and not (self._layers and computes_the_same(module_of(node, self._root))):
            return False
        if not node.all_input_nodes or any(other not in self._constant for other in node.all_input_nodes):
            return False
        if self._rounds(node):
            return False
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return not any(word in name for word in _RANDOM) and node.target is not operator.setitem

    def _rounds(self, node: fx.Node) -> bool:
        """Whether the node casts to less precision than the model has."""
        eps = _eps(node)
        return eps > self._precision and any(0 < _eps(other) < eps for other in node.all_input_nodes)

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return _doubled(_unrounded(node, attribute(self._root, str(node.target))))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: self._values[other])
        if node.op == "call_method" and node.target in _CASTS:
            return _doubled(args[0])
        args, kwargs = pytree.tree_map_only(torch.dtype, _widened, (args, kwargs))
        with torch.no_grad():
            if node.op == "call_module":
                value = copy.deepcopy(module_of(node, self._root)).double()(*args, **kwargs)  # type: ignore[union-attr]
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        return pytree.tree_map_only(torch.Tensor, _doubled, value)


def computes_the_same(module: nn.Module | None) -> bool:
    """Whether a module is a layer of torch that computes the same in every call."""
    if module is None or not type(module).__module__.startswith("torch.nn.modules."):
        return False
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    return not module.training and not isinstance(module, nn.RNNBase)


def _unrounded(node: fx.Node, value: Any) -> Any:
    """The constant as it was before a pass rounded it to the model's dtype."""
    make = node.meta.get("float64")
    held = None if make is None else make()
    return held.value if isinstance(held, Constant) else getattr(held, str(node.target).rpartition(".")[2], value)


def _precision_of(root: nn.Module) -> float:
    """The machine precision of the dtype that most parameters have."""
    counts: Counter[torch.dtype] = Counter()
    for parameter in root.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] += parameter.numel()
    return torch.finfo(counts.most_common(1)[0][0] if counts else torch.float32).eps


def _eps(node: fx.Node) -> float:
    tensor = info(node)
    return torch.finfo(tensor.dtype).eps if tensor is not None and tensor.dtype.is_floating_point else 0.0


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.to(torch.float64) if value.dtype.is_floating_point else value
    return value
