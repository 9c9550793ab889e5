"""Files that were written, against the original model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from reparam.capture.archives import load_archive
from reparam.data import Batch
from reparam.equivalence import Comparison, verify
from reparam.errors import InputError
from reparam.inputs import Inputs


def verify_archive(
    model: nn.Module, path: Path, inputs: Inputs, seed: int, level: str = "standard", data: tuple[Batch, ...] = ()
) -> Comparison:
    """The archive, read back, against the original model, by its answers: its weights are hashed."""
    module = _read_back(path)
    return verify(
        model,
        lambda *args, **kwargs: module(*args, **kwargs),
        inputs,
        level=level,
        seed=seed,
        check_structure=False,
        data=data,
    )


def _read_back(path: Path) -> nn.Module:
    """The archive as `reparam` loads it; as torch does, for a program of which no plain graph can be made."""
    try:
        return load_archive(path, trusted=True)
    except InputError:
        return torch.export.load(path).module()
