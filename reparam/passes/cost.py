"""What operations cost: multiply-adds, bytes, launches, and the seconds that a simple machine model makes of them.

`seconds = launches * launch + max(macs / rate, bytes / bandwidth)`, the roofline of one operation after the other
(Williams, Waterman and Patterson 2009, "Roofline"). The constants only rank alternatives; they promise no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from torch import fx, nn

from reparam.algebra import AffineMap, Geometry
from reparam.capture.captured import TensorInfo
from reparam.graph.nodes import info, module_of
from reparam.passes.base import Cost

T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """Constants of the machine model.

    Attributes:
        launch: seconds to launch one operation.
        macs: multiply-adds per second of a dense convolution or matrix product.
        bandwidth: bytes per second moved by an operation that computes little.
    """

    launch: float
    macs: float
    bandwidth: float


# A launch is dear on small examples only: what computes more than this is not chosen to save launches.
MOST_MACS = 1.1

EAGER_CPU = Machine(launch=5e-6, macs=5e10, bandwidth=1e10)


class CostModel:
    """Prices graph nodes and affine maps for the example inputs' sizes on one machine."""

    def __init__(self, machine: Machine = EAGER_CPU) -> None:
        self.machine = machine

    def priced(self, macs: int, moved: int, launches: int) -> Cost:
        """A cost with its seconds."""
        machine = self.machine
        seconds = launches * machine.launch + max(macs / machine.macs, moved / machine.bandwidth)
        return Cost(macs, moved, launches, seconds)

    def of_map(self, geometry: Geometry, source: TensorInfo, axis: int) -> Cost:
        """Running a map on `source`, whose channels lie in `axis`, as one layer."""
        size = source.dtype.itemsize
        out = output_numel(geometry, source, axis)
        if geometry.is_diagonal:
            return self.priced(out, size * 2 * out, 1)
        weights = prod(geometry.weight_shape)
        macs = out * prod(geometry.weight_shape[1:]) // prod(geometry.upsampling)
        padded_apart = any(low != high for low, high in geometry.padding) and not geometry.is_transposed
        layer = self.priced(macs, size * (source.numel + out + weights), 1)
        return layer + self.priced(0, 2 * size * source.numel, 1) if padded_apart else layer

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
        """The first of the cheapest options, among those that compute little more than the one that computes least."""
        fewest = min(cost(option).macs for option in options)
        lean = [option for option in options if cost(option).macs <= fewest * MOST_MACS]
        return min(lean, key=lambda option: self.key(cost(option)))

    def key(self, cost: Cost) -> tuple[float, ...]:
        """What ranks costs; the least is the best."""
        return (cost.seconds, cost.macs)

    def of_node(self, node: fx.Node, root: nn.Module, maps: tuple[AffineMap, ...] = (), axis: int = 1) -> Cost:
        """Running a node as it stands; `maps` are its maps if it is affine, which tells its multiply-adds."""
        out = info(node)
        if out is None or node.op in ("placeholder", "output", "get_attr"):
            return Cost()
        sources = [tensor for other in node.all_input_nodes if (tensor := info(other)) is not None]
        moved = sum(t.numel * t.dtype.itemsize for t in (*sources, out))
        module = module_of(node, root)
        if module is not None:
            weights = (p for p in module._parameters.values() if p is not None and p.ndim > 1)
            moved += sum(p.numel() * p.element_size() for p in weights)
        macs = 0
        for made in maps:
            if not made.geometry.is_diagonal:
                macs += out.numel * prod(made.geometry.weight_shape[1:]) // prod(made.geometry.upsampling)
        return self.priced(macs, moved, 1)


def output_numel(geometry: Geometry, source: TensorInfo, axis: int) -> int:
    """Number of elements of the map's value on `source`."""
    shape = list(source.shape)
    shape[axis] = geometry.out_channels
    if geometry.rank:
        shape[2:] = geometry.output_size(tuple(shape[2:]))
    return max(prod(shape), 0)
