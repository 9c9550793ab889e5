"""What the report shows of a graph before and after: `NodeView`, `GraphView`. Plain data; holds no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class NodeView:
    """One operation of a graph, or one of its inputs or its output.

    Attributes:
        op: what a person would call it (`Conv2d`, `add`, `the model's input`).
        detail: its settings, as torch prints them; empty if there are none.
        module: qualified name of the layer, or, for a function, of the module whose `forward` calls it.
        source: `file.py:line` of the user's code, or None where it is not known.
        shape: of its value for the example inputs; None if that is no tensor.
        inputs: indices of the nodes that it reads, in the same graph.
        region: index of the region that it belongs to; None if it was left as it is.
    """

    op: str
    module: str
    source: str | None = None
    shape: tuple[int, ...] | None = None
    inputs: tuple[int, ...] = ()
    region: int | None = None
    detail: str = ""

    @property
    def is_operation(self) -> bool:
        """Whether it does something: no input and no output of the model."""
        return not self.op.startswith("the model's ")


@dataclass(frozen=True)
class GraphView:
    """A model's graph before and after, and which part became which.

    A region is what was changed together: the operations before, those after, and the rewrites that led from one to the
    other.

    Attributes:
        before, after: nodes in the order in which they run, weights and what is computed of weights alone left out.
        regions: for each region, indices of its rewrites in `Report.rewrites`.
    """

    before: tuple[NodeView, ...]
    after: tuple[NodeView, ...]
    regions: tuple[tuple[int, ...], ...] = ()

    @property
    def removed(self) -> frozenset[int]:
        """Regions for which nothing stands in the graph after."""
        return frozenset(range(len(self.regions))) - {node.region for node in self.after}

    @property
    def anchors(self) -> tuple[str, ...]:
        """For each region the side and the index of its first node: `before-12`."""
        first: dict[int | None, str] = {}
        for side, nodes in (("before", self.before), ("after", self.after)):
            for index, node in enumerate(nodes):
                first.setdefault(node.region, f"{side}-{index}")
        return tuple(first[region] for region in range(len(self.regions)))

    def to_dict(self) -> dict[str, Any]:
        """The view as plain JSON types."""
        return asdict(self)


def joined(parts: Iterable[tuple[str, GraphView, int]]) -> GraphView:
    """The graphs of a model's parts as one.

    Args:
        parts: for each, the qualified name of the part (empty for the whole model), its graph, and how many rewrites
            the report has before the first one of this part.
    """
    before: list[NodeView] = []
    after: list[NodeView] = []
    regions: list[tuple[int, ...]] = []
    for path, view, earlier in parts:
        for nodes, found in ((before, view.before), (after, view.after)):
            nodes += _moved(found, path, len(nodes), len(regions))
        regions += [tuple(earlier + one for one in region) for region in view.regions]
    return GraphView(tuple(before), tuple(after), tuple(regions))


def _moved(nodes: Sequence[NodeView], path: str, first: int, regions: int) -> list[NodeView]:
    return [
        replace(
            node,
            module=f"{path}.{node.module}".strip("."),
            inputs=tuple(first + one for one in node.inputs),
            region=None if node.region is None else regions + node.region,
        )
        for node in nodes
    ]
