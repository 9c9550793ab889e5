"""The maps of the layers agree with torch's own operations, over random arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st

from reparam.algebra import (
    AffineMap,
    from_average_pool,
    from_batch_norm,
    from_conv,
    from_conv_transpose,
    from_linear,
    from_padding,
    from_scale_shift,
    sources,
)
from tests.algebra.drawing import FIRST_FAILURE, SETTINGS, assert_same, random

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

CONV = (F.conv1d, F.conv2d, F.conv3d)
UP = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def per_axis(draw: st.DrawFn, rank: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(rank))


@st.composite
def images(draw: st.DrawFn, most: int = 3) -> tuple[torch.Tensor, int, int, int]:
    """(image, groups, output channels, seed); the channels are a multiple of the groups."""
    rank, groups, seed = draw(st.integers(1, most)), draw(st.integers(1, 3)), draw(st.integers(0, 2**20))
    c_in, c_out = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    size = per_axis(draw, rank, 5, 8)
    return random(seed, 2, c_in, *size), groups, c_out, seed + 1


def or_drop(value: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Torch's own answer; examples that torch refuses (empty outputs, too much padding) are dropped."""
    try:
        return value()
    except RuntimeError:
        assume(False)
        raise


def flat(padding: tuple[tuple[int, int], ...]) -> list[int]:
    """`F.pad`'s order: the last axis first."""
    return [side for pair in reversed(padding) for side in pair]


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[AffineMap, torch.Tensor, torch.Tensor]:
    x, groups, c_out, seed = draw(images())
    rank = x.ndim - 2
    kernel, stride, dilation = (per_axis(draw, rank, 1, high) for high in (3, 3, 2))
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in range(rank))
    mode = draw(st.sampled_from(list(MODES)))
    weight = random(seed, c_out, x.shape[1] // groups, *kernel)
    bias = random(seed + 1, c_out) if draw(st.booleans()) else None
    made = sources.from_conv(weight, bias, stride, padding, dilation, groups, mode)
    wide = or_drop(lambda: F.pad(x, flat(padding), mode=MODES[mode]))
    return made, x, or_drop(lambda: CONV[rank - 1](wide, weight, bias, stride, 0, dilation, groups))


@st.composite
def transposed(draw: st.DrawFn) -> tuple[AffineMap, torch.Tensor, torch.Tensor]:
    x, groups, c_out, seed = draw(images())
    rank = x.ndim - 2
    kernel, stride, dilation, padding = (
        per_axis(draw, rank, low, high) for low, high in ((1, 4), (1, 3), (1, 2), (0, 2))
    )
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    weight = random(seed, x.shape[1], c_out // groups, *kernel)
    bias = random(seed + 1, c_out) if draw(st.booleans()) else None
    expected = or_drop(lambda: UP[rank - 1](x, weight, bias, stride, padding, extra, groups, dilation))
    return sources.from_conv_transpose(weight, bias, stride, padding, extra, dilation, groups), x, expected


@st.composite
def norms(draw: st.DrawFn) -> tuple[AffineMap, torch.Tensor, torch.Tensor]:
    x, _, _, seed = draw(images())
    c, eps = x.shape[1], draw(st.sampled_from([1e-5, 1e-3, 0.1]))
    mean, var = random(seed, c), random(seed + 1, c).abs() + 0.1
    gamma = random(seed + 2, c) if draw(st.booleans()) else None
    beta = random(seed + 3, c) if draw(st.booleans()) else None
    return sources.from_batch_norm(mean, var, gamma, beta, eps), x, F.batch_norm(x, mean, var, gamma, beta, eps=eps)


@st.composite
def pools(draw: st.DrawFn) -> tuple[AffineMap, torch.Tensor, torch.Tensor]:
    x, _, _, _ = draw(images())
    rank = x.ndim - 2
    kernel, stride = per_axis(draw, rank, 1, 4), per_axis(draw, rank, 1, 3)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    expected = or_drop(lambda: POOL[rank - 1](x, kernel, stride, padding))
    return sources.from_average_pool(x.shape[1], kernel, stride, tuple((p, p) for p in padding)), x, expected


@st.composite
def paddings(draw: st.DrawFn) -> tuple[AffineMap, torch.Tensor, torch.Tensor]:
    x, _, _, _ = draw(images())
    mode = draw(st.sampled_from(list(MODES)))
    low = -2 if mode == "zeros" else 0
    sides = tuple((draw(st.integers(low, 3)), draw(st.integers(low, 3))) for _ in range(x.ndim - 2))
    expected = or_drop(lambda: F.pad(x, flat(sides), mode=MODES[mode]))
    return sources.from_padding(x.shape[1], sides, mode), x, expected


@st.composite
def scales(draw: st.DrawFn) -> tuple[AffineMap, torch.Tensor, torch.Tensor]:
    x, _, _, seed = draw(images())
    which = draw(st.sampled_from(["scale", "shift", "both"]))
    scale = random(seed, x.shape[1]) if which != "shift" else None
    shift = random(seed + 1, x.shape[1]) if which != "scale" else None
    column = (1, -1, *(1,) * (x.ndim - 2))
    expected = x if scale is None else x * scale.view(column)
    return sources.from_scale_shift(scale, shift), x, expected if shift is None else expected + shift.view(column)


@st.composite
def linears(draw: st.DrawFn) -> tuple[AffineMap, torch.Tensor, torch.Tensor]:
    seed, c_in, c_out = draw(st.integers(0, 2**20)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    x, weight = random(seed, 3, c_in), random(seed + 1, c_out, c_in)
    bias = random(seed + 2, c_out) if draw(st.booleans()) else None
    return sources.from_linear(weight, bias), x, F.linear(x, weight, bias)


LAYERS = {
    "conv": convolutions(),
    "conv_transpose": transposed(),
    "batch_norm": norms(),
    "average_pool": pools(),
    "padding": paddings(),
    "scale_shift": scales(),
    "linear": linears(),
}


def agrees(kind: str, settings: Any = SETTINGS) -> None:
    """The law, on random examples of one kind."""

    @settings
    @given(LAYERS[kind])
    def law(case: tuple[AffineMap, torch.Tensor, torch.Tensor]) -> None:
        made, x, expected = case
        assert tuple(made.tensors()[0].shape) == made.geometry.weight_shape
        assert_same(made.apply(x), expected)

    law()


@pytest.mark.parametrize("kind", LAYERS)
def test_map_agrees_with_torch(kind: str) -> None:
    agrees(kind)


def swapped_sides(channels: int, padding: Any, mode: str, device: str = "cpu") -> AffineMap:
    """The sides of the padding in the wrong order."""
    return from_padding(channels, tuple((high, low) for low, high in padding), mode, device)


SABOTAGED: dict[str, Callable[..., AffineMap]] = {
    "conv": lambda w, b, s, p, d, g, m: from_conv(w, b, s, tuple(pair[::-1] for pair in p), d, g, m),
    "conv_transpose": lambda w, b, s, p, o, d, g: from_conv_transpose(w.flip(-1), b, s, p, o, d, g),
    "batch_norm": lambda mean, var, gamma, beta, eps: from_batch_norm(mean, var, gamma, beta, 0.0),
    "average_pool": lambda c, k, s, p: from_average_pool(c, tuple(reversed(k)), s, p),
    "padding": swapped_sides,
    "scale_shift": lambda scale, shift: (
        from_scale_shift(None if scale is None else scale.abs(), shift)
        if scale is None or shift is None
        else from_scale_shift(scale, shift * scale)
    ),
    "linear": lambda w, b: from_linear(w, None),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_wrong_formula_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, f"from_{kind}", SABOTAGED[kind])
    with pytest.raises(AssertionError):
        agrees(kind, FIRST_FAILURE)
