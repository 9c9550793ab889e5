"""Importing what a user names, with failures as sentences."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from reparam.errors import InputError


def import_name(name: str, purpose: str) -> Any:
    """The object called `name` (`package.module.Class`); the current folder is importable.

    Raises:
        InputError: its module cannot be imported, or has no such thing in it; `purpose` says who asked.
    """
    parts = name.split(".")
    with importable_current_folder():
        for split in range(len(parts) - 1, 0, -1):
            module_name = ".".join(parts[:split])
            try:
                item = importlib.import_module(module_name)
            except ModuleNotFoundError as error:
                if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
                    continue  # a nested class: its module is further to the left
                raise InputError(
                    f"{purpose}: importing {module_name} failed ({first_line(error)}); install it"
                ) from None
            except (Exception, SystemExit) as error:
                raise InputError(
                    f"{purpose}: importing {module_name} failed with {type(error).__name__} ({first_line(error)}); "
                    "make it importable without side effects"
                ) from error
            for part in parts[split:]:
                if not hasattr(item, part):
                    raise InputError(f"{purpose}: {module_name} has no {'.'.join(parts[split:])}; check the name")
                item = getattr(item, part)
            return item
    raise InputError(
        f"{purpose}: no module named {parts[0]} can be found; install it, or run in the folder that holds it"
    )


@contextlib.contextmanager
def importable_current_folder() -> Iterator[None]:
    """While active, modules in the current folder can be imported, as they can for `python -m`."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")


def first_line(error: object) -> str:
    """The first line of an error's message, without its full stop."""
    return str(error).strip().split("\n")[0].rstrip(".")[:200]


def printable(text: str, most: int = 2000) -> str:
    """`text` on one line, at most `most` characters, without anything that a terminal would take for a command.

    Names in a message may come from a file that somebody wrote to harm.
    """
    line = " ".join(text.split())
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return line if len(line) <= most else f"{line[: most - 3]}..."
