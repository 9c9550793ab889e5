"""Files appear whole or not at all: everything is written in a folder beside the target, then moved into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from reparam.errors import ExportError


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A temporary folder in the target's folder, so that a move is a rename; gone afterwards.

    Raises:
        ExportError: the target's folder does not exist or cannot be written, or the target is a folder.
    """
    if path.is_dir():
        raise ExportError(f"{path} is a folder; give the name of the file to write")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror or error} in {path.parent}; choose another folder"
        ) from error
    try:
        yield folder
    except OSError as error:
        raise ExportError(
            f"{path} cannot be written: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(staged: Path, target: Path) -> None:
    """Moves `staged` and, first, its external data into place; the target is replaced in one step."""
    data = staged.with_name(staged.name + ".data")
    if data.exists():
        os.replace(data, target.with_name(target.name + ".data"))
    os.replace(staged, target)
