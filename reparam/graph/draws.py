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
    draws = [
        Draw(kind(node, root), *_owner(str(node.meta.get("module_path") or ""), model), node.meta.get("source"))
        for node in graph.nodes
        if node.meta.get("draws")
    ]
    if draws:
        raise UnfitModelError(refusal(type(model).__name__, draws))


def _owner(path: str, model: nn.Module) -> tuple[str, str]:
    """Qualified name and class of the module in whose forward a node stands."""
    try:
        return path, type(model.get_submodule(path)).__name__
    except AttributeError:
        return path, ""


__all__ = ["refuse_random"]
