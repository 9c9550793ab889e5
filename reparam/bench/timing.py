"""The value a measurement ends in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from reparam.bench import statistics
from reparam.bench.footprint import Footprint

# A smaller difference is not claimed: memory layout alone changes as much from process to process.
MARGIN = 0.01
# Fewer paired runs than this carry no verdict.
LEAST_RUNS = 5


@dataclass(frozen=True)
class Ratio:
    """How many times faster a variant is than its baseline.

    Attributes:
        baseline: label of the baseline.
        value: median of baseline / variant over the paired runs; above 1 the variant is faster.
        low, high: ends of the 95% bootstrap interval.
        runs: number of paired runs.
    """

    baseline: str
    value: float
    low: float
    high: float
    runs: int

    @property
    def verdict(self) -> str:
        """`faster by x1.83 (1.75-1.90)`, `no measurable difference (0.99-1.02)`, `slower by x1.20 (1.15-1.26)`."""
        if self.runs < LEAST_RUNS:
            return f"undecided: {self.runs} paired run(s) are too few"
        if self.low > 1 and self.value >= 1 + MARGIN:
            return f"faster by x{self.value:.2f} ({self.low:.2f}-{self.high:.2f})"
        if self.high < 1 and 1 / self.value >= 1 + MARGIN:
            return f"slower by x{1 / self.value:.2f} ({1 / self.high:.2f}-{1 / self.low:.2f})"
        return f"no measurable difference ({self.low:.2f}-{self.high:.2f})"

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        return {**asdict(self), "verdict": self.verdict}


@dataclass(frozen=True)
class Timing:
    """Paired, interleaved latencies of several variants of one model.

    Attributes:
        samples: for each label, all latencies in seconds; entry `i` of every label was taken in round `i`.
        warmup: the latencies before, which are not counted.
        ratios: for each label but the baselines, how much faster it is than its baseline.
        hardware: name of the processor or GPU.
        device: torch's name of it.
        threads: torch's number of threads within an operator.
        torch_version: version of torch.
        seed: of the order within the rounds and of the bootstrap.
        partial: whether the measurement was interrupted.
        warnings: what makes the figures doubtful and what to do, a sentence each.
        conditions: what was measured, by name: batch, size, dtype, layout, CUDA graphs.
        footprints: label -> memory, space and times other than those per call.
        backends: label -> backend; empty for a callable that was run as it is.
        left_out: backend or label -> why it was not measured.
        reasons: label -> sentences on why it is not faster than its baseline; none where it is.
    """

    samples: Mapping[str, tuple[float, ...]]
    warmup: Mapping[str, tuple[float, ...]]
    ratios: Mapping[str, Ratio]
    hardware: str
    device: str
    threads: int
    torch_version: str
    seed: int
    partial: bool = False
    warnings: tuple[str, ...] = field(default=())
    conditions: Mapping[str, str] = field(default_factory=dict)
    footprints: Mapping[str, Footprint] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """Label of the first variant."""
        return next(iter(self.samples))

    @property
    def runs(self) -> int:
        """Number of complete rounds."""
        return len(self.samples[self.baseline])

    @property
    def medians(self) -> dict[str, float]:
        """Median latency of each label in seconds; NaN where nothing was measured."""
        return {label: statistics.median(samples) for label, samples in self.samples.items()}

    @property
    def p95s(self) -> dict[str, float]:
        """95th percentile of each label in seconds; NaN where nothing was measured."""
        return {label: statistics.p95(samples) for label, samples in self.samples.items()}

    @property
    def verdicts(self) -> dict[str, str]:
        """The verdict on each label that has a baseline, in words."""
        return {label: ratio.verdict for label, ratio in self.ratios.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Timing:
        """The value that `to_dict` wrote."""
        fields: dict[str, Any] = {
            key: value for key, value in plain.items() if key not in ("unit", "runs", "medians", "p95s")
        }
        for name in ("samples", "warmup", "reasons"):
            fields[name] = {label: tuple(values) for label, values in plain[name].items()}
        ratios = {
            label: {key: value for key, value in ratio.items() if key != "verdict"}
            for label, ratio in plain["ratios"].items()
        }
        fields["ratios"] = {label: Ratio(**ratio) for label, ratio in ratios.items()}
        fields["footprints"] = {label: Footprint(**found) for label, found in plain["footprints"].items()}
        return cls(**{**fields, "warnings": tuple(plain["warnings"])})

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types, all samples included; seconds throughout; None where nothing was measured."""
        empty = self.runs == 0
        return {
            "unit": "seconds",
            "runs": self.runs,
            "partial": self.partial,
            "medians": {label: None if empty else value for label, value in self.medians.items()},
            "p95s": {label: None if empty else value for label, value in self.p95s.items()},
            "ratios": {label: ratio.to_dict() for label, ratio in self.ratios.items()},
            "samples": {label: list(samples) for label, samples in self.samples.items()},
            "warmup": {label: list(samples) for label, samples in self.warmup.items()},
            "hardware": self.hardware,
            "device": self.device,
            "threads": self.threads,
            "torch_version": self.torch_version,
            "seed": self.seed,
            "warnings": list(self.warnings),
            "conditions": dict(self.conditions),
            "footprints": {label: footprint.to_dict() for label, footprint in self.footprints.items()},
            "backends": dict(self.backends),
            "left_out": dict(self.left_out),
            "reasons": {label: list(sentences) for label, sentences in self.reasons.items()},
        }
