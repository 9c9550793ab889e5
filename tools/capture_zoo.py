"""Captures every model of timm, and says how.

    python tools/capture_zoo.py [--models REGEX] [--jobs 2] [--again failed]

A model is built without memory for its weights (the meta device) and captured there; where that cannot be done, as
when its forward reads a number off a weight, it is built in memory. Nothing is fused or computed: the table shows
that, and by which way, the graph is found.

Results go to `tools/results/capture.json` and `.md`: a run that was stopped goes on where it was, unless the engine has
changed since. Exit status 1 if a model is not captured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tools import timm_zoo  # noqa: E402
from tools.record import engine_revision, first_line, write  # noqa: E402

OUT = ROOT / "tools" / "results"
SAVE_EVERY = 20


@dataclass(frozen=True)
class Row:
    """How one model was captured.

    Attributes:
        model, family: timm's name, and the source file that defines it.
        way: "symbolic", "export", or empty if it was not captured.
        device: where its weights were: "meta" or "cpu".
        nodes: of the graph.
        seconds: that capture took.
        decided: what the report notes of sizes that decided.
        error: why it was not captured.
    """

    model: str
    family: str
    way: str = ""
    device: str = ""
    nodes: int = 0
    seconds: float = 0.0
    decided: str = ""
    error: str = ""


def captured(name: str) -> Row:
    """Captures one model, on the meta device or else on the CPU."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    timm = timm_zoo.import_timm()
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    row = Row(name, family)
    for device in ("meta", "cpu"):
        row = _captured_on(name, family, device)
        if row.way:
            break
    return row


def _captured_on(name: str, family: str, device: str) -> Row:
    from reparam.capture.trace import capture

    try:
        with torch.device(device):
            model = timm_zoo.import_timm().create_model(name).eval()
        example = torch.randn(2, *model.pretrained_cfg["input_size"], device=device)
        start = time.perf_counter()
        found = capture(model, example)
    except Exception as error:
        return Row(name, family, device=device, error=first_line(error))
    decided = next((note for note in found.notes if "sizes of the example" in note), "")
    lines = re.findall(r"\(([^)]*)\)", decided)
    seconds = round(time.perf_counter() - start, 2)
    return Row(name, family, found.how, device, len(found.graph.nodes), seconds, lines[0] if lines else "")


def markdown(rows: Sequence[Row], version: str, timm_version: str, known: int) -> str:
    """One line for each of timm's source files, and one for each model that was not captured."""
    lines = [
        "# Capturing every model of timm",
        "",
        f"`python tools/capture_zoo.py`, torch {torch.__version__}, timm {timm_version}, reparam at {version}.",
        "",
        f"{sum(bool(row.way) for row in rows)} of {len(rows)} models that were tried are captured; timm has {known}. "
        "By sizes: lines where Python decides by the size of a tensor, which the fused model checks.",
        "",
        "| family | models | symbolic | export | not captured | median graph | by sizes |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for family in sorted({row.family for row in rows}):
        mine = [row for row in rows if row.family == family]
        ways = Counter(row.way for row in mine)
        nodes = sorted(row.nodes for row in mine)[len(mine) // 2]
        decided = ", ".join(sorted({part for row in mine for part in row.decided.split(", ") if part}))
        lines.append(
            f"| {family} | {len(mine)} | {ways['symbolic']} | {ways['export']} | {ways['']} | {nodes} | {decided} |"
        )
    failed = [row for row in rows if not row.way]
    if failed:
        lines += ["", "Not captured:", "", *(f"- {row.model}: {row.error}" for row in failed)]
    return "\n".join(lines) + "\n"


def load(version: str) -> dict[str, Row]:
    """The rows of an earlier run of the same engine."""
    path = OUT / "capture.json"
    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    return {row["model"]: Row(**row) for row in held["rows"]} if held["reparam"] == version else {}


def save(rows: dict[str, Row], version: str, timm_version: str) -> None:
    """Writes both files."""
    ordered = sorted(rows.values(), key=lambda row: (row.family, row.model))
    facts = {"reparam": version, "torch": torch.__version__, "timm": timm_version}
    write(OUT / "capture.json", json.dumps({**facts, "rows": [asdict(row) for row in ordered]}, indent=1) + "\n")
    known = len(timm_zoo.import_timm().list_models())
    write(OUT / "capture.md", markdown(ordered, version, timm_version, known))


def main() -> int:
    """Runs the sweep from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", metavar="REGEX", default="", help="only models whose names match")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=2, help="processes, of one thread each")
    parser.add_argument("--again", choices=("failed",), help="try these again although they are in the file")
    args = parser.parse_args()
    timm = timm_zoo.import_timm()
    version = engine_revision()
    rows = load(version)
    if args.again:
        rows = {name: row for name, row in rows.items() if row.way}
    names = [name for name in timm.list_models() if re.search(args.models, name) and name not in rows]
    try:
        with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
            pending = [pool.submit(captured, name) for name in names]
            for index, future in enumerate(as_completed(pending), 1):
                row = future.result()
                rows[row.model] = row
                print(f"{index:4} of {len(names)}  {row.model}: {row.way or row.error}", flush=True)
                if index % SAVE_EVERY == 0:
                    save(rows, version, timm.__version__)
    finally:
        save(rows, version, timm.__version__)
    return 1 if any(not row.way for row in rows.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
