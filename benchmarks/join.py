"""Whether joining parallel layers of one input pays: joined beside apart, in eager PyTorch and in ONNX Runtime.

Each case is a model of parallel linear layers or convolutions with what reads them, fused with and without the pass
`join`, whatever its rule says. All four (joined and apart, eager and ONNX Runtime) run in one process, in pairs and in
random order. Printed and written (`results/join.json` and `.md`) are the ratios joined / apart with a 95% bootstrap
interval, and what the rule says of the case: for eager alone, and by default, where ONNX Runtime must not be slower.
The exit status is 1 if the rule joins a case that is slower joined than apart, beyond its interval and `--tolerance`.

    python benchmarks/join.py [--seconds 3] [--threads 1] [--only linear]
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
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

from reparam import fuse  # noqa: E402
from reparam.bench import statistics  # noqa: E402
from reparam.bench.machine import WallClock, hardware_name, system_load  # noqa: E402
from reparam.bench.measure import Runner, measure  # noqa: E402
from reparam.export import OnnxSession, export_onnx  # noqa: E402
from reparam.inputs import Inputs  # noqa: E402
from reparam.passes.collapse import Collapse  # noqa: E402
from reparam.passes.inference_form import InferenceForm  # noqa: E402
from reparam.passes.join import Join  # noqa: E402

# A sample is this long at least, so that the clock's own time does not count.
SAMPLE = 1e-3


@dataclass(frozen=True)
class Case:
    """Parallel layers: `kind` is linear, conv1 or conv3; `size` is tokens, or height and width."""

    kind: str
    channels: int
    out: int
    branches: int
    size: int
    batch: int
    reader: str

    @property
    def name(self) -> str:
        """`linear 3 x 64>64, 1x16, attention`."""
        where = f"{self.batch}x{self.size}" + ("" if self.kind == "linear" else f"x{self.size}")
        return f"{self.kind} {self.branches} x {self.channels}>{self.out}, {where}, {self.reader}"

    def input(self) -> torch.Tensor:
        """A random input."""
        if self.kind == "linear":
            return torch.randn(self.batch, self.size, self.channels)
        return torch.randn(self.batch, self.channels, self.size, self.size)


class Branches(nn.Module):
    """The layers of a case and what reads them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        kernel = 1 if case.kind == "conv1" else 3
        self.branches = nn.ModuleList(
            nn.Linear(case.channels, case.out)
            if case.kind == "linear"
            else nn.Conv2d(case.channels, case.out, kernel, padding=kernel // 2)
            for _ in range(case.branches)
        )
        self.act = nn.ReLU(inplace=True)
        self.reader = case.reader
        self.heads = max(1, case.out // 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [branch(x) for branch in self.branches]
        if self.reader == "attention":
            batch, tokens, _ = x.shape
            q, k, v = (part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in parts)
            return (q @ k.transpose(-2, -1)).softmax(-1) @ v
        if self.reader == "positions":
            theta, phi, g = (part.flatten(2) for part in parts)
            return (theta.transpose(1, 2) @ phi).softmax(-1) @ g.transpose(1, 2)
        parts = [self.act(part) for part in parts]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total


CASES: tuple[Case, ...] = (
    *(
        Case("linear", d, d, 3, tokens, batch, "attention")
        for d, tokens, batch in (
            *((64, 16, 1), (64, 64, 1), (64, 128, 1), (64, 1024, 1), (64, 16, 8), (64, 128, 8)),
            *((192, 16, 1), (192, 196, 1), (256, 16, 1), (256, 128, 1), (512, 16, 1), (512, 128, 1)),
            *((768, 16, 1), (1024, 16, 1), (1024, 128, 1)),
        )
    ),
    *(
        Case("linear", d, d, n, tokens, 1, "relu")
        for d, n, tokens in (
            *((32, 2, 4), (32, 3, 8), (64, 2, 16), (64, 3, 1), (64, 3, 16), (64, 4, 32), (128, 3, 16), (256, 2, 1)),
            *((256, 3, 1), (256, 3, 16), (384, 3, 1), (512, 3, 16)),
        )
    ),
    *(
        Case("conv1", c, c // 2, n, size, batch, reader)
        for c, n, size, batch, reader in (
            *((64, 3, 7, 1, "relu"), (64, 3, 14, 1, "relu"), (64, 3, 28, 1, "relu"), (64, 4, 56, 1, "relu")),
            *((128, 3, 7, 1, "relu"), (128, 3, 14, 1, "relu"), (128, 4, 28, 1, "relu"), (256, 3, 7, 1, "relu")),
            *((256, 3, 14, 1, "relu"), (64, 3, 7, 8, "relu"), (64, 3, 14, 8, "relu"), (128, 3, 14, 8, "relu")),
            *((64, 3, 7, 1, "positions"), (64, 3, 14, 1, "positions"), (256, 3, 14, 1, "positions")),
            *((16, 2, 4, 1, "relu"), (32, 3, 4, 1, "relu"), (64, 3, 14, 8, "positions")),
        )
    ),
    *(Case("conv3", c, c, 2, size, 1, "relu") for c, size in ((16, 7), (32, 7), (64, 7), (64, 14), (64, 28))),
)


@dataclass(frozen=True)
class Row:
    """One case: seconds apart (median), and joined / apart with its interval, for both runtimes; and the rule."""

    case: str
    runs: int
    eager: float
    eager_ratio: tuple[float, float, float]
    onnx: float
    onnx_ratio: tuple[float, float, float]
    rule_eager: bool
    rule: bool


def joined(model: nn.Module, x: torch.Tensor, pass_: Join | None) -> tuple[nn.Module, bool]:
    """The fused model, and whether layers were joined."""
    passes = (InferenceForm(), Collapse(), *(() if pass_ is None else (pass_,)))
    result = fuse(model, x, verify=False, passes=passes)
    return result.module, any(rewrite.pass_name == "join" for rewrite in result.report.rewrites)


class PerCall(WallClock):
    """Times several calls in a row, so that the clock's own time does not count, and tells that of one."""

    def __init__(self, call: Callable[..., Any], x: torch.Tensor) -> None:
        call(x)
        start = time.perf_counter()
        call(x)
        self._repeats = max(1, round(SAMPLE / (time.perf_counter() - start)))

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        start = self.now()
        for _ in range(self._repeats):
            call()
        return (self.now() - start) / self._repeats


def timed(case: Case, args: argparse.Namespace) -> Row:
    """Times a case joined and apart in both runtimes."""
    torch.manual_seed(0)
    model, x = Branches(case).eval(), case.input()
    apart, _ = joined(model, x, None)
    one, done = joined(model, x, Join(least=float("-inf"), elsewhere=()))
    if not done:
        sys.exit(f"{case.name}: nothing was joined")
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs.of(x)
        calls: dict[str, Callable[..., Any]] = {"eager, apart": apart, "eager, joined": one}
        for name, module in (("apart", apart), ("joined", one)):
            path = export_onnx(module, inputs, Path(folder) / f"{name}.onnx").path
            calls[f"onnx, {name}"] = OnnxSession(path, threads=args.threads)
        runners = [
            Runner(label, lambda call=call: lambda: call(x), PerCall(call, x), f"{label.partition(',')[0]}, apart")
            for label, call in calls.items()
        ]
        measured = measure(runners, min_runs=args.runs, max_seconds=args.seconds, seed=0)
    if measured.partial:
        raise KeyboardInterrupt
    ratios = {}
    for runtime in ("eager", "onnx"):
        samples = (measured.samples[f"{runtime}, joined"], measured.samples[f"{runtime}, apart"])
        ratios[runtime] = statistics.ratio_interval(*samples, seed=0)
    times = {runtime: statistics.median(measured.samples[f"{runtime}, apart"]) for runtime in ratios}
    return Row(
        case=case.name,
        runs=len(measured.samples["eager, apart"]),
        eager=times["eager"],
        eager_ratio=ratios["eager"],
        onnx=times["onnx"],
        onnx_ratio=ratios["onnx"],
        rule_eager=joined(model, x, Join(elsewhere=()))[1],
        rule=joined(model, x, Join())[1],
    )


def markdown(rows: list[Row], facts: dict[str, Any]) -> str:
    """The results as a page."""

    def ratio(found: tuple[float, float, float]) -> str:
        return f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})"

    lines = [
        "# Joining parallel layers of one input",
        "",
        f"`{facts['command']}`, {facts['hardware']}, {facts['threads']} thread(s), torch {facts['torch']}, "
        f"load before {facts['load_before']}; paired and interleaved in one process, median times of one call, "
        "ratio joined / apart with 95% bootstrap interval (below 1: joined is faster).",
        "",
        "| layers and what reads them | runs | eager, apart, us | eager, joined / apart | onnxruntime, apart, us "
        "| onnxruntime, joined / apart | joined for eager alone | joined by default |",
        "|---|--:|--:|--:|--:|--:|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.case} | {row.runs} | {1e6 * row.eager:.0f} | {ratio(row.eager_ratio)} | {1e6 * row.onnx:.0f} "
            f"| {ratio(row.onnx_ratio)} | {'yes' if row.rule_eager else 'no'} | {'yes' if row.rule else 'no'} |"
        )
    return "\n".join([*lines, ""])


def wrong(rows: list[Row], tolerance: float) -> list[str]:
    """Where the rule joins what the clock says is slower: the whole interval above 1 + tolerance."""
    found = []
    for row in rows:
        if (row.rule or row.rule_eager) and row.eager_ratio[1] > 1 + tolerance:
            found.append(f"{row.case}: eager is slower joined")
        if row.rule and row.onnx_ratio[1] > 1 + tolerance:
            found.append(f"{row.case}: ONNX Runtime is slower joined")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="time per case")
    parser.add_argument("--runs", type=int, default=15, help="least number of paired runs per case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def main() -> int:
    """Exit status 1 if the rule joins what is slower joined."""
    args = parse()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    load = system_load()
    rows = []
    for case in CASES:
        if args.only not in case.name:
            continue
        row = timed(case, args)
        rows.append(row)
        e, o = row.eager_ratio, row.onnx_ratio
        print(
            f"{row.case:45} eager {1e6 * row.eager:7.0f} us, {e[0]:.2f} ({e[1]:.2f}-{e[2]:.2f}); "
            f"onnx {1e6 * row.onnx:7.0f} us, {o[0]:.2f} ({o[1]:.2f}-{o[2]:.2f}); "
            f"{'eager' if row.rule_eager else '-'} {'default' if row.rule else '-'}",
            flush=True,
        )
    facts = {
        "command": "python benchmarks/join.py",
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "out"},
        "hardware": hardware_name(torch.device("cpu")),
        "threads": args.threads,
        "torch": torch.__version__,
        "load_before": load,
        "load_after": system_load(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "join.json").write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1))
    (args.out / "join.md").write_text(markdown(rows, facts))
    failures = wrong(rows, args.tolerance)
    for sentence in failures:
        print(f"FAIL: {sentence}")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
