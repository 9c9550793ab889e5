"""Where the marks of the report's charts stand: plain numbers for the template, in percent of the width.

Percentages, because a chart is then as wide as the page lets it be and its words stay as large as the rest: a picture
of fixed size would be shrunk beyond reading on a phone. The drawing itself, colours and words are the template's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reparam.bench import Timing
    from reparam.equivalence import Comparison

WIDE = 20.0
"""A larger span than this, from the smallest value to the largest, is shown on a logarithmic scale."""
APART = 19.0
"""Percent of the width that numbers on a scale are apart at least, so that they can be read on a phone."""
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Axis:
    """A scale from 0% to 100% of the width.

    Attributes:
        low, high: values at the ends, in the unit of what is drawn.
        log: whether equal steps are equal ratios.
        ticks: position in percent, and value.
    """

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, float], ...] = ()

    def __call__(self, value: float) -> float:
        """Position of a value, in percent; values beyond an end stand at it."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return round(100 * min(1.0, (value - low) / (high - low)), 2)


def linear(high: float, most: int = 6) -> Axis:
    """A scale from zero to a little more than `high`, > 0, with round numbers on it, up to about `most`."""
    step = 10.0 ** math.floor(math.log10(high / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if high / (step * factor) <= most)
    axis = Axis(0.0, high * 1.03, False)
    values = [step * number for number in range(int(axis.high / step) + 1)]
    return Axis(axis.low, axis.high, False, tuple((axis(value), value) for value in values))


def logarithmic(low: float, high: float) -> Axis:
    """A scale that holds both values, 0 < low <= high, with powers of ten on it, and more between few of them."""
    axis = Axis(low / 1.15, high * 1.15, True)
    powers = range(math.floor(math.log10(axis.low)), math.ceil(math.log10(axis.high)) + 1)
    kept: list[float] = []
    for factors in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        values = (float(f"{factor}e{power}") for power in powers for factor in factors)
        kept = [value for value in values if axis.low <= value <= axis.high]
        if len(kept) > 2:
            break
    ticks: list[tuple[float, float]] = []
    for value in kept:
        if not ticks or axis(value) - ticks[-1][0] >= APART:
            ticks.append((axis(value), value))
    return Axis(axis.low, axis.high, True, tuple(ticks))


@dataclass(frozen=True)
class Strip:
    """All samples of one variant.

    Attributes:
        label: the variant.
        dots: path of one dot for each sample, in a box of 1000 by 100; scattered upwards so that dots lie apart.
        box: positions of the quartiles and the median; None for fewer than two samples.
        p95: position of the 95th percentile.
    """

    label: str
    dots: str
    box: tuple[float, float, float] | None
    p95: float


@dataclass(frozen=True)
class LatencyChart:
    """A strip for each variant on one scale, in seconds."""

    axis: Axis
    strips: tuple[Strip, ...]


def latency_chart(timing: Timing) -> LatencyChart | None:
    """All latencies that were measured; None if no round was complete."""
    every = [value for samples in timing.samples.values() for value in samples]
    if not every or min(every) <= 0:
        return None
    axis = logarithmic(min(every), max(every)) if max(every) > WIDE * min(every) else linear(max(every))
    p95s = timing.p95s
    return LatencyChart(axis, tuple(_strip(label, s, axis, p95s[label]) for label, s in timing.samples.items()))


def _strip(label: str, samples: Sequence[float], axis: Axis, p95: float) -> Strip:
    dots = "".join(
        f"M{round(10 * axis(value))} {round(10 + 80 * (number * _GOLDEN % 1))}h0"
        for number, value in enumerate(samples, 1)
    )
    box = None
    if len(samples) > 1:
        low, middle, high = map(axis, quantiles(samples, n=4, method="inclusive"))
        box = (low, middle, high)
    return Strip(label, dots, box, axis(p95))


@dataclass(frozen=True)
class ErrorMark:
    """The errors of one output on one input case.

    Attributes:
        case, output: names.
        error, noise: positions of the relative error and of the original's own; None where it is not a number.
        used, algebra: positions of the errors as shares of what is allowed; None where that was not asked.
        passed: whether nothing speaks against it, and something can be told.
    """

    case: str
    output: str
    error: float | None
    noise: float | None
    used: float | None
    algebra: float | None
    passed: bool


@dataclass(frozen=True)
class ErrorChart:
    """For each output of each case its error beside the original's noise, and what share of its bar that is.

    Attributes:
        axis: of the errors, relative to the RMS of the output; logarithmic. None if every error is zero.
        shares: of the shares of what is allowed; `bar` is the position of the whole.
    """

    axis: Axis | None
    shares: Axis
    bar: float
    marks: tuple[ErrorMark, ...]


def error_chart(comparison: Comparison) -> ErrorChart | None:
    """All outputs of all cases that ran; None if there are none."""
    found = [(case.name, output) for case in comparison.cases for output in case.outputs]
    if not found:
        return None
    outputs = [output for _, output in found]
    errors = _positive(value for output in outputs for value in (output.numeric_error, output.original_noise))
    ratios = _positive(value for output in outputs for value in (output.numeric_ratio, output.algebra_ratio))
    axis = logarithmic(min(errors), max(errors)) if errors else None
    most = max((*ratios, 1.0))
    shares = logarithmic(min((*ratios, 0.1)), most) if most > WIDE else linear(most * 1.1, 3)

    def on_errors(value: float) -> float | None:
        return None if axis is None or not math.isfinite(value) else axis(value)

    def on_shares(value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else shares(min(value, shares.high))

    marks = tuple(
        ErrorMark(
            case,
            output.name,
            on_errors(output.numeric_error),
            on_errors(output.original_noise),
            on_shares(output.numeric_ratio),
            on_shares(output.algebra_ratio),
            output.passed and not output.untold,
        )
        for case, output in found
    )
    return ErrorChart(axis, shares, shares(1.0), marks)


def _positive(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value) and value > 0]
