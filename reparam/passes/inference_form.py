"""What training needs and inference does not: dropout in eval mode and modules that return their input.

`dropout(x) = x` in eval mode (Srivastava et al. 2014, in the inverted form of torch); a node that returns its input
under another name is replaced by its input.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from reparam.graph.nodes import described, module_of, place
from reparam.graph.normal import eliminate_dead_code
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.ledger import allowed

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ATEN = torch.ops.aten
# Functions that drop unless they are told otherwise, and those that are always told.
_DROP_BY_DEFAULT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_FUNCTIONS = (
    *_DROP_BY_DEFAULT,
    *(F.alpha_dropout, F.feature_alpha_dropout),
    *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout, torch.native_dropout),
    *(_ATEN.dropout, _ATEN.feature_dropout, _ATEN.alpha_dropout, _ATEN.feature_alpha_dropout, _ATEN.native_dropout),
    *(_ATEN.dropout.default, _ATEN.feature_dropout.default, _ATEN.alpha_dropout.default),
    *(_ATEN.feature_alpha_dropout.default, _ATEN.native_dropout.default),
)
_WITH_MASK = (torch.native_dropout, _ATEN.native_dropout, _ATEN.native_dropout.default)


@dataclass(frozen=True)
class InferenceForm:
    """Removes the dropout family and identities."""

    name = "inference form"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        rewrites, refusals = [], []
        for node in list(graph.nodes):
            what = _no_op(node, root)
            if isinstance(what, Refusal):
                refusals.append(what)
            elif what is not None:
                rewrite = Rewrite(self.name, place(node), (described(node, root),), "", what)
                if not allowed(rewrite, node):
                    continue
                rewrites.append(rewrite)
                _replace(node, node.args[0] if node.args else node.kwargs["input"])
        eliminate_dead_code(graph)
        return rewrites, refusals


def _no_op(node: fx.Node, root: nn.Module) -> str | Refusal | None:
    """The identity that makes a node a no-op, a refusal, or None if it is something else."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node) or node.meta.get("pinned"):
        return None
    module = module_of(node, root)
    if module is not None:
        return _no_op_module(node, module)
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return None
    if node.target in _WITH_MASK and any(
        user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users
    ):
        return None  # its mask is read
    training = _argument(node, ("training", "train"), 2)
    if training is False or (training is None and node.target not in _DROP_BY_DEFAULT):
        return "dropout(x) = x in eval mode"
    return "dropout(x) = x for p = 0" if _argument(node, ("p",), 1) == 0 else _still_dropping(node)


def _replace(node: fx.Node, value: Any) -> None:
    """Puts a value where a node was read, and erases it."""
    if node.target in _WITH_MASK:
        for part in list(node.users):
            part.replace_all_uses_with(value)
            node.graph.erase_node(part)
    node.replace_all_uses_with(value)
    node.graph.erase_node(node)


def _no_op_module(node: fx.Node, module: nn.Module) -> str | Refusal | None:
    if not isinstance(module, (*_DROPOUT, nn.Identity)) or type(module) not in (*_DROPOUT, nn.Identity):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        why = "it has forward hooks, which removing it would lose"
        return Refusal("inference form", place(node), type(module).__name__, why, "remove the hooks, then fuse")
    if isinstance(module, nn.Identity):
        return "identity(x) = x"
    return _still_dropping(node) if module.training and module.p else "dropout(x) = x in eval mode"


def _still_dropping(node: fx.Node) -> Refusal:
    """What drops at random is refused with the whole model; what is left drops everything (p = 1)."""
    return Refusal(
        "inference form",
        place(node),
        "dropout",
        "it drops in eval mode too (training=True)",
        "pass training=self.training, so that it is off at inference",
    )


def _argument(node: fx.Node, names: tuple[str, ...], index: int) -> Any:
    given = next((node.kwargs[name] for name in names if name in node.kwargs), None)
    return node.args[index] if len(node.args) > index else given
