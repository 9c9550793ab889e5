"""The report in three sentences: what changed, whether it is equal, how much faster it is."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from reparam.report.format import capital, count, duration, operation_rows
from reparam.report.tables import comparisons
from reparam.report.tables import timings as measurements

if TYPE_CHECKING:
    from reparam.bench import Timing
    from reparam.report.values import Report


@dataclass(frozen=True)
class Headline:
    """What whoever decides reads first.

    Attributes:
        verdict: `equivalent`, `NOT equivalent` or `not checked`.
        changed: what became of the operations.
        equal: whether the results are the original's, with the errors.
        faster: how much faster it is, with the latencies.
        speed: the same in three words, of the variant that gains most for certain; which that is, with its interval;
            and whether something makes it doubtful.
        partial: what is missing because the run was interrupted; empty if nothing is.
    """

    verdict: str
    changed: str
    equal: str
    faster: str
    speed: tuple[str, str, str]
    partial: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The sentences as plain JSON types."""
        return {**asdict(self), "speed": list(self.speed)}


def headline(report: Report) -> Headline:
    """The three sentences of a report."""
    verdict = {True: "equivalent", False: "NOT equivalent", None: "not checked"}[report.equivalent]
    return Headline(verdict, _changed(report), _equal(report), _faster(report), _speed(report), _partial(report))


def _changed(report: Report) -> str:
    before, after = report.before, report.after
    if not report.rewrites:
        return f"Nothing could be folded: {count(before.nodes)} operations stay as they are."
    rows = [row for row in operation_rows(report) if row[0] != "operations in all"]
    kinds = [f"{name} {old} -> {new}" for name, old, new in rows if old != new]
    became = f"{count(before.nodes)} operations became {count(after.nodes)}"
    return f"{became}: {', '.join(kinds)}." if kinds else f"{became}."


def _equal(report: Report) -> str:
    made = [f"{capital(subject)}: {comparison.summary()}" for subject, comparison in comparisons(report)]
    return " ".join(made) or "Nothing was compared with the original: verification was off."


def _faster(report: Report) -> str:
    timings = [timing for _, timing in measurements(report)]
    found = [sentence for timing in timings for sentence in speed_sentences(timing)]
    doubts = sum(len(timing.warnings) for timing in timings)
    if found and doubts:
        found.append(f"{doubts} {'warnings say' if doubts > 1 else 'warning says'} what makes these figures doubtful.")
    return " ".join(found) or "Latency was not measured."


def _speed(report: Report) -> tuple[str, str, str]:
    timings = [timing for _, timing in measurements(report)]
    ratios = [pair for timing in timings for pair in timing.ratios.items()]
    label, best = max(ratios, key=lambda pair: pair[1].low, default=("", None))
    if best is None:
        return "not measured", "", ""
    gist, _, interval = re.sub(r":.*", "", best.verdict).partition(" (")
    doubtful = "doubtful" if any(timing.warnings for timing in timings) else ""
    return gist, f"{label} ({interval}" if interval else label, doubtful


def speed_sentences(timing: Timing | None) -> list[str]:
    """One sentence for each variant that is held against another one."""
    if timing is None or timing.runs == 0:
        return []
    medians = timing.medians
    return [
        f"{capital(label)}: {ratio.verdict}, median {duration(medians[ratio.baseline])} -> {duration(medians[label])}."
        for label, ratio in timing.ratios.items()
    ]


def _partial(report: Report) -> str:
    if not report.partial:
        return ""
    doing = report.interrupted or "measuring latency"
    rounds = [timing.runs for _, timing in measurements(report)]
    kept = f"{sum(rounds)} complete rounds were kept" if sum(rounds) else "no round was complete"
    return f"Partial: interrupted while {doing}; {kept}. Everything else is complete."
