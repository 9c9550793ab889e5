"""What the measurement ran on: clocks, the hardware's name, and other load."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
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


LOOP_STEPS, LOOP_TRIES = 20_000, 5


@dataclass(frozen=True)
class Pace:
    """How fast the machine is at one moment.

    Attributes:
        loop: seconds of a fixed loop on one processor, the best of a few.
        cpu_mhz: mean clock of the processors; None where the system does not say (virtual machines mostly do not).
        gpu_mhz: clock of the GPU; None without one, or where nvidia-ml is missing.
    """

    loop: float
    cpu_mhz: float | None = None
    gpu_mhz: float | None = None


def pace(device: torch.device) -> Pace:
    """How fast the machine is now; takes some milliseconds."""
    return Pace(min(_loop() for _ in range(LOOP_TRIES)), _cpu_mhz(), _gpu_mhz(device))


def _loop() -> float:
    start = time.perf_counter()
    total = 0
    for step in range(LOOP_STEPS):
        total += step * step
    return time.perf_counter() - start


def _cpu_mhz() -> float | None:
    found = []
    for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_cur_freq"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text()) / 1000)
    return sum(found) / len(found) if found else None


def _gpu_mhz(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    try:
        return float(torch.cuda.clock_rate(device))
    except Exception:  # nvidia-ml is missing, or the driver does not tell
        return None
