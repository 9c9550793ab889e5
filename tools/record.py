"""What the comparison scripts write down: files in one piece, exceptions in one line, which engine was measured."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "reparam"


def write(path: Path, text: str) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_text(text)
    os.replace(draft, path)


def measured_before(path: Path, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run of a benchmark; none if there was none.

    Raises:
        ValueError: they were measured under other `conditions`.
    """
    if not path.exists():
        return []
    saved = json.loads(path.read_text())
    before = saved["conditions"]
    if differ := [f"{key} {before.get(key)}, now {wanted[key]}" for key in wanted if before.get(key) != wanted[key]]:
        raise ValueError(f"{path} was measured with {'; '.join(differ)}: move it away, or pass --again all")
    return list(saved["rows"])


def first_line(error: BaseException) -> str:
    """The exception's type and the first line of its message; the second too where the first only introduces it."""
    lines = str(error).strip().splitlines() or [""]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {text}"[:300]


def engine_revision() -> str:
    """The last commit that changed the package, with a digest of its source if files differ from that commit.

    `REPARAM_REVISION` says it where the repository's history is not at hand.
    """
    if said := os.environ.get("REPARAM_REVISION"):
        return said

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # a machine that got a copy of the files alone
            return ""
        return done.stdout.strip()

    commit = git("log", "-1", "--format=%h", "--", PACKAGE) or "unknown"
    if commit != "unknown" and not git("status", "--porcelain", "--", PACKAGE):
        return commit
    digest = hashlib.sha256()
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{commit}-changed-{digest.hexdigest()[:8]}"
