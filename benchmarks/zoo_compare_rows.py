"""Rows of `benchmarks/zoo_compare.py`: what was measured of a model, and the ratios that follow from it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any

from benchmarks.zoo_variants import AUTHORS, ORIGINAL, OURS
from reparam.bench import Ratio, statistics

DIGITS = 4
"""Significant digits of a sample that are kept."""


@dataclass(frozen=True)
class Cell:
    """All variants of one model under one set of conditions, in paired runs.

    Attributes:
        runtime: "eager", "onnxruntime", "compile" or "cuda-graphs".
        dtype, batch: what was computed.
        samples: variant -> latencies in microseconds; entry `i` of every variant is from the same round.
        doubts: what made the measurement doubtful.
        missing: variant -> why it is not among the samples.
        failed: why nothing was measured.
    """

    runtime: str
    dtype: str
    batch: int
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    failed: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        """What a resumed run looks for."""
        return self.runtime, self.dtype, self.batch

    def median(self, variant: str) -> float:
        """Milliseconds."""
        return statistics.median(self.samples[variant]) / 1e3

    def ratio(self, variant: str = OURS, baseline: str = ORIGINAL) -> Ratio | None:
        """How many times faster `variant` is than `baseline`; None if one of them was not measured."""
        if not self.samples.get(variant) or not self.samples.get(baseline):
            return None
        found = _interval(self.samples[baseline], self.samples[variant])
        return Ratio(baseline, *found, runs=len(self.samples[variant]))


@cache
def _interval(baseline: tuple[float, ...], variant: tuple[float, ...]) -> tuple[float, float, float]:
    """Kept, because the page is written anew after every cell."""
    return statistics.ratio_interval(baseline, variant, seed=0)


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        family, model, parameters, size: timm's source file, its name, its weights' elements as built, the image's side.
        before, after: counts of operations.
        errors: variant -> largest relative error in float32 beside the original.
        missing: variant -> why there is none.
        cells: what was measured.
        failed: why nothing could be.
    """

    family: str
    model: str
    parameters: int
    size: int = 0
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    cells: tuple[Cell, ...] = ()
    failed: str = ""

    @property
    def has_batch_norms(self) -> bool:
        return self.before.get("batch_norms", 0) > 0

    @property
    def is_plain(self) -> bool:
        """Whether all there is to fuse is BatchNorm: no layer is merged with another, and no BatchNorm is left."""
        same = all(self.before.get(key) == self.after.get(key) for key in ("convolutions", "linears"))
        return self.has_batch_norms and same and self.after.get("batch_norms") == 0

    @property
    def has_conversion(self) -> bool:
        return AUTHORS in self.errors

    def with_cell(self, cell: Cell) -> Row:
        """The row with a cell added, or put in the place of an earlier one."""
        return replace(self, cells=(*(one for one in self.cells if one.key != cell.key), cell))

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Row:
        """The row that `to_dict` wrote."""
        return cls(**{**plain, "cells": tuple(map(_cell, plain["cells"]))})


def _cell(plain: Mapping[str, Any]) -> Cell:
    samples = {name: tuple(values) for name, values in plain["samples"].items()}
    return Cell(**{**plain, "samples": samples, "doubts": tuple(plain["doubts"])})


def microseconds(samples: Sequence[float]) -> tuple[float, ...]:
    """Seconds as microseconds, rounded to the digits that are kept."""
    return tuple(float(f"{1e6 * value:.{DIGITS}g}") for value in samples)


def document(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The JSON document, with a line for each model."""
    head = json.dumps(facts, indent=1)[:-2]
    return f'{head},\n "rows": [\n' + ",\n".join(json.dumps(row.to_dict()) for row in rows) + "\n ]\n}\n"


def cells(rows: Sequence[Row], runtime: str | None = None) -> Iterator[tuple[Row, Cell]]:
    """Every measured cell of every row."""
    for row in rows:
        for cell in row.cells:
            if cell.samples and runtime in (None, cell.runtime):
                yield row, cell
