"""The table of false alarms: what each outcome is called, and what is counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tools import false_alarms
from tools.false_alarms import Row, in_turn, markdown, same


def verdict(passed: bool | None = True, undone: int = 0, noise: float | None = 1e-6, said: str = "") -> dict[str, Any]:
    return {
        "passed": passed, "undone": undone, "error": 2e-6, "noise": noise, "nearest": 0.4, "cost": 10.0, "said": said,
    }  # fmt: skip


OUTCOMES = [
    (1e-12, verdict(), "agrees"),
    (1e-3, verdict(), "missed fault"),
    (None, verdict(), "missed fault"),
    (1e-12, verdict(passed=False), "false alarm"),
    (1e-12, verdict(undone=1), "false alarm"),
    (1e-12, verdict(passed=False, noise=0.9), "drowned"),
    (1e-12, verdict(passed=False, noise=None), "drowned"),
    (1e-3, verdict(passed=False), "right alarm"),
    (1e-12, verdict(passed=None), "not fused"),
]


@pytest.mark.parametrize(("float64_error", "said", "outcome"), OUTCOMES)
def test_outcome(float64_error: float | None, said: dict[str, Any], outcome: str) -> None:
    row = Row("net", "family", float64_error=float64_error, verdicts={"float32": said})
    assert row.outcome("float32") == outcome
    assert row.failed == (outcome not in ("agrees", "drowned"))
    assert outcome in row.line


def test_an_alarm_is_not_false_where_roundings_in_float64_tell_that_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Errors of a chaotic original have bounds: 0.4 of its largest answer may be as much as there can be."""
    asked: list[nn.Module] = []

    def noise(model: nn.Module, x: torch.Tensor) -> float:
        asked.append(model)
        return 1e-10

    monkeypatch.setattr(false_alarms, "_float64_noise", noise)
    monkeypatch.setattr(false_alarms.timm_zoo, "create_small", lambda name: (nn.Identity(), torch.zeros(1)))
    alarm = {"float32": verdict(), "float16": verdict(passed=False, noise=0.4)}
    row = Row("net", "family", float64_error=1e-12, verdicts=alarm)
    assert row.outcome("float16") == "false alarm"
    row = false_alarms.completed(row)
    assert [row.outcome(dtype) for dtype in alarm] == ["agrees", "drowned"]
    assert false_alarms.completed(row) is row, "it is asked once"
    assert len(asked) == 1
    steady = replace(row, float64_noise=1e-14, verdicts={"float16": verdict(undone=1, noise=0.4)})
    assert steady.outcome("float16") == "false alarm"
    wide = replace(row, verdicts={"float32": verdict(undone=1, noise=0.4)})
    assert wide.outcome("float32") == "false alarm", "1e-10 comes to 0.05 in float32"
    quiet = Row("net", "family", float64_error=1e-12, verdicts={"float32": verdict()})
    assert false_alarms.completed(quiet) is quiet


@pytest.mark.slow
def test_a_real_model_agrees_in_every_dtype() -> None:
    row = false_alarms.measured("test_resnet", false_alarms.DTYPES)
    assert row.error == ""
    assert row.exact
    assert [row.outcome(dtype) for dtype in false_alarms.DTYPES] == ["agrees"] * 3
    assert all(0 < row.verdicts[dtype]["noise"] < 0.5 for dtype in false_alarms.DTYPES)


def test_an_original_that_amplifies_roundings_in_float64_too_is_exact_as_far_as_it_lets_tell() -> None:
    """A fold of it is not within 1e-9; one that is wrong by more than its own roundings is not exact."""

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.sin(self.layer(x))
            for _ in range(24):
                x = 2.0 * x * x - 1.0
            return x

    torch.manual_seed(0)
    model, x = Doubling().eval(), torch.rand(3, 4)
    noise = false_alarms._float64_noise(model, x)
    assert 1e-11 < noise < 1e-5
    assert Row("net", "family", float64_error=4 * noise + 1e-9, float64_noise=noise).exact
    assert not Row("net", "family", float64_error=40 * noise + 1e-9, float64_noise=noise).exact
    assert false_alarms._float64_noise(nn.Linear(4, 4), x) < 1e-14


def test_an_original_that_overflows_raises_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    model[0].weight.data *= 1e6
    x = torch.rand(2, 3, 8, 8)
    monkeypatch.setattr(false_alarms.timm_zoo, "create_small", lambda name: (model, x))
    row = false_alarms.measured("resnet18", ["float32", "float16"])
    assert [row.outcome(dtype) for dtype in ("float32", "float16")] == ["agrees", "drowned"]


def test_table_counts_and_lists_what_does_not_agree() -> None:
    rows = [
        Row("a", "f", parameters=10, float64_error=1e-12, verdicts={"float32": verdict()}),
        Row("b", "f", parameters=20, float64_error=1e-12, verdicts={"float32": verdict(False, said="too | far")}),
        Row("c", "f", error="it was killed"),
    ]
    facts: dict[str, Any] = {"torch": "2", "timm": "1", "reparam": "abc", "hardware": "a processor"}
    facts["sizes"] = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6}
    facts["networks"] = {"a": "one", "b": "two", "c": "one", "d": "two", "e": None, "f": "three"}
    text = markdown(rows, facts)
    assert "3 of timm's 6 models were tried" in text
    assert same(rows, facts) == {"d": "b"}
    assert "1 others are, attribute by attribute, the network of one of these" in text
    assert "| float32 | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 2 | 0.4 | 10 |" in text
    assert "- b, float32: false alarm (float64 error 1.0e-12, the original's noise 1e-06): too / far" in text
    assert "- c: it was killed" in text
    assert "multiplied" not in text
    rows[0] = replace(rows[0], half_products="float32")
    assert "float16 and bfloat16 of 1 of them were multiplied in float32" in markdown(rows, facts)


def test_the_smallest_of_each_family_goes_first() -> None:
    sizes = {"resnet18": 12, "resnet10t": 5, "vgg11": 130, "lcnet_035": 2, "lcnet_050": 3, "vgg19": 140}
    first = ["lcnet_035", "resnet10t", "vgg11"]
    assert in_turn(sizes, math.inf) == [*first, "lcnet_050", "resnet18", "vgg19"]
    assert in_turn(sizes, 100) == [*first[:2], "lcnet_050", "resnet18"]


def test_rows_that_are_kept_name_their_machine(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert false_alarms.machines(path, "a new one") == "a new one"
    path.write_text(json.dumps({"hardware": "an old one"}))
    assert false_alarms.machines(path, "a new one") == "an old one and a new one"
    path.write_text(json.dumps({"hardware": "an old one and a new one"}))
    assert false_alarms.machines(path, "a new one") == "an old one and a new one"
    assert false_alarms.machines(None, "a new one") == "a new one"
