"""Attention in the one form that the ONNX exporter knows: tensors of four axes, (batch, heads, length, width)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class FourAxes(TorchFunctionMode):
    """Within it, scaled dot product attention on fewer or more axes is one on four, reshaped before and behind."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


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
