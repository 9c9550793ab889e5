"""What operations cost in seconds, machine by machine: the only place with such constants.

    an operation that computes little:  launch + bytes / bandwidth
    an average pooling:                 launch + outputs / windows + outputs * kernel / taps + bytes / bandwidth
    a convolution or matrix product:    launch + layer (+ grouped) + macs / rate + bytes / layer_bandwidth

`rate` is `depthwise` where every channel has its own kernel, `wide` where such a layer also pads its rows by more than
`NEAR_PADDING` positions on a side, as kernels wider than 9 do to keep the size; else it is `macs`. Channels are
computed in blocks: a group of 4 channels in blocks of 8 computes 8 of them, for inputs and outputs alike. The terms are
added, not overlapped as in the roofline (Williams, Waterman and Patterson 2009): runtimes convert a tensor's layout
before they compute on it.

The constants rank alternatives of the same region; they promise no time. `tools/measure_costs.py` measures them and
how often they rank a pair of alternatives as the clock does (`tools/results/costs.md`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

NEAR_PADDING = 4
"""oneDNN's depthwise kernels for AVX2 pad no more positions before or after a row; what pads more runs unvectorised."""


@dataclass(frozen=True)
class Machine:
    """Constants of one runtime on one kind of hardware, for float32.

    Attributes:
        launch: seconds to launch any operation.
        layer: further seconds to launch a convolution or matrix product.
        grouped: further seconds to launch a convolution with groups.
        macs: multiply-adds per second of a convolution or matrix product that is not depthwise.
        depthwise: multiply-adds per second of a depthwise convolution.
        wide: multiply-adds per second of a depthwise convolution that pads rows by more than `NEAR_PADDING`.
        windows: windows per second of an average pooling.
        taps: elements per second that an average pooling adds.
        bandwidth: bytes per second of an operation that computes little.
        layer_bandwidth: bytes per second of a layer's input, output and weights.
        block: channels of a group that are computed at once; 1 if any number of them is as good.
        pads_apart: whether one-sided padding is an operation of its own, which reads and writes the whole tensor.
    """

    launch: float
    layer: float
    grouped: float
    macs: float
    depthwise: float
    wide: float
    windows: float
    taps: float
    bandwidth: float
    layer_bandwidth: float
    block: int = 1
    pads_apart: bool = True

    def elementwise(self, moved: float, launches: int = 1) -> float:
        """Seconds of operations that compute little."""
        return launches * self.launch + moved / self.bandwidth

    def pooling(self, outputs: float, kernel: int, moved: float) -> float:
        """Seconds of an average pooling; `kernel` is the number of elements in a window."""
        return self.elementwise(moved) + outputs / self.windows + outputs * kernel / self.taps

    def dense(self, macs: float, moved: float) -> float:
        """Seconds of a convolution or matrix product without groups."""
        return self.launch + self.layer + macs / self.macs + moved / self.layer_bandwidth

    def separable(self, macs: float, moved: float, padding: int = 0) -> float:
        """Seconds of a depthwise convolution that pads rows by `padding` positions on a side."""
        rate = self.depthwise if padding <= NEAR_PADDING else self.wide
        return self.launch + self.layer + self.grouped + macs / rate + moved / self.layer_bandwidth

    def in_groups(self, macs: float, moved: float, channels: tuple[int, int]) -> float:
        """Seconds of a convolution whose groups read and write `channels` each."""
        for width in channels:
            macs *= -(-width // self.block) * self.block / width
        return self.dense(macs, moved) + self.grouped


EAGER_CPU = Machine(
    launch=3.5e-6,
    layer=1.1e-5,
    grouped=8.2e-5,
    macs=4e10,
    depthwise=5e10,
    wide=1.3e9,
    windows=1.2e8,
    taps=2.7e9,
    bandwidth=4.2e10,
    layer_bandwidth=8.9e9,
    block=8,
    pads_apart=True,
)
"""Measured: `tools/results/costs.md`, 1 thread. Layers convert their tensors' layout, which `layer_bandwidth` shows."""

ONNXRUNTIME_CPU = Machine(
    launch=7.1e-7,
    layer=0.0,
    grouped=7e-7,
    macs=4.2e10,
    depthwise=2.2e10,
    wide=1.4e10,
    windows=math.inf,
    taps=2.4e10,
    bandwidth=3.6e10,
    layer_bandwidth=4.3e10,
    block=8,
    pads_apart=False,
)
"""Measured: `tools/results/costs.md`, 1 thread. The runtime keeps one layout and fuses padding into the layer."""

CUDA = Machine(
    launch=5e-6,
    layer=0.0,
    grouped=0.0,
    macs=9.7e12,
    depthwise=9.7e12,
    wide=9.7e12,
    windows=math.inf,
    taps=9.7e12,
    bandwidth=1.6e12,
    layer_bandwidth=1.6e12,
)
"""Not measured. Rates are the data sheet's of an NVIDIA A100 (40 GB): 19.5 TFLOPS in float32 without tensor cores, that
is 9.7e12 multiply-adds per second, and 1555 GB/s; a launch of 5 us is the usual order of magnitude of a kernel launched
from eager PyTorch. `tools/measure_costs.py --runtimes cuda` measures them where there is a GPU."""

MACHINES: Mapping[str, Machine] = MappingProxyType(
    {"eager-cpu": EAGER_CPU, "onnxruntime-cpu": ONNXRUNTIME_CPU, "cuda": CUDA}
)
"""By the name that a user gives."""
