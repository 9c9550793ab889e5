"""The comparison with the authors' conversions: what counts as an exception, and that the page can turn red."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tools import compare_authors
from tools.authors_table import Row, complaints, exceptions, markdown, summary

FACTS = {"command": "python x.py", "torch": "2", "timm": "1"}


def counts(convolutions: int, batch_norms: int) -> dict[str, int]:
    return {"convolutions": convolutions, "batch_norms": batch_norms, "linears": 1, "scales": 0}


def row(**changes: Any) -> Row:
    fields = {
        "family": "repvit",
        "model": "net",
        "parameters": 10,
        "built": counts(9, 9),
        "authors": counts(4, 2),
        "ours": counts(4, 0),
        "noise": 1e-16,
        "authors_error": 1e-15,
        "ours_error": 1e-15,
    }
    return Row(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"ours": counts(3, 2)}, ""),
        ({"ours": counts(5, 0)}, "5 convolutions, theirs 4"),
        ({"ours": counts(4, 3)}, "3 BatchNorms, theirs 2"),
        ({"ours": counts(40, 30), "authors": {}, "authors_error": None, "authors_failed": "E: x"}, ""),
        ({"ours_error": 1e-9}, "float64 error 1.0e-09"),
        ({"ours_error": 1e-9, "noise": 1e-10}, ""),
        ({"ours_error": math.inf}, "float64 error inf"),
        ({"ours_error": math.nan}, "float64 error nan"),
        ({"ours": {}, "ours_error": None, "ours_failed": "CaptureError: no"}, "ours failed: CaptureError: no"),
        ({"built": {}, "authors": {}, "ours": {}, "ours_error": None, "failed": "E: no"}, "not measured: E: no"),
    ],
)
def test_complaints(changes: dict[str, Any], words: str) -> None:
    found = "; ".join(complaints(row(**changes)))
    assert found.startswith(words) if words else not found


def test_summary_counts_and_names_the_exceptions() -> None:
    rows = [
        row(),
        row(model="worse", ours=counts(5, 2)),
        row(model="again", ours=counts(5, 1)),
        row(model="wrong", authors_error=0.5),
        row(model="rounded", authors_error=1e-3, authors_float32=True),
        row(model="raises", authors={}, authors_error=None, authors_failed="TypeError: no"),
    ]
    text = " ".join(summary(rows))
    assert "6 models, 5 converted by both" in text
    assert "at most as many convolutions as theirs in 3, at most as many BatchNorms in 5" in text
    assert "Theirs leaves BatchNorms in 5 models, ours fewer in 4" in text
    assert "not exact in wrong (float64 error 5.0e-01)." in text
    assert "float32 in 1 models (repvit)" in text
    assert "raises in raises (TypeError: no)" in text
    assert "Exceptions (2): - worse, again: 5 convolutions, theirs 4" in text
    assert [bad.model for bad in exceptions(rows)] == ["worse", "again"]
    assert "No exceptions." in summary([row()])


def test_page_shows_a_dash_for_what_was_not_measured() -> None:
    page = markdown([row(), row(model="raises", authors={}, authors_error=None, authors_failed="E: x")], FACTS)
    assert "| repvit | net | 9 / 4 / 4 | 9 / 2 / 0 | 1 / 1 / 1 | 0 / 0 / 0 | 1.0e-16 | 1.0e-15 | 1.0e-15 |" in page
    assert "| repvit | raises | 9 / - / 4 | 9 / - / 0 | 1 / - / 1 | 0 / - / 0 | 1.0e-16 | - | 1.0e-15 |" in page


def test_results_survive_the_file_and_no_draft_is_left(tmp_path: Path) -> None:
    rows = {"b": row(model="b", parameters=20), "a": row(model="a", ours_failed="E: x"), "net": row()}
    assert compare_authors.load(tmp_path) == {}
    compare_authors.save(tmp_path, rows, FACTS)
    assert compare_authors.load(tmp_path) == rows
    assert sorted(path.name for path in tmp_path.iterdir()) == ["authors.json", "authors.md"]
    assert [kept["model"] for kept in json.loads((tmp_path / "authors.json").read_text())["rows"]] == ["a", "net", "b"]


@pytest.mark.slow
def test_one_model_is_measured_on_both_sides() -> None:
    measured = compare_authors.measure("repghost", "repghostnet_050", 1)
    assert not list(complaints(measured))
    assert measured.built["batch_norms"] > measured.authors["batch_norms"] > measured.ours["batch_norms"] == 0
    assert 0 < measured.ours_error < 1e-12
    assert 0 < measured.noise < 1e-12


def test_a_model_that_cannot_be_built_is_reported() -> None:
    measured = compare_authors.measure("repghost", "no_such_model", 1)
    assert measured.failed
    assert list(exceptions([measured])) == [measured]
