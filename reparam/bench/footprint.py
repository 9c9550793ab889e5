"""What a variant needs besides time per call: memory, space on disk, time to load and time of the first call."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from reparam.quiet import quiet

Call = Callable[[], Any]


@dataclass(frozen=True)
class Footprint:
    """One variant on one backend; None where it was not or could not be measured.

    Attributes:
        weights_bytes: parameters and buffers, each storage once.
        peak_bytes: most that torch had allocated at once during a call, beyond what it had before: activations,
            workspaces and outputs. Runtimes other than torch have allocators of their own, which it does not see.
        build_seconds: time to make the callable from the module: capturing, compiling, exporting, opening a session.
        first_seconds: time of the first call, on a wall clock.
        disk_bytes: size of the file that the variant came from.
        load_seconds: time to load that file.
    """

    weights_bytes: int | None = None
    peak_bytes: int | None = None
    build_seconds: float | None = None
    first_seconds: float | None = None
    disk_bytes: int | None = None
    load_seconds: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        return asdict(self)


def weights_of(module: nn.Module) -> int:
    """Bytes of parameters and buffers; what shares a storage counts once."""
    storages = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr(), tensor.device] = storage.nbytes()
    return sum(storages.values())


def peak_of(call: Call, device: torch.device) -> int | None:
    """Most bytes that torch allocates at once while `call` runs, beyond what was allocated before; None if unknown."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return int(peak)
    return _peak_on_cpu(call) if device.type == "cpu" else None


def _peak_on_cpu(call: Call) -> int | None:
    """From the profiler's list of allocations, in the order in which they happened."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with quiet(), _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            kept = call()
        del kept
        results = profiler.profiler.kineto_results
        events = [event for event in results.events() if event.name() == "[memory]"]
    except (AttributeError, RuntimeError):
        return None  # a profiler is running already, or this version of torch lists allocations otherwise
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most if events else None


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what the profiler's library prints on the process's standard error when it starts."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
