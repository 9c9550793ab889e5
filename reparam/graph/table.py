"""The lift table: one row for each linear operation, with all its spellings.

A new linear operation is one row here and one formula in `reparam.graph.formulas`; docs/extending.md shows an example.
Rows are added from outside by `reparam.graph.register`. A table of other rows can be given to the passes that use it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from reparam.graph.formulas import arithmetic, carriers, channels, layers
from reparam.graph.lift import LiftTable, Row
from reparam.graph.nodes import is_parametrized


def _read_padding(mode: str) -> Callable[[Any], dict[str, Any]]:
    return lambda module: {"pad": module.padding, "mode": mode, "value": getattr(module, "value", 0)}


def _reader(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda module: {name: read_attribute(module, name) for name in names}


def read_attribute(module: nn.Module, name: str) -> Any:
    """An attribute of a module as its formula gets it: a parametrised one is computed, None if there is none."""
    if is_parametrized(module) and name in module.parametrizations:  # type: ignore[operator]
        # The weight is an expression of others; like every merged weight it is computed in float64.
        with torch.no_grad():
            return copy.deepcopy(module.parametrizations[name]).double()()  # type: ignore[index,operator]
    value = getattr(module, name, None)
    return value.detach() if isinstance(value, torch.Tensor) else value


def _read_batch_norm(module: Any) -> dict[str, Any]:
    return {
        **_reader("running_mean", "running_var", "weight", "bias", "eps")(module),
        "training": module.training,
    }


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_POOL = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_BINARY = ("input", "other")
_CONSTANT_PADS = (nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)

_REARRANGEMENTS = (
    Row("permutation", carriers.permute, ("input", "dims"), (torch.permute, "permute"), raw=True, spread=True),
    Row(
        "transposition",
        carriers.transpose,
        ("input", "dim0", "dim1"),
        (torch.transpose, torch.swapaxes, torch.swapdims, "transpose", "swapaxes", "swapdims"),
        raw=True,
    ),
    Row("moved axis", carriers.movedim, ("input", "source", "destination"), (torch.movedim, "movedim"), raw=True),
    Row("transposition", carriers.attribute, ("input", "name"), (getattr,), raw=True),
    Row(
        "reshape",
        channels.reshape,
        ("input", "shape"),
        (torch.reshape, "reshape", "view"),
        raw=True,
        spread=True,
    ),
    Row(
        "flattening",
        channels.flatten,
        ("input", "start_dim", "end_dim"),
        (torch.flatten, "flatten"),
        (nn.Flatten,),
        _reader("start_dim", "end_dim"),
        raw=True,
    ),
    Row("unflattening", carriers.unflatten, ("input", "dim", "sizes"), (torch.unflatten, "unflatten"), raw=True),
    Row("squeeze", carriers.squeeze, ("input", "dim"), (torch.squeeze, "squeeze"), raw=True),
    Row("unsqueeze", carriers.unsqueeze, ("input", "dim"), (torch.unsqueeze, "unsqueeze"), raw=True),
    Row("copy", carriers.same, ("input", "memory_format"), (torch.clone, "contiguous", "clone"), raw=True),
    Row("roll", carriers.turned, ("input", "shifts", "dims"), (torch.roll, "roll"), raw=True),
)

_CHANNELS = (
    Row(
        "concatenation",
        channels.concatenate,
        ("tensors", "dim"),
        (torch.cat, torch.concat, torch.concatenate),
        raw=True,
    ),
    Row("indexing", channels.index, ("input", "index"), (operator.getitem,), raw=True),
    Row("slice", channels.narrow, ("input", "dim", "start", "length"), (torch.narrow, "narrow"), raw=True),
    Row(
        "choice of channels",
        channels.index_select,
        ("input", "dim", "index"),
        (torch.index_select, "index_select"),
        raw=True,
    ),
    Row("flip", channels.flip, ("input", "dims"), (torch.flip, "flip"), raw=True, spread=True),
    Row(
        "channel shuffle",
        channels.shuffle,
        ("input", "groups"),
        (F.channel_shuffle, torch.channel_shuffle),
        (nn.ChannelShuffle,),
        _reader("groups"),
        raw=True,
    ),
)

_INTERPOLATION = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")

_AVERAGES = (
    Row("mean", carriers.mean, ("input", "dim", "keepdim", "dtype"), (torch.mean, "mean"), raw=True),
    Row(
        "adaptive average pooling",
        carriers.adaptive_average_pool,
        ("input", "output_size"),
        (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, torch.adaptive_avg_pool1d),
        (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
        _reader("output_size"),
        raw=True,
    ),
    Row(
        "interpolation",
        carriers.interpolate,
        _INTERPOLATION,
        (F.interpolate,),
        (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
        _reader("mode"),
        raw=True,
    ),
)

ROWS: tuple[Row, ...] = (
    Row(
        "convolution",
        layers.conv,
        _CONV,
        (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        _reader(*_CONV[1:], "padding_mode"),
    ),
    Row(
        "transposed convolution",
        layers.conv_transpose,
        _CONV_TRANSPOSE,
        (
            *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
            *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
        ),
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        _reader(*_CONV_TRANSPOSE[1:]),
    ),
    Row(
        "linear layer",
        layers.linear,
        ("input", "weight", "bias"),
        (F.linear, torch._C._nn.linear),
        (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear),
        _reader("weight", "bias"),
    ),
    *(
        Row("matrix product", layers.product, ("input", other), calls, raw=True)
        for other, calls in (
            ("other", (operator.matmul, torch.matmul, "matmul", "__matmul__")),
            ("mat2", (torch.mm, "mm")),
        )
    ),
    Row(
        "batch normalisation",
        layers.batch_norm,
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        (F.batch_norm,),
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        _read_batch_norm,
    ),
    Row("multiplication", arithmetic.multiply, _BINARY, (operator.mul, torch.mul, torch.multiply, "mul", "multiply")),
    Row(
        "division",
        arithmetic.divide,
        _BINARY,
        (operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide"),
    ),
    Row("addition", arithmetic.add, _BINARY, (operator.add, torch.add, "add")),
    Row("subtraction", arithmetic.subtract, _BINARY, (operator.sub, torch.sub, torch.subtract, "sub", "subtract")),
    Row("negation", arithmetic.negate, ("input",), (operator.neg, torch.neg, torch.negative, "neg", "negative")),
    Row("scale and shift", arithmetic.add_scaled, ("input", "tensor1", "tensor2"), (torch.addcmul,)),
    Row("padding", layers.pad, ("input", "pad", "mode", "value"), (F.pad, torch._C._nn.pad)),
    *(
        Row("padding", layers.pad, ("input",), (), modules, _read_padding(mode))
        for mode, modules in (
            ("constant", (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, *_CONSTANT_PADS)),
            ("reflect", (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)),
            ("replicate", (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)),
            ("circular", (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)),
        )
    ),
    *(
        Row("average pooling", partial(layers.average_pool, rank=rank), _POOL, (function,), (cls,), _reader(*_POOL[1:]))
        for rank, function, cls in (
            (1, F.avg_pool1d, nn.AvgPool1d),
            (2, F.avg_pool2d, nn.AvgPool2d),
            (3, F.avg_pool3d, nn.AvgPool3d),
        )
    ),
    *_REARRANGEMENTS,
    *_CHANNELS,
    *_AVERAGES,
)

TABLE = LiftTable(ROWS)

__all__ = ["ROWS", "TABLE", "read_attribute"]
