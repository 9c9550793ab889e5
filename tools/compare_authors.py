"""Holds `reparam.fuse` against the conversions that timm's authors wrote for their own blocks.

    python tools/compare_authors.py [--models REGEX] [--smallest] [--jobs 1] [--max-parameters 60] [--again all|failed]

For every timm model that carries such a conversion (some part of it has `fuse`, `reparameterize` or
`switch_to_deploy`, which `timm.utils.reparameterize_model` calls), convolutions, BatchNorms and linear layers are
counted as built, after the authors' conversion and after ours, at the dispatcher (`tools/layer_counts.py`); the errors
of both against the original are taken in float64. BatchNorm statistics are randomised and calibrated.

Results go to `tools/results/authors.json` and `.md`, one model at a time: a run that was stopped goes on where it was.
Exit status 1 if ours leaves more convolutions or BatchNorms than theirs in some model, fails, or is not exact.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tools import timm_zoo  # noqa: E402
from tools.authors_table import Row, exceptions, markdown, summary  # noqa: E402
from tools.layer_counts import count_layers, errors, output_of  # noqa: E402
from tools.record import engine_revision, first_line, write  # noqa: E402

FAMILIES = (
    "byobnet", "fastvit", "repvit", "repghost", "ghostnet", "levit", "efficientvit_msra",
    "tiny_vit", "nextvit", "shvit", "iformer", "lcnetv2", "efficientvim",
)  # fmt: skip
"""timm's source files that define a conversion of their own."""
CONVERSIONS = ("fuse", "reparameterize", "switch_to_deploy")
REFUSALS_KEPT = 40


def candidates() -> Iterator[tuple[str, str, int]]:
    """(family, model, parameters) of every timm model of which some part has a conversion of its own."""
    timm = timm_zoo.import_timm()
    for family in FAMILIES:
        for name in timm.list_models(module=family):
            with torch.device("meta"):
                model = timm.create_model(name)
            parts = [part for path, part in model.named_modules() if path]
            if any(hasattr(part, method) for part in parts for method in CONVERSIONS):
                yield family, name, sum(p.numel() for p in model.parameters())


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model in float64 and eval mode, and an input: small, if the model takes small images."""
    model, x = timm_zoo.create_small(name)
    return model.double(), x.double()


def measure(family: str, name: str, parameters: int) -> Row:
    """One row; an exception of either side is kept as its first line."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    row: dict[str, Any] = {"family": family, "model": name, "parameters": parameters}
    try:
        model, x = build(name)
        expected = output_of(model, x)
        row |= {"size": x.shape[-1], "built": count_layers(model, x).to_dict(), "noise": noise(model, x, expected)}
        for side, failed in ((authors, "authors_failed"), (ours, "ours_failed")):
            try:
                row |= side(model, x, expected)
            except Exception as error:
                row[failed] = first_line(error)
    except Exception as error:
        row["failed"] = first_line(error)
    return Row(**row, seconds=round(time.perf_counter() - start, 1))


def noise(model: nn.Module, x: torch.Tensor, expected: Any) -> float:
    """Largest relative change of the output when the last digits of the input change at random."""
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randint(-1, 2, x.shape, generator=generator).to(x) for _ in range(3)]
    return max(errors(expected, output_of(model, x * (1 + torch.finfo(x.dtype).eps * step)))[1] for step in steps)


def authors(model: nn.Module, x: torch.Tensor, expected: Any) -> dict[str, Any]:
    """Their conversion. Some of them make float32 layers of float64 ones: these are taken back to float64."""
    converted = timm_zoo.import_timm().utils.reparameterize_model(copy.deepcopy(model)).eval()
    float32 = any(tensor.dtype == torch.float32 for tensor in [*converted.parameters(), *converted.buffers()])
    converted = converted.double()
    return {
        "authors": count_layers(converted, x).to_dict(),
        "authors_error": errors(expected, output_of(converted, x))[1],
        "authors_float32": float32,
    }


def ours(model: nn.Module, x: torch.Tensor, expected: Any) -> dict[str, Any]:
    """Our conversion, without verification, so that the engine alone is measured."""
    import reparam

    start = time.perf_counter()
    result = reparam.fuse(model, x, verify=False)
    seconds = time.perf_counter() - start
    refusals = [f"{r.where}: {r.subject}: {r.reason}" for r in result.report.refusals]
    return {
        "ours": count_layers(result.module, x).to_dict(),
        "ours_error": errors(expected, output_of(result.module, x))[1],
        "refusals": len(refusals),
        "reasons": tuple(refusals[:REFUSALS_KEPT]),
        "fuse_seconds": round(seconds, 3),
    }


def selected(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """What `args` asks for, smallest models first."""
    found = sorted(candidates(), key=lambda candidate: candidate[2])
    if args.models:
        found = [candidate for candidate in found if re.search(args.models, candidate[1])]
    if args.smallest:
        found = [next(c for c in found if c[0] == family) for family in FAMILIES if any(c[0] == family for c in found)]
    return [candidate for candidate in found if candidate[2] <= args.max_parameters * 1e6]


def save(out: Path, rows: Mapping[str, Row], facts: Mapping[str, Any]) -> None:
    """Writes `authors.json` and `authors.md`."""
    ordered = sorted(rows.values(), key=lambda row: (FAMILIES.index(row.family), row.parameters, row.model))
    write(out / "authors.json", json.dumps({**facts, "rows": [row.to_dict() for row in ordered]}, indent=1) + "\n")
    write(out / "authors.md", markdown(ordered, facts))


def load(out: Path) -> dict[str, Row]:
    """The rows of an earlier run, by model; none if there was none."""
    path = out / "authors.json"
    if not path.exists():
        return {}
    return {
        row["model"]: Row(**{**row, "reasons": tuple(row["reasons"])}) for row in json.loads(path.read_text())["rows"]
    }


def pending(args: argparse.Namespace, rows: Mapping[str, Row]) -> list[tuple[str, str, int]]:
    """What is selected and not yet measured, or to be measured again."""
    wanted = selected(args)
    if args.again == "all":
        return wanted
    failed = {row.model for row in exceptions(rows.values())} if args.again == "failed" else set()
    return [candidate for candidate in wanted if candidate[1] not in rows or candidate[1] in failed]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", metavar="REGEX", help="only models whose names match")
    parser.add_argument("--smallest", action="store_true", help="only the smallest model of each family")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="processes, of one thread each")
    parser.add_argument("--max-parameters", type=float, default=60.0, metavar="MILLIONS", help="skip larger models")
    parser.add_argument("--again", choices=("all", "failed"), help="measure these although they are in the file")
    parser.add_argument("--out", type=Path, default=ROOT / "tools" / "results")
    return parser.parse_args()


def main() -> int:
    args = parse()
    warnings.simplefilter("ignore")
    rows = load(args.out)
    todo = pending(args, rows)
    facts = {"command": "python tools/compare_authors.py", "torch": torch.__version__}
    facts["timm"] = timm_zoo.import_timm().__version__
    version = engine_revision()
    print(f"{len(todo)} models to measure, {len(rows)} measured before", flush=True)
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure, *candidate) for candidate in todo]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                row = future.result().measured_at(version)
                rows[row.model] = row
                save(args.out, rows, facts)
                print(f"{done:4d} of {len(todo)}  {row.line()}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            print("stopped; what was measured is kept, and the same command goes on from here")
    save(args.out, rows, facts)
    print(*summary(rows.values()), sep="\n")
    return int(bool(list(exceptions(rows.values()))))


if __name__ == "__main__":
    sys.exit(main())
