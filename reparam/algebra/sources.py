"""Affine maps from the layers of the field.

BatchNorm in eval mode (Ioffe and Szegedy 2015, section 3.1): `y = (x - m) * gamma / sqrt(v + eps) + beta`, that is the
scale `gamma / sqrt(v + eps)` and the shift `beta - m * scale`, channel by channel.
Average pooling over `k` positions is a depthwise convolution with weight `1/k`, if padding counts.
A transposed convolution with stride `s`, padding `p`, output padding `q` is an ordinary one over the input up-sampled
by `s`, with the kernel flipped, groups transposed, and padding `d*(k-1) - p` below and `d*(k-1) - p + q` above
(Dumoulin and Visin 2016, "A guide to convolution arithmetic for deep learning", section 4).
"""

from __future__ import annotations

import torch

from reparam.algebra.affine import AffineMap, Geometry, Pads
from reparam.algebra.deferred import Deferred


def from_conv(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: Pads,
    dilation: tuple[int, ...],
    groups: int,
    padding_mode: str = "zeros",
) -> AffineMap:
    """A convolution; `weight` is `[C_out, C_in / groups, *k]`. A 1x1 kernel that moves nothing becomes rank 0."""
    kernel = tuple(weight.shape[2:])
    channels = (weight.shape[1] * groups, weight.shape[0])
    pointwise = all(k == 1 for k in kernel) and all(s == 1 for s in stride) and all(pair == (0, 0) for pair in padding)
    if pointwise:
        return AffineMap.of(Geometry(*channels, groups), weight.flatten(1), bias)
    ones = (1,) * len(kernel)
    geometry = Geometry(*channels, groups, kernel, stride, dilation, ones, padding, padding_mode)
    return AffineMap.of(geometry, weight, bias)


def from_conv_transpose(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> AffineMap:
    """A transposed convolution; `weight` is `[C_in, C_out / groups, *k]`."""
    kernel = tuple(weight.shape[2:])
    in_channels, out_channels = weight.shape[0], weight.shape[1] * groups
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    pads = tuple((r - p, r - p + q) for r, p, q in zip(reach, padding, output_padding, strict=True))
    geometry = Geometry(in_channels, out_channels, groups, kernel, (1,) * len(kernel), dilation, stride, pads)
    flipped = Deferred(lambda w: transposed_weight(w, groups), Deferred.of(weight))
    return AffineMap(geometry, flipped, None if bias is None else Deferred.of(bias))


def transposed_weight(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """`[A, B / groups, *k]` to `[B, A / groups, *k]` with the kernel flipped; its own inverse."""
    a, b_per_group, *kernel = weight.shape
    blocks = weight.reshape(groups, a // groups, b_per_group, *kernel).transpose(1, 2)
    return blocks.reshape(groups * b_per_group, a // groups, *kernel).flip(tuple(range(2, weight.ndim)))


def from_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> AffineMap:
    """A linear layer; `weight` is `[out_features, in_features]`."""
    return AffineMap.of(Geometry(weight.shape[1], weight.shape[0]), weight, bias)


def from_batch_norm(
    mean: torch.Tensor, var: torch.Tensor, gamma: torch.Tensor | None, beta: torch.Tensor | None, eps: float
) -> AffineMap:
    """BatchNorm in eval mode with running statistics; every tensor is `[C]`."""
    mean, var = mean.detach(), var.detach()

    def scale() -> torch.Tensor:
        inverse = torch.rsqrt(var.to(torch.float64) + eps)
        return inverse if gamma is None else inverse * gamma.detach().to(torch.float64)

    weight = Deferred(lambda: scale().unsqueeze(1))
    shift = Deferred(lambda: (0.0 if beta is None else beta.detach().to(torch.float64)) - mean * scale())
    return AffineMap(_diagonal(mean.numel()), weight, shift)


def from_scale_shift(scale: torch.Tensor | None, shift: torch.Tensor | None) -> AffineMap:
    """`x * scale + shift`, both `[C]`; at least one is given."""
    given = scale if scale is not None else shift
    if given is None:
        raise ValueError("a scale or a shift is needed")
    weight = torch.ones_like(given, dtype=torch.float64) if scale is None else scale
    return AffineMap.of(_diagonal(given.numel()), weight.unsqueeze(1), shift)


def from_average_pool(
    channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: Pads,
    device: torch.device | str = "cpu",
) -> AffineMap:
    """Average pooling that counts its padding (or has none), without `ceil_mode`."""
    count = 1
    for k in kernel:
        count *= k
    ones = (1,) * len(kernel)
    geometry = Geometry(channels, channels, channels, kernel, stride, ones, ones, padding)
    weight = Deferred(lambda: torch.full((channels, 1, *kernel), 1.0 / count, dtype=torch.float64, device=device))
    return AffineMap(geometry, weight, has_weights=False)


def from_padding(channels: int, padding: Pads, padding_mode: str, device: torch.device | str = "cpu") -> AffineMap:
    """Explicit padding, negative where it crops: the identity with a padding."""
    ones = (1,) * len(padding)
    geometry = Geometry(channels, channels, channels, ones, ones, ones, ones, padding, padding_mode)
    weight = Deferred(lambda: torch.ones(geometry.weight_shape, dtype=torch.float64, device=device))
    return AffineMap(geometry, weight, has_weights=False)


def identity(channels: int, device: torch.device | str = "cpu") -> AffineMap:
    """`x` itself; `device` is where its weight of ones is made if it is needed."""
    ones = Deferred(lambda: torch.ones(channels, 1, dtype=torch.float64, device=device))
    return AffineMap(_diagonal(channels), ones, None, is_identity=True, has_weights=False)


def _diagonal(channels: int) -> Geometry:
    return Geometry(channels, channels, channels)
