"""Fuses every model of timm in float32, float16 and bfloat16 with the usual verification, and lists its alarms.

    python tools/false_alarms.py [--models REGEX] [--dtypes float32,float16,bfloat16] [--most-parameters 1e8] [--jobs 2]
        [--seconds S] [--limit 300] [--out FOLDER] [--again failed] [--keep-older] [--half-products float32]

The algebra of every fused model is also held against the original in float64 by this script's own comparison: where
that agrees to 1e-9 (or to what roundings of its weights do to an original that amplifies them more) and verification
has raised an alarm (the model was refused, or a rewrite undone), the alarm was false; where it does not agree, the
alarm was right, and if there was none, a fault was missed. An original that overflows, or whose own rounding noise in a
dtype is as large as its answers, is counted apart: nothing can be told there, whoever asks. So is one that raises an
alarm and would, by what roundings of its weights do to it in float64, err by a hundred times its answers there.

A model that is, attribute by attribute, the network of another one under another name (`same_network.py`) is not run
again, and is counted apart. Weights are random, BatchNorms are calibrated, images as small as 64 x 64 where the model
takes them. With `--half-products float32` float16 and bfloat16 are multiplied as hardware with instructions for them
does (`half_products.py`); some of torch's own kernels take many times as long. The smallest model of each family goes
first, then the others, by size. Results go to `false_alarms.json` and `.md`: a run that was stopped goes on where it
was, unless the engine has changed since. With `--keep-older` rows of an older engine stay, and the table says so. Exit
status 1 if there is an alarm or a missed fault.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tools import half_products, same_network, sweep, timm_zoo  # noqa: E402
from tools.layer_counts import errors, output_of  # noqa: E402
from tools.record import engine_revision, first_line, write  # noqa: E402

OUT = ROOT / "tools" / "results"
DTYPES = ("float32", "float16", "bfloat16")
LIMIT = 300.0
"""Seconds for one model in all dtypes."""
TOLERANCE = 1e-9
"""Relative error that is allowed in float64."""
ROUNDINGS, DRAWS = 16.0, 3
"""What is allowed an original that amplifies the roundings of its weights in float64 beyond that: so many times the
most that moving each weight by up to 2^-52 of itself does, in so many draws. Merged weights were rounded more than
once."""
DROWNED = 0.5
"""Relative error of an original in its own dtype from which on nothing can be said of its fused model."""
GROWN = 100.0
"""The same, of what the noise of an original in float64 comes to in its dtype, where it grows in proportion."""
SAVE_EVERY = 10


@dataclass(frozen=True)
class Row(sweep.ModelRow):
    """What verification said of one model.

    Attributes:
        parameters: as built.
        image: size of the example, channels first, without the batch.
        float64_error: of the fused model, by this script; None if it was not reached.
        float64_noise: of the original, from moved weights; asked only of one whose fused model is not within 1e-9, or
            that raised an alarm.
        verdicts: by dtype: `passed`, `undone` (how many rewrites), `error` and `noise` (relative to the truth in
            float64; None if not finite, or if nothing finite was left to compare), `nearest` (largest ratio of error
            to bar; at most 1 passes), `cost` (forward passes), `said` (the alarm, or why fusing failed), and `original`
            (where fusing failed: why the original does not run either).
        seconds: in all.
        half_products: "float32" if halves were multiplied in it, "" if torch's own kernels did that.
        error: why nothing could be asked.
    """

    parameters: int = 0
    image: str = ""
    float64_error: float | None = None
    float64_noise: float = 0.0
    verdicts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0
    half_products: str = ""
    error: str = ""

    @property
    def exact(self) -> bool:
        """Whether the algebra is right."""
        allowed = max(TOLERANCE, ROUNDINGS * self.float64_noise)
        return self.float64_error is not None and self.float64_error <= allowed

    @property
    def failed(self) -> bool:
        return bool(self.error) or any(self.outcome(dtype) in BAD for dtype in self.verdicts)

    @property
    def line(self) -> str:
        return self.error or ", ".join(f"{dtype}: {self.outcome(dtype)}" for dtype in self.verdicts)

    def outcome(self, dtype: str) -> str:
        """One of the words that the table counts."""
        verdict = self.verdicts[dtype]
        if verdict.get("original"):
            return "original fails"
        if verdict["passed"] and not verdict["undone"]:
            return "agrees" if self.exact else "missed fault"
        if verdict["passed"] is None:
            return "not fused"
        if not self.exact:
            return "right alarm"
        noise = verdict["noise"]
        if noise is None or noise >= DROWNED:
            return "drowned"
        # Chaos has bounds, which the noise that is seen reaches; that in float64 tells how far it would go.
        grown = self.float64_noise * torch.finfo(getattr(torch, dtype)).eps / torch.finfo(torch.float64).eps
        return "drowned" if grown >= GROWN else "false alarm"


BAD = ("false alarm", "missed fault", "right alarm", "not fused")


def measured(name: str, dtypes: Sequence[str], products: str = "") -> Row:
    """Fuses and verifies one model in each dtype."""
    torch.set_num_threads(1)
    with half_products.in_float32() if products else contextlib.nullcontext():
        return _measured(name, dtypes, products)


def _measured(name: str, dtypes: Sequence[str], products: str) -> Row:
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    facts: dict[str, Any] = {}
    verdicts: dict[str, dict[str, Any]] = {}
    try:
        model, x = timm_zoo.create_small(name)
        facts["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        facts["image"] = "x".join(map(str, x.shape[1:]))
        facts["float64_error"] = _float64_error(model, x)
        if facts["float64_error"] is not None and facts["float64_error"] > TOLERANCE:
            facts["float64_noise"] = _float64_noise(model, x)
        for dtype in dtypes:
            verdicts[dtype] = _verdict(copy.deepcopy(model).to(getattr(torch, dtype)), x.to(getattr(torch, dtype)))
    except Exception as error:
        facts["error"] = first_line(error)
    row = Row(name, timm_zoo.family(name), **facts, verdicts=verdicts, half_products=products)
    return replace(completed(row), seconds=round(time.perf_counter() - start, 1))


def completed(row: Row) -> Row:
    """The row, and, if it raised an alarm that may be false, what roundings do to the original in float64."""
    if row.error or row.float64_noise or not any(row.outcome(dtype) == "false alarm" for dtype in row.verdicts):
        return row
    return replace(row, float64_noise=_float64_noise(*timm_zoo.create_small(row.model)))


def _float64_error(model: nn.Module, x: torch.Tensor) -> float | None:
    import reparam

    double, wide = copy.deepcopy(model).double(), x.double()
    fused = reparam.fuse(double, wide, verify=False).module
    error = errors(output_of(double, wide), output_of(fused, wide))[1]
    return error if math.isfinite(error) else None


def _float64_noise(model: nn.Module, x: torch.Tensor) -> float:
    """The most that the original's answer moves in float64 when each of its weights moves by up to 2^-52 of itself.

    The engine has its own way to ask that; this script takes none of its word for it.
    """
    double, wide = copy.deepcopy(model).double(), x.double()
    expected = output_of(double, wide)
    generator = torch.Generator().manual_seed(0)
    moved = copy.deepcopy(double)
    found = 0.0
    for _ in range(DRAWS):
        for mine, own in zip(moved.parameters(), double.parameters(), strict=True):
            draws = torch.rand(own.shape, generator=generator, dtype=torch.float64) * 2.0 - 1.0
            mine.data = own.data * (1.0 + torch.finfo(torch.float64).eps * draws)
        found = max(found, errors(expected, output_of(moved, wide))[1])
    return found if math.isfinite(found) else 0.0


def _verdict(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """What `fuse` with its usual verification says."""
    import reparam

    said = ""
    try:
        report = reparam.fuse(model, x).report
    except reparam.NotEquivalentError as error:
        report, said = error.report, first_line(error)
    except Exception as error:
        failed = {"passed": None, "undone": 0, "error": None, "noise": None, "said": first_line(error)}
        return {**failed, "original": _failure(model, x)}
    comparison = report.comparison
    if report.undone:
        said = said or report.undone[0].failure
    return {
        "passed": comparison.passed,
        "undone": len(report.undone),
        "error": _finite(comparison.numeric_error),
        "noise": None if comparison.lacks_evidence else _finite(comparison.original_noise),
        "nearest": _finite(max((output.worst_ratio for output in comparison.outputs), default=math.inf)),
        "cost": round(comparison.cost, 2),
        "said": said,
    }


def _failure(model: nn.Module, x: torch.Tensor) -> str:
    """Why the model itself does not run: torch lacks some operations in some dtypes."""
    try:
        output_of(model, x)
    except Exception as error:
        return first_line(error)
    return ""


def _finite(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None


class Measure:
    """`measured` with its dtypes and products, so that another process finds it."""

    def __init__(self, dtypes: Sequence[str], products: str) -> None:
        self.dtypes, self.products = tuple(dtypes), products

    def __call__(self, name: str) -> Row:
        return measured(name, self.dtypes, self.products)


def lost(name: str, why: str) -> Row:
    """The row of a model whose process ended."""
    return Row(name, timm_zoo.family(name), error=why)


def size(name: str) -> tuple[str, int]:
    """Parameters of a model; built without memory for the weights."""
    warnings.simplefilter("ignore")
    with torch.device("meta"):
        return name, sum(parameter.numel() for parameter in timm_zoo.import_timm().create_model(name).parameters())


def sizes(jobs: int) -> dict[str, int]:
    """Parameters of every model."""
    print("building every model on the meta device, to know its size", flush=True)
    with get_context("spawn").Pool(jobs) as pool:
        return dict(pool.imap_unordered(size, timm_zoo.import_timm().list_models(), chunksize=16))


def in_turn(sizes: Mapping[str, int], most: float) -> list[str]:
    """The models of up to so many parameters: the smallest of each family, then the others, by size."""
    by_size = sorted((size, name) for name, size in sizes.items() if size <= most)
    first: dict[str, str] = {}
    for _, name in by_size:
        first.setdefault(timm_zoo.family(name), name)
    return [*first.values(), *(name for _, name in by_size if name not in first.values())]


def same(rows: Collection[Row], facts: Mapping[str, Any]) -> dict[str, str]:
    """The models without a row that need not be asked: by name, that of a row which is the same network."""
    tried = {row.model for row in rows}
    found = same_network.same_as(facts["networks"], {row.model for row in rows if not row.error})
    return {name: other for name, other in found.items() if name not in tried}


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The totals, the closest calls, and one line for each alarm."""
    dtypes = [dtype for dtype in DTYPES if any(dtype in row.verdicts for row in rows)]
    lines = [
        "# Does verification raise false alarms?",
        "",
        f"`python tools/false_alarms.py`, torch {facts['torch']}, timm {facts['timm']}, reparam at {facts['reparam']}, "
        f"{facts['hardware']}.",
        "",
        *sweep.engines(rows),
        f"{len(rows)} of timm's {len(facts['sizes'])} models were tried, of "
        f"{len({row.family for row in rows if not row.error})} families, up to "
        f"{max((row.parameters for row in rows), default=0) / 1e6:.0f} million parameters. {len(same(rows, facts))} "
        "others are, attribute by attribute, the network of one of these under another name (`tools/same_network.py`), "
        f"and were not run. {_products(rows)}"
        f"{sum(row.exact for row in rows)} fused models are exact in float64 by this script's own comparison "
        f"({_bounds(rows)}), and {sum(bool(row.error) for row in rows)} could not be asked. Drowned: exact, but the "
        f"original's own rounding noise in that dtype is {DROWNED:.0%} of its answers or more, it overflows, or what "
        f"moving its weights by 2^-52 does to it in float64 would come to {GROWN:.0f} times its answers in that dtype, "
        "so that verification rightly refuses to say that the two agree. Original fails: torch itself does not run the "
        "original in that dtype.",
        "",
        "| dtype | models | agrees | false alarms | drowned | missed faults | right alarms | not fused "
        "| original fails | median error / noise | nearest to the bar | forward passes, median |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        *(_totals(dtype, rows) for dtype in dtypes),
        "",
        *_alarms(rows, dtypes),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _bounds(rows: Sequence[Row]) -> str:
    """What exact means, and of how many models something else."""
    loud = sum(row.exact and (row.float64_error or 0.0) > TOLERANCE for row in rows)
    more = f", of {loud} of them {ROUNDINGS:.0f} times what moving its weights by 2^-52 does to the original"
    return "1e-9" + (more if loud else "")


def _products(rows: Sequence[Row]) -> str:
    """Of how many models halves were multiplied otherwise than torch does it on this CPU."""
    count = sum(bool(row.half_products) for row in rows)
    return (
        f"float16 and bfloat16 of {count} of them were multiplied in float32 and rounded once, as hardware with "
        "instructions for halves does (`tools/half_products.py`); those of the others by torch's own kernels. "
        if count
        else ""
    )


def _totals(dtype: str, rows: Sequence[Row]) -> str:
    mine = [row for row in rows if dtype in row.verdicts]
    counts = Counter(row.outcome(dtype) for row in mine)
    agree = [row.verdicts[dtype] for row in mine if row.outcome(dtype) == "agrees"]
    ratios = [one["error"] / one["noise"] for one in agree if one["error"] is not None and one["noise"]]
    nearest = max((one["nearest"] for one in agree if one["nearest"] is not None), default=None)
    words = ("agrees", "false alarm", "drowned", "missed fault", "right alarm", "not fused", "original fails")
    cells = [dtype, len(mine), *(counts[word] for word in words), _short(_median(ratios)), _short(nearest)]
    return f"| {' | '.join(map(str, cells))} | {_short(_median(one['cost'] for one in agree))} |"


def _alarms(rows: Sequence[Row], dtypes: Sequence[str]) -> Iterator[str]:
    """A line for each row that does not agree."""
    odd = [(row, dtype) for row in rows for dtype in dtypes if dtype in row.verdicts and row.outcome(dtype) != "agrees"]
    if odd:
        yield from ("What does not agree:", "")
    for row, dtype in odd:
        verdict = row.verdicts[dtype]
        noise = "not finite" if verdict["noise"] is None else f"{verdict['noise']:.2g}"
        exact = "not finite" if row.float64_error is None else f"{row.float64_error:.1e}"
        figures = f"float64 error {exact}, the original's noise {noise}"
        figures += f", in float64 {row.float64_noise:.1e}" if row.float64_noise else ""
        why = (verdict.get("original") or verdict["said"]).replace("|", "/")
        yield f"- {row.title}, {dtype}: {row.outcome(dtype)} ({figures}): {why}"
    broken = [row for row in rows if row.error]
    if broken:
        yield from ("", "Could not be asked:", "", *(f"- {row.title}: {row.error}" for row in broken))


def _median(values: Iterable[float]) -> float | None:
    held = sorted(values)
    return held[len(held) // 2] if held else None


def _short(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def save(rows: Mapping[str, Row], facts: Mapping[str, Any], out: Path) -> None:
    """Writes both files."""
    held = sorted(rows.values(), key=lambda row: (row.parameters, row.model))
    sweep.save_rows(out / "false_alarms.json", facts, held)
    write(out / "false_alarms.md", markdown(held, facts))


def parse() -> argparse.Namespace:
    parser = sweep.arguments(__doc__)
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="with commas between")
    parser.add_argument("--most-parameters", type=float, default=math.inf, help="only models of up to so many")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further model is begun")
    parser.add_argument("--limit", type=float, metavar="SECONDS", default=LIMIT, help="for one model")
    parser.add_argument("--half-products", choices=("float32",), default="", help="otherwise torch's own kernels")
    parser.add_argument("--out", type=Path, default=OUT, help="where the files are and go")
    args = parser.parse_args()
    args.dtypes = args.dtypes.split(",")
    if wrong := set(args.dtypes) - set(DTYPES):
        parser.error(f"--dtypes: {', '.join(sorted(wrong))} is none of {', '.join(DTYPES)}")
    return args


def _on_file(path: Path, timm_version: str, key: str) -> dict[str, Any]:
    held = json.loads(path.read_text()) if path.exists() else {}
    return dict(held.get(key, {})) if held.get("timm") == timm_version else {}


def machines(kept: Path | None, here: str) -> str:
    """The processors on which the rows were made: those of a file whose rows are kept, and this one."""
    before = json.loads(kept.read_text())["hardware"].split(" and ") if kept is not None and kept.exists() else []
    return " and ".join(dict.fromkeys((*before, here)))


def main() -> int:
    """Runs the sweep from the command line."""
    from reparam.bench.machine import hardware_name

    args = parse()
    start = time.monotonic()
    timm_version = timm_zoo.import_timm().__version__
    path = args.out / "false_alarms.json"
    known = _on_file(path, timm_version, "sizes") or sizes(args.jobs)
    networks = _on_file(path, timm_version, "networks") or same_network.fingerprints(known, args.jobs)
    facts = {
        "reparam": engine_revision(),
        "torch": torch.__version__,
        "timm": timm_version,
        "hardware": machines(path if args.keep_older else None, hardware_name(torch.device("cpu"))),
        "sizes": known,
        "networks": networks,
    }
    held = sweep.kept(sweep.load_rows(path, facts["reparam"], Row, args.keep_older), args)
    rows = {name: completed(row) for name, row in held.items()}
    names = sweep.missing(in_turn(known, args.most_parameters), rows, args)

    def in_time() -> Iterator[str]:
        for name in names:
            if name in same(rows.values(), facts):
                continue
            if time.monotonic() - start < args.seconds:
                yield name

    made = sweep.each(Measure(args.dtypes, args.half_products), in_time(), args.jobs, args.limit, lost)
    return sweep.run(made, len(names), rows, lambda held: save(held, facts, args.out), SAVE_EVERY)


if __name__ == "__main__":
    sys.exit(main())
