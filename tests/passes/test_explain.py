"""What `explain` says is what was decided: candidates, prices, what ruled them out, and why one won."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import reparam
from reparam.algebra import Inexact
from reparam.errors import InputError, ReparamError
from reparam.passes import collapse, explain
from reparam.passes.base import Choice
from reparam.passes.cost import OBJECTIVES
from reparam.passes.inference_form import InferenceForm
from reparam.passes.search import Search, Solution
from tests.support import sampled
from tests.zoo import BLOCKS, BlockCase
from tools.cost_probes import Sum, conv


def pointwise(*widths: int) -> nn.Module:
    return nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)))


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    with torch.no_grad():
        made.running_mean.normal_()  # type: ignore[union-attr]
        made.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        made.weight.uniform_(-1, 1)
        made.bias.normal_()
    return made


class Shared(nn.Module):
    """One tensor, read by two layers whose outputs nothing merges."""

    def __init__(self, padding: int = 0, wide: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(16, wide, 1)
        self.left, self.right = (nn.Conv2d(wide, 16, 3, padding=padding) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.first(x)
        return self.left(y).relu(), self.right(y).relu()


class Added(nn.Module):
    """A residual block without activations: its branches merge, but the input stays a summand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(8, 3), norm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.relu()
        return x.sigmoid() + self.norm(self.conv(x))


@dataclass(frozen=True)
class Case:
    """A model, and its choices: place, candidates (a star in front of the winner), and pieces of text about them."""

    name: str
    build: Callable[[], nn.Module]
    channels: int
    choices: tuple[tuple[str, tuple[str, ...]], ...]
    said: tuple[str, ...]
    objective: str = "latency"


ONE = "it costs no more than its largest operation alone"

CASES = [
    Case(
        "low-rank pair stays", lambda: pointwise(64, 16, 64), 64,
        (("1", ("*as it is: 2 Conv2d", "one layer: Conv2d(64, 64, 1x1)")),),
        ("computes 2.0 times as much as the leanest", "the only one that is not ruled out"),
    ),
    Case(
        "a pair that is nearly full goes", lambda: pointwise(64, 30, 64), 64,
        (("1", ("as it is: 2 Conv2d", "*one layer: Conv2d(64, 64, 1x1)")),),
        ("least estimated time",),
    ),
    Case(
        "unless multiply-adds count", lambda: pointwise(64, 30, 64), 64,
        (("1", ("*as it is: 2 Conv2d", "one layer: Conv2d(64, 64, 1x1)")),),
        ("fewest multiply-adds",), "macs",
    ),
    Case(
        "or weights", lambda: pointwise(64, 30, 64), 64,
        (("1", ("*as it is: 2 Conv2d", "one layer: Conv2d(64, 64, 1x1)")),),
        ("fewest weights",), "parameters",
    ),
    Case(
        "slower than the original", lambda: nn.Sequential(conv(64, 7, 64), conv(64, 1)), 64,
        (("1", ("*as it is: 2 Conv2d", "one layer: Conv2d(64, 64, 7x7)")),),
        ("slower: it takes an estimated ", "the only one that is not ruled out"),
    ),
    Case(
        "parallel branches", lambda: Sum(conv(16, 3), conv(16, 1), skip=True), 16,
        (("add_1", ("as it is: 2 Conv2d + 2 add", "*one layer: Conv2d(16, 16, 3x3)")),),
        ("computes 11% more than the leanest", ONE),
    ),
    Case(
        "branches that stay two", lambda: Sum(conv(16, (1, 3)), conv(16, (3, 1))), 16,
        (("add", ("*as it is: 2 Conv2d + add", "all merged: Conv2d(16, 16, 1x3) + Conv2d(16, 16, 3x1)")),),
        ("as cheap as 'all merged', and nearer to the original",),
    ),
    Case(
        "a sum with something else", Added, 8,
        (
            ("add", (
                "as it is: Conv2d + BatchNorm2d + add",
                "*sum of separately merged branches: Conv2d(8, 8, 3x3), add",
                "all merged: x + Conv2d(8, 8, 3x3)",
            )),
            ("norm", ("as it is: Conv2d + BatchNorm2d", "*one layer: Conv2d(8, 8, 3x3)")),
        ),
        ("as cheap as 'all merged'", ONE),
    ),
    Case(
        "a border", lambda: nn.Sequential(nn.Conv2d(8, 8, 3), norm(8), nn.Conv2d(8, 8, 3, padding=1)), 8,
        (
            ("2", (
                "as it is: 2 Conv2d + BatchNorm2d",
                "*cut behind 1: Conv2d(8, 8, 3x3), Conv2d(8, 8, 3x3)",
                "one layer",
            )),
            ("1", ("as it is: Conv2d + BatchNorm2d", "*one layer: Conv2d(8, 8, 3x3)")),
        ),
        ("1 stays in front of 2: its shift cannot cross the zero padding", "least estimated time", ONE),
    ),
    Case(
        "a shared convolution goes", Shared, 16,
        (
            ("first", ("computed once, for left and right", "*merged into each of its readers")),
            ("left", ("as it is: 2 Conv2d", "*one layer: Conv2d(16, 16, 3x3)")),
            ("right", ("as it is: 2 Conv2d", "*one layer: Conv2d(16, 16, 3x3)")),
        ),
        ("least estimated time", ONE),
    ),
    Case(
        "a shared convolution at a border", lambda: Shared(padding=1), 16,
        (("first", ("*computed once, for left and right", "merged into each of its readers")),),
        ("first stays in front of left: its shift cannot cross", "the only one that is not ruled out"),
    ),
    Case(
        "a shared narrow tensor", lambda: Shared(wide=4), 16,
        (("first", ("*computed once, for left and right", "merged into each of its readers")),),
        ("left is cheaper with it",),
    ),
]  # fmt: skip


def explained(model: nn.Module, channels: int, objective: str = "latency") -> tuple[Choice, ...]:
    x = torch.randn(1, channels, 16, 16)
    choices = reparam.fuse(model.eval(), x, explain=True, objective=objective, verify=False).report.choices
    assert choices is not None
    return choices


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_candidates_and_reasons(case: Case) -> None:
    torch.manual_seed(0)
    choices = explained(case.build(), case.channels, case.objective)
    starred = tuple(
        (
            choice.place.module.rpartition(".")[2],
            tuple("*" * (i == choice.chosen) + one.description for i, one in enumerate(choice.candidates)),
        )
        for choice in choices
    )
    assert starred == case.choices
    text = [part for choice in choices for part in (choice.why, *(one.excluded for one in choice.candidates))]
    for piece in case.said:
        assert any(piece in part for part in text), (piece, text)
    assert {(choice.objective, choice.machine) for choice in choices} == {(case.objective, "eager-cpu")}


def test_the_price_of_a_shared_tensor_is_that_of_all_its_readers() -> None:
    shared, left, right = explained(Shared(), 16)
    once, merged = (candidate.cost for candidate in shared.candidates)
    parts = [choice.candidates[choice.chosen].cost for choice in (left, right)]
    assert once is not None
    assert merged is not None
    assert merged.macs == sum(part.macs for part in parts if part is not None) == 2 * 14 * 14 * 16 * 16 * 9
    assert once.macs == merged.macs + 16 * 16 * 16 * 16
    assert merged.seconds < once.seconds


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", sampled(BLOCKS[::5], 4), ids=lambda case: case.name)
def test_it_changes_nothing_and_leaves_nothing_out(case: BlockCase, objective: str) -> None:
    """The same rewrites and refusals; each rewrite of the collapse is the winner of a choice, at the same prices."""
    model, inputs = case.make(), case.inputs()
    try:
        plain = reparam.fuse(model, inputs, verify=False, objective=objective)
    except ReparamError:
        return
    told = reparam.fuse(model, inputs, verify=False, objective=objective, explain=True)
    assert plain.report.choices is None
    assert (told.report.rewrites, told.report.refusals) == (plain.report.rewrites, plain.report.refusals)
    assert str(told.module.graph) == str(plain.module.graph)
    choices = told.report.choices
    assert choices is not None
    for choice in choices:
        assert not choice.candidates[choice.chosen].excluded
        assert len(choice.candidates) > 1
    winners = {(choice.where, choice.candidates[choice.chosen].cost): choice for choice in choices}
    for rewrite in told.report.rewrites:
        if rewrite.pass_name == "collapse":
            choice = winners[rewrite.where, rewrite.after]
            assert rewrite.before in [candidate.cost for candidate in choice.candidates]


def test_the_prices_of_the_machine_asked_for() -> None:
    x = torch.randn(1, 64, 8, 8)
    found = {}
    for machine in ("eager-cpu", "onnxruntime-cpu"):
        (choice,) = reparam.fuse(pointwise(64, 30, 64), x, explain=True, machine=machine).report.choices or ()
        found[choice.machine] = choice.candidates[0].cost
    assert list(found) == ["eager-cpu", "onnxruntime-cpu"]
    assert found["eager-cpu"] != found["onnxruntime-cpu"]


def test_regions_of_one_operation_have_no_choice() -> None:
    assert explained(nn.Sequential(conv(8, 3), nn.ReLU(), conv(8, 3)), 8) == ()


def test_what_could_not_be_written_did_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collapse, "planned", lambda *_: Inexact("its merged weights overflow"))
    (choice,) = explained(nn.Sequential(conv(8, 3), norm(8)), 8)
    assert (choice.chosen, choice.why) == (0, "it stays, since the best could not be written")
    assert choice.candidates[1].excluded == "the best by its price, but not written: its merged weights overflow"


def test_what_was_decided_wins_over_what_is_best_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: solved once more, the region comes out otherwise than it was decided."""
    solve = Search.solved

    def otherwise(self: Search, end: object) -> Solution:
        found = solve(self, end)  # type: ignore[arg-type]
        other = replace(found, real=frozenset())
        assert self._recorder is not None
        self._recorder.decisions[id(other)] = self._recorder.decisions[id(found)]
        return other

    monkeypatch.setattr(Search, "solved", otherwise)
    (choice,) = explained(nn.Sequential(conv(8, 3), norm(8)), 8)
    assert choice.candidates[choice.chosen].description == "as its neighbours need it: Conv2d(8, 8, 3x3)"
    assert choice.candidates[choice.chosen].cost == choice.candidates[1].cost


def test_a_region_too_large_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reparam.passes.search._LARGEST_CONE", 2)
    (choice,) = explained(nn.Sequential(conv(8, 3), norm(8), norm(8)), 8)
    assert choice.why == "a region of 3 operations is too large to be searched"


def test_a_second_collapse_adds_only_what_it_changed() -> None:
    """A later one decides about everything again; what it confirms was said before."""
    (merged,) = explained(nn.Sequential(conv(8, 3), norm(8)), 8)
    kept = replace(merged, chosen=0)
    elsewhere = replace(kept, place=replace(merged.place, module="other"))
    choices = explain.Choices()
    choices.add([merged])
    choices.add([kept, elsewhere, merged])
    assert choices.made[:1] == [merged]
    assert [(choice.place, choice.chosen) for choice in choices.made[1:]] == [(elsewhere.place, 0), (merged.place, 1)]
    assert all(choice.why.endswith("(collapse 2, after scales were moved)") for choice in choices.made[1:])


def test_passes_of_ones_own_are_explained_by_themselves() -> None:
    model, x = nn.Sequential(conv(8, 3), norm(8)).eval(), torch.randn(1, 8, 9, 9)
    with pytest.raises(InputError, match="explain goes with the usual passes"):
        reparam.fuse(model, x, explain=True, passes=[InferenceForm()])
    heard: list[list[Choice]] = []
    report = reparam.fuse(model, x, passes=[collapse.Collapse(explain=heard.append)]).report
    assert report.choices is None
    assert [len(choices) for choices in heard] == [1]


@pytest.mark.parametrize(
    ("value", "base", "words"),
    [
        (112, 100, "12% more than"),
        (100.1, 100, "under 1% more than"),
        (250, 100, "2.5 times as much as"),
        (1.4e-5, 1e-5, "40% more than"),
        (5, 0, "more than"),
    ],
)
def test_ratios_are_readable(value: float, base: float, words: str) -> None:
    assert explain._beyond(value, base) == words
