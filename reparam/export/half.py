"""A module in float16 that is called as before: floating-point inputs are rounded on the way in.

Weights and activations are float16. What comes out is converted back to the dtype that the module itself answers in,
or stays float16 where the caller asks for that. What a module cannot do in float16 is said before anything is written.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from reparam.errors import ExportError
from reparam.export.program import source_line
from reparam.export.shapes import tensor_leaves
from reparam.inputs import Inputs
from reparam.quiet import quiet, reason, without_copying_warnings

LARGEST = torch.finfo(torch.float16).max


def in_float16(module: nn.Module, inputs: Inputs, *, io: bool) -> nn.Module:
    """A float16 copy in eval mode with the call signature of `module`, which is not changed.

    Args:
        module: any module with weights in another floating-point dtype.
        inputs: an example, in the module's own dtype; the copy was seen to run on it.
        io: whether the outputs stay float16 (and float16 inputs are meant); else outputs have the module's own dtypes.

    Raises:
        ExportError: a weight or the answer is beyond float16, or the module does not run in it.
    """
    name = type(module).__name__
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point() and bool((tensor.isfinite() & (tensor.abs() > LARGEST)).any()):
            raise ExportError(
                f"{name} does not fit float16: the weight {key} holds values beyond {LARGEST:.0f}; "
                "export it in its own dtype"
            )
    try:
        with without_copying_warnings():
            own = copy.deepcopy(module).eval()
            narrow = copy.deepcopy(module).eval().half()
    except Exception as error:
        raise ExportError(
            f"{name} cannot be copied for export ({reason(error)}); remove what cannot be copied"
        ) from error
    try:
        with quiet():
            expected = tensor_leaves(inputs.call(own))
    except Exception as error:
        raise ExportError(f"{name} fails on the example inputs: {reason(error)}") from error
    dtypes = [None if io or not tensor.is_floating_point() else tensor.dtype for tensor in expected]
    converted = _with_signature(narrow, dtypes)
    try:
        with quiet():
            got = tensor_leaves(inputs.call(converted))
    except Exception as error:
        raise ExportError(
            f"{name} does not run in float16: {reason(error)}{source_line(error)}; export it in its own dtype"
        ) from error
    lost = sum(int((a.isfinite() & ~b.isfinite()).sum()) for a, b in zip(expected, got, strict=False))
    if lost:
        raise ExportError(
            f"{name} overflows in float16: {lost} of {sum(t.numel() for t in got)} elements of its answer are infinite "
            "or not a number, and finite in its own dtype; export it in its own dtype"
        )
    return converted


class _Converting(nn.Module):
    """Rounds the floating-point inputs to float16, calls the module, and gives its outputs the dtypes asked for."""

    def __init__(self, module: nn.Module, dtypes: list[torch.dtype | None]) -> None:
        super().__init__()
        self.module = module
        self.dtypes = dtypes

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        narrow = Inputs(args, kwargs).to(torch.float16)
        leaves, spec = pytree.tree_flatten(self.module(*narrow.args, **narrow.kwargs))
        wanted = iter(self.dtypes)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                dtype = next(wanted, None)
                leaves[number] = leaf if dtype is None else leaf.to(dtype)
        return pytree.tree_unflatten(leaves, spec)


def _with_signature(module: nn.Module, dtypes: list[torch.dtype | None]) -> nn.Module:
    """The wrapper in a class of its own, so that `inspect.signature` names the parameters of `module.forward`."""

    def forward(self: _Converting, *args: Any, **kwargs: Any) -> Any:
        return self.run(args, kwargs)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = inspect.signature(module.forward).parameters.values()
    forward.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    made: nn.Module = type(type(module).__name__, (_Converting,), {"forward": forward})(module, dtypes)
    return made.eval()
