"""Exporters print, warn and log while they work. Here that is dropped, and their failures become one sentence."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator

MAX_REASON = 240


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what is printed, warned or logged from Python while it is active; exceptions pass through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextlib.contextmanager
def without_copying_warnings() -> Iterator[None]:
    """Drops what torch warns of when its own classes are copied: graph modules of torch.export, and TorchScript."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The \.grad attribute of a Tensor that is not a leaf")
        yield


def deepest(error: BaseException) -> BaseException:
    """The exception that started the chain which ended in `error`."""
    seen: set[int] = set()
    while error.__cause__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    return error


def reason(error: BaseException) -> str:
    """The first telling line of the exception that started it all, without colours and without a full stop."""
    root = deepest(error)
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(root))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = (lines[0] if lines else type(root).__name__).rstrip(".:;")
    return first if len(first) <= MAX_REASON else first[: MAX_REASON - 3] + "..."
