"""The laws of the algebra, on random ranks, groups, strides, dilations, paddings and padding modes.

Each law is a function that draws its examples, so that the same law can be run on a sabotaged implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from reparam.algebra import AffineMap, Geometry, Inexact, compose, identity
from tests.algebra.drawing import SETTINGS, assert_same, branches, chains, maps, numbers, random, runs

Law = Callable[[], None]


def made(value: AffineMap | Inexact) -> AffineMap:
    """The map; examples without one are dropped."""
    assume(isinstance(value, AffineMap))
    assert isinstance(value, AffineMap)
    return value


def then_agrees_with_running_both() -> None:
    @SETTINGS
    @given(chains(2))
    def law(case: tuple[list[AffineMap], torch.Tensor]) -> None:
        (f, g), x = case
        expected = runs(g, runs(f, x))
        merged = made(compose.then(f, g))
        assert merged.geometry.weight_shape == tuple(merged.tensors()[0].shape)
        assert_same(merged.apply(x), expected)

    law()


def then_is_associative() -> None:
    @SETTINGS
    @given(chains(3))
    def law(case: tuple[list[AffineMap], torch.Tensor]) -> None:
        (f, g, h), x = case
        left, right = made(compose.then(f, g)), made(compose.then(g, h))
        one, other = made(compose.then(left, h)), made(compose.then(f, right))
        expected = runs(h, runs(g, runs(f, x)))
        assert_same(runs(one, x), expected)
        assert_same(runs(other, x), expected)

    law()


def plus_agrees_with_adding() -> None:
    @SETTINGS
    @given(branches(2))
    def law(case: tuple[list[AffineMap], torch.Tensor]) -> None:
        (f, g), x = case
        expected = runs(f, x) + runs(g, x)
        assert_same(made(compose.plus(f, g)).apply(x), expected)

    law()


def plus_commutes() -> None:
    @SETTINGS
    @given(branches(2))
    def law(case: tuple[list[AffineMap], torch.Tensor]) -> None:
        (f, g), x = case
        merged, swapped = compose.plus(f, g), compose.plus(g, f)
        assert isinstance(merged, Inexact) == isinstance(swapped, Inexact)
        merged, swapped = made(merged), made(swapped)
        assert merged.geometry == swapped.geometry
        assert_same(runs(swapped, x), runs(merged, x))

    law()


def plus_is_associative() -> None:
    @SETTINGS
    @given(branches(3))
    def law(case: tuple[list[AffineMap], torch.Tensor]) -> None:
        (f, g, h), x = case
        left = made(compose.plus(made(compose.plus(f, g)), h))
        right = made(compose.plus(f, made(compose.plus(g, h))))
        assert left.geometry.groups == right.geometry.groups
        assert_same(runs(left, x), runs(right, x))
        assert_same(runs(left, x), runs(f, x) + runs(g, x) + runs(h, x))

    law()


def then_distributes_over_plus() -> None:
    """`h(f + g) = h(f) + h(g)` for an unpadded h, whose shift counts once only."""

    @SETTINGS
    @given(branches(2), st.data())
    def law(case: tuple[list[AffineMap], torch.Tensor], data: st.DataObject) -> None:
        (f, g), x = case
        h = unpadded(data.draw, x.ndim - 2, f.geometry.out_channels)
        both = made(compose.then(made(compose.plus(f, g)), h))
        apart = made(compose.plus(made(compose.then(f, h)), made(compose.then(g, h.linear_part))))
        expected = runs(h, runs(f, x) + runs(g, x))
        assert_same(runs(both, x), expected)
        assert_same(runs(apart, x), expected)

    law()


def then_distributes_from_the_left() -> None:
    """`(f + g)(e) = f(e) + g(e)` for a position-wise e, which may scale and shift as long as nobody pads."""

    @SETTINGS
    @given(branches(2), st.data())
    def law(case: tuple[list[AffineMap], torch.Tensor], data: st.DataObject) -> None:
        (f, g), x = case
        e = data.draw(maps(x.ndim - 2, 2, pointwise=True, outputs=4))
        x = x[:, :2]
        both = made(compose.then(e, made(compose.plus(f, g))))
        apart = made(compose.plus(made(compose.then(e, f)), made(compose.then(e, g))))
        assert_same(runs(both, x), runs(apart, x))
        assert_same(runs(both, x), runs(f, runs(e, x)) + runs(g, runs(e, x)))

    law()


def unpadded(draw: Any, rank: int, channels: int) -> AffineMap:
    """A map without padding, up-sampling and mode."""
    geometry = draw(maps(rank, channels)).geometry
    geometry = replace(
        geometry,
        padding=tuple((0, 0) for _ in geometry.kernel),
        upsampling=(1,) * geometry.rank,
        padding_mode="zeros",
    )
    return numbers(geometry, draw(st.integers(0, 2**20)), draw(st.booleans()))


def identity_is_neutral_and_zero_adds_nothing() -> None:
    @SETTINGS
    @given(chains(1))
    def law(case: tuple[list[AffineMap], torch.Tensor]) -> None:
        (f,), x = case
        expected = runs(f, x)
        # A diagonal of ones that is not known to be the identity has to go through the arithmetic.
        for one in (identity, ones):
            assert_same(runs(made(compose.then(one(f.geometry.in_channels), f)), x), expected)
            assert_same(runs(made(compose.then(f, one(f.geometry.out_channels))), x), expected)
        zero = AffineMap.of(f.geometry, torch.zeros(f.geometry.weight_shape, dtype=torch.float64))
        assert_same(runs(made(compose.plus(f, zero)), x), expected)
        assert_same(runs(made(compose.plus(zero, f)), x), expected)

    law()


def zero_behind_is_zero() -> None:
    """`0(f(x)) = 0` and `f + (-f) = 0`, the bias exactly."""

    @SETTINGS
    @given(chains(1))
    def law(case: tuple[list[AffineMap], torch.Tensor]) -> None:
        (f,), x = case
        expected = torch.zeros_like(runs(f, x))
        channels = f.geometry.out_channels
        zero = AffineMap.of(Geometry(channels, channels, channels), torch.zeros(channels, 1, dtype=torch.float64))
        assert_same(runs(made(compose.then(f, zero)), x), expected)
        minus = AffineMap.of(Geometry(channels, channels, channels), -torch.ones(channels, 1, dtype=torch.float64))
        nothing = made(compose.plus(f, made(compose.then(f, minus))))
        assert_same(runs(nothing, x), expected)
        assert nothing.has_zero_bias()

    law()


def ones(channels: int) -> AffineMap:
    return AffineMap.of(Geometry(channels, channels, channels), torch.ones(channels, 1, dtype=torch.float64))


def regrouping_changes_nothing() -> None:
    @SETTINGS
    @given(chains(1))
    def law(case: tuple[list[AffineMap], torch.Tensor]) -> None:
        (f,), x = case
        groups = f.geometry.groups
        for coarser in (g for g in range(1, groups + 1) if groups % g == 0):
            merged = compose.regrouped(f, coarser)
            assert merged.geometry.groups == coarser
            assert_same(merged.apply(x) if coarser == groups else runs(merged, x), runs(f, x))

    law()


def pointwise_around_a_transposed_convolution() -> None:
    @SETTINGS
    @given(st.integers(1, 2), st.data())
    def law(rank: int, data: st.DataObject) -> None:
        geometry = data.draw(maps(rank, 4, pointwise=False)).geometry
        geometry = replace(geometry, upsampling=(2,) * rank, padding_mode="zeros")
        up = numbers(geometry, data.draw(st.integers(0, 2**20)), data.draw(st.booleans()))
        before = data.draw(maps(rank, 6, pointwise=True, outputs=4))
        behind = data.draw(maps(rank, geometry.out_channels, pointwise=True))
        x = random(data.draw(st.integers(0, 2**20)), 1, 6, *(5,) * rank)
        assert_same(
            runs(made(compose.then(made(compose.then(before.linear_part, up)), behind)), x),
            runs(behind, runs(up, runs(before.linear_part, x))),
        )
        if before.bias is not None:
            assert isinstance(compose.then(before, up), Inexact)

    law()


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        then_agrees_with_running_both,
        then_is_associative,
        plus_agrees_with_adding,
        plus_commutes,
        plus_is_associative,
        then_distributes_over_plus,
        then_distributes_from_the_left,
        identity_is_neutral_and_zero_adds_nothing,
        zero_behind_is_zero,
        regrouping_changes_nothing,
        pointwise_around_a_transposed_convolution,
    )
}


@pytest.mark.parametrize("law", LAWS)
def test_law(law: str) -> None:
    LAWS[law]()


@SETTINGS
@given(st.integers(1, 3), st.integers(1, 2), st.integers(2, 12))
def test_size_formula_is_the_size(rank: int, stride: int, size: int) -> None:
    geometry = Geometry(2, 2, 1, (3,) * rank, (stride,) * rank, (1,) * rank, (1,) * rank, ((1, 0),) * rank)
    x = torch.zeros(1, 2, *(size,) * rank, dtype=torch.float64)
    assert numbers(geometry, 0, False).apply(x).shape[2:] == geometry.output_size((size,) * rank)
