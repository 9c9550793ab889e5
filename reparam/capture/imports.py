"""Importing what a user names, with failures as sentences.

torchvision registers fake kernels for its compiled operators while it is imported, by whomever. Where its compiled part
cannot be loaded (a wheel built for CUDA beside a CPU-only torch) those operators do not exist and the import fails,
though most of its models need none of them.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

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
    """While active, modules in the current folder can be imported, as they can for `python -m`.

    Kernels for operators that do not exist are skipped; whoever calls such an operator is told.
    """
    sys.path.insert(0, "")
    try:
        with missing_operators_skipped():
            yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove("")


@contextlib.contextmanager
def missing_operators_skipped() -> Iterator[None]:
    """While active, registering a fake kernel for an operator that does not exist is a no-op."""
    original = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        registration = original(op, *args, **kwargs)
        if not callable(registration) or args or "func" in kwargs:
            return registration

        def decorate(kernel: Callable[..., Any]) -> Callable[..., Any]:
            try:
                registration(kernel)
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
            return kernel

        return decorate

    torch.library.register_fake = register_fake
    try:
        yield
    finally:
        torch.library.register_fake = original


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
