"""An original that amplifies every rounding many thousand times: its candidates are judged by that, and faults too."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import pytest
import torch
from torch import nn

from reparam.equivalence import conditioning, verify
from reparam.equivalence.precision import moved
from tests.equivalence.nets import Plain, example, folded, randomise

SEEDS = range(12)
Net = TypeVar("Net", bound=Plain)


class Chaotic(Plain):
    """All outputs hang on one number, which goes through the logistic map: one rounding grows 2^16 times, by luck."""

    def forward(self, x: torch.Tensor) -> Any:
        features = self.features(x).mean((2, 3))
        values = torch.sigmoid(features.mean(1, keepdim=True))
        for _ in range(16):
            values = 3.99 * values * (1.0 - values)
        return self.head(values * features)


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


def verdicts(dtype: torch.dtype) -> list[Any]:
    """Of folds that are right; one image, so that luck has few samples to even it out."""
    comparisons = []
    for seed in SEEDS:
        original = of(Chaotic, seed).to(dtype)
        comparisons.append(verify(original, folded(original), example(dtype, seed, batch=1), seed=seed))
    return comparisons


def test_a_chaotic_original_s_noise_is_no_single_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    for comparison in (looked_at := verdicts(torch.float32)):
        assert comparison.passed, comparison.failures
    monkeypatch.setattr(conditioning, "DRAWS", 0)
    failed = [index for index, comparison in enumerate(verdicts(torch.float32)) if not comparison.passed]
    assert failed, "no case needed the second look, so that this test shows nothing"
    for index in failed:
        notes = [note for case in looked_at[index].cases for note in case.notes]
        assert any("weights moved by half a ULP" in note for note in notes)


@pytest.mark.parametrize("kind", [Plain, Chaotic])
@pytest.mark.parametrize("size", [1e-3, 1e-6])
def test_a_wrong_weight_is_not_excused(kind: type[Plain], size: float) -> None:
    for seed in SEEDS:
        original = of(kind, seed)
        wrong = folded(original).double()
        wrong.convs[0].weight.data[0, 0, 1, 1] *= 1.0 + size  # type: ignore[index, operator]
        comparison = verify(
            original, copy.deepcopy(wrong).float(), example(seed=seed, batch=1), candidate_float64=wrong, seed=seed
        )
        assert not comparison.passed


@pytest.mark.parametrize("lost", [8, 10, 13])
def test_a_candidate_does_not_excuse_itself(lost: int) -> None:
    """The original is well conditioned; that the candidate is not is its own fault, by little as by much."""
    for seed in SEEDS:
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
    assert looked.cost >= 3.0 + 1.0 + len(conditioning.STEPS) * conditioning.DRAWS
    assert all(torch.equal(tensor, before[name]) for name, tensor in original.state_dict().items())


def test_a_model_whose_weights_must_be_what_they_are_is_judged_without() -> None:
    class Strict(Plain):
        total: float

        def forward(self, x: torch.Tensor) -> Any:
            if float(self.head.weight.detach().double().sum()) != self.total:
                raise ValueError("tampered with")
            return super().forward(x)

    original = of(Strict, 0)
    original.total = float(original.head.weight.detach().double().sum())
    candidate = of(Cancelling, 0)
    candidate.lost = 10
    comparison = verify(original, candidate, example(), level="quick")
    assert not comparison.passed
    assert comparison.only_noisy


def test_a_model_without_weights_can_be_looked_at() -> None:
    class Sum(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum((2, 3))

    class Poor(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 512.0).sum((2, 3)) - 512.0 * x.shape[2] * x.shape[3]

    assert not verify(Sum(), Poor(), example(), level="quick").passed


class Shifted(Plain):
    """Reads one of its buffers as a number of places: it jumps, however little that moves."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__(width, depth)
        self.register_buffer("shift", torch.tensor(3.0))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.roll(super().forward(x), int(self.shift), 1)


class Masked(Plain):
    """Compares a buffer with 1."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__(width, depth)
        self.register_buffer("kept", torch.ones(10))

    def forward(self, x: torch.Tensor) -> Any:
        return torch.where(self.kept == 1, super().forward(x), 0.0)


class Counting(Plain):
    """Answers otherwise at every call."""

    def __init__(self, width: int = 12, depth: int = 3) -> None:
        super().__init__(width, depth)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1.0
        return super().forward(x) * self.calls


@pytest.mark.parametrize("kind", [Shifted, Masked, Counting])
def test_what_jumps_or_remembers_excuses_nothing(kind: type[Plain]) -> None:
    """Faults of a few times what is allowed, on every level of input."""
    for seed in range(4):
        original = of(kind, seed)
        for size in (3e-6, 1e-5):
            wrong = copy.deepcopy(original)
            wrong.head.weight.data *= 1.0 + size
            comparison = verify(original, wrong, example(seed=seed), seed=seed)
            without = verify_without_the_look(original, wrong, example(seed=seed), seed)
            assert [case.status for case in comparison.cases] == [case.status for case in without.cases]
            assert not any("ill-conditioned" in note for case in comparison.cases for note in case.notes)


def verify_without_the_look(original: nn.Module, candidate: nn.Module, x: torch.Tensor, seed: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conditioning, "MOST_LUCK", 0.0)
        return verify(original, candidate, x, seed=seed)


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


def test_outputs_without_elements_and_of_integers_are_left_alone() -> None:
    class Three(Plain):
        def forward(self, x: torch.Tensor) -> Any:
            logits = super().forward(x)
            return logits, logits[:, :0], logits.argmax(1)

    original = of(Three, 0)
    wrong = copy.deepcopy(original)
    wrong.head.weight.data *= 1.0 + 1e-5
    assert not verify(original, wrong, example()).passed
    assert verify(original, copy.deepcopy(original), example()).passed


def test_moving_keeps_zeros_infinities_ties_and_the_module_itself() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([0.0, 1.0, -2.0, float("inf"), torch.finfo(torch.float32).max]))
    module.tied = module.weight
    module.register_buffer("mask", torch.tensor(float("-inf")).expand(3))
    module.register_buffer("index", torch.tensor([1, 2]))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = moved(module, None, None, seed=0, step=1024.0)
    assert other.tied is other.weight
    assert other.weight[0] == 0.0
    assert (other.weight[1:3] != module.weight[1:3]).all()
    torch.testing.assert_close(other.weight[1:3], module.weight[1:3], rtol=1e-3, atol=0.0)
    assert torch.equal(other.weight[3], module.weight[3])
    assert other.weight.isfinite().tolist() == [True, True, True, False, True]
    assert torch.equal(other.mask, module.mask)
    assert torch.equal(other.index, module.index)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
