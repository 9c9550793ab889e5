"""Medians, ratios with intervals, and what makes a run doubtful. Plain numbers in, plain numbers out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


def median(samples: Sequence[float]) -> float:
    """Median in the samples' unit; NaN without samples."""
    return float(np.median(samples)) if len(samples) else float("nan")


def p95(samples: Sequence[float]) -> float:
    """95th percentile in the samples' unit; NaN without samples."""
    return float(np.percentile(samples, 95)) if len(samples) else float("nan")


def ratio_interval(
    baseline: Sequence[float], variant: Sequence[float], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """How many times faster `variant` is than `baseline`: median of the paired ratios, with a bootstrap interval.

    Sample `i` of both was taken in the same round, so that what disturbs a round disturbs both and cancels. Rounds are
    resampled in circular blocks of about n^(1/3), because neighbouring rounds are not independent (Politis and Romano,
    "A circular block-resampling procedure for stationary data", 1992).

    Args:
        baseline, variant: seconds, of equal length, at least one.
        seed: of the resampling.
        resamples: number of resamples.

    Returns:
        Median ratio, lower and upper end of the 95% percentile interval.
    """
    ratios = np.asarray(baseline, dtype=np.float64) / np.asarray(variant, dtype=np.float64)
    count = len(ratios)
    block = max(1, round(count ** (1 / 3)))
    generator = np.random.default_rng(seed)
    starts = generator.integers(0, count, size=(resamples, -(-count // block)))
    chosen = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, :count] % count
    medians = np.median(ratios[chosen], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return float(np.median(ratios)), float(low), float(high)


def drift(samples: Sequence[float]) -> float:
    """Relative change of the median from the first third of the run to the last; 0 for fewer than nine samples."""
    third = len(samples) // 3
    if third < 3:
        return 0.0
    first, last = median(samples[:third]), median(samples[-third:])
    return last / first - 1 if first > 0 else 0.0


def spread(samples: Sequence[float]) -> float:
    """Distance between the quartiles, relative to the median; 0 for fewer than four samples."""
    if len(samples) < 4:
        return 0.0
    low, high = np.percentile(samples, [25, 75])
    middle = median(samples)
    return float(high - low) / middle if middle > 0 else 0.0


def is_stable(samples: Sequence[float], window: int = 3, tolerance: float = 0.1) -> bool:
    """Whether the last `window` samples' median is within `tolerance` of that of the `window` samples before."""
    if len(samples) < 2 * window:
        return False
    before, after = median(samples[-2 * window : -window]), median(samples[-window:])
    return abs(after - before) <= tolerance * max(before, after)
