"""The page of `benchmarks/zoo_compare.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.zoo_compare_claims import claims
from benchmarks.zoo_compare_rows import Cell, Row, cells
from benchmarks.zoo_variants import AUTHORS, ORIGINAL, OURS, VARIANTS

WRONG, NOISE = 1e-2, 10.0
"""A variant with a larger relative float32 error than this, and than this multiple of the error of reparam's variant,
is marked: its latency is that of another function. reparam's was verified against the original's own rounding noise,
so that its error says how far rounding alone goes."""


def markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The page."""
    about = facts["conditions"]
    lines = [
        f"# timm's models as built and converted, on {about['hardware']}",
        "",
        f"`{facts['command']}`: {about['hardware']}, {about['threads']} thread(s), torch {about['torch']}, timm "
        f"{about['timm']}, onnxruntime {about['onnxruntime']}, reparam at {about['revision']}. {len(rows)} models so "
        "far; the command goes on where it was.",
        "",
        "Random weights, the model's own image size. All variants of a cell run once in each round, in random order. "
        "Speed-up: median over the rounds of original / variant, with its 95% bootstrap interval; above 1 the variant "
        "is faster than the original. Last column: author's / reparam, above 1 reparam is faster. * : the measurement "
        "says of itself that it is doubtful (few runs, other load, drift, spread). `onnxsim` is its result for the "
        "original's file. Convolutions and BatchNorms: before / after reparam.",
        "",
        "## What must hold",
        "",
        *(claim.line() for claim in claims(rows, about["device"])),
    ]
    for runtime, batch in sorted({(cell.runtime, cell.batch) for _, cell in cells(rows)}):
        lines += ["", f"## {runtime}, batch {batch}", "", *_table(rows, runtime, batch)]
    lines += _problems(rows)
    return "\n".join([*lines, ""])


def _table(rows: Sequence[Row], runtime: str, batch: int) -> list[str]:
    found = [(row, cell) for row, cell in cells(rows, runtime) if cell.batch == batch]
    columns = [name for name in VARIANTS if name != ORIGINAL and any(name in cell.samples for _, cell in found)]
    several = len({cell.dtype for _, cell in found}) > 1
    head = ["model", *(["dtype"] if several else []), "convs", "BNs", "original, ms", "reparam, ms", *columns]
    head += ["author's / reparam", "rounds"] if AUTHORS in columns else ["rounds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * (2 if several else 1)}{'--:|' * (len(head) - 1 - several)}"]
    for row, cell in found:
        counts = [f"{row.before[key]} / {row.after[key]}" for key in ("convolutions", "batch_norms")]
        texts = [row.model, *([cell.dtype] if several else []), *counts]
        texts += [_milliseconds(cell, ORIGINAL), _milliseconds(cell, OURS)]
        texts += [_speed_up(row, cell, name) for name in columns]
        texts += [_ratio(cell, OURS, AUTHORS)] if AUTHORS in columns else []
        lines.append(f"| {' | '.join([*texts, str(len(next(iter(cell.samples.values()))))])} |")
    return lines


def _milliseconds(cell: Cell, variant: str) -> str:
    return f"{cell.median(variant):.3g}" if variant in cell.samples else "-"


def _speed_up(row: Row, cell: Cell, variant: str) -> str:
    wrong = row.errors.get(variant, 0.0) > max(WRONG, NOISE * row.errors.get(OURS, 0.0))
    return _ratio(cell, variant, ORIGINAL) + (" wrong" if wrong and variant in cell.samples else "")


def _ratio(cell: Cell, variant: str, baseline: str) -> str:
    ratio = cell.ratio(variant, baseline)
    if ratio is None:
        return "-"
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" + ("*" if cell.doubts else "")


def _problems(rows: Sequence[Row]) -> list[str]:
    """What could not be measured, and why, those alike together."""
    lines = _listed("Not measured", ((row.model, row.failed) for row in rows if row.failed))
    failed = [
        (f"{row.model} ({cell.runtime}, {cell.dtype}, batch {cell.batch})", cell.failed)
        for row in rows
        for cell in row.cells
        if cell.failed
    ]
    lines += _listed("Cells not measured", failed)
    for variant in VARIANTS:
        lacking = [(row.model, row.missing[variant]) for row in rows if variant in row.missing]
        lacking += [
            (f"{row.model} ({cell.runtime})", cell.missing[variant])
            for row in rows
            for cell in row.cells
            if cell.missing.get(variant) and cell.missing[variant] != row.missing.get(variant)
        ]
        lines += _listed(f"Without {variant}", lacking)
    return lines


def _listed(title: str, items: Iterable[tuple[str, str]]) -> list[str]:
    alike: dict[str, list[str]] = {}
    for label, text in items:
        alike.setdefault(text, []).append(label)
    if not alike:
        return []
    return ["", f"## {title}", "", *(f"- {', '.join(dict.fromkeys(names))}: {text}" for text, names in alike.items())]
