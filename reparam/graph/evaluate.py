"""The values of a graph's nodes in float64, for the example inputs.

A new layer is taken as it was before its weights were rounded, everything else as it stands, cast. One node is computed
at a time, from values that the caller holds, so that a graph can be followed while it is rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from reparam.graph.build import float64_copy
from reparam.graph.emit import Constant, Layer
from reparam.graph.nodes import attribute, info, module_of
from reparam.inputs import Inputs
from reparam.widen import all_in, told_dtype


class Evaluator:
    """Computes nodes of one graph.

    Args:
        graph: the graph, as captured.
        root: what its targets refer to.
        inputs: the example inputs.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, inputs: Inputs) -> None:
        self._root = root
        self._told = told_dtype(inputs)
        self._narrow = all(p.dtype != torch.float64 for p in root.parameters())
        self._given = _bound(graph, inputs.clone())

    @contextmanager
    def wide(self) -> Iterator[None]:
        """Within it, operations that are computed make float64 of all that they make."""
        wide = all_in(torch.float64, self._told, default=self._narrow)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), wide:
            yield

    def module(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node calls now; the graph may give its name to another one later."""
        return module_of(node, self._root)

    def __call__(self, node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
        """The value of a node whose arguments have these values; `module` is what it calls."""
        if node.op == "placeholder":
            return self._given[node]
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "call_module":
            assert module is not None
            return self._layer(node, module)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = node.target
        return function(*args, **kwargs)

    def _layer(self, node: fx.Node, module: nn.Module) -> nn.Module:
        made = _exact(node)
        if isinstance(made, Layer) and made.module is not None:
            return made.module
        tensors = (*module.parameters(), *module.buffers())
        return float64_copy(module) if any(t.is_floating_point() for t in tensors) else module

    def _attribute(self, node: fx.Node) -> Any:
        made = _exact(node)
        if isinstance(made, Constant):
            return made.value
        if isinstance(made, Layer):
            return getattr(made, str(node.target).rpartition(".")[2])
        value = attribute(self._root, str(node.target))
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().to(torch.float64) if value.is_floating_point() else value.detach()


def cost_of(node: fx.Node, module: nn.Module | None) -> float:
    """What computing a node costs, in elements that are made, each with the products that are summed for it."""
    out = info(node)
    if out is None or node.op in ("placeholder", "get_attr"):
        return 0.0
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = next((info(other) for other in node.all_input_nodes[1:] if other.op == "get_attr"), None)
    shape = tuple(weight.shape) if weight is not None else ()
    products = 1
    if len(shape) > 1:
        for size in shape[1:]:
            products *= size
    return float(out.numel * products)


def _exact(node: fx.Node) -> Any:
    make = node.meta.get("float64")
    return None if make is None else make()


def _bound(graph: fx.Graph, inputs: Inputs) -> dict[fx.Node, Any]:
    """The example's argument for each placeholder, in float64.

    Raises:
        LookupError: there is none for one.
    """
    wide = inputs.to(torch.float64)
    waiting, named = list(wide.args), dict(wide.kwargs)
    found: dict[fx.Node, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        name = str(node.target)
        if name.startswith("**"):
            found[node], named = named, {}
        elif name.startswith("*"):
            found[node], waiting = tuple(waiting), []
        elif waiting:
            found[node] = waiting.pop(0)
        elif name in named:
            found[node] = named.pop(name)
        elif node.args:
            found[node] = node.args[0]
        else:
            raise LookupError(f"no example for {name}")
    if waiting or named:
        raise LookupError("the graph takes other arguments than the example has")
    return found


Values = Mapping[fx.Node, Any]


def filled(arguments: Any, values: Values) -> Any:
    """Arguments of a node with the values in the place of the nodes."""
    return fx.node.map_arg(arguments, lambda node: values[node])
