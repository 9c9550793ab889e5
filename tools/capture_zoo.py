"""Captures every model of timm, and says how.

    python tools/capture_zoo.py [--models REGEX] [--jobs 2] [--again failed]

A model is built without memory for its weights (the meta device) and captured there; where that cannot be done, as
when its forward reads a number off a weight, it is built in memory. Nothing is fused or computed: the table shows
that, and by which way, the graph is found.

Results go to `tools/results/capture.json` and `.md`: a run that was stopped goes on where it was, unless the engine has
changed since. Exit status 1 if a model is not captured.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from tools import sweep, timm_zoo  # noqa: E402
from tools.record import engine_revision, first_line, write  # noqa: E402

OUT = ROOT / "tools" / "results"
SAVE_EVERY = 20
LIMIT = 600.0
"""Seconds for one model."""


@dataclass(frozen=True)
class Row(sweep.ModelRow):
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

    way: str = ""
    device: str = ""
    nodes: int = 0
    seconds: float = 0.0
    decided: str = ""
    error: str = ""

    @property
    def failed(self) -> bool:
        return not self.way

    @property
    def line(self) -> str:
        return self.way or self.error


def captured(name: str) -> Row:
    """Captures one model, on the meta device or else on the CPU."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    family = timm_zoo.family(name)
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
    decided = next((note for note in found.notes if " of the example decided" in note), "")
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
        *sweep.engines(rows),
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
        lines += [
            "",
            "Not captured:",
            "",
            *(f"- {row.title}: {row.error}" for row in failed),
        ]
    return "\n".join(lines) + "\n"


def load(version: str, older: bool = False) -> dict[str, Row]:
    """The rows of an earlier run."""
    return sweep.load_rows(OUT / "capture.json", version, Row, older)


def save(rows: Mapping[str, Row], version: str, timm_version: str) -> None:
    """Writes both files."""
    ordered = sweep.ordered(rows)
    facts = {"reparam": version, "torch": torch.__version__, "timm": timm_version}
    sweep.save_rows(OUT / "capture.json", facts, ordered)
    known = len(timm_zoo.import_timm().list_models())
    write(OUT / "capture.md", markdown(ordered, version, timm_version, known))


def lost(name: str, why: str) -> Row:
    """The row of a model whose process ended."""
    return Row(name, timm_zoo.family(name), error=why)


def main() -> int:
    """Runs the sweep from the command line."""
    args = sweep.arguments(__doc__).parse_args()
    timm = timm_zoo.import_timm()
    version = engine_revision()
    rows = sweep.kept(load(version, args.keep_older), args)
    names = sweep.missing(timm.list_models(), rows, args)
    made = sweep.each(captured, names, args.jobs, LIMIT, lost)
    return sweep.run(made, len(names), rows, lambda held: save(held, version, timm.__version__), SAVE_EVERY)


if __name__ == "__main__":
    sys.exit(main())
