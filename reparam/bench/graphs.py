"""CUDA graphs: the kernels of one call are recorded once and launched together from then on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from reparam.inputs import Inputs

# Calls before the recording, so that libraries choose their kernels and take their workspaces outside of it.
WARMUP_CALLS = 3


class GraphedCall:
    """A callable as a CUDA graph, for inputs of one shape.

    A call copies its tensors into those that were recorded (part of what a user of graphs pays, and of what is timed),
    replays, and returns the recorded outputs, which the next call overwrites.

    Args:
        call: torch code whose work is all on `device`'s current stream.
        inputs: example inputs on `device`.
        device: a CUDA device.

    Raises:
        RuntimeError: the call does what cannot be recorded, such as waiting for a value on the host.
    """

    def __init__(self, call: Callable[..., Any], inputs: Inputs, device: torch.device) -> None:
        self._device = device
        self._call = call  # the graph holds addresses and not tensors: weights that nobody else keeps would go
        self._static = inputs.clone()
        self._targets = list(self._static.tensors())
        originals = [tensor.clone() for tensor in self._targets]
        with torch.cuda.device(device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARMUP_CALLS):
                    self._fill(originals)  # a call may write to its arguments
                    call(*self._static.args, **self._static.kwargs)
            torch.cuda.current_stream().wait_stream(side)
            self._fill(originals)
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph):
                    self._outputs = call(*self._static.args, **self._static.kwargs)
            except Exception:
                _leave_recording(device)
                raise

    def _fill(self, tensors: list[torch.Tensor]) -> None:
        for target, tensor in zip(self._targets, tensors, strict=True):
            target.copy_(tensor)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replays the graph on the tensors among the arguments, which stand in the order of the example."""
        leaves = pytree.tree_leaves((args, kwargs))
        with torch.cuda.device(self._device):
            self._fill([leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
            self._graph.replay()
        return self._outputs


def _leave_recording(device: torch.device) -> None:
    """A recording that failed leaves torch's generator in recording mode, until another one ends well."""
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=device)
