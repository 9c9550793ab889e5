"""Why a variant is not faster on this machine: sentences that follow from counts and measurements alone.

What was not measured is not said; where nothing follows, that is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from reparam.bench.backends import BACKENDS, Backend
from reparam.bench.speeds import Speeds
from reparam.bench.timing import Ratio, Timing

SAME = 0.01
"""Multiply-adds that change less than this are called the same."""
LARGE = 0.5
"""Share of the time above which something is said to take most of it."""
SMALL = 0.1
"""Share of the operations below which few of them went."""
UNKNOWN = (
    "what was changed is not known here: `reparam bench MODEL` alone fuses, and counts operations before and after"
)


@dataclass(frozen=True)
class Change:
    """What makes a variant differ from its baseline.

    Attributes:
        before, after: operations by kind, as `OperationCounts.to_dict` gives them.
        scale: elements of the timed inputs over those of the inputs that multiply-adds were counted on.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]
    scale: float = 1.0

    def of(self, *kinds: str) -> int:
        """How many operations of these kinds went."""
        return sum(self.before.get(kind, 0) - self.after.get(kind, 0) for kind in kinds)

    @property
    def macs_are_the_same(self) -> bool:
        before, after = self.before.get("macs", 0), self.after.get("macs", 0)
        return abs(after - before) <= SAME * max(before, 1)


def explained(
    timing: Timing,
    changes: Mapping[str, Change],
    speeds: Speeds | None = None,
    more: Mapping[str, Backend] | None = None,
) -> Timing:
    """The timing with reasons for each variant that is not faster than its baseline.

    Args:
        timing: what was measured.
        changes: variant (its name without a backend) -> what makes it differ from the baseline.
        speeds: of the device; None says nothing about where the time goes.
        more: backends besides torch's.
    """
    known = {**BACKENDS, **(more or {})}
    reasons = {}
    for label, ratio in timing.ratios.items():
        if ratio.verdict.startswith("faster"):
            continue
        backend = timing.backends.get(label, "")
        change = changes.get(label.removesuffix(f" [{backend}]"))
        found = [] if change is None else list(_reasons(timing, label, ratio, change, speeds, known.get(backend)))
        if change is None:
            found = [UNKNOWN]
        elif not found:
            found = ["the counts and the measurements show no reason"]
        if timing.warnings:
            found.append(f"the measurement itself is doubtful: {timing.warnings[0]}")
        reasons[label] = tuple(found)
    return replace(timing, reasons=reasons)


def _reasons(
    timing: Timing, label: str, ratio: Ratio, change: Change, speeds: Speeds | None, backend: Backend | None
) -> Iterator[str]:
    before, after = change.before.get("nodes", 0), change.after.get("nodes", 0)
    gone, layers = before - after, change.of("convolutions", "linears")
    if gone <= 0 and change.macs_are_the_same:
        yield f"nothing was merged that this counts: both run {after:,} operations and as many multiply-adds"
        return
    if gone < SMALL * before:
        yield f"few layers were merged: {gone:,} of {before:,} operations went"
    if backend is not None and backend.folds and layers <= 0:
        yield f"what went are no convolutions and no linear layers, and {backend.folds}"
    if speeds is not None:
        yield from _where_the_time_goes(timing, label, ratio, change, speeds, backend)


def _where_the_time_goes(
    timing: Timing, label: str, ratio: Ratio, change: Change, speeds: Speeds, backend: Backend | None
) -> Iterator[str]:
    total = timing.medians[ratio.baseline]
    macs, weights = change.after.get("macs", 0), timing.footprints[label].weights_bytes or 0
    computing, reading = macs * change.scale / speeds.macs, weights / speeds.bandwidth
    gone = change.of("nodes")
    launching = gone * speeds.launch
    is_eager = backend is BACKENDS["eager"] and "CUDA graphs" not in timing.conditions
    if is_eager and gone > 0 and launching < SMALL * total:
        yield (
            f"launching is a small share: the {gone:,} operations that went cost about {_ms(launching)} to launch "
            f"({_ms(speeds.launch)} each, measured), {launching / total:.1%} of the {_ms(total)} of {ratio.baseline}"
        )
    if change.macs_are_the_same and computing > LARGE * total:
        yield (
            f"computing takes most of the time: {macs * change.scale:,.0f} multiply-adds, as many as before, are "
            f"{_ms(computing)} of work at the rate of this machine's matrix products (measured), of {_ms(total)} in all"
        )
    elif reading > LARGE * total:
        yield (
            f"reading the weights takes most of the time: {weights / 1e6:,.0f} MB take about {_ms(reading)} of "
            f"{_ms(total)} at this machine's bandwidth (measured)"
        )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
