"""What operations cost: multiply-adds, bytes, launches, weights, and the seconds that a machine makes of them.

The constants are those of a `reparam.passes.machines.Machine`. The objective says which alternative is the best:

    latency     the fewest seconds among those that compute at most a tenth more than the leanest
    macs        the fewest multiply-adds, then the fewest seconds
    parameters  the fewest weights, then the fewest seconds

An alternative that takes more seconds than the original is never chosen, whatever the objective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Literal, TypeVar, get_args

from torch import fx, nn

from reparam.algebra import AffineMap, Geometry
from reparam.capture.captured import TensorInfo
from reparam.errors import InputError
from reparam.graph.nodes import info, module_of
from reparam.passes.base import Cost
from reparam.passes.machines import EAGER_CPU, MACHINES, Machine

Objective = Literal["latency", "macs", "parameters"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)

# A launch is dear on small examples only: what computes more than this is not chosen to save launches.
MOST_MACS = 1.1
# Seconds that differ by less than this share are the same.
_SAME = 1e-6


T = TypeVar("T")


class CostModel:
    """Prices graph nodes and affine maps for the example inputs' sizes on one machine, and compares the prices."""

    def __init__(self, machine: Machine = EAGER_CPU, objective: Objective = "latency") -> None:
        self.machine = machine
        self.objective = objective

    def key(self, cost: Cost) -> tuple[float, ...]:
        """Ranks costs under the objective: the smaller, the better. Seconds are rounded, so that equal ones tie."""
        seconds = float(round(cost.seconds * 1e10))
        if self.objective == "macs":
            return (cost.macs, seconds)
        if self.objective == "parameters":
            return (cost.parameters, seconds)
        return (seconds,)

    def is_lean(self, cost: Cost, leanest: Cost) -> bool:
        """Whether latency may choose this cost although the leanest alternative computes less."""
        return self.objective != "latency" or cost.macs <= max(leanest.macs, 1) * MOST_MACS

    def no_slower(self, cost: Cost, original: Cost) -> bool:
        """Whether the seconds are at most those of the original."""
        return cost.seconds <= original.seconds * (1 + _SAME)

    def priced(self, macs: int, moved: int, launches: int, parameters: int = 0) -> Cost:
        """Operations that are no layers with weights: they scale, add, pad or copy."""
        return Cost(macs, moved, launches, self.machine.elementwise(moved, launches), parameters)

    def of_map(self, geometry: Geometry, source: TensorInfo, axis: int) -> Cost:
        """Running a map on `source`, whose channels lie in `axis`, as one layer."""
        out = output_numel(geometry, source, axis)
        if geometry.is_diagonal:
            return self.priced(0, source.dtype.itemsize * 2 * out, 1, geometry.out_channels)
        weights = prod(geometry.weight_shape)
        moved = source.dtype.itemsize * (source.numel + out + weights)
        return self._layer(geometry, out, moved, weights) + self._padding(geometry, source)

    def of_sum(self, numel: int, itemsize: int) -> Cost:
        """Adding one tensor to another."""
        return self.priced(0, itemsize * 3 * numel, 1)

    def of_copy(self, numel: int, itemsize: int) -> Cost:
        """Writing a tensor once more, as a concatenation does."""
        return self.priced(0, itemsize * 2 * numel, 1)

    def of_move(self, source: TensorInfo, result: TensorInfo) -> Cost:
        """An operation that reads one tensor and writes another, and computes next to nothing."""
        return self.priced(0, source.numel * source.dtype.itemsize + result.numel * result.dtype.itemsize, 1)

    def of_view(self) -> Cost:
        """A view: an operation that moves nothing."""
        return self.priced(0, 0, 1)

    def best(self, options: Sequence[T], cost: Callable[[T], Cost]) -> T:
        """The first of the best options under the objective."""
        leanest = min((cost(option) for option in options), key=lambda one: one.macs)
        return min((one for one in options if self.is_lean(cost(one), leanest)), key=lambda one: self.key(cost(one)))

    def of_node(self, node: fx.Node, root: nn.Module, maps: tuple[AffineMap, ...] = (), axis: int = 1) -> Cost:
        """Running a node as it stands; `maps` are its maps if it is affine, which tells what it computes."""
        out = info(node)
        if out is None or node.op in ("placeholder", "output", "get_attr"):
            return Cost()
        read = [other for other in node.all_input_nodes if not _is_vector_of_weights(other)]
        sources = [tensor for other in read if (tensor := info(other)) is not None]
        moved = sum(t.numel * t.dtype.itemsize for t in (*sources, out))
        module = module_of(node, root)
        if module is not None:
            matrices = (p for p in module._parameters.values() if p is not None and p.ndim > 1)
            moved += sum(p.numel() * p.element_size() for p in matrices)
        weights = sum(prod(made.geometry.weight_shape) for made in maps if made.has_weights)
        mixing = [made for made in maps if not made.geometry.is_diagonal]
        if not mixing:
            return self.priced(0, moved, 1, weights)
        made = mixing[0]
        if not made.has_weights:
            return self._unweighted(made.geometry, out.numel, moved)
        return self._layer(made.geometry, out.numel, moved, weights) + self._padding(made.geometry, (*sources, out)[0])

    def _unweighted(self, geometry: Geometry, out: int, moved: int) -> Cost:
        """A pooling, or an operation that moves elements: a padding, a selection of channels."""
        kernel = prod(geometry.kernel)
        macs = out * prod(geometry.weight_shape[1:])
        if kernel == 1:
            return self.priced(macs, moved, 1)
        return Cost(macs, moved, 1, self.machine.pooling(out, kernel, moved))

    def _layer(self, geometry: Geometry, out: int, moved: int, weights: int) -> Cost:
        machine, groups = self.machine, geometry.groups
        macs = out * prod(geometry.weight_shape[1:]) // prod(geometry.upsampling)
        if groups == 1:
            seconds = machine.dense(macs, moved)
        elif groups == geometry.in_channels == geometry.out_channels:
            seconds = machine.separable(macs, moved, self._padded_by_the_layer(geometry))
        else:
            widths = geometry.in_channels // groups, geometry.out_channels // groups
            seconds = machine.in_groups(macs, moved, widths)
        return Cost(macs, moved, 1, seconds, weights)

    def _pads_apart(self, geometry: Geometry) -> bool:
        """Whether padding is an operation of its own, since the layer cannot pad one side only."""
        one_sided = any(low != high for low, high in geometry.padding) and not geometry.is_transposed
        return self.machine.pads_apart and one_sided

    def _padded_by_the_layer(self, geometry: Geometry) -> int:
        """Positions that a layer which pads with zeros itself adds on a side of a row."""
        alone = geometry.is_transposed or geometry.padding_mode != "zeros" or self._pads_apart(geometry)
        return 0 if alone or not geometry.rank else max(geometry.padding[-1])

    def _padding(self, geometry: Geometry, source: TensorInfo) -> Cost:
        """What padding costs that the layer cannot do itself."""
        if not self._pads_apart(geometry):
            return Cost()
        return self.priced(0, 2 * source.dtype.itemsize * source.numel, 1)


def cost_model(objective: str, machine: str) -> CostModel:
    """The cost model of a user's words.

    Raises:
        InputError: one of them is not known.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"objective {objective!r} is not known; choose among {', '.join(OBJECTIVES)}")
    if machine not in MACHINES:
        raise InputError(f"machine {machine!r} is not known; choose among {', '.join(MACHINES)}")
    return CostModel(MACHINES[machine], objective)


def _is_vector_of_weights(node: fx.Node) -> bool:
    """One number for each channel, which costs the same as in a module: nothing."""
    tensor = info(node)
    return node.op == "get_attr" and tensor is not None and tensor.numel == max(tensor.shape, default=1)


def output_numel(geometry: Geometry, source: TensorInfo, axis: int) -> int:
    """Number of elements of the map's value on `source`."""
    shape = list(source.shape)
    shape[axis] = geometry.out_channels
    if geometry.rank:
        shape[2:] = geometry.output_size(tuple(shape[2:]))
    return max(prod(shape), 0)
