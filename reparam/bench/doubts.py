"""What makes a measurement doubtful, and what to do about it, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

from reparam.bench import statistics
from reparam.bench.machine import Pace
from reparam.bench.measure import Measured

FEW_RUNS = 20
DRIFT = 0.05
SPREAD = 0.2
# The calibration loop or a clock may differ by this much before and after.
PACE = 0.1


def doubts(
    measured: Measured, threads: int, load: float | None, before: Pace | None = None, after: Pace | None = None
) -> tuple[str, ...]:
    """The sentences; none where nothing was noticed.

    Args:
        measured: the samples.
        threads: of ours.
        load: processes that wanted to run before the measurement, this one included.
        before, after: how fast the machine was.
    """
    return (*_of_samples(measured), *_of_machine(threads, load, before, after))


def _of_samples(measured: Measured) -> Iterator[str]:
    runs = len(next(iter(measured.samples.values())))
    if measured.partial:
        yield f"the measurement was interrupted after {runs} complete round(s); run it again for full figures"
    if runs < FEW_RUNS:
        yield f"only {runs} paired run(s) were taken; measure for longer or make the example inputs smaller"
    if not measured.stable:
        yield "the latencies had not settled when warm-up ended; measure for longer"
    for label, samples in measured.samples.items():
        change = statistics.drift(samples)
        if abs(change) > DRIFT:
            yield (
                f"{label} became {abs(change):.0%} {'slower' if change > 0 else 'faster'} during the run; "
                "let the machine settle or cool down, then measure again"
            )
        if statistics.spread(samples) > SPREAD:
            yield (
                f"the middle half of {label}'s latencies spans {statistics.spread(samples):.0%} of their median; "
                "close other programs or use fewer threads"
            )


def _of_machine(threads: int, load: float | None, before: Pace | None, after: Pace | None) -> Iterator[str]:
    if load is not None and load > threads + 0.5:
        yield (
            f"other processes were running (load {load:.1f} with {threads} thread(s) of ours); "
            "stop them and measure again"
        )
    if before is None or after is None:
        return
    change = after.loop / before.loop - 1
    if abs(change) > PACE:
        yield (
            f"a fixed loop took {abs(change):.0%} {'longer' if change > 0 else 'less'} after the measurement than "
            "before it: the processor's frequency or its load changed; plug the machine in, stop other programs, and "
            "measure again"
        )
    for what, first, last in (("processor", before.cpu_mhz, after.cpu_mhz), ("GPU", before.gpu_mhz, after.gpu_mhz)):
        if first and last and abs(last / first - 1) > PACE:
            yield (
                f"the {what}'s clock went from {first:.0f} to {last:.0f} MHz during the measurement; fix the clock, "
                "or let the machine warm up or cool down first"
            )
