"""What must hold of the latencies in `benchmarks/zoo_compare.py`, each decided by the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.zoo_compare_rows import Cell, Row, cells
from benchmarks.zoo_variants import AUTHORS, ORIGINAL
from reparam.bench import Ratio

HOLDS, OPEN, FAILS = "holds", "undecided", "does not hold"
WITHIN = 0.97
"""Author's time over ours: 3% slower at most."""

Judge = Callable[[Ratio], str]
Items = Iterator[tuple[str, Ratio]]


@dataclass(frozen=True)
class Claim:
    """One sentence about all cells that it is about.

    Attributes:
        text: the sentence.
        items: label and ratio of each cell it is about.
        judge: whether a ratio bears it out.
    """

    text: str
    items: tuple[tuple[str, Ratio], ...]
    judge: Judge

    @property
    def verdict(self) -> str:
        """`HOLDS` if it does for all items, `FAILS` if it surely does not for one, else `OPEN`; empty without items."""
        found = {self.judge(ratio) for _, ratio in self.items}
        return next((verdict for verdict in (FAILS, OPEN, HOLDS) if verdict in found), "")

    def line(self) -> str:
        """The claim, what became of it, and the items that do not bear it out."""
        if not self.items:
            return f"- not measured: {self.text}"
        others = [f"{label} {_figure(ratio)}" for label, ratio in self.items if self.judge(ratio) == FAILS]
        unsure = [f"{label} {_figure(ratio)}" for label, ratio in self.items if self.judge(ratio) == OPEN]
        borne = len(self.items) - len(others) - len(unsure)
        text = f"- **{self.verdict}**: {self.text} ({borne} of {len(self.items)}"
        text += f": {_figure(self.items[0][1])})" if len(self.items) == 1 else ")"
        for word, listed in ((FAILS, others), (OPEN, unsure)):
            text += f"; {word} for {', '.join(listed)}" if listed and len(self.items) > 1 else ""
        return text


def at_least(bound: float) -> Judge:
    """The ratio is at least `bound`; undecided where it is not but its interval reaches it."""

    def judge(ratio: Ratio) -> str:
        return HOLDS if ratio.value >= bound else OPEN if ratio.high >= bound else FAILS

    return judge


def faster(ratio: Ratio) -> str:
    """Measurably faster; undecided where no difference can be measured."""
    return HOLDS if ratio.verdict.startswith("faster") else FAILS if ratio.verdict.startswith("slower") else OPEN


def no_slower(ratio: Ratio) -> str:
    """Not measurably slower."""
    return FAILS if ratio.verdict.startswith("slower") else OPEN if ratio.verdict.startswith("undecided") else HOLDS


def claims(rows: Sequence[Row], device: str) -> list[Claim]:
    """What must hold on a device."""
    runtimes = list(dict.fromkeys(cell.runtime for _, cell in cells(rows)))
    found = []
    if device == "cpu":
        for model, bound in (("mobileone_s0", 2.5), ("repvgg_a0", 1.1)):
            of_model = _items(rows, "onnxruntime", lambda row, model=model: row.model == model)  # type: ignore[misc]
            found.append(Claim(f"onnxruntime: {model}, original / reparam at least {bound}", of_model, at_least(bound)))
    for runtime in runtimes:
        converted = _items(rows, runtime, lambda row: row.has_conversion, AUTHORS)
        text = f"{runtime}: models with an author's conversion, reparam within 3% of it or faster"
        found.append(Claim(text, converted, at_least(WITHIN)))
    for runtime in runtimes:
        plain = _items(rows, runtime, lambda row: row.is_plain)
        found.append(Claim(f"{runtime}: plain Conv+BN networks, reparam no slower than the original", plain, no_slower))
    with_norms = _items(rows, "eager", lambda row: row.has_batch_norms)
    found.append(Claim("eager: models with BatchNorm, reparam faster than the original", with_norms, faster))
    return found


def _items(
    rows: Sequence[Row], runtime: str, wanted: Callable[[Row], bool], baseline: str = ORIGINAL
) -> tuple[tuple[str, Ratio], ...]:
    several = len({cell.key for _, cell in cells(rows, runtime)}) > 1

    def found() -> Items:
        for row, cell in cells(rows, runtime):
            ratio = cell.ratio(baseline=baseline)
            if wanted(row) and ratio is not None:
                yield _label(row, cell, several), ratio

    return tuple(found())


def _label(row: Row, cell: Cell, several: bool) -> str:
    return f"{row.model} ({cell.dtype}, batch {cell.batch})" if several else row.model


def _figure(ratio: Ratio) -> str:
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
