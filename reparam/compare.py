"""Several files of one model: do they agree, and how fast is each? ONNX files run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from reparam.bench import Timing, benchmark
from reparam.capture.formats import Format, identify
from reparam.data import LIMIT
from reparam.equivalence import Comparison, verify
from reparam.errors import InputError
from reparam.export import OnnxSession
from reparam.inputs import Inputs
from reparam.source import Source

Progress: TypeAlias = Callable[[str], None]
Runnable: TypeAlias = "nn.Module | OnnxSession"


def verify_files(
    source: Source,
    candidate: str,
    *,
    level: str = "standard",
    data: str | None = None,
    data_limit: int = LIMIT,
    progress: Progress | None = None,
) -> Comparison:
    """Whether the model in the file `candidate` computes what the model of `source` computes.

    Args:
        source: the reference; no ONNX file, because the truth is found by running it in float64.
        candidate: a file of any format that can be loaded or run. `source` says who builds the model in it and what it
            may hold.
        level: how thoroughly, as for `reparam.verify`.
        data, data_limit: the user's own inputs, as for `reparam.verify`.
        progress: called with a few words when a stage starts.

    Raises:
        InputError: a file cannot be loaded, or the original does not run.
        ExportError: an ONNX file cannot be run at all.
    """
    tell = progress or (lambda text: None)
    if _is_onnx(source.path):
        raise InputError(
            f"{source.path} is an ONNX file, which cannot be run in float64; give the PyTorch model first and the ONNX "
            "file second"
        )
    tell("loading the models")
    model, inputs, _ = _for_file(source, source.path).load()
    other = _runnable(source, candidate)
    tell("verifying")
    runtime = isinstance(other, OnnxSession)
    vary = not isinstance(other, OnnxSession) or other.takes_other_sizes(list(inputs.tensors()))
    return verify(
        *(model, other, inputs),
        level=level,
        seed=source.seed,
        vary_shapes=vary,
        check_structure=not runtime,
        data=data,
        data_limit=data_limit,
    )


def bench_files(
    source: Source,
    others: Sequence[str] = (),
    *,
    seconds: float = 5.0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Timing:
    """Latency of the models in several files, in pairs; the first is the baseline.

    Args:
        source: the first file, and the inputs for all of them.
        others: further files.
        seconds: for all of the measurement.
        threads: torch's and onnxruntime's threads within an operator; None leaves them.
        progress: called with a few words when a stage starts, and while measuring.

    Raises:
        InputError: a file cannot be loaded, or a model does not run on the inputs.
        ExportError: an ONNX file cannot be run at all.
    """
    tell = progress or (lambda text: None)
    tell("loading the models")
    variants: dict[str, Any] = {}
    inputs: Inputs | None = None
    for path in (source.path, *others):
        if not _is_onnx(path) and inputs is None:
            model, inputs, _ = _for_file(source, path).load()
            variants[_label(path, variants)] = model
        else:
            variants[_label(path, variants)] = _runnable(source, path, threads)
    if inputs is None:
        raise InputError("none of the files is a PyTorch model, which tells the inputs; add the one that was exported")
    return benchmark(
        variants,
        inputs,
        max_seconds=seconds,
        threads=threads,
        seed=source.seed,
        progress=lambda done, text: tell(f"measuring latency: {done:.0%}"),
    )


def _is_onnx(path: str) -> bool:
    return identify(Path(path).expanduser()) is Format.ONNX


def _runnable(source: Source, path: str, threads: int | None = None) -> Runnable:
    if _is_onnx(path):
        return OnnxSession(Path(path).expanduser(), threads=threads or torch.get_num_threads())
    return _for_file(source, path).model()


def _for_file(source: Source, path: str) -> Source:
    """`source` for another file: archives hold the whole model, so nothing is built or chosen for them."""
    whole = identify(Path(path).expanduser()) in (Format.EXPORT_ARCHIVE, Format.TORCHSCRIPT)
    return replace(source, path=path, arch=None, key=None) if whole else replace(source, path=path)


def _label(path: str, taken: dict[str, Any]) -> str:
    names = (Path(path).name, path, *(f"{path} ({number})" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)
