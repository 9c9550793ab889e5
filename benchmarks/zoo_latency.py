"""Nothing gets slower: the latency of timm's models, original beside fused.

    python benchmarks/zoo_latency.py [--models REGEX] [--seconds 10] [--onnx] [--threads 1] [--again all|slower|failed]

The models are those of `benchmarks/zoo_models.txt`: of each of timm's source files the smallest model for images of at
most 320 pixels (`--choose` writes the list anew, which takes some minutes), and the models of `INTEREST`. Each is built
with random weights and lively BatchNorm statistics, fused, and timed on one image in eager mode on the CPU, and with
`--onnx` in onnxruntime too, in paired interleaved runs (`reparam.benchmark`).

Results go to `benchmarks/results/zoo_latency.json` and `.md`, one model at a time: a run that was stopped goes on where
it was, unless the engine, the machine or a version has changed since (exit status 2): one table shows one engine.
Exit status 1 if a fused model is slower than its original beyond the interval, or fails; a refusal to capture is listed
with its reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import reparam  # noqa: E402
from benchmarks.zoo_latency_table import COUNTS, Latency, Row, complaints, markdown, summary  # noqa: E402
from reparam.bench.machine import hardware_name  # noqa: E402
from reparam.export import OnnxSession, export_onnx  # noqa: E402
from tools import timm_zoo  # noqa: E402
from tools.record import engine_revision, first_line, measured_before, write  # noqa: E402

LIST = ROOT / "benchmarks" / "zoo_models.txt"
LARGEST_IMAGE, MOST_PARAMETERS = 320, 100_000_000
"""Of a model that is chosen to stand for its family."""
LEAST_RUNS = 10
INTEREST = (
    "convnext_atto", "deit_tiny_patch16_224", "densenet121", "edgenext_xx_small", "efficientnet_b0", "fastvit_t8",
    "ghostnetv3_050", "inception_v3", "lcnetv2_base", "levit_128s", "mobilenetv3_small_100", "mobileone_s0",
    "nextvit_small", "regnety_002", "repghostnet_050", "repvgg_a0", "repvit_m1", "resnet18", "resnet50",
    "resnext50_32x4d",
)  # fmt: skip
"""Chosen whatever their size: the models that issues and other benchmarks name."""


@dataclass(frozen=True)
class Candidate:
    """A model of the list: timm's source file, timm's name, and its number of parameters."""

    family: str
    model: str
    parameters: int


def chosen() -> Iterator[Candidate]:
    """The smallest model of each of timm's source files, its toys for tests aside, and the models of `INTEREST`."""
    timm = timm_zoo.import_timm()
    for family in sorted(timm.list_modules()):
        found = []
        for name in timm.list_models(module=family, exclude_filters=["test_*"]):
            if max(timm.get_pretrained_cfg(name).input_size) <= LARGEST_IMAGE:
                with torch.device("meta"):
                    model = timm.create_model(name)
                found.append(Candidate(family, name, sum(p.numel() for p in model.parameters())))
        found.sort(key=lambda candidate: (candidate.parameters, candidate.model))
        smallest = [candidate for candidate in found[:1] if candidate.parameters <= MOST_PARAMETERS]
        yield from (candidate for candidate in found if candidate in smallest or candidate.model in INTEREST)


def listed() -> list[Candidate]:
    """The models of `zoo_models.txt`, in its order."""
    rows = (line.split() for line in LIST.read_text().splitlines() if line and not line.startswith("#"))
    return [Candidate(family, model, int(parameters)) for family, model, parameters in rows]


def latency(variants: Mapping[str, Any], x: torch.Tensor, args: argparse.Namespace) -> Latency:
    """`variants` holds the original and the fused model, in this order."""
    gc.collect()
    timing = reparam.benchmark(variants, x, threads=args.threads, min_runs=LEAST_RUNS, max_seconds=args.seconds)
    if timing.partial:
        raise KeyboardInterrupt
    medians = timing.medians
    return Latency(medians["original"], medians["fused"], timing.ratios["fused"], timing.warnings)


def onnx_latency(model: nn.Module, fused: nn.Module, x: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Fields `onnx` or `onnx_failed` of a row."""
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, module in (("original", model), ("fused", fused)):
            try:
                path = export_onnx(module, x, Path(folder) / f"{name}.onnx", verify="quick").path
                sessions[name] = OnnxSession(path, threads=args.threads)
                sessions[name](x)
            except Exception as error:
                return {"onnx_failed": f"{name}: {first_line(error)}"}
        return {"onnx": latency(sessions, x, args)}


def measure(candidate: Candidate, args: argparse.Namespace) -> Row:
    """One row; an exception is kept as its first line."""
    start = time.perf_counter()
    row = Row(candidate.family, candidate.model, candidate.parameters)
    try:
        model = timm_zoo.create(candidate.model)
        x = torch.randn(1, *timm_zoo.input_size(model), generator=torch.Generator().manual_seed(0))
        row = replace(row, size=x.shape[-1])
        begun = time.perf_counter()
        result = reparam.fuse(model, x, verify="quick", machine=args.machine)
        row = replace(row, fuse_seconds=round(time.perf_counter() - begun, 2))
        before, after = ({key: getattr(c, key) for key in COUNTS} for c in (result.report.before, result.report.after))
        row = replace(row, before=before, after=after)
        row = replace(row, eager=latency({"original": model, "fused": result.module}, x, args))
        if args.onnx:
            row = replace(row, **onnx_latency(model, result.module, x, args))
    except reparam.CaptureError as error:
        row = replace(row, refused=first_line(error))
    except Exception as error:
        row = replace(row, failed=first_line(error))
    return replace(row, seconds=round(time.perf_counter() - start, 1))


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common."""
    import onnxruntime

    return {
        "revision": engine_revision(),
        "hardware": hardware_name(torch.device("cpu")),
        "threads": args.threads,
        "machine": args.machine or "default",
        "torch": torch.__version__,
        "timm": timm_zoo.import_timm().__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def load(out: Path, wanted: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of an earlier run, by model; none if there was none.

    Raises:
        ValueError: they were measured under other conditions.
    """
    return {row["model"]: Row.from_dict(row) for row in measured_before(out / "zoo_latency.json", wanted)}


def save(out: Path, rows: Mapping[str, Row], facts: Mapping[str, Any]) -> None:
    """Writes `zoo_latency.json` and `zoo_latency.md`."""
    ordered = in_order(rows)
    write(out / "zoo_latency.json", json.dumps({**facts, "rows": [row.to_dict() for row in ordered]}, indent=1) + "\n")
    write(out / "zoo_latency.md", markdown(ordered, facts))


def in_order(rows: Mapping[str, Row]) -> list[Row]:
    """Rows by family and size."""
    return sorted(rows.values(), key=lambda row: (row.family, row.parameters, row.model))


def pending(candidates: Sequence[Candidate], rows: Mapping[str, Row], args: argparse.Namespace) -> list[Candidate]:
    """What is asked for and not yet measured, or to be measured again; small models first."""

    def is_due(candidate: Candidate) -> bool:
        row = rows.get(candidate.model)
        if row is None or args.again == "all":
            return True
        if args.again == "slower" and any(found.verdict == "slower" for _, found in row.measured()):
            return True
        if args.again == "failed" and (row.refused or row.failed or row.onnx_failed):
            return True
        return bool(args.onnx and row.eager and not row.onnx and not row.onnx_failed)

    asked = [candidate for candidate in candidates if re.search(args.models, candidate.model)]
    return sorted(filter(is_due, asked), key=lambda candidate: candidate.parameters)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", metavar="REGEX", help="only models whose names match")
    parser.add_argument("--seconds", type=float, default=10.0, help="time per model and runtime")
    parser.add_argument("--onnx", action="store_true", help="measure in onnxruntime too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", help="the cost model's machine; by default the one `fuse` takes")
    parser.add_argument("--again", choices=("all", "slower", "failed"), help="measure these although they are done")
    parser.add_argument("--choose", action="store_true", help="write the list of models anew, and stop")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.choose:
        head = "# family, model, parameters: written by `python benchmarks/zoo_latency.py --choose`"
        write(LIST, "\n".join([head, *(f"{c.family} {c.model} {c.parameters}" for c in chosen()), ""]))
        return 0
    facts = {"command": "python benchmarks/zoo_latency.py", "conditions": conditions(args)}
    try:
        rows = {} if args.again == "all" and not args.models else load(args.out, facts["conditions"])
    except ValueError as error:
        print(error)
        return 2
    todo = pending(listed(), rows, args)
    print(f"{len(todo)} models to measure, {len(rows)} measured before", flush=True)
    try:
        for done, candidate in enumerate(todo, 1):
            row = rows[candidate.model] = measure(candidate, args)
            save(args.out, rows, facts)
            print(f"{done:4d} of {len(todo)}  {row.line()}", flush=True)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from here")
    save(args.out, rows, facts)
    print(*summary(in_order(rows)), sep="\n")
    return int(any(list(complaints(row)) for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
