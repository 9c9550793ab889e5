"""A `GraphView` as something to unfold: groups by module path, before and after side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reparam.report.view import GraphView, NodeView

MOST_SHOWN = 16
"""Operations of one side that are shown together; a module with more is a group of its parts."""


@dataclass(frozen=True)
class Entry:
    """A node with its index in its graph."""

    index: int
    node: NodeView


@dataclass(frozen=True)
class Fragment:
    """Neighbours in one group: those of one region, a node that is in none, or all that were merely removed.

    Attributes:
        entries: the nodes.
        region: index of the region; None for a node that was left, and for those that were removed.
        removed: whether nothing stands for them.
    """

    entries: tuple[Entry, ...]
    region: int | None = None
    removed: bool = False


@dataclass
class Group:
    """A module, or a run of operations between two.

    Attributes:
        path: qualified name; empty for the whole model, and for what the model itself does between two modules.
        name: the end of that name, which is not in the names of the groups around it.
        before, after: nodes that are shown here.
        groups: parts, in the order in which they run.
    """

    path: str
    name: str
    before: list[Entry] = field(default_factory=list)
    after: list[Entry] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)

    def entries(self, side: str) -> list[Entry]:
        """The nodes of one side, `before` or `after`, that are shown here."""
        return self.before if side == "before" else self.after

    def count(self, side: str) -> int:
        """Operations of one side, here and in all parts."""
        own = sum(entry.node.is_operation for entry in self.entries(side))
        return own + sum(group.count(side) for group in self.groups)

    @property
    def regions(self) -> list[int]:
        """Regions that are touched here and in all parts, in order."""
        own = {entry.node.region for entry in (*self.before, *self.after)}
        inside = {region for group in self.groups for region in group.regions}
        return sorted({region for region in own if region is not None} | inside)

    def fragments(self, side: str, removed: frozenset[int]) -> list[Fragment]:
        """The nodes of one side, those of one region together where its first one stands.

        Args:
            removed: regions for which nothing stands; their nodes come last.
        """
        found: dict[object, list[Entry]] = {}
        for entry in self.entries(side):
            region = entry.node.region
            found.setdefault(("node", entry.index) if region is None else region in removed or (region,), []).append(
                entry
            )
        gone = tuple(found.pop(True, ()))
        made = [Fragment(tuple(entries), entries[0].node.region) for entries in found.values()]
        return [*made, Fragment(gone, removed=True)] if gone else made

    def walk(self) -> Iterator[Group]:
        """This group and all inside of it."""
        yield self
        for group in self.groups:
            yield from group.walk()


def grouped(view: GraphView) -> Group:
    """The whole model as a group."""
    sides = [[Entry(index, node) for index, node in enumerate(nodes)] for nodes in (view.before, view.after)]
    return _group("", "", sides[0], sides[1])


def _group(path: str, name: str, before: list[Entry], after: list[Entry]) -> Group:
    if max(len(before), len(after)) <= MOST_SHOWN:
        return Group(path, name, before, after)
    parts = _parts(path, before, after)
    if len(parts) == 1 and next(iter(parts))[0] == "own":
        return Group(path, name, before, after)  # one long forward: there is nothing to divide it by
    groups = []
    for (kind, child), (first, second) in parts.items():
        if kind == "own":
            groups.append(Group(path, _named(first or second), first, second))
            continue
        made = _group(f"{path}.{child}".strip("."), child, first, second)
        if len(made.groups) == 1 and not made.before and not made.after:  # a module that only holds another one
            made = Group(made.groups[0].path, f"{child}.{made.groups[0].name}", *_insides(made.groups[0]))
        groups.append(made)
    return Group(path, name, groups=groups)


def _insides(group: Group) -> tuple[list[Entry], list[Entry], list[Group]]:
    return group.before, group.after, group.groups


def _named(entries: Sequence[Entry]) -> str:
    """What a run of operations between two modules is called: by what it does."""
    ops = list(dict.fromkeys(entry.node.op.removeprefix("the model's ") for entry in entries))
    return ", ".join(ops[:3]) + (f" and {len(ops) - 3} more" if len(ops) > 3 else "")


Parts = dict[tuple[str, str], tuple[list[Entry], list[Entry]]]


def _parts(path: str, before: Sequence[Entry], after: Sequence[Entry]) -> Parts:
    """The children of a module and the runs of what its own forward does between them, in the order of the original."""
    depth = len(path.split(".")) if path else 0
    parts: Parts = {}
    for side, entries in enumerate((before, after)):
        names = [[*entry.node.module.split("."), ""][depth] if entry.node.module else "" for entry in entries]
        last = ""
        for entry, child in zip(entries, names, strict=True):
            last = child or last
            key = ("child", child) if child else _run_behind(last, parts, set(names))
            parts.setdefault(key, ([], []))[side].append(entry)
    return parts


def _run_behind(child: str, parts: Parts, present: set[str]) -> tuple[str, str]:
    """The run of own operations behind a child, or the one behind children that are gone on this side."""
    key = ("own", child)
    order = list(parts)
    if key in parts or ("child", child) not in parts:
        return key
    for kind, name in order[order.index(("child", child)) + 1 :]:
        if kind == "own":
            return kind, name
        if name in present:
            break
    return key
