"""A `torch.export` archive (`.pt2`): loads with `torch.export.load(path).module()`, without the model's class.

The program carries guards: called with a size for which the traced code does not hold, it raises instead of answering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from reparam.compiled import eager, nothing_compiled
from reparam.errors import ExportError
from reparam.export.files import publish, staging
from reparam.export.program import (
    argument_names,
    axis_names,
    in_call_order,
    open_axes,
    path_names,
    private_copy,
    range_notes,
    trace,
)
from reparam.export.shapes import Freedom, explore, ladder
from reparam.inputs import ExampleInputs, Inputs
from reparam.quiet import quiet, reason

METADATA_FILE = "reparam.json"


@torch.inference_mode(False)  # its tensors do not tell what was written to
@nothing_compiled()
def export_archive(
    module: nn.Module,
    example_inputs: ExampleInputs,
    path: str | Path,
    *,
    dynamic_batch: bool = True,
    dynamic_size: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `module` in eval mode as a `torch.export` archive.

    Args:
        module: any module that torch.export can capture; it is copied, never changed.
        example_inputs: tensor, tuple of arguments or dict of keyword arguments.
        path: file to write, usually `*.pt2`; replaced in one step.
        dynamic_batch: leave the batch axis (axis 0) open where the model allows it.
        dynamic_size: leave axes 2 and up of the inputs open where the model allows it.
        metadata: text to keep in the archive, beside the versions and the open axes (extra file `reparam.json`).

    Returns:
        The path written.

    Raises:
        InputError: example_inputs is no example.
        ExportError: the module cannot be captured, or the file cannot be written; the target is then unchanged.
    """
    inputs, target, module = Inputs.of(example_inputs), Path(path), eager(module)
    private = private_copy(module)
    arguments = argument_names(private, inputs)
    try:
        with quiet():
            allowed, _ = explore(private, inputs, dynamic_batch, dynamic_size)
    except Exception as error:
        raise ExportError(f"{type(module).__name__} fails on the example inputs: {reason(error)}") from error
    program = _first_that_traces(private, inputs, allowed)
    in_parameters = [name for name, leaf in path_names(arguments) if isinstance(leaf, torch.Tensor)]
    names = in_call_order(private, inputs, in_parameters)
    axes = open_axes(program)
    readable = axis_names(list(inputs.tensors()), names, axes)
    facts = {
        "torch": torch.__version__,
        "dynamic_axes": {
            name: {axis: readable.get(symbol, symbol) for axis, symbol in varying.items()}
            for name, varying in zip(names, axes, strict=True)
        },
        "notes": list(range_notes(program, readable)),
        "metadata": dict(metadata or {}),
    }
    with staging(target) as folder:
        staged = folder / target.name
        try:
            with quiet(), staged.open("wb") as file:
                torch.export.save(program, file, extra_files={METADATA_FILE: json.dumps(facts)})
        except OSError:
            raise
        except Exception as error:
            raise ExportError(f"{target} cannot be written: {reason(error)}") from error
        publish(staged, target)
    return target


def _first_that_traces(module: nn.Module, inputs: Inputs, allowed: Freedom) -> torch.export.ExportedProgram:
    """The most general program that torch.export manages."""
    steps = ladder(allowed)
    for freedom in steps[:-1]:
        try:
            return trace(module, inputs, freedom)
        except ExportError:
            continue
    return trace(module, inputs, steps[-1])
