"""What this machine does in a second, from three small measurements; explains latencies, and promises none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from reparam.bench.machine import clock_for
from reparam.bench.statistics import median

LAUNCHES, SIDE, BYTES, TRIES = 200, 512, 1 << 26, 5


@dataclass(frozen=True)
class Speeds:
    """Rates of one device with the threads in use.

    Attributes:
        launch: seconds to launch an operation that computes next to nothing, in eager mode.
        macs: multiply-adds per second of a matrix product.
        bandwidth: bytes per second, read and written, of a copy that no cache holds.
    """

    launch: float
    macs: float
    bandwidth: float


def speeds(device: torch.device, dtype: torch.dtype = torch.float32) -> Speeds:
    """Measures the device; takes a fraction of a second."""
    clock = clock_for(device)
    with torch.inference_mode():
        one = torch.ones(1, device=device, dtype=dtype)
        square = torch.ones(SIDE, SIDE, device=device, dtype=dtype)
        large = torch.zeros(BYTES // square.element_size(), device=device, dtype=dtype)
        target = torch.empty_like(large)

        def typical(call: Callable[[], Any]) -> float:
            call()
            return median([clock.time(call) for _ in range(TRIES)])

        launch = typical(lambda: [one + one for _ in range(LAUNCHES)]) / LAUNCHES
        product = typical(lambda: square @ square)
        copy = typical(lambda: target.copy_(large))
    return Speeds(launch, SIDE**3 / product, 2 * BYTES / copy)
