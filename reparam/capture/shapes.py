"""What the expensive layers return, without computing it.

While a model is traced, the values of activations are not needed, only their shapes. For the layers that take nearly
all of a forward's time the shape follows from a formula, and zeros of that shape stand in for the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CONV_RANK: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_BATCH_NORM_NDIM: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}


def stand_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Zeros shaped as the module's result, or None if the module has to run (to compute, or to raise its error)."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return None
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return None
    x = args[0]
    if type(module) in _CONV_RANK:
        return _convolution(module, x, _CONV_RANK[type(module)])
    if type(module) is nn.Linear:
        fits = x.ndim > 0 and x.shape[-1] == module.in_features and _same_kind(x, module.weight)
        return x.new_zeros((*x.shape[:-1], module.out_features)) if fits else None
    if type(module) in _BATCH_NORM_NDIM and isinstance(module.running_mean, torch.Tensor) and not module.training:
        fits = x.ndim in _BATCH_NORM_NDIM[type(module)] and x.shape[1] == module.num_features
        return torch.zeros_like(x) if fits and _same_kind(x, module.running_mean) else None
    return None


def _convolution(module: Any, x: torch.Tensor, rank: int) -> torch.Tensor | None:
    if x.ndim != rank + 2 or x.shape[1] != module.in_channels or not _same_kind(x, module.weight):
        return None
    if isinstance(module.padding, str) or module.padding_mode != "zeros" or not x.numel():
        return None
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            x.shape[2:], module.padding, module.dilation, module.kernel_size, module.stride, strict=True
        )
    ]
    if min(size) < 1:
        return None
    return x.new_zeros((x.shape[0], module.out_channels, *size))


def _same_kind(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == weight.dtype and x.device == weight.device and not torch.is_autocast_enabled(x.device.type)
