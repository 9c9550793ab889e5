"""What the sweeps over timm's models share: processes that may crash, rows that outlive a run, the command line.

A model that crashes its process or takes too long costs its own row and nothing else: the process is replaced.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

from tools.record import first_line, write

GOODBYE = 10.0
"""Seconds that an idle process is given to end."""


@dataclass(frozen=True)
class ModelRow:
    """What is known about one model.

    Attributes:
        model: timm's name.
        family: the source file that defines it.
        engine: revision of reparam, where it is not that of the whole table.
    """

    model: str
    family: str
    engine: str = field(default="", kw_only=True)

    @property
    def title(self) -> str:
        """The model's name as a table shows it."""
        return self.model + ("†" if self.engine else "")

    @property
    def failed(self) -> bool:
        """Whether the model makes the sweep fail, and is tried again with `--again failed`."""
        raise NotImplementedError

    @property
    def line(self) -> str:
        """The outcome in a few words."""
        raise NotImplementedError


R = TypeVar("R", bound=ModelRow)


@dataclass(frozen=True)
class _Raised:
    reason: str


class _Worker(Generic[R]):
    """A process that answers one question after the other; started when it is asked, and again after a crash."""

    def __init__(self, function: Callable[[str], R], limit: float) -> None:
        self._function, self._limit = function, limit
        self._process: Any = None
        self.channel: Any = None
        self.name = ""
        self.deadline = 0.0

    def ask(self, name: str) -> None:
        """Hands over the next model."""
        if self._process is None:
            context = get_context("spawn")
            self.channel, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(self._function, theirs), daemon=True)
            self._process.start()
            theirs.close()  # or the end of the process would not close the pipe
        self.name, self.deadline = name, time.monotonic() + self._limit
        self.channel.send(name)

    def answer(self) -> R | _Raised:
        """What came back, or why nothing did."""
        if not self.channel.poll():
            self.stop()
            self.name = ""
            return _Raised(f"stopped after {self._limit:.0f} s")
        self.name = ""
        try:
            return self.channel.recv()  # type: ignore[no-any-return]
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            self.stop()
            return _Raised(f"its process was killed by signal {-status}" if status < 0 else f"it exited with {status}")

    def stop(self) -> None:
        """Ends the process, if there is one: it leaves by itself when it is idle."""
        if self._process is not None:
            self.channel.close()
            self._process.join(0 if self.name else GOODBYE)
            self._process.kill()
            self._process.join()
            self._process = None


def _serve(function: Callable[[str], Any], channel: Any) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            name = channel.recv()
            try:
                answer = function(name)
            except Exception as error:
                answer = _Raised(first_line(error))
            channel.send(answer)


def each(
    function: Callable[[str], R], names: Iterable[str], jobs: int, limit: float, lost: Callable[[str, str], R]
) -> Iterator[R]:
    """`function(name)` for each name, as they get ready.

    Args:
        function: of a module, so that another process finds it.
        jobs: processes at a time.
        limit: seconds for one model.
        lost: makes the row of a model that raised, crashed or took too long, from its name and a sentence.
    """
    waiting = iter(names)
    workers: list[_Worker[R]] = []
    try:
        for name in islice(waiting, jobs):
            workers.append(_Worker(function, limit))
            workers[-1].ask(name)
        while busy := [worker for worker in workers if worker.name]:
            left = min(worker.deadline for worker in busy) - time.monotonic()
            ready = connection.wait([worker.channel for worker in busy], max(0.0, left))
            for worker in busy:
                if worker.channel not in ready and time.monotonic() < worker.deadline:
                    continue
                name, answer = worker.name, worker.answer()
                following = next(waiting, None)  # asked for late: it may depend on the time
                if following is not None:
                    worker.ask(following)
                yield lost(name, answer.reason) if isinstance(answer, _Raised) else answer
    finally:
        for worker in workers:
            worker.stop()


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options of every sweep."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--models", metavar="REGEX", default="", help="only models whose names match")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--again", choices=("failed",), help="try these again although they are in the file")
    parser.add_argument("--keep-older", action="store_true", help="keep rows of an older engine, and say so")
    return parser


def kept(rows: Mapping[str, R], args: argparse.Namespace) -> dict[str, R]:
    """The rows on file that need not be made again."""
    again = args.again == "failed"
    return {name: row for name, row in rows.items() if not (again and row.failed and re.search(args.models, name))}


def missing(names: Iterable[str], rows: Collection[str], args: argparse.Namespace) -> list[str]:
    """The models that were asked for and have no row."""
    return [name for name in names if re.search(args.models, name) and name not in rows]


def run(
    made: Iterator[R], total: int, rows: dict[str, R], save: Callable[[Mapping[str, R]], None], save_every: int
) -> int:
    """Takes the rows as they are made, tells of each, and saves now and then. Returns the exit status."""
    try:
        for index, row in enumerate(made, 1):
            rows[row.model] = row
            print(f"{index:4} of {total}  {row.model}: {row.line}", flush=True)
            if index % save_every == 0:
                save(rows)
    finally:
        save(rows)
    return 1 if any(row.failed for row in rows.values()) else 0


def load_rows(path: Path, version: str, make: Callable[..., R], older: bool = False) -> dict[str, R]:
    """The rows of an earlier run of the same engine; with `older` also those of another one, which they then name."""
    if not path.exists():
        return {}
    held = json.loads(path.read_text())
    rows = {row["model"]: make(**row) for row in held["rows"]}
    if held["reparam"] == version:
        return rows
    return {name: replace(row, engine=row.engine or held["reparam"]) for name, row in rows.items()} if older else {}


def engines(rows: Sequence[ModelRow]) -> list[str]:
    """A paragraph of Markdown that tells which rows are of an older engine; nothing if none is."""
    older = Counter(row.engine for row in rows if row.engine)
    said = [f"{count} rows are of {engine}" for engine, count in older.items()]
    return [f"Not measured again since: {'; '.join(said)} (marked †).", ""] if said else []


def ordered(rows: Mapping[str, R]) -> list[R]:
    """By family, then by name."""
    return sorted(rows.values(), key=lambda row: (row.family, row.model))


def save_rows(path: Path, facts: Mapping[str, Any], rows: Sequence[ModelRow]) -> None:
    """Writes the facts (`reparam` is the engine's revision), then the rows."""
    write(path, json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
