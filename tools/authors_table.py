"""Rows of the comparison with the authors' own conversions, what is wrong in them, and the page that shows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXACT = 1e-11
"""Largest relative float64 error that rounding explains in a well-conditioned model."""
NOISE_FACTOR = 30.0
"""Above that, an error may be this many times what the original makes of a change of its input's last digit."""
KINDS = (("convolutions", "convolutions"), ("BatchNorms", "batch_norms"))


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        family: timm's source file.
        model: timm's name.
        parameters: elements of all weights as built.
        size: height and width of the image.
        built, authors, ours: counts by kind (see `LayerCounts`), empty if that side failed.
        noise: relative float64 change of the original's output when the last digits of its input change.
        authors_error, ours_error: relative float64 error against the original; None if that side failed.
        authors_float32: theirs turned float64 weights into float32, so its error is that of rounded weights.
        failed, authors_failed, ours_failed: first line of the exception; empty if there was none.
        refusals: how many reasons for what was left ours gave.
        reasons: the first of them.
        fuse_seconds: time of our `fuse` without verification.
        seconds: time of the whole row.
        revision: the commit measured.
    """

    family: str
    model: str
    parameters: int
    size: int = 0
    built: Mapping[str, int] = dataclasses.field(default_factory=dict)
    authors: Mapping[str, int] = dataclasses.field(default_factory=dict)
    ours: Mapping[str, int] = dataclasses.field(default_factory=dict)
    noise: float = 0.0
    authors_error: float | None = None
    authors_float32: bool = False
    ours_error: float | None = None
    failed: str = ""
    authors_failed: str = ""
    ours_failed: str = ""
    refusals: int = 0
    reasons: Sequence[str] = ()
    fuse_seconds: float | None = None
    seconds: float = 0.0
    revision: str = ""

    def measured_at(self, revision: str) -> Row:
        """The row with the commit it was measured at."""
        return dataclasses.replace(self, revision=revision)

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return dataclasses.asdict(self)

    def line(self) -> str:
        """The row for the terminal."""
        counts = f"convs {self.cell('convolutions')}, BNs {self.cell('batch_norms')}"
        problems = "; ".join(complaints(self))
        flag = f"  <- {problems}" if problems else ""
        return f"{self.model}: {counts}, error {error_text(self.ours_error)}, {self.seconds:.0f} s{flag}"

    def cell(self, key: str) -> str:
        """`built / authors' / ours`, `-` for a side that failed."""
        return " / ".join(str(side.get(key, "-")) for side in (self.built, self.authors, self.ours))


def error_text(error: float | None) -> str:
    """The error with two digits, or `-`."""
    return "-" if error is None else f"{error:.1e}"


def more_than_theirs(row: Row, key: str) -> bool:
    """Whether ours leaves more operations of this kind than the authors' conversion does."""
    return bool(row.authors and row.ours) and row.ours[key] > row.authors[key]


def inexact(row: Row, error: float | None) -> bool:
    """Whether rounding in float64 does not explain this error."""
    return error is not None and not error <= max(EXACT, NOISE_FACTOR * row.noise)


def complaints(row: Row) -> Iterator[str]:
    """What is wrong with ours in this row."""
    if row.failed:
        yield f"not measured: {row.failed}"
        return
    if row.ours_failed:
        yield f"ours failed: {row.ours_failed}"
        return
    for kind, key in KINDS:
        if more_than_theirs(row, key):
            yield f"{row.ours[key]} {kind}, theirs {row.authors[key]}"
    if inexact(row, row.ours_error):
        yield f"float64 error {error_text(row.ours_error)}, the original's own noise {error_text(row.noise)}"


def exceptions(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows in which ours is worse than theirs, failed, or is not exact."""
    return (row for row in rows if any(complaints(row)))


def summary(rows: Iterable[Row]) -> list[str]:
    """In how many models ours is at most theirs, and the exceptions."""
    rows = list(rows)
    both = [row for row in rows if row.authors and row.ours]
    convs, norms = (sum(not more_than_theirs(row, key) for row in both) for _, key in KINDS)
    left = [row for row in both if row.authors["batch_norms"] > 0]
    fewer = sum(row.ours["batch_norms"] < row.authors["batch_norms"] for row in left)
    lines = [
        f"{len(rows)} models, {len(both)} converted by both: ours leaves at most as many convolutions as theirs in "
        f"{convs}, at most as many BatchNorms in {norms}. Theirs leaves BatchNorms in {len(left)} models, ours fewer "
        f"in {fewer} of these."
    ]
    rounded = [row for row in rows if row.authors_float32]
    if rounded:
        lines.append(
            f"Theirs turns float64 weights into float32 in {len(rounded)} models ({_families(rounded)}): as it is, it "
            "does not run in float64, and its errors there are those of the rounded weights."
        )
    wrong = [row for row in rows if not row.authors_float32 and inexact(row, row.authors_error)]
    if wrong:
        said = (f"{row.model} (float64 error {error_text(row.authors_error)})" for row in wrong)
        lines.append(f"Theirs is not exact in {', '.join(said)}.")
    if raised := [row for row in rows if row.authors_failed]:
        lines.append("Theirs raises in " + ", ".join(f"{row.model} ({row.authors_failed})" for row in raised) + ".")
    alike: dict[str, list[str]] = {}
    for row in exceptions(rows):
        alike.setdefault("; ".join(complaints(row)), []).append(row.model)
    if alike:
        lines.append(f"Exceptions ({sum(map(len, alike.values()))}):")
        lines += [f"- {', '.join(models)}: {text}" for text, models in alike.items()]
    else:
        lines.append("No exceptions.")
    return lines


def _families(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({row.family for row in rows}))


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The page."""
    revisions = ", ".join(sorted({row.revision for row in rows}))
    lines = [
        "# The authors' own conversions, and ours",
        "",
        f"`{facts['command']}`, torch {facts['torch']}, timm {facts['timm']}, reparam at {revisions}.",
        "",
        "Each cell: as built / after `timm.utils.reparameterize_model` / after `reparam.fuse`; executed operations, "
        "counted at the dispatcher. Scales are elementwise operations with a weight. Errors are relative to the "
        "largest output, in float64; noise is what the original makes of a change of its input in the last digit.",
        "",
        "| family | model | convs | BNs | linears | scales | noise | their error | our error |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row.cell(key) for key in ("convolutions", "batch_norms", "linears", "scales")]
        their_error = error_text(row.authors_error) + (" (float32 weights)" if row.authors_float32 else "")
        cells += [error_text(row.noise), their_error, error_text(row.ours_error)]
        lines.append(f"| {row.family} | {row.model} | " + " | ".join(cells) + " |")
    for line in summary(rows):
        lines += [line] if line.startswith("- ") else ["", line]
    return "\n".join([*lines, ""])
