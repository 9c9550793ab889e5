"""From a module and example inputs to `Captured`.

The model is copied first, because tracing may leave things behind on it; the copy shares the parameters (they are
never written to) and has its own buffers. Arguments that hold no tensor, and those that the example leaves at such a
default, are fixed: `forward(x, embed=False)` is captured for `embed=False` and says so when called otherwise.
"""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from typing import Any

import torch
from torch import fx, nn

from reparam.capture.captured import Captured
from reparam.capture.copying import copied
from reparam.capture.tracer import ExecutionError, ValueTracer, require_value
from reparam.errors import CaptureError, InputError
from reparam.inputs import ExampleInputs, Inputs

__all__ = ["capture", "private_copy", "require_value"]

_TORCH = os.path.dirname(torch.__file__) + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Captured:
    """Captures `model` for inference. The model itself is not changed.

    Raises:
        InputError: the model is no module, has hooks on itself, or cannot run on the example inputs.
        CaptureError: its graph cannot be traced; the message names the line that stopped it.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if model._forward_hooks or model._forward_pre_hooks:
        raise InputError(
            f"{type(model).__name__} has forward hooks on the model itself, which the fused model would lose; "
            "remove them, or wrap the model in another module"
        )
    inputs = Inputs.of(example_inputs)
    try:
        root, graph = _traced(model, inputs, compute=False)
    except ExecutionError:
        # A shape may depend on values (a selection by score): then every layer has to run.
        root, graph = _traced_or_explained(model, inputs)
    except Exception as error:
        raise _capture_error(model, error) from error
    _restore_buffers(root, model)
    notes = ("the model was in train mode; its inference form was taken (eval mode)",) if model.training else ()
    return Captured(root, graph, inputs, "symbolic", type(model).__name__, notes)


def _traced_or_explained(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, fx.Graph]:
    try:
        return _traced(model, inputs, compute=True)
    except ExecutionError as error:
        shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs.tensors())
        raise InputError(
            f"the model cannot run on the example input of shape {shapes}: "
            f"{error.where or type(model).__name__}: {_first_line(error.error)}; pass inputs shaped as it expects them"
        ) from error.error
    except Exception as error:
        raise _capture_error(model, error) from error


def _traced(model: nn.Module, inputs: Inputs, compute: bool) -> tuple[nn.Module, fx.Graph]:
    root = private_copy(model)
    arguments = _bound(model, inputs.clone())
    tracer = ValueTracer(root, arguments, _fixed(model, arguments), compute)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return root, tracer.trace(root)


def _capture_error(model: nn.Module, error: Exception) -> Exception:
    if isinstance(error, InputError):
        return error
    return CaptureError(
        f"{type(model).__name__} cannot be traced: {_first_line(error)}{_at(error)}; "
        "rewrite that line without Python control flow on tensor values, or fuse the submodules that can be traced"
    )


def private_copy(model: nn.Module) -> nn.Module:
    """A structural copy in eval mode that shares the parameters and copies everything else.

    Raises:
        InputError: the model cannot be copied.
    """
    try:
        return copied(model).eval()
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({_first_line(error)}); remove tensors that are results of a "
            "computation with gradients, and other objects that copy.deepcopy does not take, from its attributes"
        ) from error


def _bound(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The example's arguments by parameter name, defaults included."""
    try:
        bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward: {_first_line(error)}"
        ) from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _fixed(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that are plain values, which Python control flow may depend on."""
    plain = (bool, int, float, str, type(None))
    return {name: value for name, value in arguments.items() if isinstance(value, plain)}


def _restore_buffers(root: nn.Module, model: nn.Module) -> None:
    """Undoes what running the graph may have written into buffers (counters, caches)."""
    theirs = dict(model.named_buffers())
    for name, buffer in root.named_buffers():
        if buffer._version and name in theirs and buffer.shape == theirs[name].shape:
            with torch.no_grad():
                buffer.copy_(theirs[name])


def _at(error: BaseException) -> str:
    lines = [
        f"{os.path.basename(entry.filename)}:{entry.lineno}"
        for entry in traceback.extract_tb(error.__traceback__)
        if not entry.filename.startswith((_TORCH, _HERE, "<"))
    ]
    return f" ({lines[-1]})" if lines else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
