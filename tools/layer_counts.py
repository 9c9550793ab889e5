"""What a model executes, and how far two outputs are apart: for comparisons with other tools.

Shares no code with `reparam`, so that neither figure can repeat a mistake of the engine. Operations are counted where
every spelling (module, functional, traced graph) ends: at the dispatcher, while the model runs once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_CONVOLUTIONS = {"convolution", "_convolution", "convolution_overrideable", "mkldnn_convolution"}
_MATRIX_PRODUCTS = {"mm", "addmm", "linear", "mkldnn_linear"}
_BATCHED_PRODUCTS = {"bmm", "baddbmm"}
_ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "addcmul", "addcdiv"}


@dataclass(frozen=True)
class LayerCounts:
    """Operations executed by one forward pass.

    Attributes:
        convolutions: convolutions and transposed convolutions of any rank.
        batch_norms: batch normalisations.
        linears: matrix products with a weight.
        scales: elementwise arithmetic with a weight (a BatchNorm written out as scale and shift would be two).
    """

    convolutions: int = 0
    batch_norms: int = 0
    linears: int = 0
    scales: int = 0

    def to_dict(self) -> dict[str, int]:
        """The counts as plain JSON types."""
        return asdict(self)


class _Recorder(TorchDispatchMode):
    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._weights = {tensor.untyped_storage()._cdata for tensor in weights}
        self.convolutions = self.batch_norms = self.linears = self.scales = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in _CONVOLUTIONS:
            self.convolutions += 1
        elif "batch_norm" in name:
            self.batch_norms += 1
        elif name in _MATRIX_PRODUCTS or (name in _BATCHED_PRODUCTS and self._reads_weight(args)):
            self.linears += 1
        elif name in _ARITHMETIC and self._reads_weight(args):
            self.scales += 1
        return func(*args, **(kwargs or {}))

    def _reads_weight(self, args: Any) -> bool:
        """Whether an operand is a weight or a view of one."""
        return any(isinstance(a, torch.Tensor) and a.untyped_storage()._cdata in self._weights for a in args)


def count_layers(module: nn.Module, *inputs: torch.Tensor) -> LayerCounts:
    """Runs `module` once on copies of `inputs`, without gradients, and counts what was executed."""
    recorder = _Recorder([*module.parameters(), *module.buffers()])
    copies = [tensor.clone() for tensor in inputs]
    with torch.no_grad(), recorder:
        module(*copies)
    return LayerCounts(recorder.convolutions, recorder.batch_norms, recorder.linears, recorder.scales)


def output_of(module: nn.Module, *inputs: torch.Tensor) -> Any:
    """The output on copies of the inputs, without gradients."""
    with torch.no_grad():
        return module(*[tensor.clone() for tensor in inputs])


def errors(expected: Any, actual: Any) -> tuple[float, float]:
    """(largest `|actual - expected|`, largest `max|actual - expected| / max|expected|` of one output).

    Both are infinite where structure, shapes, dtypes or the places of non-finite numbers differ.
    """
    wanted, wanted_spec = pytree.tree_flatten(expected)
    got, got_spec = pytree.tree_flatten(actual)
    if wanted_spec != got_spec:
        return math.inf, math.inf
    pairs = [_errors_of_leaf(a, b) for a, b in zip(wanted, got, strict=True)]
    return max((p[0] for p in pairs), default=0.0), max((p[1] for p in pairs), default=0.0)


def _errors_of_leaf(wanted: Any, got: Any) -> tuple[float, float]:
    if not isinstance(wanted, torch.Tensor) or not isinstance(got, torch.Tensor):
        same = type(wanted) is type(got) and wanted == got
        return (0.0, 0.0) if same else (math.inf, math.inf)
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return math.inf, math.inf
    a, b = wanted.double(), got.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return math.inf, math.inf
    if not finite.any():
        return 0.0, 0.0
    absolute = (a[finite] - b[finite]).abs().max().item()
    largest = a[finite].abs().max().item()
    if absolute == 0.0:
        return 0.0, 0.0
    return absolute, absolute / largest if largest > 0 else math.inf
