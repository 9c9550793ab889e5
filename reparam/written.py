"""Files that were written, against the original model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from reparam.capture.archives import load_archive
from reparam.data import Batch
from reparam.equivalence import Comparison, verify
from reparam.export import OnnxFile, OnnxSession
from reparam.inputs import Inputs


def verify_onnx(
    model: nn.Module,
    session: OnnxSession,
    file: OnnxFile,
    inputs: Inputs,
    seed: int,
    level: str = "standard",
    data: tuple[Batch, ...] = (),
) -> Comparison:
    """The file in its runtime against the original model; with other sizes where the file leaves them open."""
    return verify(
        *(model, session, inputs),
        level=level,
        seed=seed,
        vary_shapes=is_open(file, inputs),
        check_structure=False,
        data=data,
    )


def is_open(file: OnnxFile, inputs: Inputs) -> bool:
    """Whether the file takes other sizes than the example's on every axis but the channels."""
    tensors = dict(zip(file.inputs, inputs.tensors(), strict=False))
    return all(
        axis in file.dynamic_axes.get(name, {})
        for name, tensor in tensors.items()
        for axis in range(tensor.ndim)
        if axis != 1
    )


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
