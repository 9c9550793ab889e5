"""Slices of a few elements, of thousands that differ in scale: no alarm by chance, and faults of one of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from reparam.equivalence import few, redrawn, verify
from reparam.equivalence.judge import spread
from reparam.equivalence.measure import measure, verdict
from reparam.equivalence.measured import Measured, Rules, Runs
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


@pytest.mark.parametrize("seeds", sampled([SEEDS[:8], SEEDS[8:]], 2), ids=["a few", "others"])
def test_chance_raises_no_alarm(seeds: range) -> None:
    looked = 0
    for seed in seeds:
        fused = reparam.fuse(flattened(seed, nn.ReLU()), example())
        comparison = fused.report.comparison
        assert comparison is not None
        assert not fused.report.undone
        looked += any("slices of fewer than" in note for case in comparison.cases for note in case.notes)
    assert looked, "a measure that nothing needs cannot be tested"


class Off(nn.Module):
    """A right model; in float32 one feature of one image is off."""

    def __init__(self, model: nn.Module, feature: int, by: float) -> None:
        super().__init__()
        self.model, self.feature = model, feature
        self.register_buffer("by", torch.tensor(by))
        self.register_buffer("large", torch.tensor(2.0 ** (26 + math.ceil(math.log2(by)))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x)
        wrong = torch.zeros_like(y)
        wrong[0, self.feature] = self.by - ((self.large + self.by) - self.large)
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
        assert comparison.only_noisy
        assert comparison.outputs[0].worst_index == (0, feature)
        assert verify(model, Off(fused, feature, 3.0 * large), x, level="quick").passed


class Quiet(nn.Module):
    """Loses some bits of some features."""

    def __init__(self, model: nn.Module, some: slice) -> None:
        super().__init__()
        self.model, self.some = model, some

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.model(x).clone()
        y[:, self.some] = (y[:, self.some] + 50.0) - 50.0
        return y


def test_what_a_slice_is_granted_helps_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    scales = torch.tensor([1e-2, 1e-1, 0.3, 1.0, 10.0, 100.0])
    torch.manual_seed(2)
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    norm.weight.data, norm.bias.data = scales.clone(), torch.randn(6) * scales
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), norm, nn.Flatten(1)).eval()
    x = torch.randn(2, 4, 20, 20)
    looked = verify(model, Quiet(model, slice(0, 100)), x, level="quick")
    monkeypatch.setattr(few, "FARTHEST", 0.0)
    before = verify(model, Quiet(model, slice(0, 100)), x, level="quick")
    assert any("20 runs" in note for case in looked.cases for note in case.notes)
    assert not looked.passed
    assert looked.outputs[0].worst_ratio == before.outputs[0].worst_ratio


def known() -> Measured:
    generator = torch.Generator().manual_seed(0)
    truth, noise = (torch.randn(2, 3000, dtype=torch.float64, generator=generator) for _ in range(2))
    truth[:, 7], noise = 1e-9, 1e-7 * noise
    (measured,), _ = measure(Runs(*(flatten(one) for one in (truth, truth + noise, truth))), Rules())
    assert measured.numeric is not None
    return measured


def test_only_how_the_noise_is_spread_comes_from_the_further_runs() -> None:
    measured = known()
    loud = torch.full((2, 3000), 1e-7, dtype=torch.float64)
    loud[:, 7] = 1e-4
    after = few._with(measured, {"output": [spread(1000.0 * loud / measured.unit)] * 3})
    assert after.numeric == measured.numeric
    assert after.redrawn is not None
    assert not after.redrawn.slices[0][0].any(), "slices of 3000 elements know their own noise"
    granted = after.redrawn.slices[1][0]
    assert int(granted.argmax()) == 7
    assert measured.numeric is not None
    assert float(granted.square().mean().sqrt()) == pytest.approx(measured.numeric[1].rms)
    assert "20 runs" in after.figures.notes[-1]


def test_a_slice_is_held_against_what_the_further_runs_show_there() -> None:
    measured = known()
    error = torch.zeros(2, 3000, dtype=torch.float64)
    error[0, 7] = 2.7e-6
    loud = torch.zeros_like(error)
    loud[:, 7] = 1.0
    assert measured.numeric is not None
    wrong = replace(measured, numeric=(spread(error / measured.unit), measured.numeric[1]))
    quiet = few._with(wrong, {"output": [spread(torch.ones_like(error) / measured.unit)]})
    there = few._with(wrong, {"output": [spread(loud / measured.unit)]})
    elsewhere = few._with(wrong, {"output": [spread(loud.roll(1, 1) / measured.unit)]})
    first, unmoved, passed, other = (verdict(one, Rules()).numeric_ratio for one in (wrong, quiet, there, elsewhere))
    assert first is not None
    assert passed is not None
    assert first > 1.0 > passed
    assert unmoved == other == first


def test_few_slices_are_judged_by_what_was_seen() -> None:
    assert few._few(spread(torch.ones(2, 3000).double())) == [False, True]
    assert few._few(spread(torch.ones(2, 10).double())) == [False, False]
    assert few._few(spread(torch.ones(2, 3000, 30).double())) == [False, False, False]
    assert few._few(spread(torch.ones(3000).double())) == [True]


def test_larger_errors_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(few, "noises_of", lambda *given: asked.append(given) or {})
    model, x = flattened(0), example()
    (_, loud), large = features(model, x)
    assert verify(model, Off(model, loud, 1e5 * large), x, level="quick").only_noisy
    assert not asked
    assert verify(model, Off(model, loud, 60.0 * large), x, level="quick").only_noisy
    assert asked


def test_an_original_that_cannot_be_watched_is_judged_by_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse: Callable[..., Any] = lambda *_: (_ for _ in ()).throw(RuntimeError("no modes here"))  # noqa: E731
    monkeypatch.setattr(redrawn, "MovedOperands", refuse)
    model, x = flattened(0), example()
    (_, loud), large = features(model, x)
    comparison = verify(model, Off(model, loud, 60.0 * large), x, level="quick")
    assert comparison.only_noisy
    assert (
        "example: the original could not be run with other roundings (RuntimeError: no modes here)" in comparison.notes
    )
