"""The law of stacking: `stacked(f, g)(x) = cat(f(x), g(x))`, on random ranks, strides, paddings and padding modes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from reparam.algebra import AffineMap, Geometry, Inexact
from reparam.algebra.join import stacked
from tests.algebra.test_laws import SETTINGS, assert_same, maps, numbers, runs


@st.composite
def parallel(draw: st.DrawFn) -> tuple[list[AffineMap], torch.Tensor]:
    """Two to four maps that read one input alike, each with its own number of channels, with a shift or without."""
    rank = draw(st.integers(0, 3))
    channels = draw(st.sampled_from([1, 2, 3, 6]))
    first = draw(maps(max(rank, 1), channels, pointwise=rank == 0)).geometry
    geometry = replace(first, groups=1)
    found = [
        numbers(
            replace(geometry, out_channels=draw(st.integers(1, 4))), draw(st.integers(0, 2**20)), draw(st.booleans())
        )
        for _ in range(draw(st.integers(2, 4)))
    ]
    size = [draw(st.integers(7, 9)) for _ in range(rank)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return found, torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)


@SETTINGS
@given(parallel())
def test_stacked_agrees_with_concatenating(case: tuple[list[AffineMap], torch.Tensor]) -> None:
    found, x = case
    expected = torch.cat([runs(map_, x) for map_ in found], 1)
    one = stacked(found)
    assert isinstance(one, AffineMap)
    assert tuple(one.tensors()[0].shape) == one.geometry.weight_shape
    assert (one.bias is None) == all(map_.bias is None for map_ in found)
    assert_same(one.apply(x), expected)
    swapped = stacked(found[::-1])
    assert isinstance(swapped, AffineMap)
    assume(float((expected - swapped.apply(x)).abs().max()) > 0)  # the order matters: the law can fail


@SETTINGS
@given(parallel())
def test_stacking_is_associative_and_one_map_is_itself(case: tuple[list[AffineMap], torch.Tensor]) -> None:
    (f, g, *_), x = case
    assert stacked([f]) is f
    pair = stacked([f, g])
    assert isinstance(pair, AffineMap)
    left, right = stacked([pair, f]), stacked([f, stacked([g, f])])  # type: ignore[list-item]
    assert isinstance(left, AffineMap)
    assert isinstance(right, AffineMap)
    assert_same(runs(left, x), runs(right, x))


CONV = Geometry(4, 4, 1, (3,), (1,), (1,), (1,), ((1, 1),))
REFUSE = [
    (replace(CONV, in_channels=2), "different numbers of channels"),
    (replace(CONV, kernel=(1,)), "differ in kernel"),
    (replace(CONV, stride=(2,)), "differ in kernel"),
    (replace(CONV, dilation=(2,)), "differ in kernel"),
    (replace(CONV, upsampling=(2,)), "differ in kernel"),
    (replace(CONV, padding=((0, 2),)), "differ in kernel"),
    (replace(CONV, padding_mode="reflect"), "differ in kernel"),
    (replace(CONV, groups=2), "in groups"),
    (Geometry(4, 4), "differ in kernel"),
]


@pytest.mark.parametrize(("other", "reason"), REFUSE)
def test_what_reads_its_input_differently_is_not_stacked(other: Geometry, reason: str) -> None:
    f, g = numbers(CONV, 0, bias=True), numbers(other, 1, bias=False)
    for pair in ([f, g], [g, f]):
        found = stacked(pair)
        assert isinstance(found, Inexact)
        assert reason in found.reason


def test_half_precision_weights_are_stacked_in_float64_and_nothing_is_an_error() -> None:
    f = AffineMap.of(Geometry(2, 3), torch.randn(3, 2).half(), torch.randn(3).half())
    g = AffineMap.of(Geometry(2, 1), torch.randn(1, 2, dtype=torch.float64))
    one = stacked([f, g])
    assert isinstance(one, AffineMap)
    weight, bias = one.tensors()
    assert weight.dtype == torch.float64
    assert bias is not None
    assert bias.tolist()[3] == 0
    with pytest.raises(ValueError, match="no map"):
        stacked([])
