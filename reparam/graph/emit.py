"""Writes affine maps back into the graph as the layers of `torch.nn`.

A map becomes a `Linear`, `Conv*d` or `ConvTranspose*d`, or, where it only scales channels, one multiply-add. Weights
are rounded to the model's dtype here, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from reparam.algebra import AffineMap, Geometry, Inexact, regrouped
from reparam.algebra.deferred import Deferred
from reparam.algebra.sources import transposed_weight
from reparam.capture.captured import TensorInfo
from reparam.graph.nodes import info, set_module
from reparam.lazy import SMALLEST, Lazy

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


MOST_LOST_ULPS = 4.0
"""Rounding costs each weight half a unit of its last place; a row that loses eight times that has underflown."""


def unwritable(geometry: Geometry, ndim: int, axis: int) -> Inexact | None:
    """Why no layer of `torch.nn` is this map on a tensor of `ndim` axes with channels in `axis`; None if one is."""
    if geometry.is_diagonal:
        return None
    if geometry.rank == 0:
        if axis == ndim - 1 or (axis == 1 and ndim <= 5):
            return None
        return Inexact(f"no layer mixes channels that lie in axis {axis} of {ndim}")
    if axis != 1 or ndim != geometry.rank + 2:
        return Inexact(f"no convolution runs over channels that lie in axis {axis} of {ndim}")
    if geometry.is_transposed:
        if any(s > 1 for s in geometry.stride):
            return Inexact("it would be a transposed convolution that also has a stride")
        for axis_, (low, high) in enumerate(geometry.padding):
            reach = geometry.dilation[axis_] * (geometry.kernel[axis_] - 1)
            limit = max(geometry.upsampling[axis_], geometry.dilation[axis_])
            if low > reach or not 0 <= high - low < limit:
                return Inexact("no transposed convolution has this padding")
    return None


@dataclass(frozen=True)
class Layer:
    """A layer that is ready to be inserted.

    Attributes:
        module: the layer, or None for a plain scale and shift.
        pads: asymmetric or moded padding to run first, as `F.pad` takes it; empty if none.
        pad_mode: mode for `F.pad`.
        scale, shift: for a plain scale and shift, shaped to broadcast.
        description: `Conv2d(64, 64, 3x3)`.
        float64: makes the same layer before its weights were rounded.
    """

    module: nn.Module | None
    pads: tuple[int, ...] = ()
    pad_mode: str = "constant"
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    description: str = ""
    float64: Callable[[], Layer | Inexact] | None = None


@dataclass(frozen=True)
class Constant:
    """A constant tensor, before it was rounded."""

    value: torch.Tensor


def layer_for(map_: AffineMap, like: TensorInfo, axis: int, bias: torch.Tensor | None) -> Layer | Inexact:
    """The layer that computes `map_` (without its own bias) plus `bias`, for results shaped and typed `like`."""
    layer = _layer(map_, like, axis, bias)
    if isinstance(layer, Inexact) or like.dtype == torch.float64:
        return layer
    return replace(layer, float64=partial(exact_layer_for, map_, like, axis, bias))


def exact_layer_for(map_: AffineMap, like: TensorInfo, axis: int, bias: torch.Tensor | None) -> Layer | Inexact:
    """The same layer in float64, whatever the dtype of `like`; a large weight is made whenever it is read."""
    return _layer(map_, replace(like, dtype=torch.float64), axis, bias, lazy=True)


def _layer(
    map_: AffineMap, like: TensorInfo, axis: int, bias: torch.Tensor | None, lazy: bool = False
) -> Layer | Inexact:
    geometry = map_.geometry
    if geometry.rank == 0 and not geometry.is_diagonal and axis == len(like.shape) - 1:
        map_ = regrouped(map_, 1)
        geometry = map_.geometry
    shape = geometry.weight_shape
    lazy = lazy and not geometry.is_diagonal and not geometry.is_transposed and math.prod(shape) >= SMALLEST
    rounded = Lazy(map_.weight, shape, like.dtype, like.device) if lazy else _rounded(map_.weight, like)
    shift = None if bias is None else _rounded(Deferred.of(bias), like)
    if isinstance(rounded, Inexact) or isinstance(shift, Inexact):
        return rounded if isinstance(rounded, Inexact) else shift  # type: ignore[return-value]
    if geometry.is_diagonal:
        unit = map_.is_identity or bool((map_.weight.evaluate() == 1).all())
        scale = None if unit else _broadcastable(rounded, like, axis)
        shift = None if shift is None else _broadcastable(shift, like, axis)
        text = " and ".join(w for w, t in (("scale", scale), ("shift", shift)) if t is not None)
        return Layer(None, scale=scale, shift=shift, description=text)
    if geometry.rank == 0 and axis == len(like.shape) - 1:
        module = _blank(nn.Linear, geometry.in_channels, geometry.out_channels, bias=shift is not None)
        return Layer(_filled(module, rounded, shift), description=f"Linear({module.extra_repr()})")
    return _convolution(map_.with_rank(len(like.shape) - 2).geometry, rounded, shift, like)


def insert_layer(graph: fx.Graph, root: nn.Module, source: fx.Node, layer: Layer, path: str) -> fx.Node:
    """Inserts a layer that reads `source`, under the qualified name `path`, and returns its node."""
    if layer.module is None:
        return _scale_shift(graph, root, source, layer, path)
    if layer.pads:
        tensor = info(source)
        source = graph.call_function(F.pad, (source, list(layer.pads)), {"mode": layer.pad_mode})
        source.meta["tensor"] = tensor
    set_module(root, path, layer.module)
    node = graph.call_module(path, (source,))
    node.meta["float64"] = layer.float64
    return node


def insert_copy(graph: fx.Graph, source: fx.Node, step: fx.Node, result: TensorInfo, axis: int, view: bool) -> fx.Node:
    """Inserts an operation as it stands elsewhere in the graph, for another input; its channels lie in `axis` then.

    A view becomes a reshape, since the other input may lie differently in memory.
    """
    if step.op == "call_module":
        node = graph.call_module(str(step.target), (source,))
    else:
        args, kwargs = list(step.args), dict(step.kwargs)
        if args:
            args[0] = source
        else:
            kwargs["input"] = source
        target = "reshape" if step.target == "view" else step.target
        before = info(step)
        if target in ("reshape", torch.reshape) and before is not None and before.shape[axis] != result.shape[axis]:
            _resize(args, kwargs, axis, result.shape[axis])
        node = graph.create_node(step.op, target, tuple(args), kwargs)
    node.meta = {key: step.meta.get(key) for key in ("module_path", "source")}
    node.meta["tensor"] = result
    if view:
        node.meta["aliases"] = (source,)
    return node


def _resize(args: list[Any], kwargs: dict[str, Any], axis: int, channels: int) -> None:
    """Writes the number of channels into the sizes of a reshape; -1 finds it by itself."""
    spread = len(args) > 1 and not isinstance(args[1], (tuple, list))
    sizes = list(args[1:] if spread else args[1] if len(args) > 1 else kwargs["shape"])
    if sizes[axis] != -1:
        sizes[axis] = channels
    if len(args) > 1:
        args[1:] = [tuple(sizes)]
    else:
        kwargs["shape"] = tuple(sizes)


def insert_constant(
    graph: fx.Graph, root: nn.Module, name: str, value: torch.Tensor, float64: Callable[[], Constant]
) -> fx.Node:
    """Inserts a read of a constant, which is kept as `constants.<name>.value`, and returns its node."""
    holder = nn.Module()
    path = _free_path(root, name)
    set_module(root, path, holder)
    return _buffer(graph, holder, f"{path}.value", value, float64)


def _free_path(root: nn.Module, name: str) -> str:
    """`constants.<name>`, with underscores added until neither is anything that the model, or every module, has."""
    folder = "constants"
    while type(getattr(root, folder, nn.Module())) is not nn.Module:
        folder += "_"
    while hasattr(getattr(root, folder, nn.Module()), name):
        name += "_"
    return f"{folder}.{name}"


def _buffer(
    graph: fx.Graph, holder: nn.Module, path: str, value: torch.Tensor, float64: Callable[[], Any] | None
) -> fx.Node:
    holder.register_buffer(path.rpartition(".")[2], value)
    node = graph.get_attr(path)
    node.meta["tensor"] = TensorInfo(tuple(value.shape), value.dtype, value.device)
    node.meta["float64"] = float64
    return node


def _scale_shift(graph: fx.Graph, root: nn.Module, source: fx.Node, layer: Layer, path: str) -> fx.Node:
    holder = nn.Module()
    set_module(root, path, holder)

    def constant(name: str, value: torch.Tensor) -> fx.Node:
        return _buffer(graph, holder, f"{path}.{name}", value, layer.float64)

    if layer.scale is None:
        if layer.shift is None:
            return source
        return graph.call_function(torch.add, (source, constant("shift", layer.shift)))
    if layer.shift is None:
        return graph.call_function(torch.mul, (source, constant("scale", layer.scale)))
    shift, scale = constant("shift", layer.shift), constant("scale", layer.scale)
    return graph.call_function(torch.addcmul, (shift, source, scale))


def _broadcastable(vector: torch.Tensor, like: TensorInfo, axis: int) -> torch.Tensor:
    """The vector along `axis`; one number where it is constant, since then no weight fixes the size of that axis."""
    shape = [1] * len(like.shape)
    vector = vector.reshape(-1)
    if bool((vector == vector[0]).all()):
        return vector[:1].clone().reshape(shape)
    shape[axis] = vector.numel()
    return vector.reshape(shape)


def _convolution(geometry: Geometry, weight: torch.Tensor, bias: torch.Tensor | None, like: TensorInfo) -> Layer:
    weight = weight.reshape(geometry.weight_shape)
    options: dict[str, Any] = {"dilation": geometry.dilation, "groups": geometry.groups, "bias": bias is not None}
    channels = (geometry.in_channels, geometry.out_channels, geometry.kernel)
    if geometry.is_transposed:
        reach = [d * (k - 1) for d, k in zip(geometry.dilation, geometry.kernel, strict=True)]
        options["padding"] = tuple(r - low for r, (low, _) in zip(reach, geometry.padding, strict=True))
        options["output_padding"] = tuple(high - low for low, high in geometry.padding)
        made = _blank(_CONV_TRANSPOSE[geometry.rank - 1], *channels, stride=geometry.upsampling, **options)
        flipped = transposed_weight(weight, geometry.groups).contiguous()
        return Layer(_filled(made, flipped, bias), description=_named(geometry))
    symmetric = all(low == high and low >= 0 for low, high in geometry.padding)
    pads: tuple[int, ...] = ()
    if symmetric:
        options["padding"] = tuple(low for low, _ in geometry.padding)
        options["padding_mode"] = geometry.padding_mode
    else:
        pads = tuple(side for pair in reversed(geometry.padding) for side in pair)
    conv = _blank(_CONV[geometry.rank - 1], *channels, stride=geometry.stride, **options)
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    return Layer(_filled(conv, weight, bias), pads, mode, description=_named(geometry))


def _blank(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A layer without weights; its constructor, which would draw random ones, runs once per set of arguments."""
    template = _template(cast(Any, cls), args, tuple(sorted(kwargs.items())))
    twin = cls.__new__(cls)
    for name, value in template.__dict__.items():
        twin.__dict__[name] = type(value)(value) if isinstance(value, (dict, list, set)) else value
    return twin


@lru_cache(maxsize=512)
def _template(cls: Any, args: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> Any:
    return cls(*args, **dict(options), device="meta").eval()


def layer_name(geometry: Geometry, ndim: int, axis: int) -> str:
    """What a person would call the layer of such a map on `ndim` axes with channels in `axis`."""
    if geometry.is_diagonal:
        return "scale"
    if geometry.rank == 0 and axis == ndim - 1:
        return f"Linear({geometry.in_channels}, {geometry.out_channels})"
    return _named(geometry.with_rank(ndim - 2))


def _named(geometry: Geometry) -> str:
    transposed = geometry.is_transposed
    kernel = "x".join(map(str, geometry.kernel))
    text = f"Conv{'Transpose' if transposed else ''}{geometry.rank}d({geometry.in_channels}, "
    text += f"{geometry.out_channels}, {kernel}"
    stride = geometry.upsampling if transposed else geometry.stride
    if any(s > 1 for s in stride):
        text += f", stride {'x'.join(map(str, stride))}"
    return text + (f", groups {geometry.groups})" if geometry.groups != 1 else ")")


def _filled(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias, requires_grad=False)
    return module


def _rounded(exact: Deferred, like: TensorInfo) -> torch.Tensor | Inexact:
    """The tensor in the model's dtype and on its device; a new one, never the model's own."""
    held: dict[Deferred, torch.Tensor] = {}
    rounded = exact.evaluate_as(like.dtype, held).to(like.device).contiguous()
    name = str(like.dtype).removeprefix("torch.")
    if not _finite(rounded) and _finite(exact.evaluate(held)):
        peak = float(exact.evaluate(held).abs().max())
        most = torch.finfo(like.dtype).max
        return Inexact(f"its merged weights overflow {name}: {peak:.3g} is above {most:.3g}", "fuse in a wider type")
    if _may_underflow(rounded) and (lost := _underflow(rounded, exact.evaluate(held))):
        return Inexact(f"its merged weights underflow {name}: {lost}", "fuse in a wider type")
    shared = any(rounded.data_ptr() == tensor.data_ptr() for tensor in held.values())
    return rounded.clone() if shared else rounded


def _finite(tensor: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN. A finite sum proves it in one pass; an overflowing one proves nothing."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _may_underflow(rounded: torch.Tensor) -> bool:
    """Whether rounding may have cost a weight [C_out, ...] its precision: it is all small, and some of it subnormal.

    Where an element reaches 4 tiny / eps, no row that counts (see `_underflow`) can be subnormal, however long it is.
    """
    if rounded.dtype == torch.float64 or rounded.dim() < 2 or not rounded.numel():
        return False
    info = torch.finfo(rounded.dtype)
    low, high = rounded.aminmax()  # no copy: weights may be large
    if max(-float(low), float(high)) >= 4.0 * info.tiny / info.eps:
        return False
    return bool((rounded.abs() < info.tiny).any())


def _underflow(rounded: torch.Tensor, exact: torch.Tensor) -> str:
    """What is lost of the rows of a weight, in words; empty if it is no more than rounding always costs.

    A row that is smaller than a unit roundoff of the largest one is let pass: a dead channel stays dead.
    """
    info = torch.finfo(rounded.dtype)
    wide = exact.reshape(rounded.shape).flatten(1).to(torch.float64)
    size = wide.norm(dim=1)
    error = (rounded.detach().cpu().to(torch.float64).flatten(1) - wide.cpu()).norm(dim=1).to(size.device)
    lost = (error > MOST_LOST_ULPS * info.eps * size) & (size > info.eps * size.max())
    if not bool(lost.any()):
        return ""
    worst = float((error[lost] / size[lost]).max())
    return (
        f"{int(lost.sum())} of {len(size)} channels lose up to {worst:.2g} of their weights, the largest of which is "
        f"{float(wide.abs().max()):.2g} where the smallest normal number is {info.tiny:.2g}"
    )
