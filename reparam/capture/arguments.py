"""Checks at the head of a graph: what was a tensor in the example must be one, of as many dims.

The rank is what every later step goes by: which axis holds the channels, what a dim counted from the front means, how
a constant broadcasts. Only where all that can be reached from an argument counts from the back may it be another one.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

from reparam.checks import CHECKS, require_member, require_tensor

# They treat the last axis, or every element by itself.
_ANY_RANK_MODULES = (
    *(nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Dropout, nn.Embedding, nn.ReLU, nn.ReLU6, nn.LeakyReLU),
    *(nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid),
    *(nn.Hardtanh, nn.Softplus, nn.Softsign),
)
_ANY_RANK_FUNCTIONS = set(
    """
    linear layer_norm rms_norm dropout embedding relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh
    hardswish hardsigmoid hardtanh softplus softsign exp log sqrt rsqrt abs neg square clone float double half
    detach contiguous
    """.split()
)
_ARITHMETIC = set("add sub mul truediv div pow iadd isub imul itruediv ipow".split())


def check_arguments(graph: fx.Graph, root: nn.Module) -> None:
    """Adds the checks, each behind the node that reads the argument."""
    for node in list(graph.nodes):
        if node.target is operator.getitem and _is_container(node.args[0]) and isinstance(node.args[1], (int, str)):
            with graph.inserting_before(node):
                _locate(graph.call_function(require_member, (node.args[0], node.args[1], name_of(node.args[0]))), node)
        tensor = node.meta.get("tensor")
        if tensor is None or not node.users or not is_given(node):
            continue
        rank = None if _takes_any_rank(node, root) else len(tensor.shape)
        with graph.inserting_after(node):
            check = graph.call_function(require_tensor, (node, rank, name_of(node)))
        _locate(check, node)


def _locate(check: fx.Node, node: fx.Node) -> None:
    check.meta.update({key: node.meta[key] for key in ("module_path", "source") if key in node.meta})


def _is_container(node: Any) -> bool:
    return isinstance(node, fx.Node) and "tensor" not in node.meta and is_given(node)


def is_given(node: fx.Node) -> bool:
    """Whether it is an argument, or read out of one that is a container."""
    while node.target in (operator.getitem, getattr) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
        if "tensor" in node.meta:
            return False
    return node.op == "placeholder"


def name_of(node: fx.Node) -> str:
    """What the caller calls an argument, or a part of one: `x`, `batch['mask']`."""
    if node.op == "placeholder":
        return str(node.target).lstrip("*")
    owner, key = node.args[:2]
    name = name_of(owner) if isinstance(owner, fx.Node) else ""
    return f"{name}.{key}" if node.target is getattr else f"{name}[{key!r}]"


def _takes_any_rank(given: fx.Node, root: nn.Module) -> bool:
    made_of_it, pending = {given}, [given]
    while pending:
        new = [user for user in pending.pop().users if user not in made_of_it]
        made_of_it.update(new)
        pending += new
    return all(_is_of_any_rank(node, root, made_of_it) for node in made_of_it if node is not given)


def _is_of_any_rank(node: fx.Node, root: nn.Module, made_of_it: set[fx.Node]) -> bool:
    if node.op == "output" or node.target in CHECKS:
        return True
    if node.op == "call_module":
        return type(root.get_submodule(str(node.target))) in _ANY_RANK_MODULES
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.rstrip("_") not in _ARITHMETIC:
        return name.rstrip("_") in _ANY_RANK_FUNCTIONS
    # A constant of two axes or more lies on axes that are counted from the front of what it meets.
    others = [other for other in node.all_input_nodes if other not in made_of_it and "tensor" in other.meta]
    return all(len(other.meta["tensor"].shape) < 2 for other in others)
