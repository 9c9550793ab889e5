"""What the comparison scripts write down: files in one piece, exceptions in one line."""

from __future__ import annotations

import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_text(text)
    os.replace(draft, path)


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of its message; the second too where the first only introduces it."""
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"[:300]
