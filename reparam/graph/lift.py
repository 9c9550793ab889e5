"""The lift table: what each operation is as an affine map of its tensor operands.

One row holds the spellings of one operation (module, function, method) and the formula. A row answers with a `Lifted`,
or with the `Inexact` reason why this call is not affine, or not known to be. An operation without a row is not affine.

A new linear operation is one row here and, if it is new to the algebra, one formula in `reparam.algebra.sources`.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from reparam import algebra
from reparam.algebra import AffineMap, Inexact
from reparam.graph.constants import Constants
from reparam.graph.nodes import info, kind, module_of, pinned


@dataclass(frozen=True)
class Lifted:
    """An operation as a sum of affine maps of its operands.

    Attributes:
        operands: the tensors it is affine in.
        maps: given the number of channels, one map per operand.
        axis: the axis that carries channels, in operands and result alike; None if any axis will do.
    """

    operands: tuple[fx.Node, ...]
    maps: Callable[[int], tuple[AffineMap, ...]]
    axis: int | None


@dataclass(frozen=True)
class Call:
    """One call of an operation, its arguments by name, whatever the spelling.

    Attributes:
        node: the graph node.
        arguments: by the names of the row's signature. Tensors of constants are values (float64), others are nodes.
        root: the module that the graph's targets refer to.
    """

    node: fx.Node
    arguments: Mapping[str, Any]
    root: nn.Module

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def ndim(self) -> int:
        """Number of axes of the result."""
        return len(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result for the example inputs."""
        tensor = info(self.node)
        return () if tensor is None else tensor.shape


@dataclass(frozen=True)
class Row:
    """One operation of the lift table.

    Attributes:
        name: what the operation is.
        lift: the formula.
        signature: argument names, in order, of the function and method spellings.
        modules: module classes, by exact type, and how to read the arguments off such a module.
        calls: functions, and names of tensor methods, that spell it.
    """

    name: str
    lift: Callable[[Call], Lifted | Inexact | None]
    signature: tuple[str, ...]
    calls: tuple[Any, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    read_module: Callable[[Any], dict[str, Any]] = field(default=lambda module: {})


class LiftTable:
    """Finds the row of a node and applies it."""

    def __init__(self, rows: tuple[Row, ...]) -> None:
        self._by_module = {cls: row for row in rows for cls in row.modules}
        self._by_call = {call: row for row in rows for call in row.calls}

    def row(self, node: fx.Node, root: nn.Module) -> Row | None:
        """The row for a node, or None if the operation has none."""
        if node.op == "call_module":
            return self._by_module.get(plain_type(module_of(node, root)))
        return self._by_call.get(node.target) if node.op in ("call_function", "call_method") else None

    def lift(self, node: fx.Node, root: nn.Module, constants: Constants) -> Lifted | Inexact | None:
        """The node as affine maps, the reason why not, or None if it is no operation of the table."""
        row = self.row(node, root)
        if row is None or node in constants:
            return None
        inexact = _untouchable(node, root)
        if inexact is not None:
            return inexact
        known = row.signature[:1] if node.op == "call_module" else row.signature
        if len(node.args) > len(known) or not set(node.kwargs) <= {*known, *_HARMLESS}:
            return Inexact("it is called with further arguments", "call it with its input alone")
        arguments: dict[str, Any] = dict(zip(row.signature, node.args, strict=False))
        arguments.update(node.kwargs)
        if node.op == "call_module":
            arguments.update(row.read_module(module_of(node, root)))
        for name, value in arguments.items():
            if isinstance(value, fx.Node) and value in constants:
                arguments[name] = constants.value(value)
            elif isinstance(value, fx.Node) and name == "groups" and "number" in value.meta:
                arguments[name] = value.meta["number"]  # a channel count; the weight's shape fixes it
            elif isinstance(value, fx.Node) and info(value) is None:
                return Inexact(f"its argument {name!r} is computed when the model runs", "pass a constant")
            elif isinstance(value, (list, tuple)) and any(isinstance(item, fx.Node) for item in value):
                return Inexact(f"its argument {name!r} is computed when the model runs", "pass constants")
        return row.lift(Call(node, arguments, root))


_HARMLESS = {"alpha", "rounding_mode", "value", "inplace"}


def plain_type(module: nn.Module | None) -> type:
    """The class of a module, that of the unparametrised module if it is parametrised."""
    cls = type(module)
    return cls.__mro__[1] if module is not None and parametrize.is_parametrized(module) else cls


def _untouchable(node: fx.Node, root: nn.Module) -> Inexact | None:
    tensor = info(node)
    if tensor is None or not tensor.dtype.is_floating_point:
        return Inexact("its result is not a floating-point tensor")
    reason = pinned(node) or next((pinned(other) for other in node.all_input_nodes if pinned(other)), None)
    if reason is not None:
        return Inexact(f"a tensor it reads or makes must stay: {reason}", "use the out-of-place form of the operation")
    for other in node.all_input_nodes:
        operand = info(other)
        if operand is not None and operand.dtype.is_floating_point and operand.dtype != tensor.dtype:
            return Inexact("it converts between floating-point types", "run the model in one type")
    module = module_of(node, root)
    if module is not None:
        return _module_hides_something(module)
    return None


def _module_hides_something(module: nn.Module) -> Inexact | None:
    if module._forward_hooks or module._forward_pre_hooks:
        return Inexact("it has forward hooks, which fusing would lose", "remove the hooks, then fuse")
    if "forward" in module.__dict__:
        return Inexact("its forward method was replaced on the instance", "give the module a class of its own")
    return None


# --- rows ------------------------------------------------------------------------------------------------------------


def _tensor(call: Call, name: str = "input") -> fx.Node | None:
    value = call[name]
    return value if isinstance(value, fx.Node) else None


def _not_constant(what: str) -> Inexact:
    return Inexact(f"its {what} is computed from the input", "fold only layers whose parameters are constant")


def _conv(call: Call) -> Lifted | Inexact:
    x, weight, bias = _tensor(call), call["weight"], call["bias"]
    if x is None or not isinstance(weight, torch.Tensor) or isinstance(bias, fx.Node):
        return _not_constant("weight")
    rank = weight.ndim - 2
    if call.ndim != rank + 2:
        return Inexact("its input has no batch axis", "pass batched inputs")
    stride, dilation = _per_axis(call["stride"], rank, 1), _per_axis(call["dilation"], rank, 1)
    padding = call["padding"]
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _per_axis(0 if padding == "valid" else padding, rank, 0))
    groups, mode = call["groups"] or 1, call["padding_mode"] or "zeros"
    made = algebra.from_conv(weight, bias, stride, pads, dilation, groups, mode)
    return Lifted((x,), lambda channels: (made,), 1)


def _conv_transpose(call: Call) -> Lifted | Inexact:
    x, weight, bias = _tensor(call), call["weight"], call["bias"]
    if x is None or not isinstance(weight, torch.Tensor) or isinstance(bias, fx.Node):
        return _not_constant("weight")
    rank = weight.ndim - 2
    if call.ndim != rank + 2:
        return Inexact("its input has no batch axis", "pass batched inputs")
    made = algebra.from_conv_transpose(
        weight,
        bias,
        _per_axis(call["stride"], rank, 1),
        _per_axis(call["padding"], rank, 0),
        _per_axis(call["output_padding"], rank, 0),
        _per_axis(call["dilation"], rank, 1),
        call["groups"] or 1,
    )
    return Lifted((x,), lambda channels: (made,), 1)


def _linear(call: Call) -> Lifted | Inexact:
    x, weight, bias = _tensor(call), call["weight"], call["bias"]
    if x is None or not isinstance(weight, torch.Tensor) or isinstance(bias, fx.Node):
        return _not_constant("weight")
    if weight.ndim != 2 or call.ndim < 2:
        return Inexact("its input has no batch axis", "pass batched inputs")
    made = algebra.from_linear(weight, bias)
    return Lifted((x,), lambda channels: (made,), call.ndim - 1)


def _batch_norm(call: Call) -> Lifted | Inexact:
    x = _tensor(call)
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


def _average_pool(call: Call, rank: int) -> Lifted | Inexact | None:
    x = _tensor(call)
    if x is None or call.ndim != rank + 2:
        return Inexact("its input has no batch axis", "pass batched inputs")
    padding = _per_axis(call["padding"], rank, 0)
    if call["ceil_mode"]:
        return Inexact("it rounds its output size up, so its last windows are smaller", "use ceil_mode=False")
    if call["divisor_override"] is not None:
        return Inexact("it divides by a number of its own", "use the window's size as the divisor")
    if any(padding) and call["count_include_pad"] is False:
        return Inexact("its windows at the border count fewer elements", "use count_include_pad=True")
    kernel = _per_axis(call["kernel_size"], rank, 1)
    stride = kernel if call["stride"] in (None, (), []) else _per_axis(call["stride"], rank, 1)
    pads = tuple((p, p) for p in padding)
    device = getattr(info(x), "device", "cpu")
    return Lifted((x,), lambda channels: (algebra.from_average_pool(channels, kernel, stride, pads, device),), 1)


_PADDING_MODES = {"constant": "zeros", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}


def _pad(call: Call) -> Lifted | Inexact | None:
    x, pads = _tensor(call), call["pad"]
    tensor = None if x is None else info(x)
    if x is None or tensor is None or call.ndim < 3:
        return None
    mode = call["mode"] or "constant"
    if mode == "constant" and call["value"] not in (None, 0, 0.0):
        return Inexact("it pads with a value other than zero", "pad with zeros, in front of the layer before")
    rank = call.ndim - 2
    sides = [*_per_axis(pads, 2, 0), *(0,) * (2 * rank - len(pads))] if isinstance(pads, (list, tuple)) else []
    if len(sides) != 2 * rank:
        return Inexact("it pads the channels or the batch")
    pairs = tuple((sides[2 * axis], sides[2 * axis + 1]) for axis in reversed(range(rank)))
    device = tensor.device
    return Lifted((x,), lambda channels: (algebra.from_padding(channels, pairs, _PADDING_MODES[mode], device),), 1)


def _read_padding(mode: str) -> Callable[[Any], dict[str, Any]]:
    return lambda module: {"pad": module.padding, "mode": mode, "value": getattr(module, "value", 0)}


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


def _multiply(call: Call) -> Lifted | Inexact | None:
    a, b = _operands(call)
    if isinstance(a, fx.Node) and _is_number(b):
        return _scaled(call, a, b, None)
    if isinstance(b, fx.Node) and _is_number(a):
        return _scaled(call, b, a, None)
    return None


def _divide(call: Call) -> Lifted | Inexact | None:
    a, b = _operands(call)
    if not isinstance(a, fx.Node) or not _is_number(b) or call["rounding_mode"] is not None:
        return None
    divisor = b.to(torch.float64) if isinstance(b, torch.Tensor) else float(b)
    if bool(torch.as_tensor(divisor == 0).any()):
        return Inexact("it divides by zero")
    return _scaled(call, a, 1.0 / divisor, None)


def _negate(call: Call) -> Lifted | Inexact | None:
    x = _tensor(call)
    return None if x is None else _scaled(call, x, -1.0, None)


def _add(call: Call, sign: float = 1.0) -> Lifted | Inexact | None:
    a, b = _operands(call)
    factor = sign * (1.0 if call["alpha"] is None else float(call["alpha"]))
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        return _sum(a, b, factor, call)
    if isinstance(a, fx.Node) and _is_number(b):
        return _scaled(call, a, None, b * factor)
    if isinstance(b, fx.Node) and _is_number(a):
        return _scaled(call, b, factor, a)
    return None


def _subtract(call: Call) -> Lifted | Inexact | None:
    return _add(call, -1.0)


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


def _add_scaled(call: Call) -> Lifted | Inexact | None:
    """`input + value * tensor1 * tensor2`, affine if the two of the three that scale and shift are constant."""
    shift, a, b = call["input"], call["tensor1"], call["tensor2"]
    x, scale = (a, b) if isinstance(a, fx.Node) else (b, a)
    if not isinstance(x, fx.Node) or not isinstance(scale, torch.Tensor) or not isinstance(shift, torch.Tensor):
        return None
    return _scaled(call, x, scale * (1.0 if call["value"] is None else call["value"]), shift)


def _per_axis(value: Any, rank: int, default: int) -> tuple[int, ...]:
    if value is None or value == ():
        return (default,) * rank
    if isinstance(value, int):
        return (value,) * rank
    values = tuple(int(v) for v in value)
    return values * rank if len(values) == 1 else values


def _reader(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda module: {name: _read(module, name) for name in names}


def _read(module: nn.Module, name: str) -> Any:
    if parametrize.is_parametrized(module, name):
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

ROWS: tuple[Row, ...] = (
    Row(
        "convolution",
        _conv,
        _CONV,
        (F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        _reader(*_CONV[1:], "padding_mode"),
    ),
    Row(
        "transposed convolution",
        _conv_transpose,
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
        _linear,
        ("input", "weight", "bias"),
        (F.linear, torch._C._nn.linear),
        (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear),
        _reader("weight", "bias"),
    ),
    Row(
        "batch normalisation",
        _batch_norm,
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        (F.batch_norm,),
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        _read_batch_norm,
    ),
    Row("multiplication", _multiply, _BINARY, (operator.mul, torch.mul, torch.multiply, "mul", "multiply")),
    Row("division", _divide, _BINARY, (operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide")),
    Row("addition", _add, _BINARY, (operator.add, torch.add, "add")),
    Row("subtraction", _subtract, _BINARY, (operator.sub, torch.sub, torch.subtract, "sub", "subtract")),
    Row("negation", _negate, ("input",), (operator.neg, torch.neg, torch.negative, "neg", "negative")),
    Row("scale and shift", _add_scaled, ("input", "tensor1", "tensor2"), (torch.addcmul,)),
    Row("padding", _pad, ("input", "pad", "mode", "value"), (F.pad, torch._C._nn.pad)),
    *(
        Row("padding", _pad, ("input",), (), modules, _read_padding(mode))
        for mode, modules in (
            ("constant", (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, *_CONSTANT_PADS)),
            ("reflect", (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)),
            ("replicate", (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)),
            ("circular", (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)),
        )
    ),
    *(
        Row("average pooling", partial(_average_pool, rank=rank), _POOL, (function,), (cls,), _reader(*_POOL[1:]))
        for rank, function, cls in (
            (1, F.avg_pool1d, nn.AvgPool1d),
            (2, F.avg_pool2d, nn.AvgPool2d),
            (3, F.avg_pool3d, nn.AvgPool3d),
        )
    ),
)

TABLE = LiftTable(ROWS)

__all__ = ["ROWS", "TABLE", "Call", "LiftTable", "Lifted", "Row", "kind", "plain_type"]
