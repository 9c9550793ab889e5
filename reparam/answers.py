"""What an exported program answers with: containers that its callers may write to."""

from __future__ import annotations

import torch
from torch.utils import _pytree as pytree

_FROZEN = "torch.fx.immutable_collections"


def plain_answers(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """`program` itself, which now returns dicts and lists where it returned frozen ones.

    torch.export runs a graph module by an interpreter, and notes the graph's own frozen containers as what the model
    returns; called as it was, the same module returns plain ones.
    """
    signature = program.module_call_graph[0].signature
    if signature is not None:
        signature.out_spec = _plain(signature.out_spec)
    return program


def _plain(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    if spec.is_leaf():
        return spec
    kind = spec.type
    if kind.__module__ == _FROZEN:
        kind = dict if issubclass(kind, dict) else list
    return pytree.TreeSpec(kind, spec.context, [_plain(child) for child in spec.children()])
