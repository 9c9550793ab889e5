"""Numbers and lists as people read them; shared by every form of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam.passes.base import Choice, Refusal, Rewrite, Undone
    from reparam.report.values import Report

SHOWN_PLACES = 3
SHOWN_CANDIDATES = 5


CAPTURED = {
    "symbolic": "by symbolic tracing",
    "export": "by torch.export",
    "partial": "in parts",
    "modules": "in parts, keeping its own class",
}
"""How a graph was captured, in words."""


def sentence(text: str) -> str:
    """`text` with a full stop, unless it ends in a mark."""
    return text if text.endswith((".", "!", "?")) else f"{text}."


def capital(text: str) -> str:
    """`text` with a large first letter."""
    return text[:1].upper() + text[1:]


def undone_lines(undone: Undone) -> list[str]:
    """What is known of a rewrite that was undone, a sentence each."""
    lines = [sentence(f"with it, {undone.failure}")]
    if undone.worst:
        where = f" ({undone.location})" if undone.location else ""
        lines.append(f"worst element {list(undone.worst)} of {list(undone.shape)}{where}")
    if undone.error_with is not None and undone.error_without is not None:
        lines.append(f"error of the model with it {undone.error_with:.2g}, without it {undone.error_without:.2g}")
    return [*lines, undone.parting] if undone.parting else lines


def count(value: int) -> str:
    """`1,234` below a million, then `5.29 M`, `1.10 G`."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value:,}"


def duration(seconds: float) -> str:
    """A time with three significant digits and the unit that suits it."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError("the last unit takes everything")


def operation_rows(report: Report) -> list[tuple[str, str, str]]:
    """Name, before, after for each kind of operation that either model has; parameters and multiply-adds always."""
    rows = []
    for name, attribute in (
        ("convolutions", "convolutions"),
        ("batch norms", "batch_norms"),
        ("linear layers", "linears"),
        ("additions", "additions"),
        ("dropouts", "dropouts"),
        ("operations in all", "nodes"),
        ("parameters", "parameters"),
        ("multiply-adds", "macs"),
    ):
        before, after = getattr(report.before, attribute), getattr(report.after, attribute)
        if before or after or attribute in ("nodes", "parameters", "macs"):
            rows.append((name, count(before), count(after)))
    return rows


def rewrite_label(rewrite: Rewrite) -> str:
    """What became what, without names and sizes: `3 Conv2d + 2 BatchNorm2d + add -> Conv2d`."""
    kinds = Counter(operation.rpartition(": ")[2].partition("(")[0] for operation in rewrite.replaced)
    ordered = sorted(kinds.items(), key=lambda item: (_rank(item[0]), item[0]))
    replaced = " + ".join(f"{number} {kind}" if number > 1 else kind for kind, number in ordered)
    return f"{replaced or 'nothing'} -> {rewrite.replacement.partition('(')[0] or 'nothing'}"


def _rank(kind: str) -> int:
    """Layers before norms before the rest, so that one kind of rewrite has one label."""
    words = ("conv", "linear", "norm")
    return next((rank for rank, word in enumerate(words) if word in kind.lower()), len(words))


def grouped_rewrites(rewrites: Sequence[Rewrite]) -> list[tuple[str, list[Rewrite]]]:
    """Rewrites that are alike, under their label, the most frequent first; what was merely removed comes last."""
    groups: dict[str, list[Rewrite]] = {}
    for rewrite in rewrites:
        groups.setdefault(rewrite_label(rewrite), []).append(rewrite)
    return sorted(groups.items(), key=lambda item: (not item[1][0].replacement, -len(item[1])))


def grouped_refusals(refusals: Sequence[Refusal]) -> list[tuple[Refusal, list[Refusal]]]:
    """Refusals with the same subject, reason and remedy, with the first of each to speak for them."""
    groups: dict[tuple[str, str, str], list[Refusal]] = {}
    for refusal in refusals:
        groups.setdefault((refusal.subject, refusal.reason, refusal.remedy), []).append(refusal)
    return [(group[0], group) for group in sorted(groups.values(), key=len, reverse=True)]


def grouped_choices(choices: Sequence[Choice]) -> list[list[Choice]]:
    """Choices between equal candidates at equal prices, with the same outcome, in the order of the model."""
    groups: dict[object, list[Choice]] = {}
    for choice in choices:
        groups.setdefault((choice.candidates, choice.chosen, choice.why, choice.part), []).append(choice)
    return list(groups.values())


def shown_candidates(choice: Choice) -> list[int]:
    """The original, the winner and the cheapest of the rest, in order."""

    def rank(index: int) -> tuple[bool, float]:
        cost = choice.candidates[index].cost
        return index not in (0, choice.chosen), 0.0 if cost is None else cost.seconds  # impossible, and why: shown

    return sorted(sorted(range(len(choice.candidates)), key=rank)[:SHOWN_CANDIDATES])


def places(items: Sequence[Rewrite] | Sequence[Refusal] | Sequence[Choice], shown: int = SHOWN_PLACES) -> str:
    """The first few places, and how many more there are."""
    names = [item.where for item in items]
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
