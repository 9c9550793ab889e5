"""Buffers of the user's own models: whatever becomes of them while reparam works, they are put back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


class Kept:
    """The values that the buffers of some models have now.

    Copies run, and not the models. But a function that a model keeps as an attribute may be bound to the model itself,
    or refer to it by a closure; a copy of the model calls it, and it runs the model's own layers as they stand.

    Args:
        models: those that are modules; others have no buffers.
        but: whose buffers are left out.
    """

    def __init__(self, *models: Any, but: Any = None) -> None:
        unique = {id(buffer): buffer for model in models for buffer in _buffers(model)}
        for buffer in _buffers(but):
            unique.pop(id(buffer), None)
        self._values = [(buffer, buffer.detach().clone()) for buffer in unique.values()]

    def put_back(self) -> bool:
        """Puts all of them back.

        Returns:
            Whether any had changed.
        """
        changed = False
        for buffer, value in self._values:
            if buffer.shape == value.shape and _is_equal(buffer, value):
                continue
            changed = True
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                if buffer.shape == value.shape:
                    buffer.copy_(value)
                else:
                    buffer.set_(value)  # type: ignore[call-overload]
        return changed


def _buffers(model: Any) -> Iterator[torch.Tensor]:
    if isinstance(model, nn.Module):
        yield from (buffer for buffer in model.buffers() if not (is_lazy(buffer) or buffer.is_meta))


def _is_equal(buffer: torch.Tensor, value: torch.Tensor) -> bool:
    try:
        return torch.equal(_bits(buffer), _bits(value))
    except (RuntimeError, NotImplementedError):  # a kind of tensor that has none to show: nobody can tell
        return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as bytes: every dtype has these, and NaN is what it was."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
