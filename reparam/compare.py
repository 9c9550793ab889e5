"""Two files of one model: do they agree? ONNX files run in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from reparam.certificate import Moved, Repeated, read_certificate, repeat
from reparam.data import LIMIT, read
from reparam.equivalence import Comparison, verify
from reparam.export import OnnxSession
from reparam.opened import Named, elsewhere, example_for, in_call_order, opened
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
    open_in = [one.takes_other_sizes(in_call_order(one, inputs)) for one in onnx]
    asked64 = isinstance(first, OnnxSession) or level == "thorough"
    comparison = verify(
        first if isinstance(first, nn.Module) else elsewhere(first, inputs, source.seed),
        elsewhere(second, inputs, source.seed) if isinstance(second, OnnxSession) and asked64 else second,
        inputs,
        level=level,
        seed=source.seed,
        vary_shapes="batch" if all(open_in) and "batch" in open_in else all(open_in),
        check_structure=not onnx,
        data=batches,
    )
    return replace(comparison, notes=(*notes, *comparison.notes))


def repeat_certificate(
    path: str,
    source: Source,
    moved: Moved,
    *,
    data: str | None = None,
    progress: Progress | None = None,
) -> Repeated:
    """Does again what a certificate says was done; arguments and errors as of `reparam.certificate.repeat`."""
    return repeat(read_certificate(path), source, moved, data=data, progress=progress)
