"""The files of `benchmarks/zoo_compare.py`: written after every cell, read to go on, put together of shards."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.zoo_compare_rows import Row, document
from benchmarks.zoo_compare_table import markdown
from tools.record import measured_before, write


def stem(args: argparse.Namespace) -> Path:
    """The results' path without ending."""
    return args.out / ("zoo_compare" if args.device == "cpu" else f"zoo_compare_{args.device}")  # type: ignore[no-any-return]


def load(path: Path, wanted: Mapping[str, Any]) -> dict[str, Row]:
    """The rows of an earlier run, by model; none if there was none.

    Raises:
        ValueError: they were measured under other conditions.
    """
    return {row["model"]: Row.from_dict(row) for row in measured_before(path, wanted)}


def save(path: Path, rows: Mapping[str, Row], facts: Mapping[str, Any]) -> None:
    """Writes the JSON document and the page."""
    ordered = sorted(rows.values(), key=lambda row: (row.family, row.parameters, row.model))
    write(path.with_suffix(".json"), document(ordered, facts))
    write(path.with_suffix(".md"), markdown(ordered, facts))


def merged(folders: Sequence[Path], args: argparse.Namespace) -> tuple[dict[str, Row], dict[str, Any]]:
    """The rows of several runs under the same conditions, and what these were.

    Raises:
        ValueError: a file is missing, or the conditions differ.
    """
    rows: dict[str, Row] = {}
    facts: dict[str, Any] = {}
    for folder in folders:
        path = (folder / stem(args).name).with_suffix(".json")
        if not path.exists():
            raise ValueError(f"{path} is not there: give folders that --out was given")
        saved = json.loads(path.read_text())
        facts = facts or {key: saved[key] for key in ("command", "conditions")}
        rows |= load(path, facts["conditions"])
    return rows, {**facts, "command": f"{facts['command']} --shard 1/{len(folders)} (and so on, at the same time)"}
