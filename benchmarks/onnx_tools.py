"""What tools that optimise ONNX files make of timm's models: node counts, file size and latency side by side.

    python benchmarks/onnx_tools.py [--models REGEX] [--seconds 10] [--threads 1] [--again failed]

Four files of each model: the original as `torch.onnx.export` writes it, that file after onnxsim and after onnxslim, and
what `reparam` writes. Each runs in onnxruntime at its highest level, in paired, interleaved rounds, on one image of the
model's own size. Each is also held against the original in PyTorch, by `reparam.verify`: an optimiser that changes the
answer is marked, and its latency is that of another function. Weights are random, BatchNorm statistics lively.

Results go to `benchmarks/results/onnx_tools.json` and `.md`, one model at a time: a run that was stopped goes on where
it was, unless the engine, the machine or a version has changed since (exit status 2). Exit status 1 if a file of ours
does not agree, or holds what inference does not need without a reason.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import reparam  # noqa: E402
from benchmarks.onnx_tools_table import ONNXSIM, ONNXSLIM, ORIGINAL, OURS, Row, markdown  # noqa: E402
from benchmarks.zoo_compare_rows import microseconds  # noqa: E402
from benchmarks.zoo_variants import ours_export, plain_export, sessions, simplify  # noqa: E402
from reparam.bench.machine import hardware_name  # noqa: E402
from reparam.export.leftovers import leftovers  # noqa: E402
from reparam.exporting import reasons_of  # noqa: E402
from reparam.quiet import quiet  # noqa: E402
from tools import sweep, timm_zoo  # noqa: E402
from tools.record import engine_revision, first_line, measured_before, write  # noqa: E402

MODELS = (
    "lcnetv2_base", "mobilenetv3_small_100", "repvgg_a0", "resnet18", "regnety_002", "efficientnet_b0", "mobileone_s0",
    "ghostnetv3_050", "densenet121", "fastvit_t8", "repvit_m1", "convnext_atto", "edgenext_xx_small", "levit_128s",
    "deit_tiny_patch16_224", "inception_v3",
)  # fmt: skip
"""Of `zoo_models.txt`: plain, multi-branch, dense, grouped, with squeeze-and-excitation, and with attention."""
LIMIT = 1800.0
"""Seconds for one model."""
LEAST_RUNS = 10


def onnxslim(source: Path, target: Path) -> None:
    """onnxslim's result for a file, at its defaults."""
    import onnx
    import onnxslim

    with quiet():
        onnx.save_model(onnxslim.slim(onnx.load(str(source))), str(target))


def made(model: nn.Module, x: torch.Tensor, folder: Path) -> tuple[dict[str, Path], dict[str, str], reparam.FuseResult]:
    """The files by variant, why others are missing, and what fusing did.

    Raises:
        Exception: the original or ours cannot be written; then there is nothing to compare.
    """
    files = {name: folder / f"{number}.onnx" for number, name in enumerate((ORIGINAL, ONNXSIM, ONNXSLIM, OURS))}
    result = reparam.fuse(model, x, machine="onnxruntime-cpu")
    plain_export(model, x, files[ORIGINAL])
    ours_export(result.module, x, files[OURS])
    missing = {}
    tools: dict[str, Callable[[Path, Path], None]] = {ONNXSIM: simplify, ONNXSLIM: onnxslim}
    for name, tool in tools.items():
        try:
            tool(files[ORIGINAL], files[name])
        except Exception as error:
            missing[name] = first_line(error)
            del files[name]
    return files, missing, result


def measured(name: str, seconds: float, threads: int) -> Row:
    """One row."""
    import onnx

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = timm_zoo.create(name)
    x = torch.randn(1, *timm_zoo.input_size(model), generator=torch.Generator().manual_seed(0))
    graphs: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files, missing, result = made(model, x, Path(folder))
        running = sessions(files, threads)
        for variant, session in running.items():
            proto = onnx.load(str(files[variant]))
            compared = reparam.verify(model, session, x, vary_shapes=False, check_structure=False)
            idle = leftovers(proto)
            graphs[variant] = {
                "nodes": len(proto.graph.node),
                "bytes": sum(
                    part.stat().st_size for part in Path(folder).glob(f"{files[variant].name}*")
                ),  # and its data
                "batch_norms": sum(one.kind == "BatchNormalization" for one in idle),
                "leftovers": [str(one) for one in idle if one.kind != "BatchNormalization" and not one.needed],
                "agrees": compared.passed,
                "error": compared.numeric_error,
                "noise": compared.original_noise,
                "why": "" if compared.passed else compared.summary(),
            }
        unexplained = reasons_of(leftovers(onnx.load(str(files[OURS]))), result.report)
        timing = reparam.benchmark(running, x, threads=threads, min_runs=LEAST_RUNS, max_seconds=seconds, memory=False)
    if timing.partial:
        raise KeyboardInterrupt
    return Row(
        model=name,
        family=timm_zoo.family(name),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        size=x.shape[-1],
        graphs=graphs,
        stays=list(unexplained),
        missing=missing,
        samples={variant: list(microseconds(values)) for variant, values in timing.samples.items()},
        doubts=list(timing.warnings),
        seconds=round(time.perf_counter() - start, 1),
    )


def lost(name: str, why: str) -> Row:
    """The row of a model that could not be measured."""
    return Row(name, timm_zoo.family(name), failure=why)


def conditions(threads: int) -> dict[str, Any]:
    """What all rows have in common."""
    return {
        "revision": engine_revision(),
        "hardware": hardware_name(torch.device("cpu")),
        "threads": threads,
        "torch": torch.__version__,
        "timm": timm_zoo.import_timm().__version__,
        **{package: version(package) for package in ("onnx", "onnxruntime", "onnxsim", "onnxslim")},
    }


def save(out: Path, rows: Mapping[str, Row], facts: Mapping[str, Any]) -> None:
    """Writes `onnx_tools.json` and `onnx_tools.md`, the rows in the order of `MODELS`."""
    order = {name: number for number, name in enumerate(MODELS)}
    ordered = sorted(rows.values(), key=lambda row: (order.get(row.model, len(order)), row.model))
    document = {**facts, "rows": [asdict(row) for row in ordered]}
    write(out / "onnx_tools.json", json.dumps(document, indent=1) + "\n")
    write(out / "onnx_tools.md", markdown(ordered, facts))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", metavar="REGEX", help="only models whose names match")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the latency of one model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for one model in all")
    parser.add_argument("--again", choices=("all", "failed"), help="measure these although they are done")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    facts = {"command": "python benchmarks/onnx_tools.py", "conditions": conditions(args.threads)}
    try:
        before = [] if args.again == "all" else measured_before(args.out / "onnx_tools.json", facts["conditions"])
    except ValueError as error:
        print(error)
        return 2
    rows = sweep.kept({row["model"]: Row(**row) for row in before}, args)
    names = sweep.missing(MODELS, rows, args)
    print(f"{len(names)} models to measure, {len(rows)} measured before", flush=True)
    measure = functools.partial(measured, seconds=args.seconds, threads=args.threads)
    try:
        status = sweep.run(
            sweep.each(measure, names, 1, args.limit, lost),
            len(names),
            rows,
            lambda held: save(args.out, held, facts),
            1,
        )
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from here")
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
