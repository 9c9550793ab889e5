"""From a rewritten graph to a module of its own."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import fx, nn

from reparam.graph.emit import Constant, Layer
from reparam.graph.nodes import set_module
from reparam.lazy import lean_copy
from reparam.quiet import without_copying_warnings


def built(root: nn.Module, graph: fx.Graph, model: nn.Module) -> fx.GraphModule:
    """The graph as a module in eval mode that shares no parameter with `model`, from whose copy it was made."""
    graph.lint()
    module = fx.GraphModule(root, graph, class_name=type(model).__name__)
    return unshared(module, model).eval()


Module = TypeVar("Module", bound=nn.Module)


def unshared(module: Module, model: nn.Module) -> Module:
    """The module, with copies in place of the parameters that it shares with `model`."""
    # By storage: an exported program has parameters of its own, which may share it.
    theirs = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None and parameter.untyped_storage()._cdata in theirs:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                owner._parameters[name] = copies[id(parameter)]
    return module


def float64_copy(module: nn.Module) -> nn.Module:
    """A copy in float64; its large weights are cast whenever they are read, if it can be copied so."""
    lean = lean_copy(module, torch.float64)
    if lean is not None:
        return lean
    with without_copying_warnings():
        return copy.deepcopy(module).double()


def float64_twin(module: fx.GraphModule) -> fx.GraphModule:
    """A float64 copy of a fused module whose new layers hold their weights as they were before rounding."""
    twin = cast(fx.GraphModule, float64_copy(module))
    for node in module.graph.nodes:
        make = node.meta.get("float64")
        layer = None if make is None else make()
        if isinstance(layer, Layer) and layer.module is not None:
            set_module(twin, str(node.target), layer.module)
        elif isinstance(layer, (Layer, Constant)):
            path, _, name = str(node.target).rpartition(".")
            value = layer.value if isinstance(layer, Constant) else getattr(layer, name)
            owner = twin.get_submodule(path)
            if name not in owner._buffers and hasattr(owner, name):
                delattr(owner, name)  # a plain attribute
            owner.register_buffer(name, value)
    return twin


def forget_float64(graph: fx.Graph) -> None:
    """Drops what `float64_twin` needs, and with it the last hold on the original's weights."""
    for node in graph.nodes:
        node.meta.pop("float64", None)
