"""What the report shows of a graph: taken before the passes and after them, and the two brought together.

Taken as it is, without tensors. Which nodes became which follows from what the passes told the ledger (the nodes that
each rewrite replaced) and from what new nodes were made for: nodes that are connected so form a region.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from reparam.checks import CHECKS
from reparam.graph.constants import Constants
from reparam.graph.nodes import info, kind, module_of
from reparam.passes.base import Rewrite
from reparam.passes.ledger import replaced_by
from reparam.report.view import GraphView, NodeView


@dataclass(frozen=True)
class Taken:
    """A graph as it was: its nodes, and for each the names that it goes by: its own, and that of what it stands for."""

    nodes: tuple[NodeView, ...]
    names: tuple[tuple[str, ...], ...]


def taken(graph: fx.Graph, root: nn.Module) -> Taken:
    """The graph as it is now: inputs, outputs, and the operations that `count_operations` counts."""
    constants = Constants(graph, root)
    nodes: list[NodeView] = []
    names: list[tuple[str, ...]] = []
    reads: dict[fx.Node, tuple[int, ...]] = {}
    for node in graph.nodes:
        inputs = tuple(dict.fromkeys(index for other in node.all_input_nodes for index in reads.get(other, ())))
        if node.op == "get_attr" or node in constants or node.target in CHECKS:
            reads[node] = inputs
            continue
        reads[node] = (len(nodes),)
        tensor = info(node)
        names.append(tuple(name for name in (node.name, node.meta.get("stands_for")) if name is not None))
        shape = None if tensor is None else tuple(tensor.shape)
        path = str(node.target) if node.op == "call_module" else node.meta.get("module_path") or ""
        source = node.meta.get("source")
        nodes.append(NodeView(kind(node, root), path, source, shape, inputs, detail=_detail(node, root)))
    return Taken(tuple(nodes), tuple(names))


def _detail(node: fx.Node, root: nn.Module) -> str:
    """The settings of a layer of torch; no code of the user's is run for it."""
    if node.op == "placeholder":
        return node.name
    module = module_of(node, root)
    known = module is not None and type(module).__module__.startswith("torch.nn.modules.")
    return module.extra_repr() if module is not None and known else ""


def side_by_side(before: Taken, after: Taken, rewrites: Sequence[Rewrite]) -> GraphView:
    """Both graphs with their regions, numbered in the order of the original.

    A rewrite of which neither graph shows a node (it was of weights alone) is in none.
    """
    groups = _Groups()
    for names in after.names:
        groups.join(names)
    for rewrite in rewrites:
        groups.join(replaced_by(rewrite))
    found: dict[str, list[int]] = {}
    for index, rewrite in enumerate(rewrites):
        for name in replaced_by(rewrite)[:1]:
            found.setdefault(groups.of(name), []).append(index)
    _follow_readers(before, {groups.of(name) for names in after.names for name in names} | set(found), groups)
    of = [[groups.of(names[0]) for names in side.names] for side in (before, after)]
    order = {groups.of(group): group for group in found}
    numbers = {group: number for number, group in enumerate(dict.fromkeys(g for g in (*of[0], *of[1]) if g in order))}
    left, right = (
        tuple(replace(node, region=numbers.get(group)) for node, group in zip(side.nodes, ours, strict=True))
        for side, ours in zip((before, after), of, strict=True)
    )
    return GraphView(left, right, tuple(tuple(found[order[group]]) for group in numbers))


def _follow_readers(before: Taken, known: set[str], groups: _Groups) -> None:
    """A node that no rewrite names and that is gone went with the region of its readers, if they are of one."""
    readers: list[set[str]] = [set() for _ in before.nodes]
    for index in range(len(before.nodes) - 1, -1, -1):
        name = before.names[index][0]
        if groups.of(name) not in known and len(readers[index]) == 1:
            groups.join((*readers[index], name))
        for source in before.nodes[index].inputs:
            readers[source].add(groups.of(name))


class _Groups:
    """Names that belong together."""

    def __init__(self) -> None:
        self._of: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The name that stands for a group."""
        while (parent := self._of.get(name, name)) != name:
            self._of[name] = self._of.get(parent, parent)  # so that chains stay short
            name = parent
        return name

    def join(self, names: Iterable[str]) -> None:
        """Makes names, and all that belongs to them, one group."""
        roots = list(dict.fromkeys(map(self.of, names)))
        for other in roots[1:]:
            self._of[other] = roots[0]
