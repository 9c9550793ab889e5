"""Several files of one model: do they agree, and how fast is each? ONNX files run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from reparam.bench import Timing, benchmark
from reparam.data import LIMIT, read
from reparam.equivalence import Comparison, verify
from reparam.errors import InputError
from reparam.export import OnnxSession
from reparam.inputs import Inputs
from reparam.opened import Named, elsewhere, example_for, for_file, in_call_order, is_onnx, opened
from reparam.source import Source

Progress: TypeAlias = Callable[[str], None]


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
        source: the reference, in a file of any format that can be loaded or run. An ONNX file is run in float64 by
            onnxruntime or by the `onnx` package's evaluator; where neither can, its noise is estimated, and a note
            says so.
        candidate: another such file. `source` says who builds the model in it and what it may hold. An ONNX file is
            asked the algebra too where the reference is one, or `level` is thorough.
        level: how thoroughly, as for `reparam.verify`.
        data, data_limit: the user's own inputs, as for `reparam.verify`.
        progress: called with a few words when a stage starts.

    Raises:
        InputError: a file cannot be loaded, the original does not run, or nothing tells the inputs' sizes.
        ExportError: an ONNX file cannot be run at all.
    """
    tell = progress or (lambda text: None)
    tell("loading the models")
    first, second = opened(source, source.path), opened(source, candidate)
    inputs = example_for(source, first, second)
    batches, notes = read(data, first if isinstance(first, nn.Module) else Named(first.names), inputs, limit=data_limit)
    tell("verifying")
    onnx = [one for one in (first, second) if isinstance(one, OnnxSession)]
    asked64 = isinstance(first, OnnxSession) or level == "thorough"
    comparison = verify(
        first if isinstance(first, nn.Module) else elsewhere(first, inputs, source.seed),
        elsewhere(second, inputs, source.seed) if isinstance(second, OnnxSession) and asked64 else second,
        inputs,
        level=level,
        seed=source.seed,
        vary_shapes=all(one.takes_other_sizes(in_call_order(one, inputs)) for one in onnx),
        check_structure=not onnx,
        data=batches,
    )
    return replace(comparison, notes=(*notes, *comparison.notes))


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
        if not is_onnx(path) and inputs is None:
            model, inputs, _ = for_file(source, path).load()
            variants[_label(path, variants)] = model
        else:
            variants[_label(path, variants)] = opened(source, path, threads)
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


def _label(path: str, taken: dict[str, Any]) -> str:
    names = (Path(path).name, path, *(f"{path} ({number})" for number in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)
