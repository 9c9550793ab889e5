"""Stages of a run: who is told that one begins, and how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str], None]


class Stages:
    """Announces stages and keeps their wall-clock times.

    Args:
        progress: called with a few words when a stage starts, or None.

    Attributes:
        seconds: by stage; of all times that it ran.
    """

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.seconds: dict[str, float] = {}

    def tell(self, text: str) -> None:
        """Announces something that is no stage of its own."""
        if self._progress is not None:
            self._progress(text)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.tell(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
