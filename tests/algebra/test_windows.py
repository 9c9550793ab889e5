"""Laws of maps of some of the channels: rows, columns, embeddings, parts side by side, selections, repetitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reparam import algebra
from reparam.algebra import AffineMap, Geometry, Inexact

RANKS = st.sampled_from([0, 1, 2])


@st.composite
def maps(draw: st.DrawFn, rank: int | None = None, groups: int | None = None) -> AffineMap:
    """A random map with small channel counts."""
    rank = draw(RANKS) if rank is None else rank
    groups = draw(st.sampled_from([1, 2, 3])) if groups is None else groups
    inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    ones, pads = (1,) * rank, tuple((draw(st.integers(0, 1)), draw(st.integers(0, 1))) for _ in range(rank))
    geometry = Geometry(inner * groups, outer * groups, groups, kernel, ones, ones, ones, pads)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    weight = torch.randn(geometry.weight_shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(geometry.out_channels, generator=generator, dtype=torch.float64)
    return AffineMap.of(geometry, weight, bias if draw(st.booleans()) else None)


def inputs(channels: int, rank: int) -> torch.Tensor:
    return torch.randn(2, channels, *(4 + axis for axis in range(rank)), dtype=torch.float64)


def window(draw: st.DrawFn, size: int) -> tuple[int, int]:
    start = draw(st.integers(0, size - 1))
    return start, draw(st.integers(start + 1, size))


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_rows_are_the_slice_of_the_result(data: st.DataObject) -> None:
    f = data.draw(maps())
    chosen = window(data.draw, f.geometry.out_channels)
    part = algebra.rows(f, chosen)
    if isinstance(part, Inexact):
        assert f.geometry.groups > 1
        return
    x = inputs(f.geometry.in_channels, f.geometry.rank)
    assert close(part.map.apply(x[:, slice(*part.other)]), f.apply(x)[:, slice(*chosen)])


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_columns_are_the_map_of_an_input_that_is_zero_elsewhere(data: st.DataObject) -> None:
    f = data.draw(maps())
    chosen = window(data.draw, f.geometry.in_channels)
    part = algebra.columns(f, chosen)
    if isinstance(part, Inexact):
        assert f.geometry.groups > 1
        return
    x = inputs(f.geometry.in_channels, f.geometry.rank)
    x[:, : chosen[0]], x[:, chosen[1] :] = 0, 0
    whole = f.linear_part.apply(x)
    assert close(part.map.apply(x[:, slice(*chosen)]), whole[:, slice(*part.other)])
    whole[:, slice(*part.other)] = 0
    assert not whole.any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_placed_reads_and_makes_its_own_channels(data: st.DataObject) -> None:
    f = data.draw(maps())
    row, column = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    out, inner = f.geometry.out_channels, f.geometry.in_channels
    wide = algebra.placed(f, row, row + out + 1, column, column + inner + 2)
    x = inputs(column + inner + 2, f.geometry.rank)
    result = wide.apply(x)
    assert close(result[:, row : row + out], f.linear_part.apply(x[:, column : column + inner]))
    assert not result[:, :row].any()
    assert not result[:, row + out :].any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_side_by_side_is_the_concatenation(data: st.DataObject) -> None:
    rank = data.draw(RANKS)
    f, count = data.draw(maps(rank)), data.draw(st.integers(1, 3))
    inner, outer = (n // f.geometry.groups for n in (f.geometry.in_channels, f.geometry.out_channels))
    geometry = replace(f.geometry, in_channels=inner * count, out_channels=outer * count, groups=count)
    g = AffineMap.of(geometry, torch.randn(geometry.weight_shape, dtype=torch.float64))
    whole = algebra.side_by_side([f, g])
    assert isinstance(whole, AffineMap)
    x = inputs(f.geometry.in_channels + g.geometry.in_channels, rank)
    parts = x.split([f.geometry.in_channels, g.geometry.in_channels], 1)
    assert close(whole.apply(x), torch.cat([f.linear_part.apply(parts[0]), g.linear_part.apply(parts[1])], 1))
    assert whole.geometry.groups == f.geometry.groups + g.geometry.groups


def test_side_by_side_of_different_groups_is_refused() -> None:
    f = AffineMap.of(Geometry(2, 2), torch.ones(2, 2))
    g = AffineMap.of(Geometry(3, 3), torch.ones(3, 3))
    assert isinstance(algebra.side_by_side([f, g]), Inexact)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_selection_indexes(index: list[int], data: st.DataObject) -> None:
    chosen = algebra.from_selection(index, 5)
    x = inputs(5, 1)
    assert torch.equal(chosen.apply(x[..., 0]), x[..., 0][:, index])
    out = data.draw(st.integers(1, 3))
    f = AffineMap.of(Geometry(len(index), out), torch.randn(out, len(index), dtype=torch.float64))
    both = algebra.then(chosen, f)
    assert isinstance(both, AffineMap)
    assert close(both.apply(x[..., 0]), f.apply(x[..., 0][:, index]))


def test_selection_out_of_range_is_an_error() -> None:
    with pytest.raises(ValueError, match="not all in"):
        algebra.from_selection([0, 5], 5)


@pytest.mark.parametrize("times", [1, 3])
def test_repeated_scales_each_neighbour(times: int) -> None:
    scale = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    wide = algebra.repeated(algebra.from_scale_shift(scale, None), times)
    x = torch.randn(2, 3, 4, times, dtype=torch.float64)
    flat = x.permute(0, 1, 3, 2).flatten(1, 2)
    assert close(wide.apply(flat), (x * scale.view(3, 1, 1)).permute(0, 1, 3, 2).flatten(1, 2))


def test_only_a_scale_can_be_repeated() -> None:
    with pytest.raises(ValueError, match="each channel alone"):
        algebra.repeated(AffineMap.of(Geometry(2, 2), torch.ones(2, 2)), 2)
