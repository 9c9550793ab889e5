"""The cells of a grid as one value and one file, which a later run goes on from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reparam.bench.grid import Setting
from reparam.bench.timing import Timing
from reparam.errors import InputError

FORMAT = "reparam-bench-1"


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: its conditions, and what was measured or why nothing was."""

    setting: Setting
    timing: Timing | None = None
    failed: str = ""

    @property
    def is_complete(self) -> bool:
        """Whether a later run need not measure it again."""
        return self.timing is not None and not self.timing.partial

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        timing = None if self.timing is None else self.timing.to_dict()
        return {"setting": self.setting.to_dict(), "timing": timing, "failed": self.failed}


@dataclass(frozen=True)
class Series:
    """Everything that one run of `reparam bench` measured.

    Attributes:
        about: what all cells have in common: files, backends, options, versions, hardware; text by name. A run goes on
            from a file only if all of it is the same.
        cells: in the order of the grid.
        partial: whether the run was interrupted, so that cells are missing or have fewer rounds.
        notes: further sentences for the user.
    """

    about: Mapping[str, str]
    cells: tuple[Cell, ...] = ()
    partial: bool = False
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types, all samples included."""
        return {
            "format": FORMAT,
            "about": dict(self.about),
            "partial": self.partial,
            "notes": list(self.notes),
            "cells": [cell.to_dict() for cell in self.cells],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Series:
        """The value that `to_dict` wrote."""
        cells = tuple(
            Cell(
                Setting.from_dict(cell["setting"]),
                None if cell["timing"] is None else Timing.from_dict(cell["timing"]),
                cell["failed"],
            )
            for cell in plain["cells"]
        )
        return cls(plain["about"], cells, plain["partial"], tuple(plain["notes"]))


def write(series: Series, path: Path) -> None:
    """Writes the whole file or nothing.

    Raises:
        InputError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(json.dumps(series.to_dict(), allow_nan=False) + "\n")
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True) if draft.parent.is_dir() else None
        raise InputError(f"{path} cannot be written ({error.strerror}); choose another place with --out") from None


def earlier(path: Path, about: Mapping[str, str]) -> dict[Setting, Cell]:
    """The complete cells of an earlier run, to go on from; none if there is no file.

    Raises:
        InputError: the file is something else, or was measured under other conditions.
    """
    if not path.exists():
        return {}
    try:
        plain = json.loads(path.read_text())
        if plain["format"] != FORMAT:
            raise KeyError
        series = Series.from_dict(plain)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); choose another file with --out") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{path} is no result of this version of `reparam bench`; choose another file with --out"
        ) from None
    names = dict.fromkeys((*about, *series.about))
    differ = [
        f"{name} {series.about.get(name, 'not said')}, now {about.get(name, 'not said')}"
        for name in names
        if series.about.get(name) != about.get(name)
    ]
    if differ:
        raise InputError(
            f"{path} was measured with {'; '.join(differ)}: its cells cannot stand beside new ones, so choose another "
            "file with --out or move it away"
        )
    return {cell.setting: cell for cell in series.cells if cell.is_complete}
