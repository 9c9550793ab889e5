"""Why something that looks foldable stayed: one `Refusal` for each.

Looked at are the affine nodes that stay as they are: every BatchNorm, and every other node beside another affine node.
"""

from __future__ import annotations

from torch import fx, nn

from reparam.algebra import Inexact
from reparam.graph.lift import Carried, Lifted
from reparam.graph.nodes import kind, place
from reparam.graph.table import TABLE
from reparam.passes.base import Refusal
from reparam.passes.region import Region
from reparam.passes.search import Search


def reasons(region: Region, search: Search, root: nn.Module, failed: dict[fx.Node, Inexact]) -> list[Refusal]:
    """A refusal for each node of the table that stays although it looks foldable."""
    found = []
    for node, why in region.inexact.items():
        if _is_norm(node, root) or any(other in region for other in (*node.all_input_nodes, *node.users)):
            found.append(Refusal("collapse", place(node), kind(node, root), why.reason, why.remedy))
    for node, why in failed.items():
        found.append(Refusal("collapse", place(node), kind(node, root), why.reason, why.remedy))
    for node in region.affine:
        if node not in search.real or node in failed or len(search.cone(node)) > 1 or not node.users:
            continue
        if node.meta.get("refused"):  # an earlier pass has said why
            continue
        if not isinstance(region.affine[node].lift, Lifted):
            continue
        left = _why(node, region, search, root)
        if left is not None:
            found.append(Refusal("collapse", place(node), kind(node, root), left.reason, left.remedy))
    return found


def _is_norm(node: fx.Node, root: nn.Module) -> bool:
    row = TABLE.row(node, root)
    return row is not None and row.name == "batch normalisation"


def _why(node: fx.Node, region: Region, search: Search, root: nn.Module) -> Inexact | None:
    """Why an affine node stays alone, or None if it does not look foldable."""
    norm = _is_norm(node, root)
    for operand in _neighbours(node, region):
        if operand in region:
            return _why_edge(operand, node, region, search, root) if norm or _looks_foldable(node, region) else None
    for user in node.users:
        if user in region and norm:
            return _why_edge(node, user, region, search, root)
    if not norm:
        return None
    inputs = " and ".join(_named(other, root) for other in region.affine[node].operands)
    outputs = " and ".join(_named(other, root) for other in list(node.users)[:3])
    return Inexact(f"nothing linear is beside it: it reads {inputs} and feeds {outputs}")


def _why_edge(operand: fx.Node, node: fx.Node, region: Region, search: Search, root: nn.Module) -> Inexact:
    blocked = search.blocked.get((operand, node))
    if blocked is not None:
        return blocked
    other_users = [user for user in operand.users if user is not node]
    if operand in search.forced and other_users:
        readers = " and ".join(_named(user, root) for user in other_users[:3])
        return Inexact(
            f"the output of {_named(operand, root)} also feeds {readers}", "give the other reader a tensor of its own"
        )
    return Inexact("merging it is exact, but the merged layers would cost more than these do")


def _neighbours(node: fx.Node, region: Region) -> list[fx.Node]:
    """The operands, seen through operations that scales and layers commute with."""
    found = []
    for operand in region.affine[node].operands:
        while operand in region and isinstance(region.affine[operand].lift, Carried):
            (operand,) = region.affine[operand].operands
        found.append(operand)
    return found


def _looks_foldable(node: fx.Node, region: Region) -> bool:
    """A chain or a scale; a sum of two tensors stands between layers for good reason."""
    return len(region.affine[node].operands) == 1


def _named(node: fx.Node, root: nn.Module) -> str:
    if node.op in ("placeholder", "output"):
        return kind(node, root)
    return f"{place(node).module}" if node.op == "call_module" else f"{kind(node, root)} in {place(node)}"
