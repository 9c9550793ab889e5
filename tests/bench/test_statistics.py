"""The statistics on samples whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from reparam.bench import statistics
from reparam.bench.timing import Ratio


def test_medians_and_percentiles() -> None:
    samples = [float(i) for i in range(1, 101)]
    assert statistics.median(samples) == 50.5
    assert statistics.p95(samples) == pytest.approx(95.05)
    assert math.isnan(statistics.median([]))
    assert math.isnan(statistics.p95([]))


@pytest.mark.parametrize("truth", [0.8, 1.0, 1.7])
def test_interval_covers_the_truth_about_as_often_as_it_says(truth: float) -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for seed in range(100):
        shared = generator.gamma(20, 1 / 20, 60)
        baseline = truth * shared * np.exp(generator.normal(0, 0.05, 60))
        variant = shared * np.exp(generator.normal(0, 0.05, 60))
        value, low, high = statistics.ratio_interval(baseline, variant, seed, resamples=300)
        assert low <= value <= high
        covered += low <= truth <= high
    assert 84 <= covered <= 100


def test_interval_narrows_with_more_runs_and_is_reproducible() -> None:
    generator = np.random.default_rng(5)
    noise = np.exp(generator.normal(0, 0.1, 1600))
    ones = np.ones(1600)
    widths = []
    for count in (25, 1600):
        _, low, high = statistics.ratio_interval(noise[:count], ones[:count], 0)
        widths.append(high - low)
    assert widths[1] < widths[0] / 3
    assert statistics.ratio_interval(noise, ones, 7) == statistics.ratio_interval(noise, ones, 7)


def test_blocks_make_intervals_wider_where_neighbours_depend_on_each_other() -> None:
    generator = np.random.default_rng(5)
    steps = np.repeat(np.exp(generator.normal(0, 0.1, 20)), 10)
    shuffled = generator.permutation(steps)
    ones = np.ones(200)

    def width(ratios: np.ndarray) -> float:
        _, low, high = statistics.ratio_interval(ratios, ones, 0)
        return high - low

    assert width(steps) > 1.3 * width(shuffled)


def test_single_run() -> None:
    assert statistics.ratio_interval([3.0], [2.0], 0) == (1.5, 1.5, 1.5)
    assert Ratio("a", 1.5, 1.5, 1.5, 1).verdict == "undecided: 1 paired run(s) are too few"


STABLE = [
    ([1.0] * 5, False),
    ([1.0] * 6, True),
    ([9.0, 9.0, 9.0, 1.0, 1.0, 1.0], False),
    ([9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.05, 1.0, 1.0], True),
]


@pytest.mark.parametrize(("samples", "stable"), STABLE)
def test_stability(samples: list[float], stable: bool) -> None:
    assert statistics.is_stable(samples) is stable


def test_drift_and_spread() -> None:
    assert statistics.drift([1.0] * 10 + [1.0] * 10 + [1.5] * 10) == pytest.approx(0.5)
    assert statistics.drift([1.0, 9.0]) == 0.0
    assert statistics.spread([1.0] * 10) == 0.0
    assert statistics.spread([1.0, 1.0, 2.0, 2.0]) == pytest.approx(1 / 1.5)
    assert statistics.spread([1.0, 9.0]) == 0.0
