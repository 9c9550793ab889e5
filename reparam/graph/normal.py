"""Normal form of a captured graph: no in-place operations, no checks that are always true.

In-place operations become plain ones, and every later use of what they wrote to reads the result instead:

    y = relu_(x); z = f(x)     ->     y = relu(x); z = f(y)

That holds only if all names of the storage are names of the *same view*. Where a different view of it is read later,
nothing is changed and every name of that storage is pinned: it keeps its place and is not rewritten.
`restore_in_place` puts the in-place forms back where the input is fresh and read by nobody else, to keep their speed.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from reparam.checks import CHECKS
from reparam.graph.nodes import attribute, info, module_of, replace_by_literal, set_module

_PLAIN_OPERATOR: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
}
_NOT_FUNCTIONAL = {"zero_", "fill_", "copy_", "set_", "resize_", "normal_", "uniform_", "requires_grad_", "data"}


def normalise(graph: fx.Graph, root: nn.Module) -> None:
    """Brings the graph into normal form, in place."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    mutations = [(node, target) for node in graph.nodes if (target := mutated(node, root)) is not None]
    storages = _Storages(graph) if mutations else None
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    for node, target in mutations:
        assert storages is not None
        _make_plain(node, target, root, order, storages, shared=calls[str(node.target)] > 1)
    _pin_other_writes(graph, root)
    _pin_modules_written_to(graph, root)
    _drop_certain_checks(graph)


def restore_in_place(graph: fx.Graph, root: nn.Module) -> None:
    """Turns operations that were in-place originally back, where the input is fresh and has no other reader."""
    for node in graph.nodes:
        original = node.meta.get("in_place")
        if original is None or not _only_reader_of_fresh_tensor(node):
            continue
        if node.op == "call_module" and node.target == original[0]:
            root.get_submodule(str(node.target)).inplace = True  # type: ignore[assignment]
        else:
            node.target, node.kwargs = original[0], {**node.kwargs, **original[1]}


def _pin_other_writes(graph: fx.Graph, root: nn.Module) -> None:
    """Pins what is written to by operations whose names do not say so (`torch._foreach_add_([x, y], 1)`)."""
    others = [node for node in graph.nodes if node.meta.get("writes") and mutated(node, root) is None]
    others = [node for node in others if node.meta.get("in_place") is None]
    storages = _Storages(graph) if others else None
    for node in others:
        assert storages is not None
        for target in node.meta["writes"]:
            _pin(node, storages.names(target))


def _pin_modules_written_to(graph: fx.Graph, root: nn.Module) -> None:
    """Pins the calls of modules whose tensors other nodes write to: their weights are no constants."""
    written = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.meta.get("pinned")}
    storages = {attribute(root, name).untyped_storage().data_ptr() for name in written}
    for node in graph.nodes if storages else ():
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            tensors = [*module.parameters(), *module.buffers()]
            if any(tensor.untyped_storage().data_ptr() in storages for tensor in tensors):
                node.meta["pinned"] = _STATE


_STATE = "it belongs to the model's state"


def _pin(node: fx.Node, names: list[fx.Node]) -> None:
    state = any(name.op == "get_attr" for name in names)
    for name in (node, *names):
        name.meta["pinned"] = _STATE if state else "its storage is written to under another name"


def mutated(node: fx.Node, root: nn.Module) -> fx.Node | None:
    """The node whose storage this node writes to, or None."""
    if node.op == "call_module":
        writes = getattr(module_of(node, root), "inplace", False) is True
    elif node.op == "call_method":
        name = str(node.target)
        writes = (name.endswith("_") and not name.endswith("__")) or name in ("__setitem__",)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        writes = (
            node.target in _PLAIN_OPERATOR
            or node.target is operator.setitem
            or (name.endswith("_") and not name.endswith("__"))
            or _inplace_argument(node) is True
            or node.kwargs.get("out") is not None
        )
    else:
        return None
    if not writes:
        return None
    target = node.kwargs.get("out") or (node.args[0] if node.args else node.kwargs.get("input"))
    return target if isinstance(target, fx.Node) and (info(target) or node.target not in _PLAIN_OPERATOR) else None


class _Storages:
    """Which nodes name the same storage, and which of them name the same view of it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        self._view: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            for other in node.meta.get("aliases", ()):
                self._parent[self._root(self._parent, node)] = self._root(self._parent, other)
            for other in node.meta.get("same_view_as", ()):
                self._view[self._root(self._view, node)] = self._root(self._view, other)
        self._members: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self._members.setdefault(self._root(self._parent, node), []).append(node)

    def names(self, node: fx.Node) -> list[fx.Node]:
        """Every node that names the storage of this one, itself included."""
        return self._members[self._root(self._parent, node)]

    def same_view(self, a: fx.Node, b: fx.Node) -> bool:
        """Whether two names of one storage name the same view of it."""
        return self._root(self._view, a) is self._root(self._view, b)

    @staticmethod
    def _root(parent: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
        while parent.get(node, node) is not node:
            node = parent[node]
        return node


def _make_plain(
    node: fx.Node, target: fx.Node, root: nn.Module, order: dict[fx.Node, int], storages: _Storages, shared: bool
) -> None:
    names = storages.names(target)
    read_later = [
        name
        for name in names
        if name is not node and order[name] < order[node] and any(order[user] > order[node] for user in name.users)
    ]
    plain = _plain(node, root, shared)
    state = any(name.op == "get_attr" for name in names)
    if plain is None or state or not all(storages.same_view(name, target) for name in read_later):
        _pin(node, names)
        return
    for name in read_later:
        name.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
    plain()


def _plain(node: fx.Node, root: nn.Module, shared: bool) -> Callable[[], None] | None:
    """What turns an in-place node into its plain form, or None if it has none."""
    if any(info(other) != info(node) for other in node.all_input_nodes[:1]):
        return None
    if any(
        (tensor := info(other)) is not None and tensor.dtype != getattr(info(node), "dtype", None)
        for other in node.all_input_nodes
    ):
        return None
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))

        def unset() -> None:
            node.meta["in_place"] = (node.target, {})
            if shared:  # another call of the same module may have to stay in-place
                twin = copy.copy(module)
                node.target = f"{node.target}_out_of_place"
                set_module(root, str(node.target), twin)
                twin.inplace = False  # type: ignore[assignment]
            else:
                module.inplace = False  # type: ignore[assignment]

        return unset
    if node.kwargs.get("out") is not None or node.target is operator.setitem:
        return None
    if node.op == "call_function" and _inplace_argument(node):
        return lambda: _without_inplace_argument(node)
    target = _plain_target(node)
    if target is None:
        return None

    def retarget() -> None:
        node.meta["in_place"] = (node.target, {})
        node.target = target

    return retarget


def _plain_target(node: fx.Node) -> Any:
    if node.op == "call_function" and node.target in _PLAIN_OPERATOR:
        return _PLAIN_OPERATOR[node.target]
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in _NOT_FUNCTIONAL:
        return None
    plain = name[:-1]
    if node.op == "call_method":
        return plain if hasattr(torch.Tensor, plain) else None
    return getattr(torch, plain, None) or getattr(F, plain, None)


def _inplace_argument(node: fx.Node) -> Any:
    if "inplace" in node.kwargs:
        return node.kwargs["inplace"]
    index = _inplace_index(node.target)
    return node.args[index] if index is not None and index < len(node.args) else None


@lru_cache(maxsize=1024)
def _inplace_index(function: Any) -> int | None:
    """The position of the argument `inplace` in a function's signature, if it has one."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def _without_inplace_argument(node: fx.Node) -> None:
    if "inplace" in node.kwargs:
        node.kwargs = {**node.kwargs, "inplace": False}
    else:
        index = _inplace_index(node.target)
        assert index is not None
        node.args = (*node.args[:index], *node.args[index + 1 :])
    node.meta["in_place"] = (node.target, {"inplace": True})


def _only_reader_of_fresh_tensor(node: fx.Node) -> bool:
    source = node.args[0] if node.args else node.kwargs.get("input")
    return (
        isinstance(source, fx.Node)
        and source.op not in ("placeholder", "get_attr")
        and len(source.users) == 1
        and list(node.all_input_nodes).count(source) == 1
        and not source.meta.get("aliases")
        and info(source) is not None
    )


def _drop_certain_checks(graph: fx.Graph) -> None:
    """Replaces reads of a rank by their value, and drops the assertions that then hold for certain.

    A rank cannot change with the input's sizes; without this, an assertion about it would count as a consumer.
    """
    for node in list(graph.nodes):
        rank = _rank_read(node)
        if rank is not None:
            replace_by_literal(node, rank)
        elif (
            node.op == "call_function"
            and getattr(node.target, "__module__", "") == "_operator"
            and node.target in _COMPARISONS
            and not node.all_input_nodes
            and not node.kwargs
        ):
            replace_by_literal(node, node.target(*node.args))
        elif node.op == "call_function" and node.target is torch._assert and node.args[:1] == (True,):
            graph.erase_node(node)


_COMPARISONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.contains}


def _rank_read(node: fx.Node) -> int | None:
    reads = (node.op == "call_function" and node.target is getattr and node.args[1] == "ndim") or (
        node.op == "call_method" and node.target in ("dim", "ndimension")
    )
    if not reads or not isinstance(node.args[0], fx.Node):
        return None
    tensor = info(node.args[0])
    return None if tensor is None else len(tensor.shape)


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Erases every node whose value nobody reads and that does nothing else."""
    for node in reversed(graph.nodes):
        if not node.users and not _has_effect(node):
            graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    if node.meta.get("pinned") and node.op != "get_attr":
        return True
    if node.op == "call_function" and node.target in CHECKS:
        return True
    if node.meta.get("draws"):
        return False  # numbers that nobody reads
    return node.op == "call_function" and bool(node.is_impure())
