"""How the time and memory of fusing grow with a network's depth and width.

    python benchmarks/fuse_scaling.py [--depths 50,200,800] [--widths 16,64,256] [--kinds chain,branches] [--budget 500]

Every cell is a network of `depth` blocks with `width` channels: `chain` has conv-BN-ReLU blocks, `branches` blocks of
three parallel branches, relu(BN(conv 3x3) + BN(conv 1x1) + BN). Timed, in pairs and in random order, are
`reparam.fuse(..., verify=False)` and `torch.fx.experimental.optimization.fuse`, which only folds BatchNorm; the peak of
the extra memory of either is that of one call in a process of its own.

Results go to `benchmarks/results/fuse_scaling.json` and `.md` after every cell: a run that was stopped, or whose
`--budget` of seconds is over, goes on where it was, unless the engine, the machine or a version has changed since (exit
status 2). Exit status 1 if our time per block grows by more than `GROWTH_LIMIT` from the shallowest to the deepest
network of a width: fusing must be linear in the depth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.fuse_memory import Branches, Watch  # noqa: E402
from benchmarks.fuse_speed import GROWTH_LIMIT, WAYS, chain, runners  # noqa: E402
from reparam.bench import statistics  # noqa: E402
from reparam.bench.machine import hardware_name  # noqa: E402
from reparam.bench.measure import measure  # noqa: E402
from tools import timm_zoo  # noqa: E402
from tools.record import engine_revision, measured_before, write  # noqa: E402

MIB = 2**20
SIZE = 8
"""Height and width of the images: fusing does not depend on it, running the example once does."""

Key = tuple[str, int, int]


@dataclass(frozen=True)
class Row:
    """One network: seconds (medians), ratio ours / theirs with its interval, bytes of weights and of extra memory."""

    kind: str
    depth: int
    width: int
    weights: int
    runs: int
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    ours_extra: int | None
    theirs_extra: int | None
    samples: dict[str, list[float]]

    @property
    def key(self) -> Key:
        """What a resumed run looks for."""
        return self.kind, self.depth, self.width


def branches(depth: int, width: int) -> nn.Module:
    """Blocks of three parallel branches."""
    torch.manual_seed(0)
    return timm_zoo.randomise_batch_norms(nn.Sequential(*(Branches(width) for _ in range(depth)))).eval()


KINDS: dict[str, Callable[[int, int], nn.Module]] = {"chain": chain, "branches": branches}


def build(kind: str, depth: int, width: int) -> tuple[nn.Module, torch.Tensor]:
    """A network and an image for it."""
    return KINDS[kind](depth, width), torch.randn(1, width, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def timed(key: Key, args: argparse.Namespace) -> Row:
    """One cell.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    model, x = build(*key)
    measured = measure(runners(model, x), min_runs=args.runs, max_seconds=args.seconds, seed=0)
    if measured.partial:
        raise KeyboardInterrupt
    samples = {way: list(measured.samples[way]) for way in WAYS}
    ratio, low, high = statistics.ratio_interval(samples["ours"], samples["theirs"], seed=0)
    medians = {way: statistics.median(samples[way]) for way in WAYS}
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    extra = {way: memory_in_child(way, key) for way in WAYS}
    return Row(
        *(*key, weights, len(samples["ours"]), medians["ours"], medians["theirs"], ratio, low, high),
        *(extra["ours"], extra["theirs"], samples),
    )


def memory_in_child(way: str, key: Key) -> int | None:
    """Peak of the extra memory of one call in bytes, in a fresh process; None where the system does not tell.

    Raises:
        RuntimeError: the process failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    words = [sys.executable, __file__, "--memory", way, *map(str, key)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {way} on {key} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def memory(way: str, key: Key) -> int:
    """Rise of the resident memory's peak over its level before one call, in bytes, in this process."""
    WAYS[way](*build(key[0], 2, 4))  # imports and caches are not the call's
    model, x = build(*key)
    with Watch() as watch:
        WAYS[way](model, x)
    return watch.total


def growth(rows: Sequence[Row], way: str) -> dict[str, float]:
    """For each kind and width: time per block of the deepest network over that of the shallowest; 1 is linear."""
    found = {}
    for kind, width in dict.fromkeys((row.kind, row.width) for row in rows):
        column = sorted((row for row in rows if (row.kind, row.width) == (kind, width)), key=lambda row: row.depth)
        if len(column) > 1:
            first, last = column[0], column[-1]
            found[f"{kind}, width {width}"] = (getattr(last, way) / last.depth) / (getattr(first, way) / first.depth)
    return found


def too_steep(rows: Sequence[Row]) -> list[str]:
    """Where our time grows faster than the depth."""
    return [f"{name}: {factor:.2f}" for name, factor in growth(rows, "ours").items() if factor > GROWTH_LIMIT]


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The page."""
    about = facts["conditions"]
    lines = [
        "# How fusing grows with depth and width",
        "",
        f"`{facts['command']}`: {about['hardware']}, {about['threads']} thread(s), torch {about['torch']}, reparam at "
        f"{about['revision']}.",
        "",
        "Blocks of `chain` are conv-BN-ReLU, of `branches` relu(BN(conv 3x3) + BN(conv 1x1) + BN). Ours is "
        "`reparam.fuse(..., verify=False)`, theirs `torch.fx.experimental.optimization.fuse`, which only folds "
        "BatchNorm and merges no branches. Times are medians of paired runs, the ratio has a 95% bootstrap interval. "
        "Extra memory is the rise of the resident memory's peak during one call in a process of its own, the fused "
        "model included.",
        "",
        "| blocks | depth | width | weights, MiB | theirs, ms | ours, ms | ours / theirs | theirs, ms per block "
        "| ours, ms per block | theirs, extra MiB | ours, extra MiB | runs |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row.kind, str(row.depth), str(row.width), f"{row.weights / MIB:.1f}"]
        cells += [f"{1e3 * row.theirs:.0f}", f"{1e3 * row.ours:.0f}", f"{row.ratio:.2f} ({row.low:.2f}-{row.high:.2f})"]
        cells += [f"{1e3 * value / row.depth:.2f}" for value in (row.theirs, row.ours)]
        cells += ["-" if value is None else f"{value / MIB:.1f}" for value in (row.theirs_extra, row.ours_extra)]
        lines.append(f"| {' | '.join([*cells, str(row.runs)])} |")
    ours, theirs = growth(rows, "ours"), growth(rows, "theirs")
    if not ours:
        return "\n".join([*lines, "", "Only one depth was measured so far.", ""])
    lines += ["", "Time per block, deepest network over shallowest; 1 is linear in the depth:", ""]
    lines += [f"- {name}: ours {ours[name]:.2f}, theirs {theirs[name]:.2f}" for name in ours]
    steep = too_steep(rows)
    lines += ["", f"Ours grows faster than the depth: {', '.join(steep)}." if steep else "Ours grows with the depth."]
    return "\n".join([*lines, ""])


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a table have in common."""
    return {
        "revision": engine_revision(),
        "hardware": hardware_name(torch.device("cpu")),
        "threads": args.threads,
        "torch": torch.__version__,
    }


def load(path: Path, wanted: Mapping[str, Any]) -> dict[Key, Row]:
    """The rows of an earlier run; none if there was none.

    Raises:
        ValueError: they were measured under other conditions.
    """
    rows = [Row(**row) for row in measured_before(path, wanted)]
    return {row.key: row for row in rows}


def save(out: Path, rows: Mapping[Key, Row], facts: Mapping[str, Any]) -> None:
    """Writes `fuse_scaling.json` and `.md`."""
    ordered = sorted(rows.values(), key=lambda row: (list(KINDS).index(row.kind), row.width, row.depth))
    head = json.dumps(facts, indent=1)[:-2]
    body = ",\n".join(json.dumps(asdict(row)) for row in ordered)
    write(out / "fuse_scaling.json", f'{head},\n "rows": [\n{body}\n ]\n}}\n')
    write(out / "fuse_scaling.md", markdown(ordered, facts))


def pending(args: argparse.Namespace, rows: Mapping[Key, Row]) -> Iterator[Key]:
    """Cells that are asked for and not yet measured, small ones first."""
    cells = product(args.kinds.split(","), map(int, args.depths.split(",")), map(int, args.widths.split(",")))
    yield from sorted((key for key in cells if key not in rows), key=lambda key: key[1] * key[2] ** 2)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="with commas: chain, branches")
    parser.add_argument("--depths", default="50,200,800", help="numbers of blocks, with commas")
    parser.add_argument("--widths", default="16,64,256", help="numbers of channels, with commas")
    parser.add_argument("--seconds", type=float, default=10.0, help="time per cell")
    parser.add_argument("--runs", type=int, default=5, help="least number of paired runs per cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no cell is started")
    parser.add_argument("--again", choices=("all",), help="measure everything anew")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--memory", nargs=4, metavar=("WAY", "KIND", "DEPTH", "WIDTH"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    deadline = time.monotonic() + args.budget
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.memory:
        way, kind, depth, width = args.memory
        print(memory(way, (kind, int(depth), int(width))))
        return 0
    facts = {"command": "python benchmarks/fuse_scaling.py", "conditions": conditions(args)}
    try:
        rows = {} if args.again else load(args.out / "fuse_scaling.json", facts["conditions"])
    except ValueError as error:
        print(error)
        return 2
    try:
        for key in list(pending(args, rows)):
            if time.monotonic() > deadline:
                print("the budget is over; what was measured is kept, and the same command goes on from here")
                break
            row = rows[key] = timed(key, args)
            save(args.out, rows, facts)
            print(
                f"{row.kind} {row.depth} x {row.width}: ours {1e3 * row.ours:.0f} ms, "
                f"theirs {1e3 * row.theirs:.0f} ms, "
                f"extra memory {row.ours_extra} and {row.theirs_extra} bytes, weights {row.weights}",
                flush=True,
            )
    except KeyboardInterrupt:
        print("stopped; what was measured is kept, and the same command goes on from here")
    steep = too_steep(list(rows.values()))
    print(*(f"FAIL: our time grows faster than the depth: {one}" for one in steep), sep="\n", end="\n" if steep else "")
    return int(bool(steep))


if __name__ == "__main__":
    sys.exit(main())
