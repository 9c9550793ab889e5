"""Operations that are not affine, and that scales and shifts commute with.

    op(s * x) = s * op(x)              for s > 0: ReLU, leaky ReLU (one slope or one for each channel), abs
    op(s * x + t) = s * op(x) + t      for s > 0: maxima over positions

A maximum pads with minus infinity, which `s * x + t` maps to itself, so padding is no obstacle. The scale and shift
must not vary along an axis that the maximum is taken over. ReLU6, GELU and SiLU have a scale of their own: not here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from reparam.algebra import Inexact
from reparam.graph.lift import Call, CallRow, CallTable
from reparam.graph.nodes import info


@dataclass(frozen=True)
class Commuting:
    """A call that commutes with positive scales.

    Attributes:
        operand: the tensor whose scale it hands on.
        name: what a person calls the operation.
        shifts: whether it hands a shift on too.
        mixed: axes of the operand whose positions it mixes.
        removed: axes of the operand that its result lacks.
    """

    operand: fx.Node
    name: str
    shifts: bool = False
    mixed: frozenset[int] = frozenset()
    removed: frozenset[int] = frozenset()

    def after(self, axis: int) -> int | None:
        """Where an axis of the operand lies in the result; None if its positions are mixed."""
        return None if axis in self.mixed else axis - sum(other < axis for other in self.removed)

    def before(self, axis: int) -> int | None:
        """Where an axis of the result lies in the operand; None if its positions are mixed."""
        for other in sorted(self.removed):
            axis += other <= axis
        return None if axis in self.mixed else axis


def _homogeneous(call: Call, name: str) -> Commuting | None:
    x = call.tensor()
    return None if x is None else Commuting(x, name)


def _prelu(call: Call) -> Commuting | None:
    return None if call.tensor("weight") is not None else _homogeneous(call, "PReLU")


def _rrelu(call: Call) -> Commuting | Inexact | None:
    return Inexact("its slope is random") if call["training"] else _homogeneous(call, "leaky ReLU")


def _clamp(call: Call) -> Commuting | None:
    low = call["min"]
    return _homogeneous(call, "ReLU") if _is_zero(low) and call["max"] is None else None


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 0


def _max_pool(call: Call, rank: int) -> Commuting | None:
    x = call.tensor()
    if x is None or call["return_indices"]:
        return None
    return Commuting(x, "max pooling", True, frozenset(range(call.ndim - rank, call.ndim)))


def _amax(call: Call) -> Commuting | None:
    x = call.tensor()
    tensor = None if x is None else info(x)
    if x is None or tensor is None:
        return None
    ndim = len(tensor.shape)
    dims = (call["dim"],) if isinstance(call["dim"], int) else tuple(call["dim"] or range(ndim))
    if not all(isinstance(dim, int) for dim in dims):
        return None
    mixed = frozenset(dim % ndim for dim in dims)
    return Commuting(x, "the maximum", True, mixed, frozenset() if call["keepdim"] else mixed)


def _reader(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda module: {name: getattr(module, name) for name in names}


_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_relu = partial(_homogeneous, name="ReLU")
_leaky_relu = partial(_homogeneous, name="leaky ReLU")

COMMUTING: CallTable[Commuting] = CallTable(
    (
        CallRow("ReLU", _relu, ("input", "inplace"), (F.relu, torch.relu, "relu"), (nn.ReLU,)),
        CallRow("ReLU", _clamp, ("input", "min", "max"), (torch.clamp, torch.clip, "clamp", "clip")),
        CallRow("ReLU", _clamp, ("input", "min"), (torch.clamp_min, "clamp_min")),
        CallRow(
            "leaky ReLU",
            _leaky_relu,
            ("input", "negative_slope", "inplace"),
            (F.leaky_relu, torch._C._nn.leaky_relu),
            (nn.LeakyReLU,),
        ),
        CallRow(
            "leaky ReLU",
            _rrelu,
            ("input", "lower", "upper", "training", "inplace"),
            (F.rrelu, torch.rrelu),
            (nn.RReLU,),
            _reader("training"),
        ),
        CallRow("PReLU", _prelu, ("input", "weight"), (F.prelu, torch.prelu, "prelu"), (nn.PReLU,)),
        CallRow(
            "abs",
            partial(_homogeneous, name="abs"),
            ("input",),
            (operator.abs, abs, torch.abs, torch.absolute, "abs", "absolute"),
        ),
        CallRow("maximum", _amax, ("input", "dim", "keepdim"), (torch.amax, "amax")),
        *(
            CallRow("max pooling", partial(_max_pool, rank=rank), _POOL, calls, (cls,), _reader("return_indices"))
            for rank, calls, cls in (
                (1, (F.max_pool1d, torch.max_pool1d), nn.MaxPool1d),
                (2, (F.max_pool2d, torch.max_pool2d), nn.MaxPool2d),
                (3, (F.max_pool3d, torch.max_pool3d), nn.MaxPool3d),
            )
        ),
        *(
            CallRow(
                "max pooling",
                partial(_max_pool, rank=rank),
                ("input", "output_size", "return_indices"),
                (function,),
                (cls,),
                _reader("return_indices"),
            )
            for rank, function, cls in (
                (1, F.adaptive_max_pool1d, nn.AdaptiveMaxPool1d),
                (2, F.adaptive_max_pool2d, nn.AdaptiveMaxPool2d),
                (3, F.adaptive_max_pool3d, nn.AdaptiveMaxPool3d),
            )
        ),
    )
)
