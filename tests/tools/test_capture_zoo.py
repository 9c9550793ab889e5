"""The table of how timm's models are captured: what it counts, and that a failure shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import capture_zoo
from tools.capture_zoo import Row, load, markdown, save

ROWS = [
    Row("a1", "alpha", "symbolic", "meta", 10, 0.1, "a.py:3, a.py:9"),
    Row("a2", "alpha", "export", "cpu", 30, 0.2, "a.py:3"),
    Row("a3", "alpha", "", "cpu", error="CaptureError: no"),
    Row("b1", "beta", "symbolic", "meta", 7),
]


def test_each_family_has_a_line_and_each_failure_too() -> None:
    text = markdown(ROWS, "abc123", "1.0", 9)
    assert "3 of 4 models that were tried are captured; timm has 9." in text
    assert "| alpha | 3 | 1 | 1 | 1 | 10 | a.py:3, a.py:9 |" in text
    assert "| beta | 1 | 1 | 0 | 0 | 7 |  |" in text
    assert "- a3: CaptureError: no" in text
    assert "Not captured" not in markdown(ROWS[:2], "abc123", "1.0", 9)


def test_a_run_goes_on_only_with_the_same_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_zoo, "OUT", tmp_path)
    assert load("abc123") == {}
    save({row.model: row for row in ROWS}, "abc123", "1.0")
    assert load("abc123") == {row.model: row for row in ROWS}
    assert load("def456") == {}


def test_a_model_is_captured_on_the_meta_device() -> None:
    row = capture_zoo.captured("resnet18")
    assert (row.way, row.device, row.family, row.error) == ("symbolic", "meta", "resnet", "")
    assert row.nodes > 60
