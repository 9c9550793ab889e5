"""What loading and fusing large models need in memory beside the original's weights; they may need 1.5 times those.

Every figure comes from a fresh process: the model is built in memory, or saved, and loaded from the file, which is
memory-mapped. Then one call runs, and the rise of the resident memory over its level before is recorded: all of it
(the kernel's own peak), and of that what is the process's own (anonymous) and what are pages of files, sampled every
few milliseconds. Pages of a mapped file are the original's weights, and the kernel may drop them; so the bound holds
for all memory where the original was in memory, and for anonymous memory where it is mapped.

    python benchmarks/fuse_memory.py [--gib 0.25,1,2] [--models conv-bn,...] [--ways load,...]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

import reparam  # noqa: E402
from reparam.bench.machine import hardware_name, system_load  # noqa: E402
from tools.record import engine_revision, write  # noqa: E402

LIMIT = 1.5
GIB = 2**30
MIB = 2**20
SAMPLE_SECONDS = 0.002
# Who holds the original, whether it is verified; `load` is the loading itself.
WAYS = ("load", "mapped, off", "mapped, standard", "memory, off", "memory, standard")


@dataclass(frozen=True)
class Row:
    """One call in a process of its own; memory in bytes, `bounded` is what the limit is for, over the weights."""

    model: str
    way: str
    weights: int
    total: int
    anonymous: int
    file: int
    fused_weights: int
    seconds: float
    bounded: float


class Branches(nn.Module):
    """relu(BN(conv 3x3) + BN(conv 1x1) + BN)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.dense(x) + self.point(x) + self.norm(x))


class Encoder(nn.Module):
    """A transformer's encoder layer with separate queries, keys and values."""

    def __init__(self, width: int, heads: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


Built = tuple[nn.Module, torch.Tensor]


def conv_bn(size: int, channels: int = 1024) -> Built:
    """A chain of conv-BN-ReLU."""
    parts: list[nn.Module] = []
    for _ in range(max(1, round(size / (channels * channels * 9 * 4)))):
        parts += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*parts), torch.randn(1, channels, 8, 8)


def branches(size: int, channels: int = 1024) -> Built:
    """Blocks of three parallel branches."""
    count = max(1, round(size / (channels * channels * 10 * 4)))
    return nn.Sequential(*(Branches(channels) for _ in range(count))), torch.randn(1, channels, 8, 8)


def encoder(size: int, width: int = 1024) -> Built:
    """Transformer layers."""
    count = max(1, round(size / (width * width * 12 * 4)))
    return nn.Sequential(*(Encoder(width) for _ in range(count))), torch.randn(1, 16, width)


def embedding(size: int, width: int = 1024) -> Built:
    """One huge embedding in front of a small head."""
    count = max(16, size // (width * 4))
    return nn.Sequential(nn.Embedding(count, width), nn.Linear(width, 16)), torch.randint(count, (2, 16))


def linear(size: int, width: int = 8192) -> Built:
    """One huge layer that nothing merges with."""
    count = max(16, size // (width * 4))
    return nn.Sequential(nn.Linear(width, count), nn.ReLU(), nn.Linear(count, 16)), torch.randn(2, width)


def linear_bn(size: int, width: int = 8192) -> Built:
    """One huge layer with a BatchNorm behind it."""
    count = max(16, size // (width * 4))
    parts = (nn.Linear(width, count), nn.BatchNorm1d(count), nn.ReLU(), nn.Linear(count, 16))
    return nn.Sequential(*parts), torch.randn(2, width)


def bn_linear(size: int, width: int = 8192) -> Built:
    """One huge layer with a BatchNorm in front of it."""
    count = max(16, size // (width * 4))
    parts = (nn.BatchNorm1d(width), nn.Linear(width, count), nn.ReLU(), nn.Linear(count, 16))
    return nn.Sequential(*parts), torch.randn(2, width)


MODELS: dict[str, Callable[[int], Built]] = {
    "conv-bn": conv_bn,
    "branches": branches,
    "encoder": encoder,
    "embedding": embedding,
    "linear": linear,
    "linear-bn": linear_bn,
    "bn-linear": bn_linear,
}


def build(name: str, size: int) -> Built:
    """The model called `name` with about `size` bytes of weights, with statistics of its own, and an input."""
    torch.manual_seed(0)
    model, x = MODELS[name](size)
    for part in model.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.detach().mul_(6**0.5)  # keeps the signal's size through ReLU
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.running_mean.normal_(0.0, 0.1)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0.0, 0.1)
    return model.eval(), x


def weights_of(model: nn.Module) -> int:
    """Bytes of the weights."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def load(file: Path) -> nn.Module:
    """The model in the file, mapped."""
    return reparam.load(file, allow_classes=[Branches, Encoder])


class Watch:
    """Rise of the resident memory while the block runs, in bytes: all (the kernel's peak), anonymous and of files."""

    def __enter__(self) -> Watch:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # or a call that reuses free pages would seem to need none
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self._before = _status()
        self._most = dict(self._before)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            for key, value in _status().items():
                self._most[key] = max(self._most[key], value)

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()
        now = _status()
        self.total = now["VmHWM"] - self._before["VmRSS"]
        self.anonymous = max(self._most["RssAnon"], now["RssAnon"]) - self._before["RssAnon"]
        self.file = max(self._most["RssFile"], now["RssFile"]) - self._before["RssFile"]


def _status() -> dict[str, int]:
    """Figures of /proc/self/status in bytes."""
    wanted = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
    pairs = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {key: int(value.split()[0]) * 1024 for key, value in pairs if key in wanted}


def child(name: str, size: int, way: str, file: Path) -> dict[str, Any]:
    """Measures one call in this process. `file` holds the model, if the way reads it."""
    small, x = build(name, 1)
    with tempfile.TemporaryDirectory() as folder:  # imports and caches are not the call's
        torch.save(small, Path(folder) / "small.pt")
        load(Path(folder) / "small.pt")
    reparam.fuse(small, x, verify=True)
    if way == "load":
        with Watch() as watch:
            model = load(file)
        fused = model
    else:
        holder, level = way.split(", ")
        if holder == "mapped":
            model, x = load(file), build_input(name, size)
        else:
            model, x = build(name, size)
        with Watch() as watch:
            fused = reparam.fuse(model, x, verify=level).module
    bounded = watch.total if way.startswith("memory") else watch.anonymous
    return asdict(
        Row(
            name,
            way,
            weights_of(model),
            watch.total,
            watch.anonymous,
            watch.file,
            weights_of(fused),
            watch.seconds,
            bounded / weights_of(model),
        )
    )


def build_input(name: str, size: int) -> torch.Tensor:
    """The input without the model."""
    with torch.device("meta"):
        _, x = MODELS[name](size)
    torch.manual_seed(0)
    return torch.randn(x.shape) if x.is_floating_point() else torch.randint(16, x.shape)


def measured(name: str, size: int, ways: list[str], folder: Path) -> list[Row]:
    """All ways of one model, each in a process of its own; the file is written by one too."""
    file = folder / "model.pt"
    rows = []
    if any(not way.startswith("memory") for way in ways):
        _call(["--save", name, str(size), str(file)])
    for way in ways:
        rows.append(Row(**json.loads(_call(["--child", name, str(size), way, str(file)]))))
    file.unlink(missing_ok=True)
    return rows


def _call(words: list[str]) -> str:
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def markdown(rows: list[Row], facts: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# What loading and fusing need in memory",
        "",
        f"`{facts['command']}`, {facts['hardware']}, {facts['threads']} thread(s), torch {facts['torch']}, reparam "
        f"{facts['engine']}. Each row is one call in a fresh process: rise of the resident memory over its level "
        f"before the call, over the original's weights. The limit is {LIMIT}; it holds for all memory where the "
        "original was in memory (`memory`), and for anonymous memory where it is mapped from the file (`load`, "
        "`mapped`), since mapped pages are the original's weights themselves. The fused model, which shares nothing "
        "with the original, is part of the extra memory. `off` and `standard` are levels of `verify`.",
        "",
        "| model | way | weights, MiB | fused weights, MiB | all, MiB | anonymous, MiB | of files, MiB | seconds "
        "| extra / weights | |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        verdict = "" if row.bounded <= LIMIT else "above the limit"
        lines.append(
            f"| {row.model} | {row.way} | {row.weights / MIB:.0f} | {row.fused_weights / MIB:.0f} "
            f"| {row.total / MIB:.0f} | {row.anonymous / MIB:.0f} | {row.file / MIB:.0f} | {row.seconds:.1f} "
            f"| {row.bounded:.2f} | {verdict} |"
        )
    return "\n".join([*lines, ""])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", default="0.25,1,2", help="sizes of the models' weights in GiB")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ways", default=";".join(WAYS), help="with semicolons: " + "; ".join(WAYS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--save", nargs=3, metavar=("MODEL", "BYTES", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=4, metavar=("MODEL", "BYTES", "WAY", "FILE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Exit status 1 if a call needs more than the limit."""
    args = parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    if args.save:
        torch.save(build(args.save[0], int(args.save[1]))[0], args.save[2])
        return 0
    if args.child:
        name, size, way, file = args.child
        print(json.dumps(child(name, int(size), way, Path(file))))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        sys.exit("this system does not tell the peak of a process's memory")
    load_before = system_load()
    facts = {
        "command": "python benchmarks/fuse_memory.py "
        + " ".join(f"'{word}'" if " " in word else word for word in sys.argv[1:]),
        "arguments": {k: str(v) for k, v in vars(args).items() if k not in ("out", "save", "child")},
        "hardware": hardware_name(torch.device("cpu")),
        "threads": args.threads,
        "torch": torch.__version__,
        "engine": engine_revision(),
        "load_before": load_before,
        "limit": LIMIT,
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for gib in args.gib.split(","):
            for name in args.models.split(","):
                for row in measured(name, int(float(gib) * GIB), args.ways.split(";"), Path(folder)):
                    rows.append(row)
                    print(
                        f"{row.model:10} {row.way:16} weights {row.weights / MIB:6.0f} MiB, all {row.total / MIB:6.0f},"
                        f" anonymous {row.anonymous / MIB:6.0f}, of files {row.file / MIB:6.0f},"
                        f" extra / weights {row.bounded:.2f}, {row.seconds:.1f} s",
                        flush=True,
                    )
                write(
                    args.out / "fuse_memory.json",
                    json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n",
                )
                write(args.out / "fuse_memory.md", markdown(rows, facts))
    above = [row for row in rows if row.bounded > LIMIT]
    for row in above:
        print(f"FAIL: {row.model}, {row.way}: {row.bounded:.2f} times the weights, {LIMIT} are allowed")
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
