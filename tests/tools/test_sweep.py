"""The sweeps' common part: a model that raises, crashes or hangs costs its own row; rows outlive a run."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools import sweep


@dataclass(frozen=True)
class Row(sweep.ModelRow):
    process: int = 0
    error: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.error)

    @property
    def line(self) -> str:
        return self.error or "fine"


def behave(name: str) -> Row:
    if name == "raises":
        raise ValueError("no\nsuch thing")
    if name == "exits":
        os._exit(3)
    if name == "is killed":
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(600)
    return Row(name, "letters", os.getpid())


def lost(name: str, why: str) -> Row:
    return Row(name, "letters", error=why)


def options(models: str = "", again: str | None = None) -> argparse.Namespace:
    return argparse.Namespace(models=models, again=again)


@pytest.mark.slow
def test_a_lost_process_costs_one_row_only() -> None:
    names = ["a", "raises", "b", "exits", "c", "is killed", "d", "hangs", "e"]
    start = time.monotonic()
    rows = list(sweep.each(behave, names, 1, 6.0, lost))
    assert time.monotonic() - start < 30
    assert [row.model for row in rows] == names
    assert {row.model: row.error for row in rows if row.failed} == {
        "raises": "ValueError: no",
        "exits": "it exited with 3",
        "is killed": "its process was killed by signal 9",
        "hangs": "stopped after 6 s",
    }
    process = {row.model: row.process for row in rows}
    assert process["a"] == process["b"]  # an exception does not end the process
    assert len({process[name] for name in "acde"}) == 4


def test_two_processes_share_the_work() -> None:
    rows = list(sweep.each(behave, list("abcdef"), 2, 60.0, lost))
    assert sorted(row.model for row in rows) == list("abcdef")
    assert len({row.process for row in rows} - {os.getpid()}) == 2


def test_what_is_asked_for() -> None:
    rows = {"a1": Row("a1", "x"), "a2": Row("a2", "x", error="no"), "b1": Row("b1", "x", error="no")}
    assert set(sweep.kept(rows, options())) == {"a1", "a2", "b1"}
    assert set(sweep.kept(rows, options(again="failed"))) == {"a1"}
    assert set(sweep.kept(rows, options("^b", "failed"))) == {"a1", "a2"}
    assert sweep.missing(["a1", "a3", "b2"], rows, options("^a")) == ["a3"]


def test_a_stopped_run_keeps_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    saved: list[list[str]] = []

    def made() -> Iterator[Row]:
        yield Row("b", "x")
        yield Row("c", "x", error="no")
        yield Row("d", "x")
        raise KeyboardInterrupt

    rows = {"a": Row("a", "x")}
    with pytest.raises(KeyboardInterrupt):
        sweep.run(made(), 9, rows, lambda held: saved.append(sorted(held)), 2)
    assert saved == [["a", "b", "c"], ["a", "b", "c", "d"]]
    assert capsys.readouterr().out.splitlines() == ["   1 of 9  b: fine", "   2 of 9  c: no", "   3 of 9  d: fine"]


@pytest.mark.parametrize(("error", "status"), [("", 0), ("no", 1)])
def test_the_exit_status_counts_rows_on_file_too(error: str, status: int) -> None:
    assert sweep.run(iter([Row("b", "x")]), 1, {"a": Row("a", "x", error=error)}, lambda held: None, 1) == status


def test_rows_on_file_are_those_of_the_same_engine(tmp_path: Path) -> None:
    path, rows = tmp_path / "rows.json", [Row("a", "x", 7), Row("b", "x", error="no")]
    assert sweep.load_rows(path, "abc", Row) == {}
    sweep.save_rows(path, {"reparam": "abc"}, rows)
    assert sweep.load_rows(path, "abc", Row) == {row.model: row for row in rows}
    assert sweep.load_rows(path, "def", Row) == {}


def test_rows_of_an_older_engine_are_kept_on_request_and_marked(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    sweep.save_rows(path, {"reparam": "abc"}, [Row("a", "x", 7), Row("b", "x", engine="older")])
    rows = sweep.load_rows(path, "def", Row, older=True)
    assert {name: row.engine for name, row in rows.items()} == {"a": "abc", "b": "older"}
    assert [row.title for row in rows.values()] == ["a†", "b†"]
    assert sweep.engines(list(rows.values()))[0] == (
        "Not measured again since: 1 rows are of abc; 1 rows are of older (marked †)."
    )
    assert sweep.load_rows(path, "abc", Row, older=True)["a"] == Row("a", "x", 7)
    assert sweep.engines([Row("a", "x", 7)]) == []
