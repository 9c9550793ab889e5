"""`LiftedGraph`: every node of a graph as the lift table sees it, and the sizes that follow from that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from reparam.algebra import Inexact
from reparam.graph.constants import Constants
from reparam.graph.formulas import layers
from reparam.graph.lift import Carried, Concatenated, Either, Lift, Lifted, LiftTable, Sliced
from reparam.graph.nodes import info, kind, module_of
from reparam.graph.sizes import Dims, Size, Sizes, own_sizes

_NAMES = """
relu relu6 leaky_relu leakyrelu prelu elu celu selu silu mish gelu sigmoid tanh hardswish hardsigmoid hardtanh softplus
softsign logsigmoid tanhshrink abs exp log sqrt rsqrt square neg clamp clip erf sin cos pow threshold softmax
log_softmax dropout dropout1d dropout2d dropout3d alphadropout contiguous identity float half to type
layer_norm group_norm instance_norm batch_norm layernorm groupnorm batchnorm1d batchnorm2d batchnorm3d syncbatchnorm
instancenorm1d instancenorm2d instancenorm3d
"""
_KEEPS_SIZES = frozenset(_NAMES.split())
"""Operations whose result is as large as what they read first, by the names of functions, methods and classes."""


def features(node: fx.Node, root: nn.Module, rank: int, axis: int) -> int | None:
    """How many channels in an axis a layer with weights demands of its input; None if it demands nothing there."""
    module = module_of(node, root)
    if isinstance(module, nn.Linear):
        return module.in_features if axis == rank - 1 else None
    if module is None:
        return _features_of_call(node, rank, axis)
    if axis != 1 or not isinstance(module, (*_CONVS, nn.modules.batchnorm._BatchNorm)):
        return None
    return module.in_channels if isinstance(module, _CONVS) else module.num_features


def _features_of_call(node: fx.Node, rank: int, axis: int) -> int | None:
    """The same of a function that is given its weight as a parameter or buffer."""
    name = getattr(node.target, "__name__", "")
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or (held := info(weight)) is None:
        return None
    if name == "linear":
        return held.shape[-1] if axis == rank - 1 else None
    if axis != 1:
        return None
    if name in ("conv1d", "conv2d", "conv3d"):
        groups = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
        return held.shape[1] * groups if isinstance(groups, int) else None
    return held.shape[0] if name in ("batch_norm", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d") else None


def is_split(node: fx.Node, axis: int, rank: int) -> bool:
    """Whether a node divides its input along an axis."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
    return name in ("chunk", "split", "tensor_split") and type(dim) is int and dim % rank == axis


def _is_empty(node: fx.Node) -> bool:
    tensor = info(node)
    return tensor is not None and tensor.numel == 0


EMPTY = Inexact("one of its tensors has no elements")
"""Nothing is to be gained there."""
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class _Convolution:
    """What decides the sizes of a convolution's result, by the names that torch's modules have for it."""

    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool = False


class LiftedGraph:
    """Lifts nodes, each once.

    Attributes:
        sizes: of the graph's tensors.
    """

    def __init__(self, graph: fx.Graph, root: nn.Module, table: LiftTable, constants: Constants) -> None:
        self._root, self._table, self._constants = root, table, constants
        self._found: dict[fx.Node, Lift | Inexact | None] = {}
        self.sizes = Sizes(graph, self._sizes, self._demanded)

    def lift(self, node: fx.Node) -> Lift | Inexact | None:
        """What a node is, the reason why it is not affine, or None."""
        if node not in self._found:
            found = self._table.lift(node, self._root, self._constants, self.sizes)
            empty = found is not None and any(map(_is_empty, (node, *node.all_input_nodes)))
            self._found[node] = EMPTY if empty else found
        return self._found[node]

    def is_affine(self, node: fx.Node) -> bool:
        """Whether a node is affine, and so may be merged with others."""
        found = self.lift(node)
        return found is not None and not isinstance(found, Inexact)

    def _convolution(self, node: fx.Node) -> tuple[fx.Node, _Convolution] | None:
        """Input and settings of a convolution that is written as a function of a constant weight and numbers."""
        row = self._table.row(node, self._root)
        if row is None or row.lift is not layers.conv:
            return None
        given = {**dict(zip(row.signature, node.args, strict=False)), **node.kwargs}
        source, weight = given.get("input"), given.get("weight")
        tensor = info(weight) if isinstance(weight, fx.Node) and weight in self._constants else None
        if tensor is None or len(tensor.shape) < 3 or not isinstance(source, fx.Node):
            return None
        stride, padding, dilation = (given.get(name) for name in ("stride", "padding", "dilation"))
        if any(isinstance(part, fx.Node) for part in tree_leaves((stride, padding, dilation))):
            return None
        rank = len(tensor.shape) - 2
        steps, reaches = (layers.per_axis(value, rank, 1) for value in (stride, dilation))
        pads = padding if isinstance(padding, str) else layers.per_axis(padding, rank, 0)
        return source, _Convolution(tensor.shape[0], tuple(tensor.shape[2:]), steps, pads, reaches)

    def _demanded(self, node: fx.Node, axis: int) -> int | None:
        """The size of an axis that a layer with weights demands, which reads the tensor or all parts of its split."""
        shape = info(node).shape  # type: ignore[union-attr]
        if axis not in (1, len(shape) - 1):
            return None
        for user in node.users:
            if user.args[:1] != (node,):
                continue
            size = features(user, self._root, len(shape), axis)
            if size is None and info(user) is None and user.users and is_split(user, axis, len(shape)):
                parts = [self._demanded_part(part, len(shape), axis) for part in user.users]
                size = shape[axis] if None not in parts and sum(filter(None, parts)) == shape[axis] else None
            if size == shape[axis]:
                return size
        return None

    def _demanded_part(self, part: fx.Node, rank: int, axis: int) -> int | None:
        return next((size for user in part.users if (size := features(user, self._root, rank, axis)) is not None), None)

    def _sizes(self, node: fx.Node, sizes: Sizes) -> Dims | None:
        module = module_of(node, self._root)
        if isinstance(module, (*_CONVS, nn.Linear, nn.modules.batchnorm._BatchNorm)):
            source = node.args[0] if len(node.args) == 1 else None
            return _layer_sizes(node, source, module, sizes)  # without reading its weights
        if (called := self._convolution(node)) is not None:
            return _layer_sizes(node, *called, sizes)  # without computing its weights
        found = self.lift(node)
        if isinstance(found, Either):
            found = next((option for option in found.options if isinstance(option, Carried)), found.options[0])
        if isinstance(found, Carried):
            return found.sizes
        if isinstance(found, Concatenated):
            return _concatenated(found, sizes)
        if isinstance(found, Sliced):
            dims = list(sizes.dims(found.operand))
            dims[found.axis] = Size(found.window[1] - found.window[0])
            return tuple(dims)
        if isinstance(found, Lifted):
            return _mapped(node, found, sizes)
        if kind(node, self._root).lower() in _KEEPS_SIZES and node.all_input_nodes:
            first = node.all_input_nodes[0]
            return sizes.dims(first) if info(first) is not None else None
        return None


def _layer_sizes(node: fx.Node, source: Any, layer: nn.Module | _Convolution, sizes: Sizes) -> Dims | None:
    if not isinstance(source, fx.Node):
        return None
    dims = list(sizes.dims(source))
    own = own_sizes(node)
    if len(dims) != len(own) or len(dims) < 2:
        return None
    if isinstance(layer, nn.Linear):
        dims[-1] = Size(layer.out_features)
    elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
        dims[1] = Size(layer.num_features)
    elif isinstance(layer, (_Convolution, *_CONVS)) and len(dims) == len(layer.kernel_size) + 2:
        dims[1] = Size(layer.out_channels)
        for axis, kernel in enumerate(layer.kernel_size):
            reach = layer.dilation[axis] * (kernel - 1)
            pads = 0 if isinstance(layer.padding, str) else int(layer.padding[axis])  # "valid" has none
            kept = layer.padding == "same" or (not layer.transposed and 2 * pads == reach)
            if not kept or layer.stride[axis] != 1:
                dims[axis + 2] = own[axis + 2]
    else:
        return None
    return tuple(dims)


def _mapped(node: fx.Node, found: Lifted, sizes: Sizes) -> Dims:
    operand = found.operands[0]
    dims = list(sizes.dims(operand))
    if found.axis is None:
        if len(found.operands) > 1:
            others = [sizes.dims(other) for other in found.operands]
            # equal for the example: a number above 1 that one of them has, the result has for every input
            dims = [
                next((size for size in column if (size.literal or 0) > 1), column[0])
                for column in zip(*others, strict=True)
            ]
        return tuple(dims)
    shape = info(operand).shape  # type: ignore[union-attr]
    geometry = found.maps(shape[found.axis])[0].geometry
    if not geometry.rank or all(map_.has_weights for map_ in found.maps(shape[found.axis])):
        dims[found.axis] = Size(geometry.out_channels)
    own = own_sizes(node)
    for axis in range(geometry.rank):
        keeps = geometry.stride[axis] == geometry.upsampling[axis] == 1 and geometry.size_offset(axis) == 0
        if not keeps:
            dims[axis + 2] = own[axis + 2]
    return tuple(dims)


def _concatenated(found: Concatenated, sizes: Sizes) -> Dims:
    each = [sizes.dims(operand) for operand in found.operands]
    dims = list(each[0])
    literals = [size[found.axis].literal for size in each]
    dims[found.axis] = Size(sum(value for value in literals if value is not None))
    return tuple(dims)
