"""An original that amplifies every rounding many thousand times: its candidates are judged by that, and faults too."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn

from reparam.equivalence import conditioning, redrawn, verify
from reparam.equivalence.judge import spread
from reparam.equivalence.measure import measure
from reparam.equivalence.measured import Rules, Runs
from reparam.equivalence.outputs import flatten
from tests.equivalence.nets import Plain, example, folded, randomise
from tests.support import sampled

SEEDS = range(12)
A_FEW = pytest.mark.parametrize("seeds", sampled([SEEDS[:4], SEEDS[4:]], 2), ids=["a few", "others"])
Net = TypeVar("Net", bound=Plain)


class Chaotic(Plain):
    """All outputs hang on one number, which goes through twelve sines of some five times itself."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__(width, depth)
        self.gains = nn.Parameter(5.0 + torch.rand(12, generator=torch.Generator().manual_seed(1)))

    def forward(self, x: torch.Tensor) -> Any:
        features = self.features(x).mean((2, 3))
        value = features.mean(1, keepdim=True)
        for gain in self.gains:
            value = torch.sin(gain * value)
        return self.head(value * features)


class Trembling(Chaotic):
    """A third of its answer hangs on that number, so that in half precision its noise cannot grow beyond that."""

    def forward(self, x: torch.Tensor) -> Any:
        features = self.features(x).mean((2, 3))
        value = features.mean(1, keepdim=True)
        for gain in self.gains[:8]:
            value = torch.sin(gain * value)
        return self.head((1.0 + 0.3 * value) * features)


class Cancelling(Plain):
    """Right in float64; in float32 it loses `lost` bits of every feature."""

    lost: int = 3

    def features(self, x: torch.Tensor) -> torch.Tensor:
        values = super().features(x)
        offset = float(2**self.lost) * values.detach().abs().max()
        return (values + offset) - offset


def of(kind: type[Net], seed: int) -> Net:
    made = randomise(kind(width=4), seed)
    assert isinstance(made, kind)
    return made


def failing(kind: type[Plain], noise_factor: float, dtype: torch.dtype = torch.float32) -> dict[int, Any]:
    """By seed, what is said of folds that are right; one image, so that luck has few samples to even it out."""
    found = {}
    for seed in range(24):
        original = of(kind, seed).to(dtype)
        exact = folded(copy.deepcopy(original).double())
        comparison = verify(
            original,
            copy.deepcopy(exact).to(dtype),
            example(seed=seed, batch=1).to(dtype),
            candidate_float64=exact,
            seed=seed,
            level="quick",
            noise_factor=noise_factor,
        )
        if not comparison.passed:
            found[seed] = comparison
    return found


def without_the_look(function: Callable[..., Any], *args: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditioning, "NEAR", 0.0)
        return function(*args)


@pytest.mark.slow
def test_a_chaotic_original_s_noise_is_no_single_sample() -> None:
    """A bar of a third of the noise: right folds fail it by chance, and fewer where the noise is better known."""
    alone = without_the_look(failing, Chaotic, 0.3)
    looked_at = failing(Chaotic, 0.3)
    assert len(alone) >= 4
    assert len(looked_at) <= len(alone) // 2
    assert looked_at.keys() < alone.keys()


@pytest.mark.slow
def test_noise_of_half_precision_that_cannot_grow_hides_no_ill_conditioning() -> None:
    """It is as large as the answers; what the original amplifies is seen in float32, and the algebra is excused."""
    alone = without_the_look(failing, Trembling, 0.1, torch.bfloat16)
    looked_at = failing(Trembling, 0.1, torch.bfloat16)
    both = looked_at.keys() & alone.keys()
    ratios = [[found[seed].outputs[0].algebra_ratio for seed in both] for found in (alone, looked_at)]
    assert any(after < before for before, after in zip(*ratios, strict=True))


class Drowning(Chaotic):
    """Its answers are noise in float32, and roundings in float64 change a millionth of them."""

    steepness = 1e5

    def forward(self, x: torch.Tensor) -> Any:
        features = self.features(x).mean((2, 3))
        value = features.mean(1, keepdim=True)
        for gain in self.gains:
            value = torch.sin(gain * value)
        return self.head((1.0 + 3.0 * torch.sin(self.steepness * value)) * features)


@pytest.mark.slow
def test_noise_in_float32_that_cannot_grow_bounds_that_in_float64_no_more() -> None:
    alone = without_the_look(failing, Drowning, 2.0)
    looked_at = failing(Drowning, 2.0)
    assert len(alone) >= 4
    assert len(looked_at) <= len(alone) // 4


class Lost(Drowning):
    """Roundings in float64 change a thousandth of its answers and more, too much to move in proportion."""

    steepness = 1e8


def test_where_float64_is_noise_too_nothing_is_told_and_no_tensor_is_blamed() -> None:
    untold = 0
    for seed in SEEDS:
        original = of(Lost, seed)
        exact = folded(copy.deepcopy(original).double())
        x = example(seed=seed, batch=1)
        comparison = verify(original, copy.deepcopy(exact).float(), x, candidate_float64=exact, seed=seed)
        if not comparison.lacks_evidence:
            continue
        untold += 1
        assert not comparison.passed
        assert comparison.summary().startswith("NOT shown to be equivalent: ")
        assert "which roundings alone may do to the original (in the few runs that were made, up to " in str(comparison)
        (case, *_) = [case for case in comparison.cases if case.is_untold]
        assert case.status == "no evidence"
        assert any("so nothing can be told" in note for note in case.notes)
        assert comparison.parting is None
    assert untold >= len(SEEDS) // 2


@A_FEW
def test_what_that_noise_does_not_explain_is_a_failure(seeds: range) -> None:
    for seed in seeds:
        original = of(Lost, seed)
        wrong = folded(copy.deepcopy(original).double())
        wrong.head.bias.data += 3.0
        x = example(seed=seed, batch=1)
        comparison = verify(original, copy.deepcopy(wrong).float(), x, candidate_float64=wrong, seed=seed)
        assert not comparison.passed
        assert not comparison.lacks_evidence


@A_FEW
@pytest.mark.parametrize("size", sampled([1e-3, 1e-2], 2))
def test_a_fault_beyond_that_noise_is_found(size: float, seeds: range) -> None:
    """Of the last weights, so that nothing amplifies it."""
    for seed in seeds:
        original = of(Drowning, seed)
        wrong = folded(copy.deepcopy(original).double())
        wrong.head.weight.data *= 1.0 + size
        x = example(seed=seed, batch=1)
        assert not verify(original, copy.deepcopy(wrong).float(), x, candidate_float64=wrong, seed=seed).passed


def test_a_well_conditioned_original_s_first_verdict_stands() -> None:
    alone = without_the_look(failing, Plain, 0.3)
    assert alone
    assert failing(Plain, 0.3).keys() == alone.keys()


def test_what_was_measured_is_told() -> None:
    original = of(Chaotic, 0)
    exact = folded(copy.deepcopy(original).double())
    for seed in range(24):
        x = example(seed=seed, batch=1)
        comparison = verify(original, copy.deepcopy(exact).float(), x, candidate_float64=exact, noise_factor=0.2)
        for case in comparison.cases:
            for note in case.notes:
                if "other roundings of what it multiplies" in note:
                    assert "in float32 (allowed for was " in note or "in float64 (allowed for was " in note
                    return
    pytest.fail("no case was looked at again")


@A_FEW
@pytest.mark.parametrize("kind", sampled([Plain, Chaotic, Drowning], 3))
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_wrong_weight_is_not_excused(kind: type[Plain], size: float, seeds: range) -> None:
    for seed in seeds:
        original = of(kind, seed)
        wrong = folded(original).double()
        wrong.convs[0].weight.data[0, 0, 1, 1] *= 1.0 + size  # type: ignore[index, operator]
        comparison = verify(
            original, copy.deepcopy(wrong).float(), example(seed=seed, batch=1), candidate_float64=wrong, seed=seed
        )
        assert not comparison.passed


@A_FEW
@pytest.mark.slow
@pytest.mark.parametrize("lost", sampled([13, 10, 8], 3))
def test_a_candidate_does_not_excuse_itself(lost: int, seeds: range) -> None:
    """The original is well conditioned; that the candidate is not is its own fault, by little as by much."""
    for seed in seeds:
        original = of(Plain, seed)
        candidate = of(Cancelling, seed)
        candidate.lost = lost
        comparison = verify(original, candidate, example(seed=seed), seed=seed)
        assert not comparison.passed
        assert comparison.only_noisy


def test_what_the_look_costs_is_counted_and_the_original_stays_as_it_was() -> None:
    original, candidate = of(Plain, 0), of(Cancelling, 0)
    candidate.lost = 6
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    looked = verify(original, candidate, example(), level="quick")
    assert 1.0 < max(output.worst_ratio for output in looked.outputs) < conditioning.MOST_LUCK
    assert looked.cost >= 3.0 + 1.0 + 2 * redrawn.DRAWS
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_what_is_known_of_the_original_is_not_measured_again() -> None:
    original, known = of(Drowning, 1), {}  # type: ignore[var-annotated]
    exact = folded(copy.deepcopy(original).double())
    x = example(seed=1, batch=1)
    first, second = (
        verify(original, copy.deepcopy(exact).float(), x, candidate_float64=exact, seed=1, known=known)
        for _ in range(2)
    )
    assert known
    assert second.cost <= first.cost - 2 * redrawn.DRAWS
    assert second.outputs == first.outputs
    other = folded(copy.deepcopy(original).double())
    other.head.weight.data *= 1.001
    assert not verify(original, copy.deepcopy(other).float(), x, candidate_float64=other, seed=1, known=known).passed


def test_an_original_that_cannot_be_watched_is_judged_without_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("no modes here")

    monkeypatch.setattr(redrawn, "MovedOperands", refuse)
    original, candidate = of(Plain, 0), of(Cancelling, 0)
    candidate.lost = 10
    comparison = verify(original, candidate, example(), level="quick")
    assert not comparison.passed
    assert comparison.only_noisy
    assert "example: the original's noise could not be measured anew (RuntimeError: no modes here)" in comparison.notes


def test_a_model_without_weights_can_be_looked_at() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum((2, 3))

    class Poor(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 512.0).sum((2, 3)) - 512.0 * x.shape[2] * x.shape[3]

    assert not verify(Sum(), Poor(), example(), level="quick").passed


def test_it_is_the_input_that_failed_that_is_looked_at() -> None:
    """A fault that only black pixels show, in a net that returns the same shape for every image size."""

    class Dark(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.head = nn.Linear(8, 10)
            with torch.no_grad():
                self.conv.weight[0] = -10.0
                self.conv.bias[0] = 1.0
                self.head.weight[:, 0] *= 100.0

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(torch.relu(self.conv(x.abs())).mean((2, 3)))

    torch.manual_seed(0)
    original = Dark().eval()
    wrong = copy.deepcopy(original)
    wrong.conv.bias.data[0] += 2e-5
    comparison = verify(original, wrong, torch.randn(1, 3, 80, 80))
    assert not comparison.passed
    assert not any("ill-conditioned" in note for case in comparison.cases for note in case.notes)


def test_a_narrow_deployment_does_not_make_the_original_ill_conditioned() -> None:
    class Taking(Plain):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x.to(self.head.weight.dtype))

    original = of(Taking, 0)
    deployed = copy.deepcopy(original).bfloat16()
    for size in (5e-9, 2e-9):  # some ten times what the algebra allows
        exact = copy.deepcopy(original).double()
        exact.head.weight.data *= 1.0 + size
        comparison = verify(
            original, copy.deepcopy(exact).bfloat16(), example(), deployed=deployed, candidate_float64=exact
        )
        assert not comparison.passed


class Halving(Plain):
    """Its noise is that of a cast inside it, and no amplified rounding."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x.half().to(x.dtype))


@pytest.mark.slow
def test_a_cast_inside_is_no_amplified_rounding() -> None:
    for seed in range(4):
        original = of(Halving, seed)
        for size in (3e-6, 3e-5, 1e-3):
            wrong = copy.deepcopy(original)
            wrong.head.weight.data *= 1.0 + size
            comparison = verify(original, wrong, example(seed=seed), seed=seed)
            assert not any("ill-conditioned" in note for case in comparison.cases for note in case.notes)


class Sawing(Chaotic):
    """What that number amplifies goes through a saw of narrow teeth of one thousandth, and a weight is compared."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__(width, depth)
        self.register_buffer("gate", torch.ones(()))

    def forward(self, x: torch.Tensor) -> Any:
        features = self.features(x).mean((2, 3))
        value = features.mean(1, keepdim=True)
        for gain in self.gains:
            value = torch.sin(gain * value)
        saw = 3e6 * value
        logits = self.head((1.0 + 1e-3 * (saw - saw.round())) * features)
        return torch.where((self.gate - 1.0).abs() < 1e-8, logits, 1.05 * logits)


class Losing(Sawing):
    """The same with features that have lost bits."""

    lost: int = 16

    def features(self, x: torch.Tensor) -> torch.Tensor:
        values = super().features(x)
        offset = float(2**self.lost) * values.detach().abs().max()
        return (values + offset) - offset


@pytest.mark.slow
def test_noise_that_cannot_grow_excuses_no_more_than_it_is() -> None:
    """In float64 it grows as fast as in a model whose answers are noise; float32 shows that it stays a thousandth."""
    for seed in range(6):
        original, poor = of(Sawing, seed), of(Losing, seed)
        x = example(seed=seed, batch=1)

        def scaled(x: torch.Tensor, original: nn.Module = original) -> Any:
            return 1.03 * original(x)

        right = folded(copy.deepcopy(original).double()).float()

        def folds(x: torch.Tensor, right: nn.Module = right) -> Any:
            return right(x)

        assert verify(original, folds, x, seed=seed, level="quick").passed
        assert not verify(original, scaled, x, seed=seed, level="quick").passed
        assert not verify(original, poor, x, seed=seed, level="quick").passed


@pytest.mark.parametrize(
    ("seen", "wide", "expected"), [(50.0, 500.0, True), (5.0, 500.0, False), (50.0, 50.0, False), (50.0, 0.0, False)]
)
def test_roundings_must_be_amplified_in_float64_and_as_seen(seen: float, wide: float, expected: bool) -> None:
    truth = torch.linspace(1.0, 2.0, 64, dtype=torch.float64)
    (measured,), _ = measure(Runs(*map(flatten, (truth, truth.float(), truth.float()))), Rules())
    noise = spread(truth * wide * torch.finfo(torch.float64).eps / measured.unit)
    found = conditioning._is_ill_conditioned(replace(measured, amplified=seen), [noise])
    assert found is expected


@pytest.mark.parametrize(("further", "expected"), [(1.0, False), (8.0, False), (300.0, True), (2e5, False)])
def test_what_jumps_is_as_far_away_by_any_step(further: float, expected: bool) -> None:
    found, more = ([spread(torch.full((4,), size))] * 5 for size in (1e-9, 1e-9 * further))
    assert conditioning._grows(found, more, 2.0**8) is expected


def test_noise_counts_as_far_as_a_longer_step_lets_expect() -> None:
    """A jump of ten times the noise, which is nothing beside what the longer step shows."""
    found = [spread(torch.full((4,), size)) for size in (1e-9, 2e-9, 1e-8)]
    further = [spread(torch.full((4,), 1e-9 * 2.0**8))] * 3
    left = [noise.rms for noise in conditioning._without_jumps(found, further, 2.0**8)]
    assert left == pytest.approx([1e-9, 2e-9, 2.5e-9])


@pytest.mark.parametrize(("noise", "tells"), [(0.01, False), (0.2, False), (0.5, True)])
def test_float32_tells_what_half_precision_amplifies_where_that_is_at_its_ceiling(noise: float, tells: bool) -> None:
    """Not of an output beside one that is: each has its own noise."""
    truth = torch.linspace(1.0, 2.0, 64, dtype=torch.float64)
    single = (truth * (1.0 + 1e-3)).float()
    rounded = (truth * (1.0 + noise)).bfloat16()
    runs = Runs(*map(flatten, (truth, rounded, rounded)), candidate64=flatten(truth), single=flatten(single))
    (measured,), failures = measure(runs, Rules(dtype=torch.bfloat16))
    assert not failures
    seen = measured.amplified * torch.finfo(torch.bfloat16).eps
    if tells:
        assert measured.amplified == pytest.approx(1e-3 / torch.finfo(torch.float32).eps, rel=1e-2)
    else:
        assert seen == pytest.approx(noise, rel=0.3)


def test_outputs_that_cannot_be_looked_at_are_left_alone() -> None:
    """Without elements, of integers, not finite, of NumPy, beside one that fails by little."""

    class Several(Plain):
        def forward(self, x: torch.Tensor) -> Any:
            logits = super().forward(x)
            infinite = torch.where(logits > 0, torch.inf, logits)
            return logits, logits[:, :0], logits.argmax(1), infinite, np.arange(3)

    original = of(Several, 0)
    wrong = copy.deepcopy(original)
    wrong.head.weight.data *= 1.0 + 1e-5
    comparison = verify(original, wrong, example())
    assert not comparison.passed
    assert max(output.worst_ratio for output in comparison.outputs) > 1.0


def test_several_noises_together_are_their_root_mean_square() -> None:
    values = [torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[4.0, 0.0], [0.0, 1.0]])]
    together = redrawn.root_mean_square([spread(value) for value in values])
    assert together.rms == pytest.approx(math.sqrt((9 / 4 + 17 / 4) / 2))
    assert together.peak == pytest.approx(math.sqrt((9 + 16) / 2))
    (rows, peaks), _ = together.slices
    assert rows.tolist() == pytest.approx([math.sqrt((4.5 + 8) / 2), math.sqrt((0 + 0.5) / 2)])
    assert peaks.tolist() == pytest.approx([math.sqrt(12.5), math.sqrt(0.5)])


@pytest.mark.slow
def test_deployed_runs_that_are_all_small_by_luck_do_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conditioning, "with_decisions", lambda session, original, ran, *asked: ran)
    looked_at = failing(Chaotic, 0.1)
    monkeypatch.setattr(conditioning, "CERTAIN", 0.0)
    largest_alone = failing(Chaotic, 0.1)
    assert looked_at.keys() < largest_alone.keys()
