"""Rows of `benchmarks/zoo_latency.py`, what is wrong in them, and the page that shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reparam.bench import Ratio

COUNTS = ("convolutions", "batch_norms", "linears", "nodes")
VERDICTS = ("faster", "no measurable difference", "slower", "undecided")


@dataclass(frozen=True)
class Latency:
    """One runtime's measurement: medians in seconds, their paired ratio, and what makes the figures doubtful."""

    original: float
    fused: float
    ratio: Ratio
    doubts: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        return next(word for word in VERDICTS if self.ratio.verdict.startswith(word))

    def cell(self) -> str:
        """`1.83 (1.75-1.90)`, with a star if the figures are doubtful."""
        ratio = self.ratio
        return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" + ("*" if self.doubts else "")


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        family: timm's source file.
        model: timm's name.
        parameters: elements of all weights as built.
        size: height and width of the image.
        before, after: counts of operations, see `COUNTS`.
        eager, onnx: the latencies; None if not measured.
        refused: why the model cannot be captured; empty if it can.
        failed: what went wrong otherwise.
        onnx_failed: what went wrong with the ONNX files, which one first.
        fuse_seconds: time of `fuse` with quick verification.
        seconds: time of the whole row.
    """

    family: str
    model: str
    parameters: int
    size: int = 0
    before: Mapping[str, int] = dataclasses.field(default_factory=dict)
    after: Mapping[str, int] = dataclasses.field(default_factory=dict)
    eager: Latency | None = None
    onnx: Latency | None = None
    refused: str = ""
    failed: str = ""
    onnx_failed: str = ""
    fuse_seconds: float = 0.0
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Row:
        """The row that `to_dict` wrote."""

        def latency(saved: Mapping[str, Any] | None) -> Latency | None:
            return saved and Latency(**{**saved, "ratio": Ratio(**saved["ratio"]), "doubts": tuple(saved["doubts"])})

        return cls(**{**fields, "eager": latency(fields["eager"]), "onnx": latency(fields["onnx"])})

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return dataclasses.asdict(self)

    def measured(self) -> Iterator[tuple[str, Latency]]:
        """Runtime and latency of each measurement."""
        yield from ((name, found) for name, found in (("eager", self.eager), ("onnxruntime", self.onnx)) if found)

    def line(self) -> str:
        """The row for the terminal."""
        said = [f"{name} {found.ratio.verdict}" for name, found in self.measured()]
        said += [text for text in (self.refused and f"refused: {self.refused}", self.failed, self.onnx_failed) if text]
        return f"{self.model}: {'; '.join(said)} ({self.seconds:.0f} s)"


def complaints(row: Row) -> Iterator[str]:
    """What must not be: slower than the original, or an error other than a refusal to capture."""
    for name, found in row.measured():
        if found.verdict == "slower":
            yield f"{name}: {found.ratio.verdict}"
    if row.failed:
        yield row.failed
    if row.onnx_failed.startswith("fused"):
        yield f"ONNX of {row.onnx_failed}"


def summary(rows: Sequence[Row]) -> list[str]:
    """How many models became faster, and what is wrong."""
    lines = []
    for runtime in ("eager", "onnxruntime"):
        found = [latency for row in rows for name, latency in row.measured() if name == runtime]
        if found:
            counts = ", ".join(f"{sum(f.verdict == word for f in found)} {word}" for word in VERDICTS)
            doubtful = sum(bool(f.doubts) for f in found)
            lines.append(f"{runtime}: {len(found)} models, {counts}; {doubtful} with doubtful figures.")
    lines += _listed("Not captured", ((row.model, row.refused) for row in rows if row.refused))
    lines += _listed("No ONNX file", ((row.model, row.onnx_failed) for row in rows if row.onnx_failed))
    wrong = _listed("Slower, or failed", ((row.model, "; ".join(complaints(row))) for row in rows))
    return [*lines, *(wrong or ["No model became slower."])]


def _listed(title: str, items: Iterable[tuple[str, str]]) -> list[str]:
    alike: dict[str, list[str]] = {}
    for model, text in items:
        if text:
            alike.setdefault(text, []).append(model)
    lines = [f"- {', '.join(models)}: {text}" for text, models in alike.items()]
    return [f"{title} ({sum(map(len, alike.values()))}):", *lines] if lines else []


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The page."""
    conditions = facts["conditions"]
    lines = [
        "# Latency of timm's models, original and fused",
        "",
        f"`{facts['command']}` on {conditions['hardware']}, {conditions['threads']} thread(s), "
        f"torch {conditions['torch']}, timm {conditions['timm']}, onnxruntime {conditions['onnxruntime']}, "
        f"reparam at {conditions['revision']}, cost model `{conditions['machine']}`.",
        "",
        "One image of the model's own size, random weights. Speed-up: median of original / fused over paired, "
        "interleaved runs, with its 95% bootstrap interval; above 1 the fused model is faster. * : the measurement "
        "itself says that it is doubtful (few runs, other load, drift, spread). Layers: before / after.",
        "",
        "| family | model | convs | BNs | linears | operations | original, ms | fused, ms | speed-up | verdict | runs "
        "| onnxruntime: original, ms | fused, ms | speed-up | verdict | fuse, s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|---|--:|",
    ]
    for row in rows:
        if row.eager is None:
            continue
        counts = [f"{row.before[key]} / {row.after[key]}" for key in COUNTS]
        cells = [row.family, row.model, *counts, *_cells(row.eager), str(row.eager.ratio.runs)]
        cells += [*(_cells(row.onnx) if row.onnx else ["-"] * 4), f"{row.fuse_seconds:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for line in summary(rows):
        lines += [line] if line.startswith("- ") else ["", line]
    return "\n".join([*lines, ""])


def _cells(latency: Latency) -> list[str]:
    return [f"{1e3 * latency.original:.2f}", f"{1e3 * latency.fused:.2f}", latency.cell(), latency.verdict]
