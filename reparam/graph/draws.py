"""The randomness audit of a captured graph: no node that the result depends on may draw random numbers.

Capture marks the nodes that moved a random generator when they ran (`meta["draws"]`); what nobody reads is dropped.
"""

from __future__ import annotations

from torch import fx, nn

from reparam.chance import Draw, refusal
from reparam.errors import UnfitModelError
from reparam.graph.nodes import kind
from reparam.graph.normal import eliminate_dead_code


def refuse_random(graph: fx.Graph, root: nn.Module, model: nn.Module) -> None:
    """Drops draws that nobody reads; `model` is what the graph was captured of, for names.

    Raises:
        UnfitModelError: other draws are left. The message names them.
    """
    if not any(node.meta.get("draws") for node in graph.nodes):
        return
    eliminate_dead_code(graph)
    draws = [_draw(node, root, model) for node in graph.nodes if node.meta.get("draws")]
    if draws:
        raise UnfitModelError(refusal(type(model).__name__, draws))


def _draw(node: fx.Node, root: nn.Module, model: nn.Module) -> Draw:
    path = str(node.meta.get("module_path") or "")
    try:
        return Draw.of(kind(node, root), path, model.get_submodule(path), node.meta.get("source"))
    except AttributeError:  # a program that was exported elsewhere has no modules
        return Draw(kind(node, root), path, source=node.meta.get("source"), alone=False)


__all__ = ["refuse_random"]
