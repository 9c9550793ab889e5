"""The report in a file: its form by the ending of the name, and whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from reparam.errors import InputError

if TYPE_CHECKING:
    from reparam.report.values import Report

FORMS: Mapping[str, str] = {
    ".html": "html",
    ".htm": "html",
    ".md": "markdown",
    ".markdown": "markdown",
    ".json": "json",
}
"""Ending -> form."""


def require_writable(path: str | Path) -> Path:
    """The path, if a report can be written there.

    Raises:
        InputError: its ending stands for no form, it is a folder, or nothing can be written there.
    """
    target = Path(path).expanduser()
    if target.suffix.lower() not in FORMS:
        raise InputError(f"{target} has an ending that no report has; use .html, .md or .json")
    if target.is_dir():
        raise InputError(f"{target} is a folder; give the report the name of a file")
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{folder} cannot be written to; choose another place for the report")
    return target


def rendered(report: Report, form: str) -> str:
    """The report as a text of the form `html`, `markdown` or `json`."""
    if form == "html":
        return report.to_html()
    if form == "markdown":
        return report.to_markdown()
    return json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n"


def write_report(report: Report, path: str | Path) -> Path:
    """Writes the report, as HTML, Markdown or JSON by the ending of `path`; a file that is there is replaced at once.

    Raises:
        InputError: nothing can be written there, or the ending stands for no form.
    """
    target = require_writable(path)
    text = rendered(report, FORMS[target.suffix.lower()])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{target} cannot be written ({error.strerror}); choose another place for the report"
        ) from None
    return target


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside the target and puts it in its place, so that nobody ever reads half of it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    os.close(descriptor)
    beside = Path(name)
    try:
        write(beside)
        beside.chmod(0o666 & ~_umask())
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            beside.unlink()
        raise


def _umask() -> int:
    """What new files are not allowed; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
