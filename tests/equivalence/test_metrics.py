"""Laws of the metrics, and of the judge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam.equivalence import metrics
from reparam.equivalence.comparison import ULP_QUANTILES
from reparam.equivalence.judge import Judgement, judge, numeric_floor, spread, with_weight_rounding
from reparam.equivalence.measure import measure
from reparam.equivalence.measured import Rules, Runs
from reparam.equivalence.outputs import flatten

values = st.floats(-1e6, 1e6, allow_nan=False).map(lambda v: 0.0 if abs(v) < 1e-6 else v)
vectors = st.lists(st.tuples(values, values), min_size=1, max_size=20).map(
    lambda pairs: torch.tensor(pairs, dtype=torch.float64).T
)
finite32 = st.floats(-(2.0**126), 2.0**126, width=32)


@settings(deadline=None)
@given(finite32)
def test_ulp_is_numpy_s_spacing(value: float) -> None:
    expected = float(np.spacing(np.float32(abs(value))))
    assert float(metrics.ulp(torch.tensor([value], dtype=torch.float64), torch.float32)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_next_number_is_one_ulp_away(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0, 1.5, 3.0, 1000.0, -7.0, 0.1]).to(dtype)
    after = torch.nextafter(x, x * 2)
    assert torch.equal((after - x).double().abs(), metrics.ulp(x.double(), dtype))
    assert metrics.error_metrics(after.double(), x.double(), dtype)["max_ulp"] == 1.0


@settings(deadline=None)
@given(vectors)
def test_the_passing_tolerance_passes_and_less_does_not(pair: torch.Tensor) -> None:
    candidate, original = pair
    t = metrics.passing_tolerance(candidate, original)
    torch.testing.assert_close(candidate, original, rtol=t * (1 + 1e-9), atol=t * (1 + 1e-9))
    if t > 1e-9:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(candidate, original, rtol=t * 0.99, atol=t * 0.99)


@settings(deadline=None)
@given(vectors)
def test_metrics_of_a_tensor_with_itself_and_with_another(pair: torch.Tensor) -> None:
    a, b = pair
    same = metrics.error_metrics(a, a, torch.float32)
    assert same["max_abs"] == same["rms"] == same["max_ulp"] == same["numeric_error"] == 0.0
    assert same["snr_db"] == math.inf
    assert same["cosine"] == pytest.approx(1.0)
    other = metrics.error_metrics(b, a, torch.float32)
    assert -1.0 <= other["cosine"] <= 1.0
    assert other["mean_abs"] <= other["rms"] * (1 + 1e-12) <= other["max_abs"] * (1 + 1e-9)
    if 0.0 < other["numeric_error"] < math.inf:
        assert other["snr_db"] == pytest.approx(-20 * math.log10(other["numeric_error"]), abs=1e-6)


@settings(deadline=None)
@given(vectors, st.floats(1e-3, 1e3))
def test_scaled_metrics_ignore_the_unit(pair: torch.Tensor, unit: float) -> None:
    a, b = pair
    before, after = (metrics.error_metrics(x, y, torch.float32) for x, y in ((b, a), (b * unit, a * unit)))
    for name in ("max_rel", "numeric_error", "cosine"):
        assert after[name] == pytest.approx(before[name], rel=1e-6, abs=1e-9)


def test_top1_agreement_is_for_classifiers() -> None:
    a = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    assert metrics.top1_agreement(a, a) == 1.0
    assert metrics.top1_agreement(a.flip(1), a) == 0.0
    assert metrics.top1_agreement(a[:, :1], a[:, :1]) is None
    assert metrics.top1_agreement(a[None], a[None]) is None


def test_top_k_agreement_is_the_share_of_the_largest_values_that_both_have() -> None:
    a = torch.tensor([[9.0, 8, 7, 6, 5, 1, 0], [9, 8, 7, 6, 5, 1, 0]], dtype=torch.float64)
    assert metrics.topk_agreement(a, a) == (5, 1.0)
    other = a.clone()
    other[0, 5] = 10.0  # comes in for the fifth in one of two rows
    assert metrics.topk_agreement(other, a) == (5, pytest.approx(0.9))
    assert metrics.topk_agreement(a[:, [1, 0, 2, 3, 4, 5, 6]], a) == (5, 1.0), "the order is top-1's question"
    assert metrics.topk_agreement(a[:, :3], a[:, :3]) == (2, 1.0)
    assert metrics.topk_agreement(a.flip(1)[:, :3], a[:, :3])[0] == 2
    for none in (a[:, :2], a[None], a[:0]):
        assert metrics.topk_agreement(none, none) == (None, None)


def test_ulp_quantiles_and_histogram_count_errors() -> None:
    ulps = torch.tensor([0.0, 0.5, 0.75, 3.0, 2000.0], dtype=torch.float64)
    assert metrics.ulp_histogram(ulps) == (2, 1, 0, 1, 0, 0, 0, 0, 0, 1)
    assert metrics.ulp_quantiles(ulps) == (0.75, 2000.0, 2000.0, 2000.0)
    assert metrics.ulp_quantiles(ulps[:1]) == (0.0,) * 4


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_quantiles_of_ulps_hold_their_share(errors: list[float]) -> None:
    ulps = torch.tensor(errors, dtype=torch.float64)
    for share, value in zip(ULP_QUANTILES, metrics.ulp_quantiles(ulps), strict=True):
        assert float((ulps <= value).double().mean()) >= share - 1e-12
        assert float((ulps < value).double().mean()) < share
    assert sum(metrics.ulp_histogram(ulps)) == len(errors)


def test_many_errors_are_sampled_evenly() -> None:
    ulps = torch.arange(1_200_000, dtype=torch.float64)
    for share, value in zip(ULP_QUANTILES, metrics.ulp_quantiles(ulps), strict=True):
        assert value == pytest.approx(share * 1_200_000, rel=1e-4)


@pytest.mark.parametrize(
    ("index", "shape", "expected"),
    [
        ((0, 0, 1, 1), (1, 1, 3, 3), "interior"),
        ((0, 0, 0, 1), (1, 1, 3, 3), "border"),
        ((0, 0, 1, 2), (1, 1, 3, 3), "border"),
        ((0, 5, 7), (1, 9, 8), "border"),
        ((0, 5), (1, 9), "no spatial dims"),
        ((), (), "no spatial dims"),
    ],
)
def test_location(index: tuple[int, ...], shape: tuple[int, ...], expected: str) -> None:
    assert metrics.location(index, shape) == expected


def _noise(seed: int, shape: tuple[int, ...] = (2, 16, 9, 9)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _judged(error: torch.Tensor, noise: torch.Tensor, truth: torch.Tensor, floor: float = 0.0) -> float:
    return judge(spread(error), spread(noise), spread(truth), factor=2.0, floor=floor, samples=truth.numel()).ratio


def test_the_whole_tensor_is_held_to_the_stated_factor() -> None:
    truth, noise, error = _noise(0), 1e-7 * _noise(1), 1e-7 * _noise(2)
    assert 0.4 < _judged(error, noise, truth) < 0.6
    assert 0.8 < _judged(1.8 * error, noise, truth) <= 1.0
    assert _judged(2.4 * error, noise, truth) > 1.0


@pytest.mark.parametrize(
    "where", [(slice(None), 3), (slice(None), slice(None), 0), (slice(None), slice(None), slice(None), -1)]
)
def test_a_fault_in_one_channel_row_or_column_exceeds_its_bar(where: tuple[slice | int, ...]) -> None:
    truth, noise, error = _noise(0), 1e-7 * _noise(1), 1e-7 * _noise(2)
    error[where] *= 30.0
    assert _judged(error, noise, truth) > 1.0


def test_a_huge_channel_does_not_hide_a_small_one() -> None:
    scale = torch.ones(16, dtype=torch.float64)
    scale[0] = 1e10
    scale = scale.reshape(1, -1, 1, 1)
    truth, noise, error = _noise(0) * scale, 1e-7 * _noise(1) * scale, 1e-7 * _noise(2) * scale
    assert _judged(error, noise, truth) <= 1.0
    error[:, 7] *= 30.0
    assert _judged(error, noise, truth) > 1.0


def test_a_channel_whose_noise_is_zero_by_luck_is_granted_its_peers() -> None:
    truth, noise, error = _noise(0), 1e-7 * _noise(1), 1e-7 * _noise(2)
    noise[:, 3] = 0.0
    assert _judged(error, noise, truth) <= 1.0


def test_a_handful_of_values_is_held_to_the_scale_of_all() -> None:
    """What a ReLU left of five logits: one is small, its own noise smaller still by luck."""
    truth, noise, error = (
        torch.tensor([[0.0, 0.0, *values, 0.0]], dtype=torch.float64)
        for values in ((0.0934, 1.0), (5.4e-9, 1.15e-7), (1.44e-7, 3.4e-8))
    )
    floor = numeric_floor(torch.float32, runtime=False)
    assert _judged(error, noise, truth, floor) <= 1.0
    assert _judged(3 * error, noise, truth, floor) > 1.0


def test_a_score_beside_a_box_is_not_held_to_the_scale_of_the_box() -> None:
    truth = torch.tensor([[-946.0, 22.0, -2124.0, 1033.0, 4.2e-4]], dtype=torch.float64)
    noise, error = torch.zeros_like(truth), torch.zeros_like(truth)
    noise[0, :4], error[0, 4] = 1e-5, 2 * 4.2e-4
    floor = numeric_floor(torch.float32, runtime=False)
    assert _judged(error, noise, truth, floor) > 1.0
    assert _judged(noise, noise, truth, floor) <= 1.0


def test_without_noise_the_floor_decides() -> None:
    truth = _noise(0)
    zero = torch.zeros_like(truth)
    assert _judged(zero, zero, truth) == 0.0
    assert _judged(zero, zero, zero) == 0.0
    assert _judged(truth * 1e-8, zero, truth, floor=1e-7) <= 1.0
    assert _judged(truth * 1e-6, zero, truth, floor=1e-7) > 1.0
    assert _judged(truth, zero, zero, floor=1e-7) == math.inf


def test_ill_conditioned_weights_are_excused_only_up_to_a_limit() -> None:
    truth, noise = spread(_noise(0)), spread(1e-7 * _noise(1))
    mild, wild = spread(2e-7 * _noise(2)), spread(1e-3 * _noise(2))
    assert with_weight_rounding(noise, mild, truth, 1.2e-7).rms == pytest.approx(mild.rms)
    assert with_weight_rounding(noise, wild, truth, 1.2e-7).rms == pytest.approx(4 * 1.2e-7, rel=0.1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-12, 1e12))
def test_the_judgement_does_not_depend_on_the_unit(seed: int, unit: float) -> None:
    truth, noise, error = _noise(seed, (2, 5)), 1e-7 * _noise(seed + 1, (2, 5)), 1e-7 * _noise(seed + 2, (2, 5))
    assert _judged(error * unit, noise * unit, truth * unit) == pytest.approx(_judged(error, noise, truth), rel=1e-9)


def test_slices_of_another_runtime_are_granted_what_chance_does() -> None:
    """Where the input repeats itself there are few independent errors, and other kernels make others of them."""
    truth = torch.ones(64, 64, dtype=torch.float64)
    noise = torch.full_like(truth, 1e-6)
    error = noise.clone()
    error[3, 5] = 1e-4

    def held(samples: int, paired: bool) -> Judgement:
        return judge(*map(spread, (error, noise, truth)), factor=2.0, floor=0.0, samples=samples, paired=paired)

    assert held(16, True).where.startswith("index")
    assert held(16, False).ratio < 0.5 * held(16, True).ratio
    assert held(10**8, False).ratio == pytest.approx(held(10**8, True).ratio, rel=0.01)


@pytest.mark.parametrize(("given", "samples"), [(None, 40), (1, 16), (2, 32), (100, 40)])
def test_an_input_that_repeats_itself_is_few_samples(given: int | None, samples: int) -> None:
    truth = torch.arange(40.0, dtype=torch.float64)
    flat = flatten(truth.float())
    runs = Runs(flatten(truth), flat, flat, given=given)
    measured, failures = measure(runs, Rules())
    assert not failures
    assert measured[0].samples == samples
