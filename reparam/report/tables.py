"""Rows that Markdown and HTML show alike: every cell as text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from reparam.report.format import duration, sentence

if TYPE_CHECKING:
    from reparam.bench import Timing
    from reparam.equivalence import Comparison
    from reparam.equivalence.comparison import OutputComparison
    from reparam.report.values import Report

LATENCY_COLUMNS = ("variant", "median", "95th percentile", "against the baseline")
_SPACES = ("weights_bytes", "peak_bytes", "disk_bytes")
_TIMES = ("build_seconds", "first_seconds", "load_seconds")
FOOTPRINT_COLUMNS = (
    "variant",
    "weights",
    "peak memory of a call",
    "on disk",
    "time to build",
    "first call",
    "time to load",
)
CASE_COLUMNS = (
    "input case",
    "output",
    "verdict",
    "error",
    "original's own",
    "of its bar",
    "float64 error",
    "of its bar",
)


def comparisons(report: Report) -> list[tuple[str, Comparison]]:
    """What was compared with the original, under its name."""
    every = (
        ("fused model", report.comparison),
        ("archive", report.archive_comparison),
        ("ONNX file", report.onnx_comparison),
    )
    return [(subject, comparison) for subject, comparison in every if comparison is not None]


def timings(report: Report) -> list[tuple[str, Timing]]:
    """What was measured, under its name."""
    both = (("latency", report.timing), ("latency in onnxruntime", report.onnx_timing))
    return [(subject, timing) for subject, timing in both if timing is not None]


def measured_on(timing: Timing) -> str:
    """Hardware, threads, number of runs, and whether they are all."""
    threads = f"{timing.threads} thread{'s' if timing.threads != 1 else ''}"
    partial = ", interrupted" if timing.partial else ""
    return f"{timing.hardware}, {threads}, {timing.runs} paired runs{partial}, seed {timing.seed}"


def latency_rows(timing: Timing) -> list[tuple[str, str, str, str]]:
    """A row for each variant; empty if no round was complete."""
    if timing.runs == 0:
        return []
    medians, p95s, verdicts = timing.medians, timing.p95s, timing.verdicts
    return [
        (label, duration(medians[label]), duration(p95s[label]), verdicts.get(label, "baseline"))
        for label in timing.samples
    ]


def remarks(timing: Timing) -> list[str]:
    """Why a variant is not faster, what was not measured and why, and what makes the figures doubtful."""
    slow = [
        f"{label} is not faster than {timing.ratios[label].baseline} on this machine: {sentence(reason)}"
        for label, reasons in timing.reasons.items()
        for reason in reasons
    ]
    absent = [f"{label} was not measured: {sentence(why)}" for label, why in timing.left_out.items()]
    return [*slow, *absent, *map(sentence, timing.warnings)]


def footprint_rows(timing: Timing) -> list[tuple[str, ...]]:
    """A row for each variant of which space or times besides those per call are known."""
    return [
        (label, *(_space(getattr(found, name)) for name in _SPACES), *(_time(getattr(found, name)) for name in _TIMES))
        for label, found in timing.footprints.items()
    ]


def case_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    """A row for each output of each input case, and one for a case without outputs."""
    for case in comparison.cases:
        if not case.outputs:
            yield (case.name, "", case.status, *("-",) * 5)
        for output in case.outputs:
            yield (case.name, output.name, case.status, *_figures(output))


def _figures(output: OutputComparison) -> tuple[str, ...]:
    return (
        number(output.numeric_error),
        number(output.original_noise),
        share(output.numeric_ratio),
        number(output.algebra_error),
        share(output.algebra_ratio),
    )


def _space(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value} bytes"


def _time(value: float | None) -> str:
    return "-" if value is None else duration(value)


def number(value: float | None) -> str:
    """Two significant digits; a dash where there is nothing."""
    return "-" if value is None else f"{value:.2g}"


def share(value: float | None) -> str:
    """A share of what is allowed, as a percentage; above 100% it is too much."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "not finite"
    return "0%" if value == 0 else "under 1%" if value < 0.01 else f"{value:,.0%}"


def environment_rows(report: Report) -> list[tuple[str, str]]:
    """Versions, hardware and settings, the seed of verification among them, and what each stage took."""
    rows = list(report.environment.items())
    if report.comparison is not None:
        rows.append(("verification", f"level {report.comparison.level}, seed {report.comparison.seed}"))
    for _, timing in timings(report):
        rows.append(("measured on", measured_on(timing)))
    rows += [(f"time for {stage}", duration(seconds)) for stage, seconds in report.seconds.items()]
    return list(dict.fromkeys(rows))
