"""Rows of `benchmarks/onnx_tools.py`, what is wrong in them, and the page that shows them."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.zoo_compare_rows import Cell
from reparam.bench import Ratio
from tools import sweep

ORIGINAL, ONNXSIM, ONNXSLIM, OURS = "original", "onnxsim", "onnxslim", "reparam"
VARIANTS = (ORIGINAL, ONNXSIM, ONNXSLIM, OURS)


@dataclass(frozen=True)
class Row(sweep.ModelRow):
    """One model.

    Attributes:
        parameters: elements of all weights as built.
        size: height and width of the image.
        graphs: variant -> nodes, bytes, BatchNorms, other leftovers, whether it agrees with the original model in
            PyTorch, its error and the original's own noise, and why it does not.
        stays: why nodes of our file stay that inference does not need, a sentence each.
        missing: variant -> why there is no file.
        samples: variant -> latencies in microseconds; entry `i` of every variant is from the same round.
        doubts: what makes the latencies doubtful.
        failure: why there is nothing of this model.
        seconds: time of the whole row.
    """

    parameters: int = 0
    size: int = 0
    graphs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    stays: Sequence[str] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    doubts: Sequence[str] = ()
    failure: str = ""
    seconds: float = 0.0

    def ratio(self, name: str) -> Ratio | None:
        """How many times faster than the original; None if that was not measured."""
        return _ratio(tuple(self.samples.get(ORIGINAL, ())), tuple(self.samples.get(name, ())))

    @property
    def failed(self) -> bool:
        return any(True for _ in complaints(self))

    @property
    def line(self) -> str:
        if self.failure:
            return self.failure
        said = [
            f"{name} {self.graphs[name]['nodes']} nodes{_times(self, name)}" for name in VARIANTS if name in self.graphs
        ]
        return f"{', '.join(said)} ({self.seconds:.0f} s)"


@functools.cache
def _ratio(original: tuple[float, ...], samples: tuple[float, ...]) -> Ratio | None:
    return Cell("onnxruntime", "float32", 1, {ORIGINAL: original, "": samples}).ratio("", ORIGINAL)


def complaints(row: Row) -> Iterator[str]:
    """What must not be of our own file."""
    if row.failure:
        yield row.failure
        return
    ours = row.graphs[OURS]
    if not ours["agrees"]:
        yield f"our file does not agree: {ours['why']}"
    yield from (f"our file holds {one}" for one in ours["leftovers"])
    yield from (f"our file keeps a node without a reason: {one}" for one in row.stays if "no reason is known" in one)


def smaller(row: Row) -> Iterator[str]:
    """Where another tool's file has fewer nodes than ours, and agrees."""
    for name, graph in row.graphs.items():
        if graph["nodes"] < row.graphs[OURS]["nodes"] and graph["agrees"]:
            yield f"{name} has {graph['nodes']} nodes, ours {row.graphs[OURS]['nodes']}"


def _times(row: Row, name: str) -> str:
    ratio = row.ratio(name)
    return "" if ratio is None or name == ORIGINAL else f" x{ratio.value:.2f}"


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The page: totals, graphs, latencies, and what is wrong."""
    about = facts["conditions"]
    packages = ", ".join(
        f"{name} {about[name]}" for name in ("torch", "timm", "onnx", "onnxruntime", "onnxsim", "onnxslim")
    )
    shown = [row for row in rows if row.graphs]
    lines = [
        "# Tools that optimise ONNX files, on timm's models",
        "",
        f"`{facts['command']}` on {about['hardware']}, {about['threads']} thread(s), {packages}, reparam at "
        f"{about['revision']}.",
        "",
        "`original`: as `torch.onnx.export` writes it; `onnxsim` and `onnxslim`: that file after these tools, at their "
        "defaults; `reparam`: fused, then exported. Random weights, one image of the model's own size. ✗: the file "
        "does not agree with the original model in PyTorch (its figures are those of another function); -: no file.",
        "",
        *_totals(shown),
        "",
        "## Nodes, BatchNorms among them, and megabytes",
        "",
        f"| model | {' | '.join(VARIANTS)} |",
        f"|---|{'--:|' * len(VARIANTS)}",
        *(f"| {row.model} | {' | '.join(_graph(row, name) for name in VARIANTS)} |" for row in shown),
        "",
        "## Latency in onnxruntime at its highest level",
        "",
        "Milliseconds of the original, then speed-up over it: median of original / variant over paired, interleaved "
        "runs, with its 95% bootstrap interval; above 1 the variant is faster. * : the measurement itself says that it "
        "is doubtful (few runs, other load, drift, spread).",
        "",
        f"| model | original, ms | {' | '.join(VARIANTS[1:])} | rounds |",
        f"|---|--:|{'--:|' * len(VARIANTS)}",
        *map(_latency_line, shown),
    ]
    lines += _listed("Does not agree", [(row, f"{name}: {graph['why']}") for row in shown
                                        for name, graph in row.graphs.items() if not graph["agrees"]])  # fmt: skip
    lines += _listed("No file", [(row, f"{name}: {why}") for row in rows for name, why in row.missing.items()])
    lines += _listed("Why nodes stay that inference does not need", [(row, why) for row in shown for why in row.stays])
    lines += _listed("Fewer nodes than ours", [(row, text) for row in shown for text in smaller(row)])
    lines += _listed("What must not be", [(row, why) for row in rows for why in complaints(row)])
    return "\n".join([*lines, ""])


def _totals(rows: Sequence[Row]) -> list[str]:
    """For each tool, over the models it has an agreeing file of: nodes in all, and the speed-up's geometric mean."""
    lines = []
    for name in VARIANTS[1:]:
        found = [row for row in rows if name in row.graphs and row.graphs[name]["agrees"]]
        if not found:
            continue
        before, after = (sum(row.graphs[variant]["nodes"] for row in found) for variant in (ORIGINAL, name))
        ratios = [ratio for row in found if (ratio := row.ratio(name)) is not None]
        mean = math.exp(sum(math.log(ratio.value) for ratio in ratios) / len(ratios)) if ratios else math.nan
        faster, slower = (sum(ratio.verdict.startswith(word) for ratio in ratios) for word in ("faster", "slower"))
        lines.append(
            f"- {name}: {len(found)} of {len(rows)} files agree; {before} -> {after} nodes; geometric mean of the "
            f"speed-up {mean:.2f}, {faster} faster, {slower} slower"
        )
    return lines


def _graph(row: Row, name: str) -> str:
    graph = row.graphs.get(name)
    if graph is None:
        return "-"
    return f"{graph['nodes']} ({graph['batch_norms']}), {graph['bytes'] / 1e6:.1f}" + ("" if graph["agrees"] else " ✗")


def _latency_line(row: Row) -> str:
    star = "*" if row.doubts else ""
    texts = [row.model, f"{statistics.median(row.samples[ORIGINAL]) / 1e3:.3g}"]
    for name in VARIANTS[1:]:
        ratio = row.ratio(name)
        texts.append("-" if ratio is None else _interval(ratio) + star + ("" if row.graphs[name]["agrees"] else " ✗"))
    return f"| {' | '.join([*texts, str(len(row.samples[ORIGINAL]))])} |"


def _interval(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _listed(title: str, items: Sequence[tuple[Row, str]]) -> list[str]:
    if not items:
        return []
    return ["", f"{title} ({len(items)}):", "", *(f"- {row.model}: {text}" for row, text in items)]
