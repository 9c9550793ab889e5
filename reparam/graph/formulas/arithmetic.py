"""Arithmetic with constants as affine maps: scales, shifts, sums, differences, quotients."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from reparam import algebra
from reparam.algebra import AffineMap, Inexact
from reparam.graph.lift import Call, Lifted
from reparam.graph.nodes import info


def _scaled(call: Call, x: fx.Node, scale: Any, shift: Any) -> Lifted | Inexact:
    """`x * scale + shift` for constants that vary along one axis at most."""
    axis: int | None = None
    for value in (scale, shift):
        found = _varying_axis(value, call.shape)
        if isinstance(found, Inexact):
            return found
        if found is not None and axis is not None and found != axis:
            return Inexact("its constants vary along more than one axis")
        axis = found if found is not None else axis
    tensor = info(x)
    if tensor is None or tensor.shape != call.shape:
        return Inexact("its constant broadcasts the input to a larger shape")

    def make(channels: int) -> tuple[AffineMap, ...]:
        vectors = [None if value is None else _vector(value, channels, tensor.device) for value in (scale, shift)]
        return (algebra.from_scale_shift(*vectors),)

    return Lifted((x,), make, axis)


def _varying_axis(value: Any, shape: tuple[int, ...]) -> int | Inexact | None:
    if not isinstance(value, torch.Tensor):
        return None
    if value.dtype.is_complex:
        return Inexact("its constant is complex")
    axes = [len(shape) - value.ndim + i for i, size in enumerate(value.shape) if size != 1]
    if not axes:
        return None
    if len(axes) > 1 or axes[0] < 0:
        return Inexact("its constant varies by position, not by channel only")
    if axes[0] == 0:
        return Inexact("its constant varies along the batch axis")
    return axes[0]


def _vector(value: Any, channels: int, device: torch.device) -> torch.Tensor:
    tensor = (
        value.reshape(-1)
        if isinstance(value, torch.Tensor)
        else torch.full((1,), float(value), dtype=torch.float64, device=device)
    )
    return tensor.to(torch.float64).expand(channels)


def _operands(call: Call) -> tuple[Any, Any]:
    return call["input"], call["other"]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.Tensor)) and not isinstance(value, bool)


def multiply(call: Call) -> Lifted | Inexact | None:
    a, b = _operands(call)
    if isinstance(a, fx.Node) and _is_number(b):
        return _scaled(call, a, b, None)
    if isinstance(b, fx.Node) and _is_number(a):
        return _scaled(call, b, a, None)
    return None


def divide(call: Call) -> Lifted | Inexact | None:
    a, b = _operands(call)
    if not isinstance(a, fx.Node) or not _is_number(b) or call["rounding_mode"] is not None:
        return None
    divisor = b.to(torch.float64) if isinstance(b, torch.Tensor) else float(b)
    if bool(torch.as_tensor(divisor == 0, device="cpu").any()):
        return Inexact("it divides by zero")
    return _scaled(call, a, 1.0 / divisor, None)


def negate(call: Call) -> Lifted | Inexact | None:
    x = call.tensor()
    return None if x is None else _scaled(call, x, -1.0, None)


def add(call: Call, sign: float = 1.0) -> Lifted | Inexact | None:
    a, b = _operands(call)
    factor = sign * (1.0 if call["alpha"] is None else float(call["alpha"]))
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return _sum(a, b, factor, call)
    if isinstance(a, fx.Node) and _is_number(b):
        return _scaled(call, a, None, b * factor)
    if isinstance(b, fx.Node) and _is_number(a):
        return _scaled(call, b, factor, a)
    return None


def subtract(call: Call) -> Lifted | Inexact | None:
    return add(call, -1.0)


def _sum(a: fx.Node, b: fx.Node, factor: float, call: Call) -> Lifted | Inexact:
    shapes = [getattr(info(node), "shape", None) for node in (a, b)]
    if shapes != [call.shape, call.shape]:
        return Inexact("it broadcasts one operand over the other, which is no sum of equal maps")
    device = info(call.node).device  # type: ignore[union-attr]

    def make(channels: int) -> tuple[AffineMap, ...]:
        first = algebra.identity(channels, device)
        if factor == 1.0:
            return first, algebra.identity(channels, device)
        return first, algebra.from_scale_shift(torch.full((channels,), factor, device=device).double(), None)

    return Lifted((a, b), make, None)


def add_scaled(call: Call) -> Lifted | Inexact | None:
    """`input + value * tensor1 * tensor2`, affine if the two of the three that scale and shift are constant."""
    shift, a, b = call["input"], call["tensor1"], call["tensor2"]
    x, scale = (a, b) if isinstance(a, fx.Node) else (b, a)
    if not isinstance(x, fx.Node) or not isinstance(scale, torch.Tensor) or not isinstance(shift, torch.Tensor):
        return None
    return _scaled(call, x, scale * (1.0 if call["value"] is None else call["value"]), shift)
