"""What is equivalent passes: in every dtype, with many seeds, and in badly scaled nets."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from reparam.equivalence import compare_outputs, verify
from reparam.equivalence.measure import measure, verdict
from reparam.equivalence.measured import Rules, Runs
from reparam.equivalence.outputs import flatten
from tests.equivalence.nets import Branchy, Plain, TwoOutputs, example, folded, randomise
from tests.support import sampled

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("net", [Plain, Branchy, TwoOutputs])
def test_a_fold_rounded_once_passes(net: type[Plain], dtype: torch.dtype) -> None:
    for seed in range(4):
        original = randomise(net(), seed).to(dtype)
        assert isinstance(original, Plain)
        comparison = verify(original, folded(original), example(dtype, seed), seed=seed)
        assert comparison.passed, comparison.failures


@pytest.mark.parametrize("net", [Plain, Branchy, TwoOutputs])
def test_a_fold_combined_in_float32_passes(net: type[Plain]) -> None:
    for seed in range(4):
        original = randomise(net(), seed)
        assert isinstance(original, Plain)
        comparison = verify(original, folded(original, combine=None), example(seed=seed))
        assert comparison.passed, comparison.failures


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_copy_passes_without_any_error_of_its_own(dtype: torch.dtype) -> None:
    original = randomise(Plain(), 3).to(dtype)
    comparison = verify(original, copy.deepcopy(original), example(dtype))
    assert comparison.passed
    assert comparison.algebra_error == 0.0
    if dtype != torch.float64:
        assert comparison.numeric_error == comparison.original_noise > 0.0


def growing(net: Plain) -> None:
    """Activations grow to about 1e8."""
    for bn in net.bns:
        bn.weight.data *= 500.0
        bn.bias.data *= 500.0


def nearly_constant(net: Plain) -> None:
    """Variances so small that eps decides, and a mean that nearly cancels."""
    for bn in net.bns:
        bn.running_var[::3] = 1e-12
        bn.weight.data[::3] *= 1e-3


def dead(net: Plain) -> None:
    """gamma of 0 in some channels, and no shift either in some of those."""
    for bn in net.bns:
        bn.weight.data[::2] = 0.0
        bn.bias.data[::4] = 0.0


def negative(net: Plain) -> None:
    for bn in net.bns:
        bn.weight.data[1::2] *= -1.0


@pytest.mark.parametrize("distort", [growing, nearly_constant, dead, negative], ids=lambda f: f.__name__)
@pytest.mark.parametrize("depth", sampled([3, 12], 2))
def test_badly_scaled_nets_get_the_right_verdict(distort, depth: int) -> None:  # type: ignore[no-untyped-def]
    for seed in range(2):
        for dtype in (torch.float32, torch.float64):
            original = randomise(Plain(depth=depth), seed)
            assert isinstance(original, Plain)
            distort(original)
            if distort is growing:
                for bn in original.bns[3:]:
                    bn.weight.data /= 500.0
                    bn.bias.data /= 500.0
            original.to(dtype)
            if distort is growing:
                assert float(original.features(example(dtype)).detach().abs().max()) > 1e7
            good = verify(original, folded(original), example(dtype, seed))
            assert good.passed, good.failures
            broken = folded(original)
            broken.convs[-1].weight.data[1] *= 1.01
            assert not verify(original, broken, example(dtype, seed)).passed


class Cancelling(nn.Module):
    """One channel is the difference of two equal sums of large terms: nothing but rounding is left of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x.sum(1, keepdim=True) * 1e3
        other = (x * 1e3).flip(1).sum(1, keepdim=True)
        return torch.cat([x, total - other], 1)


class CancellingOtherwise(Cancelling):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = (x * 1e3).sum(1, keepdim=True)
        other = x.flip(1).sum(1, keepdim=True) * 1e3
        return torch.cat([x, total - other], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_channel_that_cancels_to_rounding_noise_does_not_explode(dtype: torch.dtype) -> None:
    x = torch.randn(2, 64, 9, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    comparison = verify(Cancelling(), CancellingOtherwise(), x)
    assert comparison.passed, comparison.failures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_noise_stays_the_yardstick_for_deep_nets(dtype: torch.dtype) -> None:
    original = randomise(Plain(depth=20), 5).to(dtype)
    assert isinstance(original, Plain)
    comparison = verify(original, folded(original), example(dtype))
    assert comparison.passed, comparison.failures
    assert comparison.original_noise > torch.finfo(dtype).eps / 8


def test_noise_that_half_precision_cannot_show_is_measured_in_float32() -> None:
    """A chaotic model: half precision is off by as much as it can be, float64 by more than that tells."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(4, 64, generator=generator, dtype=torch.float64)

    def off_by(size: float) -> torch.Tensor:
        return truth + size * torch.randn(truth.shape, generator=generator, dtype=torch.float64)

    half, single, double = off_by(0.3).half(), off_by(0.05).float(), off_by(2e-10)
    runs = Runs(flatten(truth), flatten(half), flatten(half), flatten(double), algebra_is_exact=True)
    rules = Rules(dtype=torch.float16)
    blind, _ = measure(runs, rules)
    assert "float64 results differ" in verdict(blind[0], rules).failures[0]
    seeing, _ = measure(replace(runs, single=flatten(single)), rules)
    assert verdict(seeing[0], rules).failures == ()
    wrong, _ = measure(replace(runs, single=flatten(single), candidate64=flatten(off_by(1e-7))), rules)
    assert "float64 results differ" in verdict(wrong[0], rules).failures[0]


def test_a_logit_that_is_nearly_zero_by_chance_is_held_to_the_scale_of_its_peers() -> None:
    truth = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth[0, 667] = 1e-5
    own = truth.to(torch.bfloat16)
    off = truth.clone()
    off[0, 667] += 1e-12
    fine = compare_outputs(truth, own, own, candidate_float64=off)
    assert all(output.passed for output in fine), fine[0].failures
    off[0, 667] += 1e-8
    wrong = compare_outputs(truth, own, own, candidate_float64=off)
    assert "index 667 of dim 1" in wrong[0].failures[0]
