"""Calls that their arguments make do nothing, and copies that nothing tells from their original.

    leaky_relu(x, slope 1) = x,  pad(x, 0) = x,  pool(x, windows of 1) = x,  cat(split(x)) = x,  clone(x) = x

A copy can be told from its original by writing to one of them, in which case both are pinned; by a caller who gets it,
which is for whoever asks to find out; and by `view`, if the original may have gaps in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from reparam.graph.constants import computes_the_same
from reparam.graph.nodes import info, module_of

_LAYOUT = frozenset("view view_as as_strided stride is_contiguous data_ptr storage_offset contiguous unfold".split())
"""What asks how a tensor lies in memory."""
_POOLS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d)
_POOL_LAYERS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_SPLITS = (torch.split, "split", torch.chunk, "chunk", torch.tensor_split, "tensor_split")
_PAD_LAYERS = (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
_SIGNATURE = ("input", "first", "stride", "padding")

Found = tuple[fx.Node, str]


def idle(node: fx.Node, root: nn.Module) -> Found | None:
    """The tensor that a node's value is, and why; None if it is another one."""
    if node.op == "call_module":
        return _of_module(node, root)
    return _of_call(node) or _rejoined(node) or _copied(node)


def _of_call(node: fx.Node) -> Found | None:
    given: dict[str, Any] = dict(zip(_SIGNATURE, node.args, strict=False)) | dict(node.kwargs)
    source = given.get("input")
    if not isinstance(source, fx.Node) or len(node.args) > len(_SIGNATURE):
        return None
    if node.target in (F.leaky_relu, torch._C._nn.leaky_relu):
        return _if(given.get("first", given.get("negative_slope")) == 1, source, "leaky_relu(x, slope 1) = x")
    if node.target in (F.pad, torch._C._nn.pad):
        return _if(_all_are(given.get("first", given.get("pad")), 0), source, "pad(x, 0) = x")
    if node.target in _POOLS:
        window = given.get("first", given.get("kernel_size"))
        return _if(_is_pool_of_one({**given, "kernel_size": window}), source, "pool(x, windows of 1) = x")
    return None


def _of_module(node: fx.Node, root: nn.Module) -> Found | None:
    module: Any = module_of(node, root)
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(source, fx.Node) or not computes_the_same(module):
        return None
    if type(module) is nn.LeakyReLU:
        return _if(module.negative_slope == 1, source, "leaky_relu(x, slope 1) = x")
    if type(module) in _PAD_LAYERS:
        return _if(_all_are(module.padding, 0), source, "pad(x, 0) = x")
    if type(module) in _POOL_LAYERS:
        return _if(_is_pool_of_one(vars(module)), source, "pool(x, windows of 1) = x")
    return None


def _if(holds: bool, source: fx.Node, identity: str) -> Found | None:
    return (source, identity) if holds else None


def _all_are(value: Any, number: int) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return len(values) > 0 and all(type(one) is int and one == number for one in values)


def _is_pool_of_one(given: dict[str, Any]) -> bool:
    stride = given.get("stride")
    moves = stride not in (None, (), []) and not _all_are(stride, 1)
    further = given.get("return_indices") or given.get("divisor_override") is not None
    at_one_place = _all_are(given["kernel_size"], 1) and _all_are(given.get("padding", 0), 0)
    return at_one_place and not moves and not further


def _rejoined(node: fx.Node) -> Found | None:
    """All parts of a tensor, put together again where they were taken apart."""
    split = node.args[0] if node.args else node.kwargs.get("tensors")
    if node.target not in (torch.cat, torch.concat, torch.concatenate) or not isinstance(split, fx.Node):
        return None
    source = split.args[0] if split.args else None
    tensor = info(source) if isinstance(source, fx.Node) else None
    if tensor is None or split.target not in _SPLITS or not isinstance(source, fx.Node):
        return None
    axes: list[Any] = [
        one.args[at] if len(one.args) > at else one.kwargs.get("dim", 0) for one, at in ((node, 1), (split, 2))
    ]
    same = all(type(axis) is int for axis in axes) and len({axis % len(tensor.shape) for axis in axes}) == 1
    return _if(same, source, "cat(split(x)) = x")


def _copied(node: fx.Node) -> Found | None:
    source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if node.target not in (torch.clone, "clone") or not isinstance(source, fx.Node):
        return None
    dense = source.op.startswith("call") and not source.meta.get("aliases")
    return _if(dense or not _layout_is_asked_for(node), source, "clone(x) = x")


def _layout_is_asked_for(node: fx.Node) -> bool:
    """Whether a reader, of the tensor or of a view of it, asks how it lies in memory."""
    pending, seen = [node], {node}
    while pending:
        one = pending.pop()
        for user in one.users:
            name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
            if name in _LAYOUT:
                return True
            if user not in seen and (info(user) is None or one in user.meta.get("aliases", ())):
                seen.add(user)
                pending.append(user)
    return False


__all__ = ["idle"]
