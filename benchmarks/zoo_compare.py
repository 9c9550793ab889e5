"""timm's models side by side: as built, and after the author's conversion, torch.fx fuse, onnxsim and reparam.

    python benchmarks/zoo_compare.py [--budget 500] [--models REGEX] [--seconds 6] [--threads 1]
    python benchmarks/zoo_compare.py --device cuda [--runtimes eager,cuda-graphs,compile] [--dtypes ...] [--batches ...]
    python benchmarks/zoo_compare.py --shard 1/4 --out A ... --merge A B C D    # several processes on a large machine

On the CPU each model is timed in eager mode and in onnxruntime; on a GPU in eager mode, as CUDA graphs and compiled, in
float32, TF32, float16 and bfloat16, with one image and with 64. All variants of a cell run in paired, interleaved
rounds (`reparam.benchmark`). Models come in the order of what is claimed of them: the two that have a bound of their
own, those with an author's conversion, those of `zoo_models.txt`, the others of `tools/results/authors.json`; on a GPU
those of `ON_GPU`. Compiling is left to the end, because it takes longest.

Results go to `benchmarks/results/zoo_compare.json` and `.md` (`zoo_compare_cuda` on a GPU) after every cell: a run that
was stopped, or whose `--budget` of seconds is over, goes on where it was, unless the engine, the machine or a version
has changed since (exit status 2). The page says of every claim whether the data bear it out; exit status 1 if they
do not, or a model fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import reparam  # noqa: E402
from benchmarks.zoo_compare_claims import FAILS, claims  # noqa: E402
from benchmarks.zoo_compare_rows import Cell, Row, microseconds  # noqa: E402
from benchmarks.zoo_compare_store import load, merged, save, stem  # noqa: E402
from benchmarks.zoo_latency import Candidate, listed  # noqa: E402
from benchmarks.zoo_variants import Converted, convert, onnx_files, sessions  # noqa: E402
from reparam.bench.machine import hardware_name  # noqa: E402
from tools import timm_zoo  # noqa: E402
from tools.record import engine_revision, first_line  # noqa: E402

AUTHORS_JSON = ROOT / "tools" / "results" / "authors.json"
FIRST = ("mobileone_s0", "repvgg_a0")
ON_GPU = (
    *FIRST, "resnet18", "resnet50", "efficientnet_b0", "mobileone_s1", "fastvit_t8", "repvit_m1", "ghostnetv3_050",
    "convnext_atto", "deit_tiny_patch16_224", "densenet121",
)  # fmt: skip
RUNTIMES = {"cpu": "eager,onnxruntime", "cuda": "eager,cuda-graphs,compile"}
DTYPES = {"cpu": "float32", "cuda": "float32,tf32,float16,bfloat16"}
BATCHES = {"cpu": "1", "cuda": "1,64"}
SECONDS = {"cpu": 6.0, "cuda": 1.0}
LATE = ("compile",)
LEAST_RUNS = 10

Key = tuple[str, str, int]


class BudgetOverError(Exception):
    """The time that the command may take is over."""


def models(device: str) -> list[Candidate]:
    """What to measure, in order."""
    known = {candidate.model: candidate for candidate in listed()}
    converted = {
        row["model"]: Candidate(row["family"], row["model"], row["parameters"])
        for row in json.loads(AUTHORS_JSON.read_text())["rows"]
    }
    everything = {**converted, **known}
    if device == "cuda":
        return [everything[name] for name in ON_GPU]

    def rank(candidate: Candidate) -> tuple[int, int]:
        name = candidate.model
        group = 0 if name in FIRST else 1 if name in converted and name in known else 2 if name in known else 3
        return group, candidate.parameters

    return sorted(everything.values(), key=rank)


def keys(args: argparse.Namespace) -> list[Key]:
    """Runtime, dtype and batch of every cell that is asked for."""
    return list(product(args.runtimes, args.dtypes, args.batches))


def pending(args: argparse.Namespace, rows: Mapping[str, Row]) -> Iterator[tuple[Candidate, list[Key]]]:
    """Models with the cells that are due; cells that take long come after all others."""
    first, step = args.shard
    for late in (False, True):
        for candidate in models(args.device)[first - 1 :: step]:
            if not re.search(args.models, candidate.model):
                continue
            row = rows.get(candidate.model)
            if row is not None and row.failed and args.again != "failed":
                continue
            done = {cell.key for cell in row.cells if not (cell.failed and args.again == "failed")} if row else set()
            due = [key for key in keys(args) if key not in done and (key[0] in LATE) == late]
            if due:
                yield candidate, due


def in_torch(made: Converted, x: torch.Tensor, key: Key, args: argparse.Namespace) -> Cell:
    """A cell of a runtime that calls torch."""
    runtime, dtype, batch = key
    images = x.repeat(batch, *(1 for _ in x.shape[1:]))
    timing = reparam.benchmark(
        made.variants,
        images,
        backends=["compile" if runtime == "compile" else "eager"],
        cuda_graphs=runtime == "cuda-graphs",
        dtype=dtype if args.device == "cuda" else None,
        device=args.device,
        strict=False,
        **measuring(args),
    )
    return cell_of(timing, key)


def in_onnxruntime(made: Converted, x: torch.Tensor, key: Key, args: argparse.Namespace) -> Cell:
    """The cell of onnxruntime."""
    images = x.repeat(key[2], *(1 for _ in x.shape[1:]))
    with tempfile.TemporaryDirectory() as folder:
        files, missing = onnx_files(made, images, Path(folder))
        timing = reparam.benchmark(sessions(files, args.threads), images, **measuring(args))
    return replace(cell_of(timing, key), missing=missing)


def measuring(args: argparse.Namespace) -> dict[str, Any]:
    """What all cells have in common."""
    return {"threads": args.threads, "min_runs": LEAST_RUNS, "max_seconds": args.seconds, "memory": False}


def cell_of(timing: reparam.Timing, key: Key) -> Cell:
    """The samples that are kept of a measurement.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    if timing.partial:
        raise KeyboardInterrupt
    samples = {name: microseconds(values) for name, values in timing.samples.items()}
    return Cell(*key, samples=samples, doubts=timing.warnings, missing=timing.left_out)


def measure(row: Row, due: Sequence[Key], args: argparse.Namespace, deadline: float) -> Iterator[Row]:
    """The row after each cell; an exception is kept as its first line.

    Raises:
        BudgetOverError: there is no time for the next cell.
    """
    device = torch.device(args.device)
    try:
        model = timm_zoo.create(row.model)
        size = timm_zoo.input_size(model)
        x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
        made = convert(model, x, device, args.machine)
        x = x.to(device)
    except Exception as error:
        _require_gpu(error)
        yield replace(row, failed=first_line(error))
        return
    facts = {"before": made.before, "after": made.after, "errors": made.errors, "missing": made.missing}
    row = replace(row, size=size[-1], failed="", **facts)
    for key in due:
        _require_time(deadline)
        gc.collect()
        try:
            cell = (in_onnxruntime if key[0] == "onnxruntime" else in_torch)(made, x, key, args)
        except Exception as error:
            _require_gpu(error)
            cell = Cell(*key, failed=first_line(error))
        row = row.with_cell(cell)
        yield row


def _require_gpu(error: BaseException) -> None:
    """A process that made its GPU fail gets nothing from it any more: what it reports is not about the models.

    Raises:
        KeyboardInterrupt: it is such a failure.
    """
    if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
        print(f"the GPU failed: {first_line(error)}", flush=True)
        raise KeyboardInterrupt from error


def _require_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise BudgetOverError


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common."""
    import onnxruntime

    return {
        "revision": engine_revision(),
        "device": args.device,
        "hardware": hardware_name(torch.device(args.device)),
        "threads": args.threads,
        "machine": args.machine or "default",
        "torch": torch.__version__,
        "timm": timm_zoo.import_timm().__version__,
        "onnxruntime": onnxruntime.__version__,
    }


def shard(text: str) -> tuple[int, int]:
    """`2/5` as numbers."""
    match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 2/5")
    return int(match[1]), int(match[2])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", default="", metavar="REGEX", help="only models whose names match")
    parser.add_argument("--runtimes", help="with commas: eager, onnxruntime; on a GPU eager, cuda-graphs, compile")
    parser.add_argument("--dtypes", help="with commas; on a GPU float32, tf32, float16, bfloat16")
    parser.add_argument("--batches", help="with commas")
    parser.add_argument("--seconds", type=float, help="time per cell, warm-up included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--machine", help="the cost model's machine; by default the one `fuse` takes")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no cell is started")
    parser.add_argument("--again", choices=("all", "failed"), help="measure these although they are done")
    parser.add_argument("--shard", type=shard, default=(1, 1), metavar="N/M", help="every M-th model, from the N-th on")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FOLDER", help="measure nothing, put shards together")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    for name, defaults in (("runtimes", RUNTIMES), ("dtypes", DTYPES), ("batches", BATCHES)):
        setattr(args, name, (getattr(args, name) or defaults[args.device]).split(","))
    args.batches = [int(batch) for batch in args.batches]
    args.seconds = SECONDS[args.device] if args.seconds is None else args.seconds
    allowed = {"cpu": {"eager", "onnxruntime", "compile"}, "cuda": {"eager", "cuda-graphs", "compile"}}[args.device]
    if not set(args.runtimes) <= allowed:
        parser.error(f"--runtimes: on {args.device} choose from {', '.join(sorted(allowed))}")
    if args.device == "cuda" and not args.merge and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device here")
    return args


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    deadline = time.monotonic() + args.budget
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    signal.signal(signal.SIGTERM, _stop)
    path = stem(args)
    if args.merge:
        try:
            save(path, *merged(args.merge, args))
        except ValueError as error:
            print(error)
            return 2
        return 0
    facts = {"command": f"python benchmarks/zoo_compare.py --device {args.device}", "conditions": conditions(args)}
    try:
        rows = {} if args.again == "all" else load(path.with_suffix(".json"), facts["conditions"])
    except ValueError as error:
        print(error)
        return 2
    try:
        for candidate, due in list(pending(args, rows)):
            _require_time(deadline)
            start = time.monotonic()
            known = rows.get(candidate.model, Row(candidate.family, candidate.model, candidate.parameters))
            for row in measure(known, due, args, deadline):
                rows[row.model] = row
                save(path, rows, facts)
                print(f"{progress(row)} ({time.monotonic() - start:.0f} s)", flush=True)
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from here")
    except BudgetOverError:
        print("the budget is over; what was measured is kept, and the same command goes on from here")
    found = claims(list(rows.values()), args.device)
    print(*(claim.line() for claim in found), sep="\n")
    return int(any(claim.verdict == FAILS for claim in found) or any(row.failed for row in rows.values()))


def progress(row: Row) -> str:
    """The row's last cell for the terminal."""
    if row.failed or not row.cells:
        return f"{row.model}: {row.failed}"
    cell = row.cells[-1]
    found = {name: cell.ratio(name) for name in cell.samples if name != "original"}
    said = ", ".join(f"{name} {ratio.value:.2f}" for name, ratio in found.items() if ratio) or cell.failed
    return f"{row.model} {cell.runtime} {cell.dtype} batch {cell.batch}: {said}"


if __name__ == "__main__":
    sys.exit(main())
