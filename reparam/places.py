"""Files of a run appear together in their places, when everything is done, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from reparam.errors import InputError


@contextmanager
def staging(targets: Mapping[str, Path]) -> Iterator[Path]:
    """A folder on the targets' file system, which is gone afterwards with whatever is left in it."""
    parent = next(iter(targets.values())).absolute().parent if targets else Path(tempfile.gettempdir())
    while not parent.exists():
        parent = parent.parent
    try:
        folder = Path(tempfile.mkdtemp(prefix=".reparam-", dir=parent))
    except OSError as error:
        raise InputError(f"{parent} cannot be written to ({error.strerror}); choose another place with --out") from None
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, targets: Mapping[str, Path], source: Path) -> dict[str, str]:
    """Moves everything staged into its place; an ONNX file's external data goes first, so that it is never without."""
    files: dict[str, str] = {}
    try:
        for target in targets.values():
            target.parent.mkdir(parents=True, exist_ok=True)
        for staged in sorted(folder.iterdir(), key=lambda path: path.suffix != ".data"):
            target = next(iter(targets.values())).with_name(staged.name)
            if target.exists() and target.samefile(source):
                raise InputError(f"{target} is the model file itself, which is never overwritten; choose another --out")
            os.replace(staged, target)
    except OSError as error:
        raise InputError(f"the files cannot be written ({error}); choose another place with --out") from None
    for kind, target in targets.items():
        files[kind] = str(target)
    return files
