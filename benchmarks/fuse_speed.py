"""What fusing itself costs: `reparam.fuse` without verification beside `torch.fx.experimental.optimization.fuse`.

Both run in one process, in pairs and in random order, on resnet50 and on chains of conv-BN-ReLU layers. Printed and
written (`results/fuse_speed.json` and `.md`) are the times, the ratio ours / theirs with a 95% bootstrap interval, the
peak of the extra memory (each in a process of its own) and the time per layer over the depth, which must not grow.

theirs only folds BatchNorm into convolutions; ours does everything it does by default, but for the verification.

    python benchmarks/fuse_speed.py [--depths 200,2000] [--channels 8] [--size 16] [--seconds 30] [--threads 1]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from reparam.bench import statistics  # noqa: E402
from reparam.bench.machine import WallClock, hardware_name, system_load  # noqa: E402
from reparam.bench.measure import Runner, measure  # noqa: E402
from tools import timm_zoo  # noqa: E402
from tools.torch_rewrites import optimization  # noqa: E402

LIMIT = 1.5
# Time per layer may rise this much over the depth before the growth is called worse than linear.
GROWTH_LIMIT = 1.5


@dataclass(frozen=True)
class Row:
    """One model: seconds (medians), ratio ours / theirs with its interval, and peak extra memory in MiB."""

    model: str
    layers: int
    runs: int
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    ours_mib: float | None
    theirs_mib: float | None
    weights_mib: float
    samples: dict[str, list[float]]


def chain(depth: int, channels: int) -> nn.Module:
    """`depth` times conv-BN-ReLU, with random BatchNorm statistics."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return timm_zoo.randomise_batch_norms(nn.Sequential(*layers)).eval()


def build(name: str, channels: int, size: int) -> tuple[nn.Module, torch.Tensor, int]:
    """The model called `name` (`chain-<depth>` or timm's name), an input for it, and its number of convolutions."""
    if name.startswith("chain-"):
        model: nn.Module = chain(int(name.removeprefix("chain-")), channels)
        x = torch.randn(1, channels, size, size)
    else:
        model = timm_zoo.create(name)
        x = torch.randn(1, *timm_zoo.input_size(model))
    return model, x, sum(isinstance(part, nn.Conv2d) for part in model.modules())


def ours(model: nn.Module, x: torch.Tensor) -> Any:
    """Ours without verification: capture, all passes, emission."""
    from reparam import fuse

    return fuse(model, x, verify=False).module


def theirs(model: nn.Module, x: torch.Tensor) -> Any:
    """torch.fx's: symbolic trace and conv-BN folding, on a copy."""
    return optimization().fuse(model)


WAYS: dict[str, Callable[[nn.Module, torch.Tensor], Any]] = {"theirs": theirs, "ours": ours}


def runners(model: nn.Module, x: torch.Tensor) -> list[Runner]:
    """Both ways on one model, ready to be timed side by side."""

    def prepare(way: str) -> Callable[[], Callable[[], Any]]:
        def call() -> None:
            # Users run with the collector on; `measure` turns it off around the rounds.
            gc.enable()
            try:
                WAYS[way](model, x)
            finally:
                gc.disable()

        def ready() -> Callable[[], Any]:
            gc.collect()
            return call

        return ready

    return [Runner(way, prepare(way), WallClock(), "theirs") for way in WAYS]


def timed(name: str, args: argparse.Namespace) -> Row:
    """Times both ways on one model, and their memory in processes of their own."""
    model, x, layers = build(name, args.channels, args.size)
    measured = measure(runners(model, x), min_runs=args.runs, max_seconds=args.seconds, seed=0)
    if measured.partial:
        raise KeyboardInterrupt
    samples = {way: list(measured.samples[way]) for way in WAYS}
    ratio, low, high = statistics.ratio_interval(samples["ours"], samples["theirs"], seed=0)
    return Row(
        model=name,
        layers=layers,
        runs=len(samples["ours"]),
        ours=statistics.median(samples["ours"]),
        theirs=statistics.median(samples["theirs"]),
        ratio=ratio,
        low=low,
        high=high,
        ours_mib=memory_in_child("ours", name, args),
        theirs_mib=memory_in_child("theirs", name, args),
        weights_mib=sum(t.nbytes for t in model.state_dict().values()) / 2**20,
        samples=samples,
    )


def memory_in_child(way: str, name: str, args: argparse.Namespace) -> float | None:
    """Peak extra memory of one call in MiB, measured in a fresh process; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    done = subprocess.run(
        [sys.executable, __file__, "--memory", way, name, "--channels", str(args.channels), "--size", str(args.size)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        sys.exit(f"measuring the memory of {way} on {name} failed:\n{done.stderr}")
    return float(done.stdout)


def memory(way: str, name: str, args: argparse.Namespace) -> float:
    """Rise of the resident memory's peak over its level before the call, in MiB."""
    WAYS[way](*build("chain-2", args.channels, args.size)[:2])  # imports and caches are not the call's
    model, x, _ = build(name, args.channels, args.size)
    gc.collect()
    _return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    WAYS[way](model, x)
    return (_status("VmHWM") - before) / 1024


def _return_free_memory() -> None:
    """Gives the allocator's free pages back, or a call that reuses them would seem to need no memory."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """A figure of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1])


def growth(rows: list[Row]) -> dict[str, float]:
    """Time per layer of the deepest chain over that of the shallowest: 1 is linear."""
    chains = sorted((row for row in rows if row.model.startswith("chain-")), key=lambda row: row.layers)
    if len(chains) < 2:
        return {}
    first, last = chains[0], chains[-1]
    return {way: (getattr(last, way) / last.layers) / (getattr(first, way) / first.layers) for way in WAYS}


def markdown(rows: list[Row], facts: dict[str, Any]) -> str:
    """The results as a page."""

    def mib(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    lines = [
        "# What fusing costs",
        "",
        f"`{facts['command']}`, {facts['hardware']}, {facts['threads']} thread(s), torch {facts['torch']}; "
        "paired and interleaved in one process, median times, ratio with 95% bootstrap interval. "
        "Theirs is `torch.fx.experimental.optimization.fuse`, ours `reparam.fuse(..., verify=False)`.",
        "",
        "| model | convs | runs | theirs, ms | ours, ms | ours / theirs | theirs, ms per conv | ours, ms per conv "
        "| theirs, extra MiB | ours, extra MiB | weights, MiB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.model} | {row.layers} | {row.runs} | {1e3 * row.theirs:.1f} | {1e3 * row.ours:.1f} "
            f"| {row.ratio:.2f} ({row.low:.2f}-{row.high:.2f}) | {1e3 * row.theirs / row.layers:.3f} "
            f"| {1e3 * row.ours / row.layers:.3f} "
            f"| {mib(row.theirs_mib)} | {mib(row.ours_mib)} | {row.weights_mib:.1f} |"
        )
    for way, factor in facts["growth"].items():
        lines += ["", f"Time per layer, deepest chain over shallowest, {way}: {factor:.2f} (1 is linear)."]
    return "\n".join([*lines, ""])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="200,2000", help="depths of the chains")
    parser.add_argument("--models", default="resnet50", help="timm models, with commas; empty for none")
    parser.add_argument("--channels", type=int, default=8, help="channels of the chains")
    parser.add_argument("--size", type=int, default=16, help="height and width of the chains' input")
    parser.add_argument("--seconds", type=float, default=30.0, help="time per model")
    parser.add_argument("--runs", type=int, default=7, help="least number of paired runs per model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "MODEL"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Exit status 1 if ours is above the limit on a model, or grows worse than linearly."""
    args = parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.memory:
        print(memory(*args.memory, args))
        return 0
    load = system_load()
    names = [name for name in args.models.split(",") if name] + [f"chain-{d}" for d in args.depths.split(",") if d]
    rows = []
    for name in names:
        row = timed(name, args)
        rows.append(row)
        print(
            f"{row.model:12} ours {1e3 * row.ours:8.1f} ms, theirs {1e3 * row.theirs:8.1f} ms, "
            f"ours / theirs {row.ratio:.2f} ({row.low:.2f}-{row.high:.2f}), {row.runs} runs; "
            f"per conv {1e3 * row.ours / row.layers:.3f} and {1e3 * row.theirs / row.layers:.3f} ms; "
            f"extra memory {row.ours_mib} and {row.theirs_mib} MiB",
            flush=True,
        )
    facts = {
        "command": "python benchmarks/fuse_speed.py",
        "arguments": {key: str(value) for key, value in vars(args).items() if key not in ("out", "memory")},
        "hardware": hardware_name(torch.device("cpu")),
        "threads": args.threads,
        "torch": torch.__version__,
        "load_before": load,
        "growth": growth(rows),
    }
    for way, factor in facts["growth"].items():
        print(f"time per layer, deepest chain over shallowest, {way}: {factor:.2f} (1 is linear)")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "fuse_speed.json").write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1))
    (args.out / "fuse_speed.md").write_text(markdown(rows, facts))
    too_slow = [row.model for row in rows if row.ratio > LIMIT]
    too_steep = facts["growth"].get("ours", 1.0) > GROWTH_LIMIT
    for model in too_slow:
        print(f"FAIL: ours takes more than {LIMIT} times theirs on {model}")
    if too_steep:
        print("FAIL: our cost grows faster than the depth")
    return int(bool(too_slow) or too_steep)


if __name__ == "__main__":
    sys.exit(main())
