"""Small questions about graph nodes: what they are called, where they stand, what tensor they carry."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from reparam.capture.captured import TensorInfo
from reparam.graph.place import Place


def place(node: fx.Node) -> Place:
    """Where the node stands in the user's model."""
    return Place(node.meta.get("module_path") or node.name, node.meta.get("source"))


def stand_for(new: fx.Node, old: fx.Node) -> None:
    """Says that a new node is in the user's model where an old one was, for which it was made."""
    new.meta["module_path"] = old.meta.get("module_path", old.name)
    new.meta["source"] = old.meta.get("source")
    new.meta["stands_for"] = old.name


def info(node: fx.Node) -> TensorInfo | None:
    """Shape, dtype and device of the node's value for the example inputs, if it is a tensor."""
    found = node.meta.get("tensor")
    return found if isinstance(found, TensorInfo) else None


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The leaf module a node calls."""
    if node.op != "call_module":
        return None
    module: nn.Module | None = root
    for name in str(node.target).split("."):
        module = module._modules[name]  # type: ignore[union-attr]  # what get_submodule does, without its checks
    return module


def is_parametrized(module: nn.Module) -> bool:
    """`torch.nn.utils.parametrize.is_parametrized`, which asks in a slower way."""
    return "parametrizations" in module._modules


def attribute(root: nn.Module, target: str) -> Any:
    """The parameter, buffer or other attribute that a `get_attr` node names."""
    value: Any = root
    for name in target.split("."):
        value = getattr(value, name)
    return value


def kind(node: fx.Node, root: nn.Module) -> str:
    """What a person would call the operation: `Conv2d`, `batch_norm`, `add`."""
    if node.op == "call_module":
        return type(module_of(node, root)).__name__
    if node.op in ("call_function", "call_method"):
        if node.target is operator.getitem:
            return "indexing"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return str(name).split(".")[0]
    return {"placeholder": "the model's input", "output": "the model's output", "get_attr": "a constant"}[node.op]


def described(node: fx.Node, root: nn.Module) -> str:
    """`layer1.conv1: Conv2d`, for lists of what was replaced."""
    return f"{place(node).module}: {kind(node, root)}"


def is_floating(node: fx.Node) -> bool:
    """Whether the node's value is a real floating-point tensor."""
    tensor = info(node)
    return tensor is not None and tensor.dtype.is_floating_point


def same_kind_of_tensor(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes carry tensors of equal shape, dtype and device."""
    return info(a) is not None and info(a) == info(b)


def pinned(node: fx.Node) -> str | None:
    """Why the node must stay where it is (its storage is written to under another name), or None."""
    reason = node.meta.get("pinned")
    return reason if isinstance(reason, str) else None


def escapes(node: fx.Node) -> bool:
    """Whether the model returns the node's tensor, or a view of it."""
    pending, seen = [node], {node}
    while pending:
        one = pending.pop()
        for user in one.users:
            if user.op == "output":
                return True
            if user not in seen and (info(user) is None or one in user.meta.get("aliases", ())):
                seen.add(user)
                pending.append(user)
    return False


def free_name(root: nn.Module, node: fx.Node) -> str:
    """A qualified name that nothing in the model has."""
    stem = f"{place(node).module}_moved"
    index = 0
    while _has(root, name := f"{stem}{index or ''}"):
        index += 1
    return name


def _has(root: object, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(root, part):
            return False
        root = getattr(root, part)
    return True


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a qualified name, making plain parents where there are none."""
    *parents, name = path.split(".")
    owner = root
    for parent in parents:
        if not isinstance(getattr(owner, parent, None), nn.Module):
            setattr(owner, parent, nn.Module())
        owner = getattr(owner, parent)
    if name in owner.__dict__ or name in owner._parameters or name in owner._buffers:
        delattr(owner, name)
    setattr(owner, name, module)


def replace_by_literal(node: fx.Node, value: Any) -> None:
    """Puts a number where a node's value was read, and erases the node."""

    def swap(argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda other: value if other is node else other)

    for user in list(node.users):
        user.args, user.kwargs = swap(user.args), swap(user.kwargs)
    node.graph.erase_node(node)
