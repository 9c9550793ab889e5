"""A module and example inputs become an exported program, with the axes that may vary left open.

`Dim.AUTO` lets torch.export decide for each of these axes whether it really varies: an axis that the model's code fixes
becomes a constant instead of an error, and axes that must be equal share one symbol.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from reparam.answers import plain_answers
from reparam.errors import ExportError
from reparam.export.shapes import TRACED_BATCH, Freedom, resized
from reparam.inputs import Inputs
from reparam.quiet import deepest, quiet, reason, without_copying_warnings

PATIENCE = 60.0
"""Seconds for a trace with open image axes; most take less than ten, and without such axes it can still be done."""


def private_copy(module: nn.Module) -> nn.Module:
    """A copy in eval mode, so that nothing done while exporting reaches the caller's module."""
    try:
        with without_copying_warnings():
            return copy.deepcopy(module).eval()
    except Exception as error:
        raise ExportError(
            f"{type(module).__name__} cannot be copied for export ({reason(error)}); remove what cannot be copied first"
        ) from error


def argument_names(module: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """The arguments of the call under the names of `forward`'s parameters, in the order of the parameters.

    Raises:
        ExportError: they do not fit `forward`'s signature, or it is TorchScript, which has none.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ExportError("TorchScript cannot be exported as it is; reparam.fuse makes a module of it that can be")
    try:
        return dict(inspect.signature(module.forward).bind(*inputs.args, **inputs.kwargs).arguments)
    except TypeError as error:
        raise ExportError(
            f"example_inputs do not fit {type(module).__name__}.forward: {reason(error)}; "
            "pass a tuple of its positional arguments or a dict of its keyword arguments"
        ) from error


def path_names(tree: Any, top: str = "") -> list[tuple[str, Any]]:
    """Each leaf of a nested container with its path joined by underscores (`x`, `boxes_0`, `logits`)."""
    named = []
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
        name = "_".join([top, *keys] if top else keys)
        named.append((re.sub(r"\W", "_", name), leaf))
    return named


def in_call_order(module: nn.Module, inputs: Inputs, names: Sequence[str]) -> list[str]:
    """`names`, which follow the order of `forward`'s parameters, in the order in which the call gives the tensors."""
    leaves = [leaf for leaf in pytree.tree_leaves(argument_names(module, inputs)) if isinstance(leaf, torch.Tensor)]
    # The same tensor may be given twice; each of its places has a name of its own.
    unused = [(id(leaf), name) for leaf, name in zip(leaves, names, strict=True)]
    ordered = []
    for tensor in inputs.tensors():
        entry = next(pair for pair in unused if pair[0] == id(tensor))
        unused.remove(entry)
        ordered.append(entry[1])
    return ordered


def trace(module: nn.Module, inputs: Inputs, freedom: Freedom, name: str = "") -> torch.export.ExportedProgram:
    """Exports `module` (already a private copy) with the axes of `freedom` open; errors call it `name`.

    Raises:
        ExportError: torch.export cannot capture the module.
    """
    if any(tensor.shape[0] < TRACED_BATCH for n, tensor in enumerate(inputs.tensors()) if n in freedom.batch):
        inputs = resized(inputs, TRACED_BATCH, freedom.batch)
    inputs = inputs.clone()
    numbers = {id(tensor): n for n, tensor in enumerate(inputs.tensors())}

    def axes(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return dict.fromkeys(freedom.axes(numbers[id(leaf)], leaf), torch.export.Dim.AUTO)

    shapes = pytree.tree_map(axes, argument_names(module, inputs))
    try:
        with quiet(), torch.no_grad(), _Patience(PATIENCE if freedom.size else math.inf):
            program = torch.export.export(module, inputs.args, dict(inputs.kwargs), dynamic_shapes=shapes, strict=False)
            return plain_answers(program)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot capture {name or type(module).__name__}: {reason(error)}{source_line(error)}"
        ) from error


class _Patience(TorchFunctionMode):
    """Stops a trace after so many seconds, at the next operation: expressions of open sizes can grow without end."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.monotonic() + seconds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self._end:
            raise TimeoutError("its sizes become too long expressions")
        return func(*args, **(kwargs or {}))


def source_line(error: BaseException) -> str:
    """The last line of the model's own code in the traceback, as ` (file.py:line)`."""
    found = ""
    traceback = deepest(error).__traceback__
    while traceback is not None:
        name = traceback.tb_frame.f_code.co_filename
        if "/torch/" not in name and not name.startswith("<") and "/reparam/" not in name and "functools" not in name:
            found = f" ({name.rsplit('/', 1)[-1]}:{traceback.tb_lineno})"
        traceback = traceback.tb_next
    return found


def open_axes(program: torch.export.ExportedProgram) -> list[dict[int, str]]:
    """For each tensor input of the program, its axes that vary and the symbol of each."""
    users = set(program.graph_signature.user_inputs)
    found = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in users and isinstance(value, torch.Tensor):
            found.append({axis: str(n) for axis, n in enumerate(value.shape) if not isinstance(n, int)})
    return found


def axis_names(tensors: list[torch.Tensor], names: list[str], axes: list[dict[int, str]]) -> dict[str, str]:
    """A readable name for each symbol: `batch`, `height`, `width`, `length`; with the input's name if taken."""
    readable: dict[str, str] = {}
    for tensor, name, varying in zip(tensors, names, axes, strict=True):
        sizes = {3: ("length",), 4: ("height", "width"), 5: ("depth", "height", "width")}.get(tensor.ndim, ())
        for axis, symbol in varying.items():
            plain = "batch" if axis == 0 else sizes[axis - 2] if 0 <= axis - 2 < len(sizes) else f"axis{axis}"
            if symbol.isidentifier() and symbol not in readable:
                readable[symbol] = plain if plain not in readable.values() else f"{name}_{plain}"
    return readable


def range_notes(program: torch.export.ExportedProgram, readable: dict[str, str]) -> tuple[str, ...]:
    """A sentence for each open axis that the model's code restricts to a range."""
    notes = []
    for symbol, bounds in program.range_constraints.items():
        name = readable.get(str(symbol), str(symbol))
        # A lower bound of 2 is torch.export's own convention for "not a constant"; such programs do run at 1.
        if bounds.lower > TRACED_BATCH:
            notes.append(f"{name} must be at least {bounds.lower}")
        if str(bounds.upper).isdigit():  # anything else is infinity
            notes.append(f"{name} must be at most {bounds.upper}")
    return tuple(notes)
