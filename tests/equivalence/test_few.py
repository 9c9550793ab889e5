"""Slices of a few elements, of thousands that differ in scale: no alarm by chance, and faults of one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from reparam.equivalence import few, redrawn, verify
from reparam.equivalence.judge import spread
from reparam.equivalence.measure import measure
from reparam.equivalence.measured import Rules, Runs
from reparam.equivalence.outputs import flatten
from tests.support import sampled

SEEDS = range(40)


def flattened(seed: int, *after: nn.Module) -> nn.Sequential:
    """Six channels that differ in scale, as one row of thousands of features."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm3d(6)
    model = nn.Sequential(nn.ConvTranspose3d(4, 6, 3), norm, *after, nn.Flatten(1)).eval()
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return model


def example() -> torch.Tensor:
    return torch.randn(2, 4, 7, 8, 9)


@pytest.mark.parametrize("seeds", sampled([SEEDS[:8], SEEDS[8:]], 1), ids=lambda seeds: f"{len(seeds)} seeds")
def test_chance_raises_no_alarm(monkeypatch: pytest.MonkeyPatch, seeds: range) -> None:
    looked = 0
    for seed in seeds:
        fused = reparam.fuse(flattened(seed, nn.ReLU()), example())
        comparison = fused.report.comparison
        assert comparison is not None
        assert not fused.report.undone
        looked += any("slices of fewer than" in note for case in comparison.cases for note in case.notes)
    assert looked, "a measure that nothing needs cannot be tested"


class Off(nn.Module):
    """A right model, but for one feature of one image."""

    def __init__(self, model: nn.Module, feature: int, by: float) -> None:
        super().__init__()
        self.model, self.feature, self.by = model, feature, by

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x)
        wrong = torch.zeros_like(y)
        wrong[0, self.feature] = self.by
        return y + wrong


def features(model: nn.Sequential, x: torch.Tensor) -> tuple[list[int], float]:
    """A feature in the quietest channel and one in the loudest, and the RMS of the original's noise in the latter."""
    with torch.no_grad():
        noise = model(x).double() - model.double()(x.double())
        model.float()
    channels = noise.reshape(2, 6, -1).square().mean((0, 2)).sqrt()
    each = noise.shape[1] // 6
    return [int(one) * each + each // 2 for one in (channels.argmin(), channels.argmax())], float(channels.max())


@pytest.mark.parametrize("seed", range(4))
def test_a_fault_of_one_feature_is_found_where_it_is_one(seed: int) -> None:
    model, x = flattened(seed), example()
    fused = reparam.fuse(model, x).module
    places, large = features(model, x)
    for feature in places:
        comparison = verify(model, Off(fused, feature, 60.0 * large), x, level="quick")
        assert not comparison.passed
        assert comparison.outputs[0].worst_index == (0, feature)
        assert verify(model, Off(fused, feature, 3.0 * large), x, level="quick").passed


def test_only_how_the_noise_is_spread_comes_from_the_further_runs() -> None:
    truth = torch.randn(2, 3000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise, loud = torch.full_like(truth, 1e-7), torch.full_like(truth, 1e-7)
    loud[:, 7] = 1e-4
    runs = Runs(*(flatten(one) for one in (truth, (truth + noise).float().double(), truth)))
    (measured,), _ = measure(runs, Rules())
    assert measured.numeric is not None
    (after,) = (few._with(measured, {"output": [spread(1000.0 * loud / measured.unit)] * 3}),)
    assert after.numeric is not None
    error, known = measured.numeric
    changed, found = after.numeric
    assert changed == error
    assert (found.rms, found.peak) == (known.rms, known.peak)
    assert found.slices[0] is known.slices[0], "slices of 3000 elements know their own noise"
    raised = found.slices[1][0] / known.slices[1][0]
    assert int(raised.argmax()) == 7
    assert float(found.slices[1][0][7]) <= known.rms * 3000**0.5
    assert "20 runs" in after.figures.notes[-1]


def test_larger_errors_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(few, "noises_of", lambda *given: asked.append(given) or {})
    model, x = flattened(0), example()
    (_, loud), large = features(model, x)
    assert not verify(model, Off(model, loud, 1e5 * large), x, level="quick").passed
    assert not asked
    assert not verify(model, Off(model, loud, 60.0 * large), x, level="quick").passed
    assert asked


def test_an_original_that_cannot_be_watched_is_judged_by_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse: Callable[..., Any] = lambda *_: (_ for _ in ()).throw(RuntimeError("no modes here"))  # noqa: E731
    monkeypatch.setattr(redrawn, "MovedOperands", refuse)
    model, x = flattened(0), example()
    (_, loud), large = features(model, x)
    comparison = verify(model, Off(model, loud, 60.0 * large), x, level="quick")
    assert not comparison.passed
    assert (
        "example: the original could not be run with other roundings (RuntimeError: no modes here)" in comparison.notes
    )
