"""Operators in the form of which the ONNX exporter makes the least.

* Scaled dot product attention has tensors of four axes, (batch, heads, length, width); it knows no other.
* An average over all positions is a mean. As a pooling to size 1 it also sets the strides of a channels-last tensor:
  the exporter writes them as a Gather at indices that it computes, six nodes that do nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

POOLS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}
"""How many axes each averages over."""


class Spelled(TorchFunctionMode):
    """Within it, the operators above are called in that form."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func in POOLS:
            return _average(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _average(pool: Any, input: torch.Tensor, output_size: Any) -> torch.Tensor:
    axes = POOLS[pool]
    sizes = tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size,)
    if any(size != 1 for size in sizes):
        result: torch.Tensor = pool(input, output_size)
        return result
    return input.mean(tuple(range(-axes, 0)), keepdim=True)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    axes = query.dim()
    lead = query.shape[:-2] if axes == 3 else query.shape[:-3]
    same = all(other.dim() == axes and other.shape[: len(lead)] == lead for other in (key, value))
    if axes in (2, 4) or not same:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = _four(attn_mask.expand(*query.shape[:-1], key.shape[-2]), axes)
    query, key, value = (_four(tensor, axes) for tensor in (query, key, value))
    result = F.scaled_dot_product_attention(query, key, value, attn_mask, *args, **kwargs)
    return result.squeeze(1) if axes == 3 else result.unflatten(0, lead)


def _four(tensor: torch.Tensor, axes: int) -> torch.Tensor:
    return tensor.unsqueeze(1) if axes == 3 else tensor.flatten(0, axes - 4)
