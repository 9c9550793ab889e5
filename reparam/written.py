"""Files that were written, against the original model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from reparam.capture.archives import load_archive
from reparam.data import Batch
from reparam.equivalence import Comparison, verify
from reparam.inputs import Inputs


def verify_archive(
    model: nn.Module, path: Path, inputs: Inputs, seed: int, level: str = "standard", data: tuple[Batch, ...] = ()
) -> Comparison:
    """The archive, read back, against the original model, by its answers: its weights are hashed."""
    module = load_archive(path, trusted=True)
    return verify(
        model,
        lambda *args, **kwargs: module(*args, **kwargs),
        inputs,
        level=level,
        seed=seed,
        check_structure=False,
        data=data,
    )
