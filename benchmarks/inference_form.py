"""What is computed from parameters only, and scales: timm's models that are full of them, original beside fused.

    python benchmarks/inference_form.py [--models REGEX] [--seconds 8] [--threads 1] [--budget MINUTES]
                                        [--again all|failed] [--untimed]

Models with weight standardisation, with LayerScale, with relative position bias; random weights, no parameter left at a
constant. Counted are the operations that no input goes into: what every call computes anew from parameters, buffers and
literals. The error is that of the float64 comparison, which `fuse` makes. Latencies are of one image, eager and in
onnxruntime, in paired interleaved runs.

`--budget` starts no further model after so many minutes. `--untimed` counts and compares, prints that, and writes
nothing.

Results go to `benchmarks/results/inference_form.json` and `.md`, one model at a time: a run that was stopped goes on
where it was, unless the engine, the machine or a version has changed since (exit status 2). Exit status 1 if constant
operations are left, an error exceeds 1e-10, a fused model is slower beyond the interval, or something fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import fx, nn  # noqa: E402

import reparam  # noqa: E402
from benchmarks.zoo_latency import conditions, latency, onnx_latency  # noqa: E402
from benchmarks.zoo_latency_table import Latency  # noqa: E402
from reparam.bench import Ratio  # noqa: E402
from reparam.capture.trace import capture  # noqa: E402
from tools import timm_zoo  # noqa: E402
from tools.record import first_line, write  # noqa: E402

MODELS = {
    "convnext_atto": "LayerScale",
    "edgenext_xx_small": "LayerScale, temperature, positions",
    "maxvit_pico_rw_256": "relative position bias",
    "nf_regnet_b0": "weight standardisation",
    "nf_resnet50": "weight standardisation",
    "resnetv2_50x1_bit": "weight standardisation",
    "swin_tiny_patch4_window7_224": "relative position bias, 1/sqrt(d)",
}
"""And what of them is constant, or a scale."""
LARGEST_ERROR = 1e-10


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        model: timm's name.
        size: height and width of the image.
        before, after: operations that no input goes into; all operations.
        error: scaled float64 difference between original and fused.
        eager, onnx: the latencies; None if not measured.
        failed: what went wrong; empty if nothing did.
        seconds: time of the whole row.
    """

    model: str
    size: int = 0
    before: tuple[int, int] = (0, 0)
    after: tuple[int, int] = (0, 0)
    error: float | None = None
    eager: Latency | None = None
    onnx: Latency | None = None
    failed: str = ""
    seconds: float = 0.0

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Row:
        """The row that was written as JSON."""

        def read(saved: Mapping[str, Any] | None) -> Latency | None:
            return saved and Latency(**{**saved, "ratio": Ratio(**saved["ratio"]), "doubts": tuple(saved["doubts"])})

        pairs = {key: tuple(fields[key]) for key in ("before", "after")}
        return cls(**{**fields, **pairs, "eager": read(fields["eager"]), "onnx": read(fields["onnx"])})

    def complaints(self) -> Iterator[str]:
        """What must not be."""
        if self.failed:
            yield self.failed
        if self.after[0]:
            yield f"{self.after[0]} constant operations are left"
        if self.error is not None and not self.error <= LARGEST_ERROR:
            yield f"float64 error {self.error:.1e}"
        for name, found in (("eager", self.eager), ("onnxruntime", self.onnx)):
            if found is not None and found.verdict == "slower":
                yield f"{name}: {found.ratio.verdict}"


def operations(graph: fx.Graph, root: nn.Module) -> tuple[int, int]:
    """Operations on tensors that no input goes into, and all of them. A layer counts as one, whatever it reads."""
    depends: set[fx.Node] = set()
    constant = total = 0
    for node in graph.nodes:
        if node.op == "placeholder" or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
        if node.op.startswith("call") and "tensor" in node.meta:
            total += 1
            constant += node not in depends
    return constant, total


def measure(name: str, args: argparse.Namespace) -> Row:
    """One row; an exception is kept as its first line."""
    start = time.perf_counter()
    row = Row(name)
    try:
        model = timm_zoo.create(name, lively=True)
        x = torch.randn(1, *timm_zoo.input_size(model), generator=torch.Generator().manual_seed(0))
        captured = capture(model, x)
        row = replace(row, size=x.shape[-1], before=operations(captured.graph, captured.root))
        del captured
        result = reparam.fuse(model, x, verify="quick")
        assert result.report.comparison is not None
        assert isinstance(result.module, fx.GraphModule)
        row = replace(row, after=operations(result.module.graph, result.module))
        row = replace(row, error=result.report.comparison.algebra_error)
        if args.untimed:
            return replace(row, seconds=round(time.perf_counter() - start, 1))
        row = replace(row, eager=latency({"original": model, "fused": result.module}, x, args))
        found = onnx_latency(model, result.module, x, args)
        row = replace(row, onnx=found.get("onnx"), failed=found.get("onnx_failed", ""))
    except Exception as error:
        row = replace(row, failed=first_line(error))
    return replace(row, seconds=round(time.perf_counter() - start, 1))


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The page."""
    about = facts["conditions"]
    lines = [
        "# Constants and scales in timm's models",
        "",
        f"`{facts['command']}` on {about['hardware']}, {about['threads']} thread(s), torch {about['torch']}, timm "
        f"{about['timm']}, onnxruntime {about['onnxruntime']}, reparam at {about['revision']}.",
        "",
        "Operations that no input goes into (before -> after), all operations, the float64 error, and the latency of "
        "one image. Speed-up: median of original / fused over paired, interleaved runs, with its 95% bootstrap "
        "interval; above 1 the fused model is faster. * : the measurement itself says that it is doubtful (few "
        "runs, other load, "
        "drift, spread). onnxruntime computes most constants once by itself when it loads a file.",
        "",
        "| model | what it has | image | constant operations | operations | float64 error | eager, ms | speed-up "
        "| onnxruntime, ms | speed-up |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row.model, MODELS.get(row.model, ""), str(row.size)]
        cells += [f"{before} -> {after}" for before, after in zip(row.before, row.after, strict=True)]
        cells += ["-" if row.error is None else f"{row.error:.0e}"]
        for found in (row.eager, row.onnx):
            times = found and f"{1e3 * found.original:.2f} -> {1e3 * found.fused:.2f}"
            cells += [times, found.cell()] if found and times else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    wrong = [f"- {row.model}: {text}" for row in rows for text in row.complaints()]
    lines += ["", *(["What is wrong:", "", *wrong] if wrong else ["No constant operation is left, no model slower."])]
    return "\n".join([*lines, ""])


def load(out: Path, wanted: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of an earlier run, by model.

    Raises:
        ValueError: they were measured under other conditions.
    """
    path = out / "inference_form.json"
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    if saved["conditions"] != dict(wanted):
        raise ValueError(f"{path} was measured under other conditions: move it away, or pass --again all")
    return {row["model"]: Row.from_dict(row) for row in saved["rows"]}


def save(out: Path, rows: Mapping[str, Row], facts: Mapping[str, Any]) -> None:
    """Writes `inference_form.json` and `.md`."""
    ordered = sorted(rows.values(), key=lambda row: row.model)
    held = {**facts, "rows": [asdict(row) for row in ordered]}
    write(out / "inference_form.json", json.dumps(held, indent=1) + "\n")
    write(out / "inference_form.md", markdown(ordered, facts))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", metavar="REGEX", help="only models whose names match")
    parser.add_argument("--seconds", type=float, default=8.0, help="time per model and runtime")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="start no further model after these")
    parser.add_argument("--untimed", action="store_true", help="count and compare only; print, and write nothing")
    parser.add_argument("--again", choices=("all", "failed"), help="measure these although they are done")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    args.machine = None
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    facts = {"command": "python benchmarks/inference_form.py", "conditions": conditions(args)}
    begun = time.perf_counter()
    try:
        rows = {} if args.again == "all" or args.untimed else load(args.out, facts["conditions"])
    except ValueError as error:
        print(error)
        return 2
    try:
        for name in MODELS:
            done = name in rows and not (args.again == "failed" and rows[name].failed)
            if done or not re.search(args.models, name):
                continue
            if args.budget is not None and time.perf_counter() - begun > 60 * args.budget:
                print(f"the budget is spent before {name}; the same command goes on from here")
                break
            row = rows[name] = measure(name, args)
            if not args.untimed:
                save(args.out, rows, facts)
            said = [f"{found.ratio.verdict}" for found in (row.eager, row.onnx) if found]
            said += [f"float64 error {row.error:.0e}"] if row.error is not None else []
            print(
                f"{name}: {row.before} -> {row.after}, {'; '.join([*said, row.failed])} ({row.seconds:.0f} s)",
                flush=True,
            )
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from here")
    return int(any(list(row.complaints()) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
