"""A few operations drawn as a graph: boxes in rows below what they read, and a line from each to its readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reparam.report.tree import Entry

BOX, GAP, HEIGHT, STEP = 132, 14, 26, 46


@dataclass(frozen=True)
class Box:
    """An operation: where its box stands, in units of the drawing."""

    entry: Entry
    x: float
    y: float


@dataclass(frozen=True)
class Diagram:
    """Boxes, lines as paths, and the size of the drawing."""

    boxes: tuple[Box, ...]
    lines: tuple[str, ...]
    width: int
    height: int


def drawn(entries: Sequence[Entry]) -> Diagram:
    """Lays out the nodes of a group; what comes from elsewhere comes in from above."""
    rows: dict[int, list[Entry]] = {}
    row_of: dict[int, int] = {}
    inside = {entry.index for entry in entries}
    for entry in entries:
        row_of[entry.index] = 1 + max((row_of[one] for one in entry.node.inputs if one in inside), default=-1)
        rows.setdefault(row_of[entry.index], []).append(entry)
    width = max((len(row) for row in rows.values()), default=1) * (BOX + GAP) + 2 * GAP
    centre: dict[int, float] = {}
    boxes: list[Box] = []
    for number in sorted(rows):
        row = sorted(rows[number], key=lambda entry: _middle(entry, centre, width))
        left = (width - len(row) * (BOX + GAP)) / 2
        for place, entry in enumerate(row):
            x = left + place * (BOX + GAP) + GAP / 2
            centre[entry.index] = x + BOX / 2
            boxes.append(Box(entry, x, number * STEP + 12))
    return Diagram(tuple(boxes), tuple(_lines(boxes, centre)), width, len(rows) * STEP + 4)


def _middle(entry: Entry, centre: dict[int, float], width: float) -> float:
    """Below what it reads."""
    known = [centre[one] for one in entry.node.inputs if one in centre]
    return sum(known) / len(known) if known else width / 2


def _lines(boxes: Sequence[Box], centre: dict[int, float]) -> list[str]:
    at = {box.entry.index: box for box in boxes}
    lines = []
    for box in boxes:
        x1, y = centre[box.entry.index], box.y
        for source in box.entry.node.inputs:
            if source not in centre:
                lines.append(f"M{x1:g} {y - 10:g}V{y:g}")
                continue
            x0, start = centre[source], at[source].y + HEIGHT
            between = [other for other in boxes if start < other.y < y]
            if between:
                lane = _lane(x0, x1, between)
                lines.append(f"M{x0:g} {start:g}C{x0:g} {start + 12:g} {lane:g} {start + 8:g} {lane:g} {start + 20:g}"
                             f"V{y - 20:g}C{lane:g} {y - 8:g} {x1:g} {y - 12:g} {x1:g} {y:g}")  # fmt: skip
            else:
                middle = (start + y) / 2
                lines.append(f"M{x0:g} {start:g}C{x0:g} {middle:g} {x1:g} {middle:g} {x1:g} {y:g}")
    return lines


def _lane(x0: float, x1: float, between: Sequence[Box]) -> float:
    """Where a line passes the boxes between its ends: straight down if none is in the way, else beside all of them."""
    for x in (x0, x1):
        if all(not box.x - 3 <= x <= box.x + BOX + 3 for box in between):
            return x
    beside = (min(box.x for box in between) - GAP / 2, max(box.x for box in between) + BOX + GAP / 2)
    return min(beside, key=lambda x: abs(x - x0) + abs(x - x1))
