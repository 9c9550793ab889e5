"""Latency, measured in pairs: callables become a `Timing`."""

from __future__ import annotations

from reparam.bench.benchmark import benchmark
from reparam.bench.timing import Ratio, Timing

__all__ = ["Ratio", "Timing", "benchmark"]
