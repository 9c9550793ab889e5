"""Latency, measured in pairs: callables become a `Timing`, a grid of conditions becomes a `Series` of them."""

from __future__ import annotations

from reparam.bench.benchmark import benchmark
from reparam.bench.footprint import Footprint
from reparam.bench.series import Series
from reparam.bench.timing import Ratio, Timing

__all__ = ["Footprint", "Ratio", "Series", "Timing", "benchmark"]
