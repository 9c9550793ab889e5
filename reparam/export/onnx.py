"""A module becomes an ONNX file.

The exported program is traced with its batch and size axes open, translated, simplified, and *run*: onnxruntime must
give the module's own answers at the example's size and at other sizes that the file says it accepts. An axis for which
that fails is closed again and the value says so. Then the file is held against the original model, by the harness that
judges fused models too: at several batch sizes, and image sizes where these are open, its error against float64 must be
within the original's own rounding noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from reparam.compiled import eager, nothing_compiled
from reparam.data import Data
from reparam.errors import ExportError, InputError
from reparam.export.files import publish, staging
from reparam.export.half import in_float16
from reparam.export.names import chosen_names, input_names, output_names
from reparam.export.program import argument_names, private_copy
from reparam.export.proto import Plan
from reparam.export.shapes import Freedom, Probe, explore
from reparam.export.staged import Task, stage
from reparam.export.written import OnnxFile
from reparam.inputs import ExampleInputs, Inputs
from reparam.quiet import quiet, reason

# Above this many bytes of weights a protobuf message cannot hold the model, and they go to a file beside it.
EXTERNAL_DATA_BYTES = 2_000_000_000
LEVELS = ("quick", "standard", "thorough", "off")


@torch.inference_mode(False)  # its tensors do not tell what was written to
@nothing_compiled()
def export_onnx(
    module: nn.Module,
    example_inputs: ExampleInputs,
    path: str | Path,
    *,
    opset: int | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = True,
    simplify: bool = True,
    float16: bool = False,
    float16_io: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    original: nn.Module | None = None,
    verify: bool | str = "standard",
    seed: int = 0,
    data: Data | None = None,
) -> OnnxFile:
    """Writes `module` in eval mode as an ONNX file, after the file was found to compute what the original computes.

    Args:
        module: any module that torch.export can capture; it is copied, never changed.
        example_inputs: tensor, tuple of arguments or dict of keyword arguments. Arguments that are no tensors
            (flags, None) are fixed in the file.
        path: file to write, usually `*.onnx`; replaced in one step.
        opset: version of the default operator set; None takes the exporter's own.
        dynamic_batch: leave the batch axis (axis 0) open where the model allows it.
        dynamic_size: leave axes 2 and up of the inputs open where the model allows it.
        simplify: simplify with onnxsim; kept only if the result has fewer nodes, is hardly larger, valid, and agrees.
        float16: weights and activations in float16. Inputs and outputs keep the module's dtypes: the file converts
            them. The original's error in float16, against its own truth in float64, is then what is allowed.
        float16_io: the same with inputs and outputs in float16 too.
        input_names, output_names: names of the file's inputs and outputs; None takes the names of `forward`'s
            parameters and the keys of its result.
        metadata: text for the file's `metadata_props`, beside the provenance that is always there.
        external_data_bytes: weights beyond this many bytes go to `<path>.data`.
        original: the model that the file must agree with, such as the one that `module` was fused from; None means
            `module` itself.
        verify: how thoroughly the file is compared with `original`, as for `reparam.verify`: "quick", "standard",
            "thorough", or "off" (then it is only held against `module`, coarsely). True is "standard", False is "off".
        seed: of the inputs drawn for it.
        data: inputs of your own that are compared besides; as for `reparam.verify`.

    Returns:
        What was written, and what of the request could not be had. Where onnxruntime has no kernels for the file (as
        for bfloat16), it is written unchecked: `checked` is False, and a note says why.

    Raises:
        InputError: example_inputs is no example, an option has no such value, or `original` cannot be compared with.
        ExportError: the module cannot be exported, the file disagrees with it, or it cannot be written. The target is
            then unchanged.
        NotEquivalentError: the file does not agree with the original. The target is unchanged.
    """
    inputs, target, level = Inputs.of(example_inputs), Path(path), _level(verify)
    module = eager(module)
    private, prefix = private_copy(module), ""
    argument_names(private, inputs)  # refuses a call that does not fit
    exact = deployed = None
    if float16 or float16_io:
        exact, prefix = private, "module."
        private = in_float16(module, inputs, io=float16_io)
        deployed = private if original is None else in_float16(original, inputs, io=float16_io)
        inputs = inputs.to(torch.float16) if float16_io else inputs
    allowed, answers = _explore(private, inputs, dynamic_batch, dynamic_size)
    plan = _plan(private, inputs, input_names, output_names, opset, metadata, prefix)
    task = Task(
        *(plan, answers, simplify, external_data_bytes),
        original=(private if exact is None else exact) if original is None else original,
        deployed=deployed,
        exact=exact,
        given=original is not None,
        level=level,
        seed=seed,
        data=data,
    )
    with staging(target) as folder:
        staged = folder / target.name
        written = stage(task, staged, allowed)
        publish(staged, target)
    return OnnxFile(
        path=target,
        opset=written.opset,
        nodes=written.nodes,
        bytes=target.stat().st_size + written.data_bytes,
        inputs=plan.input_names,
        outputs=plan.output_names,
        dynamic_axes=written.dynamic_axes,
        simplified=written.simplified,
        checked=written.checked,
        notes=(*_fixed(allowed, inputs, dynamic_batch, dynamic_size), *written.notes),
        shapes=written.shapes,
        dtypes=written.dtypes,
        float16=exact is not None,
        comparison=written.comparison,
        leftovers=written.leftovers,
    )


def _level(requested: bool | str) -> str:
    level = {True: "standard", False: "off"}.get(requested, requested) if isinstance(requested, bool) else requested
    if level not in LEVELS:
        raise InputError(f"verify={requested!r} is not known; use {', '.join(LEVELS)}")
    return str(level)


def _plan(
    module: nn.Module,
    inputs: Inputs,
    names_in: Sequence[str] | None,
    names_out: Sequence[str] | None,
    opset: int | None,
    metadata: Mapping[str, str] | None,
    prefix: str,
) -> Plan:
    taken = chosen_names(names_in, input_names(module, inputs), "input")
    given = chosen_names(names_out, output_names(module, inputs), "output", taken)
    return Plan(module, inputs, taken, given, opset, dict(metadata or {}), prefix)


def _fixed(allowed: Freedom, inputs: Inputs, batch: bool, size: bool) -> list[str]:
    """Which of the axes that were to be open the model itself does not let vary."""
    notes = []
    if batch and not allowed.batch:
        notes.append("the batch axis is fixed: the model does not run with another batch length than the example's")
    if size and not allowed.size and any(tensor.ndim > 2 for tensor in inputs.tensors()):
        notes.append("the size axes are fixed: the model does not run with other sizes than the example's")
    return notes


def _explore(module: nn.Module, inputs: Inputs, batch: bool, size: bool) -> tuple[Freedom, tuple[Probe, ...]]:
    """`explore` with the errors a user can cause."""
    try:
        with quiet():
            allowed, answers = explore(module, inputs, batch, size)
    except Exception as error:
        raise ExportError(f"{type(module).__name__} fails on the example inputs: {reason(error)}") from error
    if not answers[0].outputs:
        raise ExportError(f"{type(module).__name__} returns no tensor; there is nothing to export")
    return allowed, answers
