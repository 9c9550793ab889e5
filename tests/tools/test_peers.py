"""The comparison with other tools: the verdict about ours can be red, and the page shows what was measured."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks import peers
from benchmarks.peers_table import TITLES, ModelRow, TrapRow, markdown, verdict
from tests.zoo.peers import PEERS

FACTS: dict[str, Any] = {"command": "python x.py", "hardware": "abacus", "torch": "2", "timm": "1", "size": 64}
FACTS["dropouts"] = {"as built": 5, "remove_dropout": 4, "reparam": 0}
BUILT = {"convolutions": 4, "batch_norms": 6}


def model(error: float = 1e-15) -> ModelRow:
    left = {"as built": BUILT, "reparam": {"convolutions": 2, "batch_norms": 0}}
    return ModelRow("net", left, {"reparam": error}, {"other": "TypeError: no"})


def trap(error: float = 1e-15) -> TrapRow:
    return TrapRow("biased_conv_norm", 1.0, {"other": 0.25, "reparam": error}, {"third": "ValueError: no"})


def test_verdict_is_red_when_ours_is_wrong_or_raised() -> None:
    assert verdict([model()], [trap()]) == []
    assert verdict([model(1e-9)], [trap()]) == ["net: reparam is off by 1.0e-09"]
    assert verdict([model()], [trap(math.nan)]) == ["biased_conv_norm: reparam is off by nan"]
    raised = TrapRow("t", 1.0, {}, {"reparam": "CaptureError: no"})
    assert verdict([], [raised]) == ["t: reparam raised CaptureError: no"]


def test_page() -> None:
    page = markdown([model()], [trap()], FACTS)
    assert "| model | as built | other | reparam |\n|---|--:|--:|--:|\n| net | 4 / 6 | - | 2 / 0 (1e-15) |" in page
    assert "| model | other | third | reparam |" in page
    assert "| conv with bias + BN | **0.25** | - | 1e-15 |" in page
    assert "Of 5 dropouts of several kinds in one traced graph, torch.fx `remove_dropout` leaves 4, reparam 0." in page
    assert "Measured by `python x.py` on abacus with torch 2." in page


def test_every_model_has_a_title() -> None:
    assert {trap.name for trap in PEERS} == set(TITLES)


@pytest.mark.parametrize(
    ("name", "wrong"), [("conv_called_twice_each_with_its_norm", True), ("biased_conv_norm", False)]
)
def test_a_trap_is_measured(name: str, wrong: bool) -> None:
    found = next(trap for trap in PEERS if trap.name == name)
    row = peers.on_trap(found, {"torch.fx fuse": peers.torch_fx, "reparam": peers.ours})
    assert not verdict([], [row])
    assert (row.errors["torch.fx fuse"] > 0.1) == wrong
    assert 0.1 < row.largest < 100
    assert not row.raised


def test_a_tool_that_raises_is_recorded() -> None:
    def broken(module: torch.nn.Module, x: torch.Tensor) -> torch.nn.Module:
        raise TypeError("first\nsecond")

    row = peers.on_trap(PEERS[0], {"broken": broken})
    assert row.raised == {"broken": "TypeError: first"}
    assert row.cell("broken") == "-"


def test_dropouts_are_counted_in_every_spelling() -> None:
    left = peers.dropouts_left()
    assert left["as built"] == 5
    assert left["as built"] > left["remove_dropout"] > 0
    assert left["reparam"] == 0
