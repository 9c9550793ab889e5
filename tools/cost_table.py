"""The values that `tools/measure_costs.py` ends in, their file and their page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from reparam.passes.machines import Machine
from tools.record import write

NAMES = {"eager": "eager-cpu", "onnxruntime": "onnxruntime-cpu", "cuda": "cuda"}
MARGIN = 0.03


@dataclass(frozen=True)
class Ranked:
    """One pair: ratio first / second of the clock with its interval, and of the prices."""

    pair: str
    first: float
    second: float
    ratio: float
    low: float
    high: float
    fitted: float
    committed: float

    @property
    def decided(self) -> bool:
        """Whether the clock tells the two apart."""
        apart = max(self.ratio, 1 / self.ratio) >= 1 + MARGIN
        return apart and (self.low > 1 or self.high < 1)

    def agrees(self, priced: float) -> bool:
        """Whether a ratio of prices is on the clock's side of 1."""
        return (priced > 1) == (self.ratio > 1) and priced != 1


@dataclass(frozen=True)
class Result:
    """One runtime with one number of threads; `load` is how many processes wanted to run in the minute before."""

    runtime: str
    threads: int
    load: float | None
    machine: Machine
    errors: dict[str, float]
    layers: dict[str, tuple[float, float]]
    ranked: tuple[Ranked, ...]

    @property
    def decided(self) -> list[Ranked]:
        """The pairs that the clock tells apart."""
        return [one for one in self.ranked if one.decided]


def as_python(result: Result) -> str:
    """The constants, ready to paste."""
    name = NAMES[result.runtime].upper().replace("-", "_")
    values = {field.name: getattr(result.machine, field.name) for field in fields(Machine)}
    body = "".join(f"    {field}={literal(value)},\n" for field, value in values.items())
    return f"{name} = Machine(\n{body})"


def literal(value: float | bool) -> str:
    """A constant as one would write it."""
    if isinstance(value, float) and math.isinf(value):
        return "math.inf"
    if isinstance(value, float) and value:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return repr(value)


def cell(value: float | bool) -> str:
    """A constant in the table."""
    return "-" if math.isnan(value) else f"{value:g}"


def score(result: Result, which: str) -> str:
    """`61 of 63`: pairs that the model ranks as the clock does, of those that the clock tells apart."""
    good = sum(one.agrees(getattr(one, which)) for one in result.decided)
    return f"{good} of {len(result.decided)}"


def markdown(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """The results as a page."""
    lines = [
        "# What the cost model's constants are, and how they rank",
        "",
        f"`{facts['command']}`, {facts['hardware']}, torch {facts['torch']}, onnxruntime {facts['onnxruntime']}; "
        "float32, paired and interleaved, medians. "
        "The constants in `reparam/passes/machines.py` are those with 1 thread.",
        "",
        "| runtime | threads | " + " | ".join(field.name for field in fields(Machine)) + " |",
        "|---|--:|" + "--:|" * len(fields(Machine)),
    ]
    for result in results:
        cells = " | ".join(cell(getattr(result.machine, field.name)) for field in fields(Machine))
        lines.append(f"| {result.runtime} | {result.threads} | {cells} |")
    lines += [
        "",
        "launch, layer and grouped are seconds, the rest multiply-adds, windows, elements or bytes per second; "
        "inf is free, and - was not measured.",
        "",
        "Load is the number of processes that wanted to run in the minute before: above 1, others ran too.",
        "",
        "| runtime | threads | load | median factor of a layer's price, fitted / committed | "
        "pairs ranked as the clock does, fitted | committed | pairs the clock does not tell apart |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        ties = len(result.ranked) - len(result.decided)
        lines.append(
            f"| {result.runtime} | {result.threads} | {'-' if result.load is None else f'{result.load:.1f}'} "
            f"| {result.errors['fitted']:.2f} / {result.errors['committed']:.2f} "
            f"| {score(result, 'fitted')} | {score(result, 'committed')} | {ties} |"
        )
    for result in results:
        lines += [
            "",
            f"## {result.runtime}, {result.threads} thread(s)",
            "",
            "Ratio first / second: above 1 the second is faster. Prices are those of the committed constants.",
            "",
            "| pair | first, us | second, us | clock (95% interval) | price | |",
            "|---|--:|--:|--:|--:|---|",
        ]
        for one in result.ranked:
            verdict = "undecided" if not one.decided else "" if one.agrees(one.committed) else "**differs**"
            lines.append(
                f"| {one.pair.replace(' | ', ' or ')} | {1e6 * one.first:.0f} | {1e6 * one.second:.0f} "
                f"| {one.ratio:.2f} ({one.low:.2f}-{one.high:.2f}) | {one.committed:.2f} | {verdict} |"
            )
    return "\n".join(lines) + "\n"


def load(out: Path) -> tuple[dict[str, Any], list[Result]]:
    """The facts and results of an earlier run; a constant that was not fitted then is NaN."""
    unknown = {field.name: math.nan for field in fields(Machine)}
    facts = json.loads((out / "costs.json").read_text())
    results = [
        Result(
            row["runtime"],
            row["threads"],
            row["load"],
            Machine(**{**unknown, **row["machine"]}),
            row["errors"],
            {name: (took, price) for name, (took, price) in row["layers"].items()},
            tuple(Ranked(**one) for one in row["ranked"]),
        )
        for row in facts.pop("results")
    ]
    return facts, results


def save(out: Path, facts: dict[str, Any], results: Sequence[Result]) -> None:
    """Writes `costs.json` and `costs.md`."""
    rows = [asdict(result) for result in results]
    write(out / "costs.json", json.dumps({**facts, "results": rows}, indent=1) + "\n")
    write(out / "costs.md", markdown(results, facts))
