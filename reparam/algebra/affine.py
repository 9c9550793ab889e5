"""`AffineMap`: "this tensor is `W * x + b` of that tensor".

Meaning, with all quantities per spatial axis:

    f(x)[o, i] = b[o] + sum_{c, k} W[o, c, k] * X[c, s*i + d*k - p_low]

`X` is `x` with `u - 1` zeros inserted between neighbours (`u` = upsampling, 1 for ordinary convolutions), continued
beyond its edges by the padding mode. `u > 1` is how a transposed convolution is written, so one formula serves both.
A map of rank 0 has no spatial axis: it acts on each position alone (a linear layer, a 1x1 convolution, a scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from reparam.algebra.deferred import Deferred

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

Pads: TypeAlias = "tuple[tuple[int, int], ...]"


@dataclass(frozen=True)
class Inexact:
    """Why a composition is not the map one would like it to be.

    Attributes:
        reason: a clause that completes "it stays, because ...".
        remedy: what would lift it; empty if nothing would.
    """

    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Geometry:
    """Everything about an affine map but its numbers.

    Attributes:
        in_channels, out_channels, groups: as in `torch.nn.Conv2d`.
        kernel, stride, dilation, upsampling: one positive integer per spatial axis; empty for rank 0.
        padding: (low, high) per spatial axis; negative crops.
        padding_mode: how `x` continues beyond its edges: zeros, reflect, replicate or circular.
    """

    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    upsampling: tuple[int, ...] = ()
    padding: Pads = ()
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        rank = len(self.kernel)
        lengths = {len(self.stride), len(self.dilation), len(self.upsampling), len(self.padding)}
        if lengths != {rank}:
            raise ValueError(f"every per-axis field needs {rank} entries: {self}")
        if min((*self.kernel, *self.stride, *self.dilation, *self.upsampling, 1)) < 1:
            raise ValueError(f"kernel, stride, dilation and upsampling must be positive: {self}")
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(f"groups must divide both channel counts: {self}")
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {PADDING_MODES}: {self}")

    @property
    def rank(self) -> int:
        """Number of spatial axes the kernel extends over; 0 acts on each position alone."""
        return len(self.kernel)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(out_channels, in_channels / groups, *kernel)`."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def is_diagonal(self) -> bool:
        """Whether it scales each channel alone and position by position."""
        return self.rank == 0 and self.groups == self.in_channels == self.out_channels

    @property
    def is_padded(self) -> bool:
        """Whether it reads beyond the edges of its input on some side."""
        return any(low > 0 or high > 0 for low, high in self.padding)

    @property
    def is_transposed(self) -> bool:
        """Whether it up-samples, as a transposed convolution does."""
        return any(factor > 1 for factor in self.upsampling)

    def size_offset(self, axis: int) -> int:
        """`a` in `n_out = floor((u*(n-1) + a) / s) + 1`: two maps agree in size for every `n` iff it is equal."""
        low, high = self.padding[axis]
        return low + high - self.dilation[axis] * (self.kernel[axis] - 1)

    def with_rank(self, rank: int) -> Geometry:
        """A rank-0 geometry as a kernel of ones in `rank` axes; others must already have that rank."""
        if self.rank == rank:
            return self
        if self.rank:
            raise ValueError(f"a map of rank {self.rank} is not one of rank {rank}")
        ones = (1,) * rank
        return Geometry(
            self.in_channels, self.out_channels, self.groups, ones, ones, ones, ones, ((0, 0),) * rank, "zeros"
        )

    def output_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial output size for a spatial input size."""
        if not self.rank:
            return size
        return tuple(
            (self.upsampling[axis] * (n - 1) + self.size_offset(axis)) // self.stride[axis] + 1
            for axis, n in enumerate(size)
        )


@dataclass(frozen=True, eq=False)
class AffineMap:
    """An affine, shift-invariant map with its numbers in float64, computed on demand.

    Attributes:
        geometry: shapes, strides, paddings.
        weight: `[out_channels, in_channels / groups, *kernel]`, deferred.
        bias: `[out_channels]`, deferred, or None for an exact zero.
        is_identity: known to return its input unchanged.
        has_weights: whether its numbers are learned, or made by composing or adding maps. A pooling, a padding and an
            identity have none: they take any number of channels.
    """

    geometry: Geometry
    weight: Deferred
    bias: Deferred | None = None
    is_identity: bool = False
    has_weights: bool = True

    @classmethod
    def of(cls, geometry: Geometry, weight: torch.Tensor, bias: torch.Tensor | None = None) -> AffineMap:
        """A map from existing tensors of any floating dtype.

        Raises:
            ValueError: the shapes do not fit the geometry.
        """
        if tuple(weight.shape) != geometry.weight_shape:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, the geometry needs {geometry.weight_shape}")
        if bias is not None and tuple(bias.shape) != (geometry.out_channels,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}, the geometry needs ({geometry.out_channels},)")
        return cls(geometry, Deferred.of(weight), None if bias is None else Deferred.of(bias))

    def with_rank(self, rank: int) -> AffineMap:
        """The same map with a kernel of ones in `rank` axes, if it has rank 0."""
        if self.geometry.rank == rank:
            return self
        shape = self.geometry.with_rank(rank).weight_shape
        weight = self.weight.reshaped(shape)
        return AffineMap(self.geometry.with_rank(rank), weight, self.bias, self.is_identity)

    @property
    def linear_part(self) -> AffineMap:
        """The map without its bias."""
        return self if self.bias is None else AffineMap(self.geometry, self.weight)

    def tensors(self, memo: dict[Deferred, torch.Tensor] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in float64."""
        memo = {} if memo is None else memo
        bias = None if self.bias is None else self.bias.evaluate(memo).to(torch.float64)
        return self.weight.evaluate(memo).to(torch.float64), bias

    def has_zero_bias(self) -> bool:
        """Whether the bias is exactly zero; computes it if need be."""
        return self.bias is None or not bool(self.bias.evaluate().any())

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """The map's value, straight from the definition; `x` is `[N, in_channels, *spatial]` in float64."""
        rank = x.ndim - 2
        this = self.with_rank(rank) if rank else self
        weight, bias = this.tensors()
        geometry = this.geometry
        if not rank:
            return _grouped_linear(x, weight, geometry.groups) + (0 if bias is None else bias)
        x = _continued(_upsampled(x, geometry.upsampling), geometry.padding, geometry.padding_mode)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        return convolve(x, weight, bias, geometry.stride, 0, geometry.dilation, geometry.groups)


def _grouped_linear(x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
    return F.conv1d(x.unsqueeze(-1), weight.unsqueeze(-1), groups=groups).squeeze(-1)


def _upsampled(x: torch.Tensor, factors: tuple[int, ...]) -> torch.Tensor:
    for axis, factor in enumerate(factors, start=2):
        if factor > 1:
            shape = list(x.shape)
            shape[axis] = (shape[axis] - 1) * factor + 1
            wide = x.new_zeros(shape)
            wide[(slice(None),) * axis + (slice(None, None, factor),)] = x
            x = wide
    return x


def _continued(x: torch.Tensor, padding: Pads, mode: str) -> torch.Tensor:
    grow = [max(side, 0) for pair in reversed(padding) for side in pair]
    crop = [min(side, 0) for pair in reversed(padding) for side in pair]
    if any(grow):
        x = F.pad(x, grow, mode="constant" if mode == "zeros" else mode)
    return F.pad(x, crop) if any(crop) else x
