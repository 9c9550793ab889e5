"""Values of the graph that depend on parameters, buffers and literals only.

They are evaluated on demand and in float64, because they feed weights that are combined in float64. A cast to the
model's own precision is none then. One to less than that is meant to round, so what is
computed in less precision is left to run time.

`mean.to(x.dtype)`, `torch.arange(8, device=x.device)`: what `x` holds does not matter. Its device is that of the model,
and its dtype that of the model's weights, where a layer with weights has made it or is going to read it: on any other
one the original fails, or converts.
"""

from __future__ import annotations

import copy
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from reparam.graph.emit import Constant
from reparam.graph.nodes import attribute, info, module_of, pinned
from reparam.graph.normal import mutated

_CASTS = ("float", "double", "half", "bfloat16")
_RANDOM = re.compile(r"rand|dropout|bernoulli|multinomial|(?<![a-z])normal(?![a-z])|poisson|exponential|empty|uniform")
_UNSTRIDED = re.compile(r"sparse|mkldnn|nested")
_NEW = ("new_tensor", "new_full", "new_zeros", "new_ones")
_FILLED = (torch.arange, torch.full, torch.zeros, torch.ones, torch.eye, torch.linspace, torch.tensor)
_EXACT = set(
    "full zeros ones eye triu tril masked_fill where getitem view reshape flatten expand repeat squeeze unsqueeze "
    "transpose permute cat stack".split()
)
"""What only moves numbers about, or makes them of literals."""
_LAYERS = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


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
        pending, on_the_way = [argument], []
        while pending:
            node = pending[-1]
            missing = [other for other in self._operands(node) if other not in self._values]
            if node in self._values or not missing:
                pending.pop()
                if node not in self._values:
                    self._values[node] = self._evaluate(node)
                    on_the_way.append(node)
            else:
                pending.extend(missing)
        for node in on_the_way:
            if node is not argument and len(node.users) == 1:
                del self._values[node]  # only what was asked for reads it; weights are large
        return self._values[argument]

    def held(self, node: fx.Node) -> Any:
        """The value of a constant node; that of a parameter or buffer as it is held, without a copy in float64."""
        return _unrounded(node, attribute(self._root, str(node.target))) if node.op == "get_attr" else self.value(node)

    def forget(self, node: fx.Node) -> None:
        """Drops the value of a node that nothing reads any more, and of what only led to it."""
        pending = [node]
        while pending:
            gone = pending.pop()
            if gone in self._values and not any(user in self._values for user in gone.users):
                del self._values[gone]
                pending.extend(gone.all_input_nodes)

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            held = attribute(self._root, str(node.target))
            return pinned(node) is None and getattr(held, "layout", torch.strided) is torch.strided
        if node.op in ("placeholder", "output") or pinned(node) or mutated(node, self._root) is not None:
            return False
        if any(other not in self._constant for other in self._operands(node)):
            return False
        if not node.all_input_nodes and not _is_filled(node):
            return False
        if self._rounds(node) or (node.op == "call_module" and not self._may_be_computed(module_of(node, self._root))):
            return False
        name = _name(node)
        return not (_RANDOM.search(name) or _UNSTRIDED.search(name) or node.target is operator.setitem)

    def _may_be_computed(self, module: nn.Module | None) -> bool:
        """Whether the module makes a constant of one; without `layers` it must not have weights, as an activation."""
        return computes_the_same(module) and (self._layers or not any(True for _ in module.parameters()))  # type: ignore[union-attr]

    def _operands(self, node: fx.Node) -> list[fx.Node]:
        """The nodes whose values a node needs: not those of which it only asks for the dtype and the device."""
        like = self._like(node)
        return [other for other in node.all_input_nodes if other is not like]

    def _like(self, node: fx.Node) -> fx.Node | None:
        """The tensor whose dtype or device a node asks for, if that is the model's own."""
        other = None
        if node.target is getattr and node.args[1] in ("device", "dtype"):
            other = node.args[0]
        elif node.op == "call_method" and node.target in ("to", "type_as") and len(node.args) == 2:
            other = node.args[1]
        elif node.op == "call_method" and node.target in _NEW:
            other = node.args[0]
        if not isinstance(other, fx.Node) or other in self._constant or info(other) is None or node.kwargs.get("other"):
            return None
        if other in (*node.args[1:], *node.kwargs.values()) and node.args[0] is other:
            return None
        asks_device_only = node.target is getattr and node.args[1] == "device"
        return other if asks_device_only or self._has_own_dtype(other) else None

    def _has_own_dtype(self, node: fx.Node) -> bool:
        """Whether a tensor has the dtype of the model's weights for every input that the model takes."""
        if _eps(node) != self._precision:
            return False
        return any(map(self._has_weights, _reached(node, lambda one: one.all_input_nodes))) or any(
            map(self._has_weights, _reached(node, lambda one: one.users))
        )

    def _has_weights(self, node: fx.Node) -> bool:
        module = module_of(node, self._root)
        if module is not None:
            return any(_eps_of(parameter.dtype) == self._precision for parameter in module.parameters())
        name = getattr(node.target, "__name__", "")
        weight = node.args[1] if node.op == "call_function" and len(node.args) > 1 else node.kwargs.get("weight")
        return name in _LAYERS and isinstance(weight, fx.Node) and _eps(weight) == self._precision

    def _rounds(self, node: fx.Node) -> bool:
        """Whether the node computes in less precision than the model has, and so rounds."""
        return _eps(node) > self._precision and _name(node) not in _EXACT

    def _evaluate(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return _doubled(_unrounded(node, attribute(self._root, str(node.target))))
        like = self._like(node)
        values = self._values if like is None else {**self._values, like: _stand_in(like)}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda other: values[other])
        if node.op == "call_method" and node.target in _CASTS:
            return args[0].detach().to(torch.float64)  # type: ignore[union-attr]
        args, kwargs = pytree.tree_map_only(torch.dtype, _widened, (args, kwargs))
        with torch.no_grad(), _default_float64():
            if node.op == "call_module":
                value = copy.deepcopy(module_of(node, self._root)).double()(*args, **kwargs)  # type: ignore[union-attr]
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(value, torch.Tensor) and _eps(node) > self._precision:
            value = value.to(info(node).dtype)  # type: ignore[union-attr]
        return pytree.tree_map_only(torch.Tensor, _doubled, value)


@contextmanager
def _default_float64() -> Iterator[None]:
    """Inside, what is made of Python's numbers or of integers has their precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _is_filled(node: fx.Node) -> bool:
    """Whether a call makes a tensor of literals alone."""
    return node.op == "call_function" and node.target in _FILLED


def _reached(node: fx.Node, next_of: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """All nodes that can be reached from one, itself apart."""
    pending, seen = [node], {node}
    while pending:
        for other in next_of(pending.pop()):
            if other not in seen:
                seen.add(other)
                pending.append(other)
                yield other


def _stand_in(like: fx.Node) -> torch.Tensor:
    """Something of the dtype and device of a tensor of which no more is asked; it has no elements."""
    tensor = info(like)
    assert tensor is not None
    return torch.empty(0, dtype=_widened(tensor.dtype), device=tensor.device)


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
    return 0.0 if tensor is None else _eps_of(tensor.dtype)


def _eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        return value.to(torch.float64) if value.dtype.is_floating_point else value
    return value
