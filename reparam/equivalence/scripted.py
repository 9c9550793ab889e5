"""TorchScript whose code names dtypes: torch's interpreter runs it in them, whatever the dtype of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from reparam.widen import NARROW

_CODES = (5, 6, 15)
"""What TorchScript calls float16, float32 and bfloat16: c10's ScalarType."""


def names_narrow_dtypes(module: nn.Module) -> bool:
    """Whether a TorchScript module in it casts to a dtype narrower than float64, makes tensors in one, or holds one.

    Such code in float64 rounds as it does when it is deployed, or stops where two dtypes do not go together.
    """
    return any(_names(part) for part in module.modules() if isinstance(part, torch.jit.ScriptModule))


def _names(script: torch.jit.ScriptModule) -> bool:
    try:
        graph = script.inlined_graph
    except (AttributeError, RuntimeError):  # a module without a forward: its parts are asked
        return False
    return any(_is_narrow(node) for node in _nodes(graph))


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _is_narrow(node: Any) -> bool:
    if node.kind() == "prim::Constant":
        value = node.output().toIValue()
        return isinstance(value, torch.Tensor) and value.dtype in NARROW and value.dim() > 0
    try:
        arguments = torch._C.parse_schema(node.schema()).arguments
    except RuntimeError:  # it has none, as an `if`
        return False
    given = dict(zip((argument.name for argument in arguments), node.inputs(), strict=False))
    if "dtype" not in given:
        return False
    kind = given["dtype"].node().kind()
    if kind == "prim::Constant":
        return given["dtype"].toIValue() in _CODES
    return bool(kind != "prim::dtype")  # that of another tensor follows the weights; an attribute or a choice may not
