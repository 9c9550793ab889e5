"""How often a model is run while it is captured, and that what is kept of a run is what a new one would have said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from reparam import pipeline
from reparam.capture.agreement import Answers
from reparam.capture.captured import Captured
from reparam.capture.trace import capture
from reparam.errors import UnfitModelError
from reparam.inputs import Inputs
from tools.faults import perturb_one_weight, rewrites_sabotaged

X = torch.randn(2, 4)


class Counting(nn.Module):
    """Tells each run on real tensors."""

    def __init__(self, told: Callable[[], None]) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.told = [told]
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            self.told[0]()
        return self.norm(self.layer(x))


class Calls(nn.Module):
    """Answers otherwise in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


class Runs:
    """Counts; a copy of it is itself."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> None:
        self.count += 1

    def __deepcopy__(self, memo: object) -> Runs:
        return self


def test_a_model_is_run_twice_while_it_is_captured() -> None:
    runs = Runs()
    capture(Counting(runs), X)
    assert runs.count == 2


def test_a_second_capture_needs_no_run_of_the_model() -> None:
    runs = Runs()
    model = Counting(runs)
    own = Answers(model, Inputs.of(X))
    captured = [capture(model, X, own=own) for _ in range(3)]
    assert runs.count == 2
    assert len({str(one.graph) for one in captured}) == 1


def test_every_seed_is_asked_on_a_copy_that_was_called_once() -> None:
    class Third(nn.Module):
        """Answers otherwise from its third call on."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * (1 + self.calls // 3)

    own = Answers(Third(), Inputs.of(X))
    assert torch.equal(own.first, X)
    assert [own.differ_again(seed) for seed in (0, 1, 0, 1)] == [False] * 4


def test_state_is_found_and_the_model_left_as_it_was() -> None:
    model = Calls()
    own = Answers(model, Inputs.of(X))
    assert own.differ_again(0)
    assert own.differ_again(0)
    assert model.calls == 0
    assert torch.equal(own.first, X)


def test_a_model_that_cannot_run_is_for_others_to_explain() -> None:
    own = Answers(nn.Linear(7, 7), Inputs.of(X))
    for _ in range(2):
        assert not own.differ_again(0)
        with pytest.raises(RuntimeError):
            _ = own.first


def test_a_write_to_a_parameter_is_told_each_time() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.data.add_(1)
            return x * self.weight

    model = Writing()
    own = Answers(model, Inputs.of(X))
    for _ in range(2):
        with pytest.raises(UnfitModelError, match="writes to a parameter"):
            own.differ_again(0)
    assert torch.equal(model.weight, torch.ones(4))


def test_what_undoing_tries_is_captured_without_running_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Answers] = []
    asked: list[Answers | None] = []

    class Told(Answers):
        def __init__(self, model: nn.Module, inputs: Inputs) -> None:
            super().__init__(model, inputs)
            made.append(self)

    def captured(*args: Any, **options: Any) -> Captured:
        asked.append(args[4])
        return capture(*args, **options)

    monkeypatch.setattr(pipeline, "Answers", Told)
    monkeypatch.setattr(pipeline, "capture_graph", captured)
    convs = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    model = nn.Sequential(convs[0], nn.BatchNorm2d(4), nn.ReLU(), convs[1], nn.BatchNorm2d(4)).eval()
    with rewrites_sabotaged({1: perturb_one_weight}):
        report = pipeline.fuse(model, torch.randn(1, 3, 8, 8)).report
    assert len(report.undone) == 1
    assert len(made) == 1
    assert len(asked) > 1
    assert set(asked) == set(made)
