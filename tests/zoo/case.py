"""What a test model is, and the layers of any rank that the models are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


@dataclass(frozen=True)
class BlockCase:
    """One block, small, and what must be left of it.

    Attributes:
        name: unique; also the test's name.
        build: makes the model; random numbers are seeded, statistics randomised and the dtype set by `make`.
        input_shape: of the only input, batch first.
        expected: operations that remain, by kind (see `tests.support.static_counts`); kinds not named are not asserted.
            "conv+linear" is the sum of two kinds, where either may be left.
        since: the issue whose work collapses the block to `expected`. Exactness is asserted whatever it says.
        flexible: other image sizes than `input_shape` are legal for the original.
        may_refuse: the block may also be refused as a whole with a `ReparamError` (its `forward` cannot be captured).
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    expected: Mapping[str, int] = field(default_factory=lambda: {"conv": 1, "bn": 0, "linear": 0})
    since: str = "2"
    flexible: bool = True
    may_refuse: bool = False

    def make(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The model in eval mode, with randomised BatchNorms; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build()
            randomise(model)
        return in_dtype(model, dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float64, batch: int | None = None, grow: int = 0) -> torch.Tensor:
        """Random input; `grow` is added to every spatial size."""
        shape = list(self.input_shape)
        if batch is not None:
            shape[0] = batch
        shape[2:] = [size + grow for size in shape[2:]]
        generator = torch.Generator().manual_seed(100 * grow + (batch or 0))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in `dtype`; in float64 its numbers are such that float32 cannot hold them, so that a detour shows."""
    model = model.to(dtype)
    if dtype == torch.float64:
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.div_(1.1)
    return model


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Random BatchNorm statistics and affine parameters, a quarter of the scales negative, in place."""
    for norm in model.modules():
        if not isinstance(norm, _BatchNorm):
            continue
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0, 0.5)
            norm.running_var.uniform_(0.3, 2.0)
        if norm.affine:
            sign = torch.where(torch.rand_like(norm.weight) < 0.25, -1.0, 1.0)
            norm.weight.uniform_(0.4, 1.6).mul_(sign)
            norm.bias.normal_(0, 0.5)
    return model


def conv(
    rank: int,
    c_in: int,
    c_out: int,
    k: int | tuple[int, ...],
    stride: int = 1,
    groups: int = 1,
    bias: bool = False,
    dilation: int = 1,
    padding: int | tuple[int, ...] | None = None,
) -> nn.Module:
    """A convolution of rank 1, 2 or 3, by default with the padding that keeps the size for odd kernels."""
    kernel = (k,) * rank if isinstance(k, int) else k
    if padding is None:
        padding = tuple(dilation * (size - 1) // 2 for size in kernel)
    return CONV[rank](c_in, c_out, kernel, stride, padding, dilation=dilation, groups=groups, bias=bias)


def bn(rank: int, channels: int, eps: float = 1e-5) -> nn.Module:
    """A BatchNorm of rank 1, 2 or 3."""
    return BATCH_NORM[rank](channels, eps=eps)


def conv_bn(
    rank: int,
    c_in: int,
    c_out: int,
    k: int | tuple[int, ...],
    stride: int = 1,
    groups: int = 1,
    eps: float = 1e-5,
    **kwargs: int | bool | None,
) -> nn.Sequential:
    """A convolution followed by its BatchNorm."""
    return nn.Sequential(conv(rank, c_in, c_out, k, stride, groups, **kwargs), bn(rank, c_out, eps))  # type: ignore[arg-type]


def shape(rank: int, channels: int, size: int = 8, batch: int = 2) -> tuple[int, ...]:
    """`(batch, channels, size, size + 1, size + 2)`, cut to the rank: no two sizes are the same."""
    return (batch, channels, *(size + axis for axis in range(rank)))


def channel_parameter(channels: int, rank: int) -> nn.Parameter:
    """A random per-channel factor, some of them negative, that broadcasts over `(N, C, *spatial)`."""
    return nn.Parameter(torch.randn(channels, *(1,) * rank) + 0.2)
