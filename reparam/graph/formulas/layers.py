"""Layers as affine maps: convolutions, linear layers, BatchNorms, average pooling, padding."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from reparam import algebra
from reparam.algebra import Inexact
from reparam.graph.formulas import carriers
from reparam.graph.lift import Call, Carried, Lifted
from reparam.graph.nodes import info


def _not_constant(what: str) -> Inexact:
    return Inexact(f"its {what} is computed from the input", "fold only layers whose parameters are constant")


def conv(call: Call) -> Lifted | Inexact:
    x, weight, bias = call.tensor(), call["weight"], call["bias"]
    if x is None or not isinstance(weight, torch.Tensor) or isinstance(bias, fx.Node):
        return _not_constant("weight")
    rank = weight.ndim - 2
    if call.ndim != rank + 2:
        return Inexact("its input has no batch axis", "pass batched inputs")
    stride, dilation = per_axis(call["stride"], rank, 1), per_axis(call["dilation"], rank, 1)
    padding = call["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in per_axis(0 if padding == "valid" else padding, rank, 0))
    groups, mode = call["groups"] or 1, call["padding_mode"] or "zeros"
    made = algebra.from_conv(weight, bias, stride, pads, dilation, groups, mode)
    return Lifted((x,), lambda channels: (made,), 1)


def conv_transpose(call: Call) -> Lifted | Inexact:
    x, weight, bias = call.tensor(), call["weight"], call["bias"]
    if x is None or not isinstance(weight, torch.Tensor) or isinstance(bias, fx.Node):
        return _not_constant("weight")
    rank = weight.ndim - 2
    if call.ndim != rank + 2:
        return Inexact("its input has no batch axis", "pass batched inputs")
    made = algebra.from_conv_transpose(
        weight,
        bias,
        per_axis(call["stride"], rank, 1),
        per_axis(call["padding"], rank, 0),
        per_axis(call["output_padding"], rank, 0),
        per_axis(call["dilation"], rank, 1),
        call["groups"] or 1,
    )
    return Lifted((x,), lambda channels: (made,), 1)


def linear(call: Call) -> Lifted | Inexact:
    x, weight, bias = call.tensor(), call["weight"], call["bias"]
    if x is None or not isinstance(weight, torch.Tensor) or isinstance(bias, fx.Node):
        return _not_constant("weight")
    if weight.ndim != 2 or call.ndim < 2:
        return Inexact("its input has no batch axis", "pass batched inputs")
    made = algebra.from_linear(weight, bias)
    return Lifted((x,), lambda channels: (made,), call.ndim - 1)


def product(call: Call) -> Lifted | None:
    """`x @ W` for a constant matrix `W`, of shape `[in, out]`: the linear layer whose weight is its transpose."""
    x, weight = call.tensor(), call["other"] if call["mat2"] is None else call["mat2"]
    if x is None or x in call.constants or not isinstance(weight, fx.Node) or weight not in call.constants:
        return None
    matrix = call.constants.held(weight)
    if matrix.ndim != 2 or call.ndim < 2:
        return None
    made = algebra.from_linear(matrix.t(), None)
    return Lifted((x,), lambda channels: (made,), call.ndim - 1)


def batch_norm(call: Call) -> Lifted | Inexact:
    x = call.tensor()
    mean, var, gamma, beta = (call[name] for name in ("running_mean", "running_var", "weight", "bias"))
    if call["training"]:
        return Inexact(
            "it normalises with the statistics of its batch", "call it with training=False and running statistics"
        )
    if mean is None or var is None:
        return Inexact("it has no running statistics", "train it with track_running_stats=True")
    if x is None or any(isinstance(value, fx.Node) for value in (mean, var, gamma, beta)):
        return _not_constant("scale or shift")
    eps = call["eps"]
    made = algebra.from_batch_norm(mean, var, gamma, beta, 1e-5 if eps is None else float(eps))
    return Lifted((x,), lambda channels: (made,), 1)


def average_pool(call: Call, rank: int) -> Lifted | Carried | Inexact | None:
    x = call.tensor()
    if x is None or call.ndim != rank + 2:
        return Inexact("its input has no batch axis", "pass batched inputs")
    padding = per_axis(call["padding"], rank, 0)
    if call["divisor_override"] is not None:
        return Inexact("it divides by a number of its own", "use the window's size as the divisor")
    if call["ceil_mode"] and any(padding) and call["count_include_pad"] is not False:
        return Inexact("it rounds its output size up, so its last windows are smaller", "use ceil_mode=False")
    if call["ceil_mode"] or (any(padding) and call["count_include_pad"] is False):
        return carriers.inner_average_pool(call)
    kernel = per_axis(call["kernel_size"], rank, 1)
    stride = kernel if call["stride"] in (None, (), []) else per_axis(call["stride"], rank, 1)
    pads = tuple((p, p) for p in padding)
    device = getattr(info(x), "device", "cpu")
    carried = None if any(padding) else carriers.inner_average_pool(call)
    made = partial(algebra.from_average_pool, kernel=kernel, stride=stride, padding=pads, device=device)
    return Lifted((x,), lambda channels: (made(channels),), 1, carried=carried)


_PADDING_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def pad(call: Call) -> Lifted | Inexact | None:
    x, pads = call.tensor(), call["pad"]
    tensor = None if x is None else info(x)
    if x is None or tensor is None or call.ndim < 3:
        return None
    mode = call["mode"] or "constant"
    if mode == "constant" and call["value"] not in (None, 0, 0.0):
        return Inexact("it pads with a value other than zero", "pad with zeros, in front of the layer before")
    rank = call.ndim - 2
    sides = [*per_axis(pads, 2, 0), *(0,) * (2 * rank - len(pads))] if isinstance(pads, (list, tuple)) else []
    if len(sides) != 2 * rank:
        return Inexact("it pads the channels or the batch")
    pairs = tuple((sides[2 * axis], sides[2 * axis + 1]) for axis in reversed(range(rank)))
    device = tensor.device
    return Lifted((x,), lambda channels: (algebra.from_padding(channels, pairs, _PADDING_MODES[mode], device),), 1)


def per_axis(value: Any, rank: int, default: int) -> tuple[int, ...]:
    if value is None or value == ():
        return (default,) * rank
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(int(v) for v in value)
    return values * rank if len(values) == 1 else values
