"""Is the file valid, are its weights the module's, and does onnxruntime compute with it what the module computes?

The weights are compared one by one, because running the file cannot show a small fault in one of them: in a deep
network it is less than the rounding of the activations.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from reparam.errors import ExportError
from reparam.export.runtime import OnnxSession, UnsupportedByRuntimeError
from reparam.export.shapes import Probe, tensor_leaves
from reparam.quiet import quiet, reason, without_copying_warnings

if TYPE_CHECKING:
    import numpy as np
    import onnx

# Largest error relative to the largest magnitude of the output. This net is there for wrong answers, not for rounding:
# whether rounding is within the original's own noise is judged elsewhere.
COARSE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
# Share of the elements of an integer output (class numbers, masks) that ties may turn.
TIES = 0.01
# Multiple of the module's own rounding error that is let pass whatever its size.
NOISE_MARGIN = 4.0
_BLOCK = 1 << 20  # elements


@dataclass(frozen=True)
class Checked:
    """Whether onnxruntime ran the file (and agreed, otherwise there is an error), and why not."""

    ran: bool
    notes: tuple[str, ...] = ()


def check_file(path: Path, module: nn.Module, answers: Sequence[Probe], dtype: torch.dtype | None = None) -> Checked:
    """onnx.checker with full shape inference, then a run at every size in `answers`, which are those of `module`.

    The run shows gross faults: what is allowed is coarse, and where even that is exceeded, four times the module's own
    rounding error, as random or badly conditioned weights can make it large. Where the answers come from `module` in a
    narrower dtype, `dtype` is that one, whatever dtype they came out in.

    Raises:
        ExportError: the file is invalid, or disagrees with the module.
    """
    check_valid(path)
    try:
        session = OnnxSession(path, threads=1)
    except UnsupportedByRuntimeError as error:
        return Checked(False, (f"not checked by running it: {error}",))
    for probe in answers:
        got = session.run_flat(list(probe.inputs.tensors()))
        difference = disagreement(got, probe.outputs, dtype=dtype)
        if difference:
            difference = disagreement(got, probe.outputs, rounding_of(module, probe), dtype)
        if difference:
            sizes = ", ".join("x".join(map(str, t.shape)) for t in probe.inputs.tensors())
            raise ExportError(f"the ONNX file disagrees with the module on an input of size {sizes}: {difference}")
    return Checked(True)


def check_valid(path: Path) -> None:
    """onnx.checker with full shape inference.

    Raises:
        ExportError: the file is not valid ONNX.
    """
    import onnx

    try:
        with quiet():
            onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the exporter wrote an invalid ONNX model: {reason(error)}") from error


def check_weights(path: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Every weight stands in the file with the module's values, to the last bit; transposed or reshaped is the same.

    The exporter itself may combine weights (a BatchNorm and the convolution before it). Then some have no place in the
    file, and those that differ may be the result: nothing is said about them.

    Args:
        path: of the file; what it keeps beside itself is read one weight at a time.
        weights: the module's parameters and buffers, by name.

    Raises:
        ExportError: the file has all weights, and one has other values.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    stored = {initializer.name: initializer for initializer in model.graph.initializer}
    floating = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    if not floating.keys() <= stored.keys():
        return
    for name, weight in floating.items():
        if not _same_values(stored[name], weight.detach().cpu(), path.parent):
            raise ExportError(f"the weight {name} of the ONNX file has other values than the module's")
        stored[name].ClearField("raw_data")  # it stays once it was read


def _same_values(initializer: onnx.TensorProto, weight: torch.Tensor, folder: Path) -> bool:
    from onnx.numpy_helper import to_array

    values = to_array(initializer, base_dir=str(folder))
    forms = [weight.reshape(values.shape)] if weight.numel() == values.size else []
    forms += [weight.T] if weight.ndim == 2 and weight.T.shape == values.shape else []
    return any(_equal(values, form) for form in forms)


def _equal(values: np.ndarray, weight: torch.Tensor) -> bool:
    """Compared in float64, a few rows at a time: a copy of all would be as large as the model."""
    if weight.ndim == 0:
        return _equal(values.reshape(1), weight.reshape(1))
    rows = max(1, _BLOCK * len(weight) // max(weight.numel(), 1))
    for start in range(0, len(weight), rows):
        stored = torch.from_numpy(values[start : start + rows].astype("float64"))
        if not torch.equal(stored.nan_to_num(), weight[start : start + rows].double().nan_to_num()):
            return False
    return True


def rounding_of(module: nn.Module, probe: Probe) -> list[float]:
    """How far each of the module's answers is from its value in float64; 0 where that cannot be told."""
    try:
        with quiet(), without_copying_warnings():
            exact = tensor_leaves(probe.inputs.to(torch.float64).call(copy.deepcopy(module).double()))
    except Exception:
        return [0.0] * len(probe.outputs)
    pairs = zip(probe.outputs, exact, strict=True)
    return [float((a.double() - b.cpu()).abs().max()) if a.is_floating_point() and a.numel() else 0.0 for a, b in pairs]


def disagreement(
    got: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    noise: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """How two lists of tensors differ beyond rounding, as a phrase; empty if they do not.

    Args:
        noise: for each tensor what rounding alone made of the expected one, if that is known.
        dtype: what was computed in; None where that is the dtype of the tensors.
    """
    if len(got) != len(expected):
        return f"{len(got)} outputs instead of {len(expected)}"
    for number, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape:
            return f"output {number} has shape {list(a.shape)} instead of {list(b.shape)}"
        if a.dtype != b.dtype:
            return f"output {number} is {a.dtype} instead of {b.dtype}"
        if b.numel() == 0:
            continue
        if not b.is_floating_point():
            share = (a != b).double().mean().item()
            if share > TIES:
                return f"{share:.0%} of output {number} differ"
            continue
        x, y = a.double(), b.double()
        finite = torch.isfinite(y)
        if not torch.equal(
            torch.where(torch.isfinite(x), 0.0, x).nan_to_num(7.0), torch.where(finite, 0.0, y).nan_to_num(7.0)
        ):
            return f"output {number} is infinite or not a number in other places"
        scale = y[finite].abs().max().item() if finite.any() else 0.0
        error = (x[finite] - y[finite]).abs().max().item() if finite.any() else 0.0
        allowed = COARSE.get(dtype or b.dtype, 1e-3) * max(scale, torch.finfo(b.dtype).tiny)
        if error > max(allowed, 0.0 if noise is None else NOISE_MARGIN * noise[number]):
            return f"output {number} is off by {error:.3g} where the largest value is {scale:.3g}"
    return ""
