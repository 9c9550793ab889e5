"""What the measurement ran on: clocks, the hardware's name, and other load."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Tells the time and times a call."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds that `call` takes until its result is there."""


class WallClock:
    """Monotonic wall-clock time, for calls that have finished when they return."""

    def now(self) -> float:
        """Seconds since some fixed moment."""
        return time.perf_counter()

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds between call and return."""
        start = self.now()
        call()
        return self.now() - start


class CudaClock(WallClock):
    """CUDA events around the call on the current stream: queueing from Python counts as far as the GPU waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds between two events around the call, with nothing else queued before."""
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000


def clock_for(device: torch.device) -> Clock:
    """The clock that is honest on `device`."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


def hardware_name(device: torch.device) -> str:
    """The GPU's or the processor's name, as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def system_load() -> float | None:
    """Processes that wanted to run over the last minute, this one included; None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
