"""The measurement itself: rounds in which every variant runs once, in random order."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reparam.bench.machine import Clock
from reparam.bench.statistics import is_stable

# Warm-up ends when every variant is stable, or at this many rounds, or at this share of the time.
WARMUP_ROUNDS = 50
WARMUP_SHARE = 0.25
MOST_ROUNDS = 2000

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Runner:
    """One variant on one backend.

    Attributes:
        label: its name in the result.
        prepare: makes a call ready (fresh inputs); what it does is not timed.
        clock: times the call that `prepare` returned.
        baseline: label that it is compared with; its own for a baseline.
    """

    label: str
    prepare: Callable[[], Callable[[], Any]]
    clock: Clock
    baseline: str


@dataclass(frozen=True)
class Measured:
    """Complete rounds only, warm-up apart."""

    samples: dict[str, tuple[float, ...]]
    warmup: dict[str, tuple[float, ...]]
    partial: bool
    stable: bool


def measure(
    runners: Sequence[Runner],
    *,
    min_runs: int,
    max_seconds: float,
    seed: int,
    progress: Progress | None = None,
    warm: Callable[[], None] | None = None,
) -> Measured:
    """Warms up until stable, then runs rounds until `max_seconds` are over, but `min_runs` in any case.

    The random order within a round keeps a variant from always running behind the same other one. An interrupt from the
    keyboard ends the measurement; the rounds that were complete are kept. `warm` is called when
    warm-up is over.
    """
    order = random.Random(seed)
    clock = runners[0].clock
    start = clock.now()
    warmup: list[dict[str, float]] = []
    rounds: list[dict[str, float]] = []
    stable = partial = False
    collecting = gc.isenabled()
    gc.disable()
    try:
        while not stable and len(warmup) < WARMUP_ROUNDS:
            if len(warmup) >= 2 and clock.now() - start > WARMUP_SHARE * max_seconds:
                break
            warmup.append(_round(runners, order))
            stable = all(is_stable([one[r.label] for one in warmup]) for r in runners)
            _tell(progress, clock.now() - start, max_seconds, f"warm-up, round {len(warmup)}")
        if warm is not None:
            warm()
        while len(rounds) < MOST_ROUNDS:
            if len(rounds) >= min_runs and clock.now() - start > max_seconds:
                break
            rounds.append(_round(runners, order))
            _tell(progress, clock.now() - start, max_seconds, f"round {len(rounds)}")
    except KeyboardInterrupt:
        partial = True
    finally:
        if collecting:
            gc.enable()
    labels = [runner.label for runner in runners]
    return Measured(
        {label: tuple(one[label] for one in rounds) for label in labels},
        {label: tuple(one[label] for one in warmup) for label in labels},
        partial,
        stable,
    )


def _round(runners: Sequence[Runner], order: random.Random) -> dict[str, float]:
    """One latency of every variant, in seconds."""
    latencies = {}
    for runner in order.sample(list(runners), len(runners)):
        latencies[runner.label] = runner.clock.time(runner.prepare())
    return latencies


def _tell(progress: Progress | None, elapsed: float, total: float, text: str) -> None:
    if progress is not None:
        progress(min(1.0, elapsed / total) if total > 0 else 1.0, text)
