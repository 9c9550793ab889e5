"""When padding makes a composition inexact.

In `g(f(x))` a padded `g` reads the output of `f` beyond its edges. There the original has the padding value, while a
merged map has `f` evaluated outside of its range. The two agree in these cases, and in these cases only:

- `g` reads nothing outside (no padding, or cropping): always;
- `g` pads with zeros: every value of `f` outside its range is 0, that is, all taps of `f` there fall into the zero
  padding of `x`, and `f` has no bias. Below the range this needs `d*(k-1) <= p_low + s - 1`, above it
  `d*(k-1) <= p_high` (the size of `x` being free);
- `g` pads by reflecting, replicating or wrapping: `f` acts on each position alone; a bias is harmless there.

A `g` that up-samples puts zeros *between* the outputs of `f`; so `f` must act on each position alone and have no bias.
"""

from __future__ import annotations

from reparam.algebra.affine import AffineMap, Geometry, Inexact


def crossing(f: AffineMap, g: AffineMap) -> Inexact | None:
    """Why `g(f(x))` is not one affine map of `x`, or None if it is. Both have the same rank."""
    first, second = f.geometry, g.geometry
    if second.is_transposed:
        return _into_upsampling(f, second)
    if not second.is_padded:
        return None
    if second.padding_mode != "zeros":
        if _acts_on_positions(first):
            return None
        return Inexact(
            f"the next layer pads by mode '{second.padding_mode}', which only a position-wise layer commutes with",
            "pad once, in front of the first of the two layers",
        )
    if first.is_padded and first.padding_mode != "zeros":
        return Inexact(
            f"the first layer pads by mode '{first.padding_mode}' and the next one with zeros",
            "use one padding mode, and pad in front of the first layer only",
        )
    if not _vanishes_outside(first, second):
        return Inexact(
            "the next layer's zero padding lies where this layer's output would not be zero",
            "give all of the padding to the first of the two layers",
        )
    return None if f.has_zero_bias() else shift_crossing(second)


def shift_crossing(second: Geometry) -> Inexact | None:
    """Why a shift, equal at all positions, does not stay one behind a map; None if it does."""
    if second.is_transposed:
        return Inexact(
            "its shift cannot enter a transposed convolution, which puts zeros between its inputs",
            "drop the shift, or scale without shifting",
        )
    if second.is_padded and second.padding_mode == "zeros":
        return Inexact(
            "its shift cannot cross the zero padding of the next layer: at the border that layer sees 0, not the shift",
            "move the padding in front of it, pad with its shift, or fuse for one image size (fixed sizes)",
        )
    return None


def _into_upsampling(f: AffineMap, second: Geometry) -> Inexact | None:
    if not _acts_on_positions(f.geometry):
        return Inexact("the next layer is a transposed convolution, which only a position-wise layer merges into")
    return None if f.has_zero_bias() else shift_crossing(second)


def _acts_on_positions(geometry: Geometry) -> bool:
    return (
        all(k == 1 for k in geometry.kernel)
        and all(s == 1 for s in geometry.stride)
        and all(u == 1 for u in geometry.upsampling)
        and all(pair == (0, 0) for pair in geometry.padding)
    )


def _vanishes_outside(first: Geometry, second: Geometry) -> bool:
    for axis, (low, high) in enumerate(second.padding):
        reach = first.dilation[axis] * (first.kernel[axis] - 1)
        first_low, first_high = first.padding[axis]
        if low > 0 and reach > first_low + first.stride[axis] - 1:
            return False
        if high > 0 and reach > first_high:
            return False
    return True
