"""Fuses the smallest model of every family of timm, and checks it in float64, in float32 and in onnxruntime.

    python tools/fuse_families.py [--models REGEX] [--jobs 2] [--limit 900] [--again failed] [--keep-older]

A family is a source file of timm; its smallest model is the one with the fewest parameters. Weights are random (also
those that timm starts at a constant, as a layer scale of 1e-6 would hide its whole block; where this makes a model
chaotic, so that it is off by a hundredth in float32 itself, timm's own stay for the checks in float32), BatchNorms are
calibrated, images as small as 64 x 64 where the model takes them. Asked of each model:

* float64: converted to float64 and fused there, its outputs are the original's up to a relative error of 1e-9;
* float32: `reparam.fuse` with its usual verification, which holds the error against the original's own rounding;
* ONNX: the fused model is written, and onnxruntime agrees with the original, by the check of the command line;
* leftovers: neither the fused graph nor the file holds a dropout, an identity or a random number.

Results go to `tools/results/families.json` and `.md`: a run that was stopped goes on where it was, unless the engine
has changed since. With `--keep-older` rows of an older engine stay, and the table says which engine each row is of.
Exit status 1 if a model fails in any of these.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tools import sweep, timm_zoo  # noqa: E402
from tools.layer_counts import errors, output_of  # noqa: E402
from tools.record import engine_revision, first_line, write  # noqa: E402

OUT = ROOT / "tools" / "results"
LIMIT = 900.0
"""Seconds for one model."""
IDLE = r"drop|identity|rand|bernoulli|multinomial|poisson|normal_"
"""Names of operations that have nothing to do at inference."""
TOLERANCE = 1e-9
"""Relative error that is allowed in float64."""
CHAOTIC = 0.01
"""Relative error of an original in float32 from which on nothing can be said of its fused model."""
KINDS = ("convolutions", "batch_norms", "linears", "nodes")
"""Counts on record, as `reparam.report.OperationCounts` names them."""


@dataclass(frozen=True)
class Row(sweep.ModelRow):
    """What became of one model. A figure is None, and a text empty, where that stage was not reached.

    Attributes:
        parameters: as built.
        image: size of the example, channels first, without the batch.
        calm: whether float32 and ONNX have weights closer to timm's own, because random ones make it chaotic.
        way: how its graph was captured: as in `reparam.Report`.
        float64_error: largest difference over largest value, of the outputs, both models in float64.
        float32_passed, float32_error, float32_noise: reparam's verdict on the fused model, the error it found in
            float32, and the original's own, both relative to the truth in float64.
        onnx_written: whether an ONNX file was made.
        onnx_passed, onnx_error, onnx_noise: the same for that file, run by onnxruntime.
        onnx_notes: what of the file could not be had, such as an open axis.
        leftovers: dropouts, identities and draws of random numbers in the fused graph and in the ONNX file.
        before, after: operations by kind.
        rewrites, refusals: how many there are.
        fuse_seconds: of the float32 stage, without its verification.
        seconds: by stage.
        failures: by stage, one line each.
    """

    parameters: int = 0
    image: str = ""
    calm: bool = False
    way: str = ""
    float64_error: float | None = None
    float32_passed: bool | None = None
    float32_error: float | None = None
    float32_noise: float | None = None
    onnx_written: bool = False
    onnx_passed: bool | None = None
    onnx_error: float | None = None
    onnx_noise: float | None = None
    onnx_notes: Sequence[str] = ()
    leftovers: Sequence[str] = field(default_factory=list)
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)
    rewrites: int = 0
    refusals: int = 0
    fuse_seconds: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the float64 error is within its limit."""
        return self.float64_error is not None and self.float64_error <= TOLERANCE

    @property
    def failed(self) -> bool:
        return bool(self.leftovers) or not (self.exact and self.float32_passed and self.onnx_passed)

    @property
    def line(self) -> str:
        if self.failed:
            return "; ".join(f"{stage}: {why}" for stage, why in self.failures.items())
        return f"{self.way}, float64 error {_short(self.float64_error)}, {sum(self.seconds.values()):.0f} s"


class _Stages:
    """Times the stages of one model; an exception in one is its failure, and the next stage begins."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failures: dict[str, str] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.failures[name] = first_line(error)
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 2)


def measured(name: str) -> Row:
    """Fuses and checks one model."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    stages = _Stages()
    facts: dict[str, Any] = {}
    model: nn.Module | None = None
    fused: nn.Module | None = None
    with stages("build"):
        model, x = timm_zoo.create_small(name, lively=True)
        facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        facts["image"] = "x".join(map(str, x.shape[1:]))
    if model is not None:
        with stages("float64"):
            in_float64(model, x, facts)
        with stages("build"):
            model, facts["calm"] = _calm(name, model, x)
        with stages("float32"):
            fused = in_float32(model, x, facts)
    if model is not None and fused is not None:
        with stages("ONNX"):
            as_onnx(model, fused, x, facts)
    if facts.get("leftovers"):
        stages.failures["leftovers"] = ", ".join(facts["leftovers"])
    return Row(name, timm_zoo.family(name), **facts, seconds=stages.seconds, failures=stages.failures)


def _calm(name: str, model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, bool]:
    """The model, if its answers in float32 mean something; else with weights closer to timm's own, and True."""
    if _own_noise(model, x) <= CHAOTIC:
        return model, False
    closer, _ = timm_zoo.create_small(name, lively=True, norms=False)
    return (closer if _own_noise(closer, x) <= CHAOTIC else timm_zoo.create_small(name, norms=False)[0]), True


def _own_noise(model: nn.Module, x: torch.Tensor) -> float:
    """Relative error of the model itself in float32."""
    from torch.utils import _pytree as pytree

    exact = output_of(copy.deepcopy(model).double(), x.double())
    own = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.double(), output_of(model, x))
    return errors(exact, own)[1]


def in_float64(model: nn.Module, x: torch.Tensor, facts: dict[str, Any]) -> None:
    """The error of the algebra alone, by this script's own comparison. Writes what it finds to `facts`."""
    import reparam

    double, x = copy.deepcopy(model).double(), x.double()
    result = reparam.fuse(double, x, verify=False)
    facts["way"] = result.report.capture
    error = errors(output_of(double, x), output_of(result.module, x))[1]
    if not math.isfinite(error):
        raise ValueError("outputs differ in structure, shape, dtype or in where they are not finite")
    facts["float64_error"] = error
    if error > TOLERANCE:
        raise ValueError(f"relative error {error:.1e}, allowed is {TOLERANCE:.0e}")


def in_float32(model: nn.Module, x: torch.Tensor, facts: dict[str, Any]) -> nn.Module:
    """The fused model, verified as usual."""
    import reparam

    try:
        result = reparam.fuse(model, x)
    except reparam.NotEquivalentError as error:
        facts.update(_reported(error.report))
        raise
    facts.update(_reported(result.report))
    facts["leftovers"] = _leftovers_in_graph(result.module)
    return result.module


def _leftovers_in_graph(module: nn.Module) -> list[str]:
    """Calls of dropouts and identities, and of what draws random numbers."""
    from torch import fx

    found = []
    for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
        target = module.get_submodule(node.target) if node.op == "call_module" else node.target
        name = type(target).__name__ if node.op == "call_module" else getattr(target, "__name__", str(target))
        if node.op.startswith("call") and re.search(IDLE, name, re.IGNORECASE):
            found.append(f"{node.name}: {name}")
    return found


def _reported(report: Any) -> dict[str, Any]:
    before, after = report.before.to_dict(), report.after.to_dict()
    return {
        "way": report.capture,
        "before": {kind: before[kind] for kind in KINDS},
        "after": {kind: after[kind] for kind in KINDS},
        "rewrites": len(report.rewrites),
        "refusals": len(report.refusals),
        "fuse_seconds": round(sum(report.seconds.values()) - report.seconds.get("verifying", 0.0), 2),
        **_compared("float32", report.comparison),
    }


def as_onnx(model: nn.Module, fused: nn.Module, x: torch.Tensor, facts: dict[str, Any]) -> None:
    """Writes the file and runs it against the original."""
    from reparam import NotEquivalentError
    from reparam.export import export_onnx

    with tempfile.TemporaryDirectory() as folder:
        try:
            file = export_onnx(fused, x, Path(folder) / "fused.onnx", original=model)
        except NotEquivalentError as error:
            facts.update(onnx_written=True, **_compared("onnx", error.comparison))
            raise ValueError(error.comparison.summary()) from error
    facts.update(onnx_written=True, onnx_notes=file.notes, **_compared("onnx", file.comparison))
    idle = [f"ONNX: {one}" for one in file.leftovers if one.kind != "BatchNormalization" and not one.needed]
    facts["leftovers"] = [*facts.get("leftovers", ()), *idle]


def _compared(subject: str, comparison: Any) -> dict[str, Any]:
    figures = {"error": comparison.numeric_error, "noise": comparison.original_noise}
    finite = {f"{subject}_{key}": value if math.isfinite(value) else None for key, value in figures.items()}
    return {f"{subject}_passed": comparison.passed, **finite}


def lost(name: str, why: str) -> Row:
    """The row of a model whose process ended."""
    return Row(name, timm_zoo.family(name), failures={"process": why})


def smallest() -> list[dict[str, Any]]:
    """The model with the fewest parameters of each family, smallest first; built without memory for the weights."""
    timm = timm_zoo.import_timm()
    best: dict[str, tuple[int, str]] = {}
    for name in timm.list_models():
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        family = timm_zoo.family(name)
        best[family] = min(best.get(family, (parameters, name)), (parameters, name))
    return [
        {"family": family, "model": name, "parameters": parameters}
        for family, (parameters, name) in sorted(best.items(), key=lambda item: item[1])
    ]


def chosen(timm_version: str) -> list[dict[str, Any]]:
    """`smallest`, from the file if it was found with the same timm: it takes minutes."""
    path = OUT / "families.json"
    held = json.loads(path.read_text()) if path.exists() else {}
    if held.get("timm") == timm_version:
        return list(held["smallest"])
    print("looking for the smallest model of each family", flush=True)
    return smallest()


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The totals, one line for each model, and one for each failure."""
    lines = [
        "# The smallest model of every family of timm, fused",
        "",
        f"`python tools/fuse_families.py`, torch {facts['torch']}, timm {facts['timm']}, "
        f"reparam at {facts['reparam']}.",
        "",
        *sweep.engines(rows),
        *_totals(rows, len(facts["smallest"])),
        "",
        "Counts are before → after; operations are nodes of the graph. float32 and ONNX: error of the fused model / "
        "of the original itself, both relative to float64; a failed check is marked ✗, an ONNX file with notes "
        "(in the JSON file) *, a model that random norms make chaotic, and that has timm's own but in float64, °.",
        "",
        "| family | model | image | capture | convolutions | BatchNorms | linears | operations | rewrites | refusals "
        "| float64 error | float32 | ONNX | seconds |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *map(_table_line, rows),
    ]
    failed = [row for row in rows if row.failed]
    if failed:
        lines += ["", "What failed, and the rounding noise of the original itself in float32:", ""]
        for row in failed:
            noise = f" (noise {_short(row.float32_noise)})"
            lines += [f"- {row.family}, {row.model}, {stage}: {why}{noise}" for stage, why in row.failures.items()]
    return "\n".join(lines) + "\n"


def _totals(rows: Sequence[Row], families: int) -> list[str]:
    before, after = (
        {kind: sum(counts.get(kind, 0) for counts in every) for kind in KINDS}
        for every in ([row.before for row in rows], [row.after for row in rows])
    )
    worst = max((row.float64_error for row in rows if row.float64_error is not None), default=None)
    return [
        f"{len(rows)} of {families} families were tried. Of these, "
        f"{sum(bool(row.way) for row in rows)} are captured "
        f"({sum(row.way == 'symbolic' for row in rows)} by symbolic tracing), "
        f"{sum(row.exact for row in rows)} are exact in float64 (largest error {_short(worst)}), "
        f"{sum(bool(row.float32_passed) for row in rows)} pass in float32, "
        f"{sum(row.onnx_written for row in rows)} become an ONNX file and "
        f"{sum(bool(row.onnx_passed) for row in rows)} of these files pass in onnxruntime. A dropout, an identity or a "
        f"random number is left in {sum(bool(row.leftovers) for row in rows)} of them.",
        "",
        f"In all: {before['convolutions']} → {after['convolutions']} convolutions, "
        f"{before['batch_norms']} → {after['batch_norms']} BatchNorms, "
        f"{before['linears']} → {after['linears']} linear layers, {before['nodes']} → {after['nodes']} operations; "
        f"{sum(row.rewrites for row in rows)} rewrites, {sum(row.refusals for row in rows)} refusals.",
    ]


def _table_line(row: Row) -> str:
    counts = [f"{row.before[kind]} → {row.after[kind]}" if row.before else "" for kind in KINDS]
    float64 = _short(row.float64_error) + ("" if row.exact else " ✗")
    float32 = _figures(row.float32_passed, row.float32_error, row.float32_noise)
    onnx = _figures(row.onnx_passed, row.onnx_error, row.onnx_noise) + ("*" if row.onnx_notes else "")
    cells = [
        row.family,
        row.title + ("°" if row.calm else ""),
        row.image,
        row.way,
        *counts,
        row.rewrites,
        row.refusals,
        float64,
        float32,
        onnx,
    ]
    return f"| {' | '.join(map(str, cells))} | {sum(row.seconds.values()):.0f} |"


def _figures(passed: bool | None, error: float | None, noise: float | None) -> str:
    return f"{_short(error)} / {_short(noise)}" + ("" if passed else " ✗")


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def load(version: str, older: bool = False) -> dict[str, Row]:
    """The rows of an earlier run."""
    return sweep.load_rows(OUT / "families.json", version, Row, older)


def save(rows: Mapping[str, Row], facts: Mapping[str, Any]) -> None:
    """Writes both files."""
    ordered = sweep.ordered(rows)
    sweep.save_rows(OUT / "families.json", facts, ordered)
    write(OUT / "families.md", markdown(ordered, facts))


def parse() -> argparse.Namespace:
    parser = sweep.arguments(__doc__)
    parser.add_argument("--limit", type=float, metavar="SECONDS", default=LIMIT, help="for one model")
    return parser.parse_args()


def main() -> int:
    """Runs the sweep from the command line."""
    args = parse()
    timm_version = timm_zoo.import_timm().__version__
    found = chosen(timm_version)
    facts = {"reparam": engine_revision(), "torch": torch.__version__, "timm": timm_version, "smallest": found}
    rows = sweep.kept(load(facts["reparam"], args.keep_older), args)
    names = sweep.missing([one["model"] for one in found], rows, args)
    made = sweep.each(measured, names, args.jobs, args.limit, lost)
    return sweep.run(made, len(names), rows, lambda held: save(held, facts), 1)


if __name__ == "__main__":
    sys.exit(main())
