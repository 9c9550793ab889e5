"""Files in one piece, exceptions in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.record import first_line, write


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.md"
    write(path, "long enough\n")
    write(path, "b\n")
    assert path.read_text() == "b\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.md"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "ValueError: one"),
        (ValueError("raised:\ntwo\nthree"), "ValueError: raised: two"),
        (KeyError(), "KeyError: "),
        (ValueError("x" * 1000), "ValueError: " + "x" * 288),
    ],
)
def test_first_line(error: Exception, line: str) -> None:
    assert first_line(error) == line
