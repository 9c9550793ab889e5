"""A grid of conditions: every batch length x image size x dtype x number of threads is a cell, measured by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch

from reparam.inputs import Inputs


@dataclass(frozen=True)
class Setting:
    """The conditions of one cell; None leaves what the example inputs, the model or torch have.

    Attributes:
        batch: length of the batch.
        size: height and width of images.
        dtype: name of a dtype of `reparam.bench.placement.DTYPES`.
        threads: threads within an operator.
    """

    batch: int | None = None
    size: tuple[int, int] | None = None
    dtype: str | None = None
    threads: int | None = None

    def __str__(self) -> str:
        words = [
            f"batch {self.batch}" if self.batch else "",
            f"{self.size[0]}x{self.size[1]}" if self.size else "",
            self.dtype or "",
            f"{self.threads} thread{'s' if self.threads > 1 else ''}" if self.threads else "",
        ]
        return ", ".join(word for word in words if word) or "as given"

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        return {**asdict(self), "size": None if self.size is None else list(self.size)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Setting:
        """The value that `to_dict` wrote."""
        return cls(**{**plain, "size": None if plain["size"] is None else tuple(plain["size"])})


def settings(
    batches: Sequence[int] = (),
    sizes: Sequence[tuple[int, int]] = (),
    dtypes: Sequence[str] = (),
    threads: Sequence[int] = (),
) -> tuple[Setting, ...]:
    """Every combination, each once; what is empty is left as it is."""
    axes = [dict.fromkeys(axis) or {None: None} for axis in (batches, sizes, dtypes, threads)]
    return tuple(Setting(*values) for values in product(*axes))  # type: ignore[arg-type]


def resized(inputs: Inputs, setting: Setting) -> Inputs:
    """The inputs with another batch length and image size, made of their own values.

    The batch is axis 0 of every tensor that is as long there as the first tensor; height and width are axes 2 and 3 of
    tensors with four axes. Values are repeated or cut off, so that indices stay within what the model knows.
    """
    length = next((tensor.shape[0] for tensor in inputs.tensors() if tensor.dim()), None)

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if setting.batch and tensor.dim() and tensor.shape[0] == length:
            tensor = _fitted(tensor, 0, setting.batch)
        if setting.size and tensor.dim() == 4:
            tensor = _fitted(_fitted(tensor, 2, setting.size[0]), 3, setting.size[1])
        return tensor

    return inputs.map(one)


def _fitted(tensor: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    if tensor.shape[axis] == length:
        return tensor
    return tensor.index_select(axis, torch.arange(length, device=tensor.device) % tensor.shape[axis])
