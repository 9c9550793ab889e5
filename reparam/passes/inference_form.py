"""What training needs and inference does not: dropout in eval mode and modules that return their input.

`dropout(x) = x` in eval mode (Srivastava et al. 2014, in the inverted form of torch); a node that returns its input
under another name is replaced by its input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from reparam.graph.nodes import described, module_of, place
from reparam.graph.normal import eliminate_dead_code
from reparam.passes.base import Refusal, Rewrite

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_FUNCTIONS = {
    F.dropout: 2,
    F.dropout1d: 2,
    F.dropout2d: 2,
    F.dropout3d: 2,
    F.alpha_dropout: 2,
    F.feature_alpha_dropout: 2,
    torch.dropout: 2,
}


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
                rewrites.append(Rewrite(self.name, place(node), (described(node, root),), "", what))
                node.replace_all_uses_with(node.args[0] if node.args else node.kwargs["input"])
                graph.erase_node(node)
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
    if node.op == "call_function" and node.target in _FUNCTIONS:
        training = _argument(node, "train" if node.target is torch.dropout else "training", _FUNCTIONS[node.target])
        default = node.target in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
        if training is False or (training is None and not default):
            return "dropout(x) = x in eval mode"
        if _argument(node, "p", 1) == 0:
            return "dropout(x) = x for p = 0"
        return _still_random(node)
    return None


def _no_op_module(node: fx.Node, module: nn.Module) -> str | Refusal | None:
    if not isinstance(module, (*_DROPOUT, nn.Identity)) or type(module) not in (*_DROPOUT, nn.Identity):
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        why = "it has forward hooks, which removing it would lose"
        return Refusal("inference form", place(node), type(module).__name__, why, "remove the hooks, then fuse")
    if isinstance(module, nn.Identity):
        return "identity(x) = x"
    return _still_random(node) if module.training and module.p else "dropout(x) = x in eval mode"


def _still_random(node: fx.Node) -> Refusal:
    return Refusal(
        "inference form",
        place(node),
        "dropout",
        "it drops at random in eval mode too (training=True)",
        "pass training=self.training, so that it is off at inference",
    )


def _argument(node: fx.Node, name: str, index: int) -> Any:
    return node.kwargs.get(name, node.args[index] if len(node.args) > index else None)
