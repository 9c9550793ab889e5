"""Models whose forward cannot be captured are fused in parts; they keep their classes, methods and attributes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reparam
from tests.support import assert_unchanged, executed_counts, relative_error, sampled, snapshot
from tests.zoo.case import conv_bn, randomise

X = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Three parallel branches."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.channels = channels
        self.dense, self.point = conv_bn(2, channels, channels, 3), conv_bn(2, channels, channels, 1)
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.skip(x)) * gain

    def describe(self) -> str:
        return f"{self.channels} channels"


class Model(nn.Module):
    """A forward of the table over four blocks and a head."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.stem, self.blocks = Block(), nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 5))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)  # type: ignore[no-any-return]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.stem(x)  # type: ignore[no-any-return]


def data_dependent(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    for block in m.blocks:
        if x.mean() > 0.05:
            x = block(x)
    return m.head(x)


def loop_over_tensors(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    for index in (x.flatten(1).max(1).values * 100).long().tolist():
        x = m.blocks[index % 3](x)
    return m.head(x)


def through_numpy(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x)
    x = torch.from_numpy(np.clip(x.detach().numpy(), 0, 1.5))
    return m.head(m.blocks[0](x))


def until_converged(m: Any, x: torch.Tensor) -> torch.Tensor:
    steps = 0
    while float(x.abs().max()) > 0.5 and steps < 20:
        x, steps = m.stem(x) * 0.3, steps + 1
    return m.head(x)


def asks_for_classes(m: Any, x: torch.Tensor) -> torch.Tensor:
    if x.sum() != 0:
        x = m.stem(x, gain=0.5) if isinstance(m.stem, Block) and m.stem.channels == 4 else x * 0
    return m.head(x)


def reads_weights(m: Any, x: torch.Tensor) -> torch.Tensor:
    if x.sum() != 0:
        x = m.stem(x) * m.stem.dense[0].weight.mean()
    return m.head(m.blocks[0](x))


def called_in_two_ways(m: Any, x: torch.Tensor) -> torch.Tensor:
    if x.sum() != 0:
        x = m.stem(x, 1.0) + m.stem(x, 2.0)
    return m.head(x)


# What runs in the fused model, and what stays outside besides the model itself.
CASES: list[tuple[Callable[..., Any], dict[str, int], set[str]]] = [
    (data_dependent, {"bn": 0, "conv": 4}, set()),
    (loop_over_tensors, {"bn": 0, "conv": 3}, {"blocks.1"}),
    (through_numpy, {"bn": 0, "conv": 2}, {"blocks.1", "blocks.2"}),
    (until_converged, {"bn": 0}, {"blocks.0", "blocks.1", "blocks.2"}),
    (asks_for_classes, {"bn": 0, "conv": 1}, {"blocks.0", "blocks.1", "blocks.2"}),
    (reads_weights, {"bn": 2, "conv": 3}, {"stem", "stem.dense", "blocks.1", "blocks.2"}),
    (called_in_two_ways, {"bn": 2, "conv": 4}, {"stem", "blocks.0", "blocks.1", "blocks.2"}),
]


def build(function: Callable[..., Any]) -> Model:
    torch.manual_seed(0)
    model = randomise(Model(function))
    return model.double().eval()  # type: ignore[return-value]


@pytest.mark.parametrize(("function", "counts", "outside"), sampled(CASES, 2), ids=[case[0].__name__ for case in CASES])
def test_parts_are_fused(function: Callable[..., Any], counts: dict[str, int], outside: set[str]) -> None:
    model = build(function)
    before = snapshot(model)
    result = reparam.fuse(model, X)
    assert result.report.capture == "partial"
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    for x in (X, X[:1], torch.randn(3, 4, 11, 9, dtype=torch.float64)):
        with torch.no_grad():
            assert relative_error(model(x), result.module(x)) < 1e-12
    executed = executed_counts(result.module, X)
    assert {name: executed[name] for name in counts} == counts
    notes = [note for note in result.report.notes if "stays as it is" in note]
    assert "cannot be traced" in notes[0]
    assert "test_partial.py:" in notes[0]
    assert {note.partition(" ")[0] for note in notes[1:]} == outside
    assert type(result.module) is Model
    assert_unchanged(before, model)
    theirs = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert theirs.isdisjoint(p.untyped_storage().data_ptr() for p in result.module.parameters())


def test_places_are_those_of_the_whole_model() -> None:
    report = reparam.fuse(build(data_dependent), X).report
    assert any(rewrite.place.module.startswith("blocks.1.") for rewrite in report.rewrites)
    assert report.before.batch_norms == 13
    assert report.after.batch_norms == 0


def test_modules_keeps_class_methods_and_attributes_on_purpose() -> None:
    model = build(lambda m, x: m.head(m.forward_features(x)))
    assert reparam.fuse(model, X).report.capture == "symbolic"
    result = reparam.fuse(model, X, capture="modules")
    fused: Any = result.module
    assert result.report.capture == "modules"
    assert type(fused) is Model
    assert relative_error(model.forward_features(X), fused.forward_features(X)) < 1e-12
    assert isinstance(fused.stem, Block)
    assert fused.stem.channels == 4
    assert executed_counts(fused, X)["bn"] == 0
    assert executed_counts(fused, X)["conv"] == 4
    twin = copy.deepcopy(fused)
    assert isinstance(twin.stem, Block)
    assert twin.blocks[1].channels == 4
    assert torch.equal(twin(X), fused(X))


def test_what_is_left_of_a_fused_part_can_be_asked_for_and_nothing_else() -> None:
    fused: Any = reparam.fuse(build(data_dependent), X).module
    part = fused.stem
    assert isinstance(part, Block)
    assert part.channels == 4
    assert not part.training
    assert hasattr(part, "forward")
    for gone in ("dense", "point", "skip", "describe"):
        with pytest.raises(reparam.OtherInputError, match=f"Block.{gone} is asked for and not there"):
            getattr(part, gone)
        with pytest.raises(reparam.OtherInputError):
            hasattr(part, gone)
    with pytest.raises(AttributeError):
        part.never_was_there  # noqa: B018
    assert not hasattr(part, "never_was_there")
    assert {name for name, _ in part.named_parameters()}
    twin = pickle.loads(pickle.dumps(part))
    assert isinstance(twin, Block)
    assert twin.channels == 4
    assert torch.equal(twin(X), part(X))
    with pytest.raises(reparam.OtherInputError):
        twin.dense  # noqa: B018


def asks_later(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.stem(x)
    if x.mean() > 1:  # not in the example
        y = y * m.stem.dense[0].weight.mean()
    return m.head(y)


def test_a_part_that_is_looked_into_on_another_input_stops() -> None:
    model = build(asks_later)
    fused = reparam.fuse(model, X, verify=False).module
    assert relative_error(model(X * 0.5), fused(X * 0.5)) < 1e-12
    with pytest.raises(reparam.OtherInputError, match="this part of the model was fused"):
        fused(X + 5)


def test_in_float32_the_algebra_is_checked_with_unrounded_weights() -> None:
    model = build(data_dependent).float()
    comparison = reparam.fuse(model, X.float()).report.comparison
    assert comparison is not None
    assert comparison.passed
    assert comparison.algebra_error < 1e-10


def test_nothing_to_capture_is_said() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else x  # type: ignore[no-any-return]

    with pytest.raises(reparam.CaptureError, match=r"cannot be traced.*test_partial.py:"):
        reparam.fuse(Only(), X.float())
    with pytest.raises(reparam.CaptureError, match="no child of Only can be captured"):
        reparam.fuse(Only(), X.float(), capture="modules")
    for way in ("symbolic", "export"):
        with pytest.raises(reparam.CaptureError):
            reparam.fuse(build(data_dependent), X, capture=way)
    with pytest.raises(reparam.InputError, match="capture='graph' is not known"):
        reparam.fuse(Only(), X.float(), capture="graph")


def counting(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.calls = getattr(m, "calls", 0) + 1
    return m.head(m.stem(x) if x.sum() != 0 else x) * m.calls


def remembering(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.stem(x) if x.sum() != 0 else x
    m.mean.mul_(0.9).add_(x.mean())
    return m.head(x)


def test_a_model_with_a_memory_is_refused_if_its_answers_depend_on_it() -> None:
    for way in ("auto", "modules"):
        with pytest.raises(reparam.CaptureError, match="answers the same input otherwise"):
            reparam.fuse(build(counting), X, capture=way, verify=False)
    model = build(remembering)
    model.register_buffer("mean", torch.ones(1, dtype=torch.float64))
    fused: Any = reparam.fuse(model, X).module
    assert torch.equal(fused.mean, torch.ones(1, dtype=torch.float64))
    for _ in range(3):
        assert relative_error(model(X), fused(X)) < 1e-12
        assert relative_error(model.mean, fused.mean) < 1e-12


def test_shared_and_hooked_children_nested_results_and_train_mode() -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        return {"o": m.stem(x=x, gain=2.0), "p": [m.blocks[0](x), None, 3]} if x.mean() != 7 else {}

    model = build(forward)
    model.blocks[1] = model.blocks[0]
    model.stem.register_forward_hook(lambda module, inputs, output: output * 2)
    model.train()
    result = reparam.fuse(model, X)
    model.eval()
    expected, actual = model(X), result.module(X)
    assert relative_error(expected["o"], actual["o"]) < 1e-12
    assert relative_error(expected["p"][0], actual["p"][0]) < 1e-12
    assert actual["p"][1:] == [None, 3]
    fused: Any = result.module
    assert fused.blocks[0] is fused.blocks[1]
    assert any(note.startswith("stem (Block) stays as it is") and "hooks" in note for note in result.report.notes)
    assert executed_counts(fused, X)["bn"] == 1  # beside the hooked module itself, which cannot be looked into


def test_a_part_that_is_a_graph_module_is_fused() -> None:
    model = randomise(Model(data_dependent)).eval().double()
    model.stem = torch.fx.symbolic_trace(model.stem)  # type: ignore[assignment]
    result = reparam.fuse(model, X)
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert executed_counts(result.module, X)["bn"] == 0
    copied = copy.deepcopy(result.module)
    with torch.no_grad():
        assert relative_error(model(X), copied(X)) < 1e-11
