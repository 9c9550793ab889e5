"""Which axes of the inputs may vary after export, and inputs of other sizes to find out with.

The batch axis is axis 0 of the inputs that share its length with the input of the highest rank; which of them do
vary together is found by trying (a scale of shape `[1]` need not be a batch of one). The size axes are axes 2 and up of
tensors with three dimensions or more (length of a signal, height and width of an image, depth of a volume).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from reparam.inputs import Inputs

# torch.export takes an axis of length 1 for a constant, so a program with an open batch axis is traced with this.
TRACED_BATCH = 2


@dataclass(frozen=True)
class Freedom:
    """Which axes are left open.

    Attributes:
        batch: numbers of the tensors (in the order of `Inputs.tensors`) whose axis 0 is left open.
        size: whether the size axes are left open.
    """

    batch: tuple[int, ...] = ()
    size: bool = False

    def __str__(self) -> str:
        names = [name for name, free in (("batch", self.batch), ("size", self.size)) if free]
        return " and ".join(names) or "nothing"

    def axes(self, number: int, tensor: torch.Tensor) -> tuple[int, ...]:
        """The open axes of one input tensor."""
        return (*((0,) if number in self.batch else ()), *(range(2, tensor.ndim) if self.size else ()))


def batch_carriers(inputs: Inputs) -> tuple[tuple[int, ...], ...]:
    """Which tensors may carry the batch, as sets of tensor numbers to try, the largest first."""
    tensors = list(inputs.tensors())
    rank = max(tensor.ndim for tensor in tensors)
    if rank == 0:
        return ()
    length = next(tensor.shape[0] for tensor in tensors if tensor.ndim == rank)
    ranked = [(n, tensor.ndim) for n, tensor in enumerate(tensors) if tensor.ndim > 0 and tensor.shape[0] == length]
    tries = [tuple(n for n, ndim in ranked if ndim >= least) for least in (1, 2, rank)]
    return tuple(dict.fromkeys(numbers for numbers in [*tries, tries[-1][:1]] if numbers))


def _resized(tensor: torch.Tensor, axis: int, length: int) -> torch.Tensor:
    """`tensor` cut or repeated along `axis`, so that its values stay those of the example."""
    if tensor.shape[axis] == length:
        return tensor
    index = torch.arange(length, device=tensor.device) % tensor.shape[axis]
    return tensor.index_select(axis, index)


def resized(
    inputs: Inputs,
    batch: int | None = None,
    carriers: tuple[int, ...] = (),
    size: Callable[[int, int], int] | None = None,
) -> Inputs:
    """The example with another batch length, other sizes, or both.

    Args:
        inputs: the example.
        batch: new length of axis 0 of the tensors `carriers`; None leaves them.
        carriers: numbers of the tensors that carry the batch.
        size: new length of a size axis from its number and its length; None leaves them. Axes of length 1 stay.
    """
    numbers = itertools.count()

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if next(numbers) in carriers and batch is not None:
            tensor = _resized(tensor, 0, batch)
        if size is not None:
            for axis in range(2, tensor.ndim):
                if tensor.shape[axis] > 1:
                    tensor = _resized(tensor, axis, max(1, size(axis, tensor.shape[axis])))
        return tensor

    return inputs.map(change)


@dataclass(frozen=True)
class Probe:
    """One call of the module: the arguments and the tensors it answered with (moved to the CPU)."""

    inputs: Inputs
    outputs: tuple[torch.Tensor, ...]


def tensor_leaves(value: Any) -> tuple[torch.Tensor, ...]:
    """Every tensor in a nested container, in order."""
    return tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))


def _probe(module: torch.nn.Module, inputs: Inputs) -> Probe:
    outputs = tensor_leaves(inputs.call(module))
    return Probe(inputs, tuple(tensor.detach().cpu() for tensor in outputs))


def _try(module: torch.nn.Module, inputs: Inputs) -> list[Probe]:
    try:
        return [_probe(module, inputs)]
    except Exception:  # any failure means that the module cannot do this size, which is the question
        return []


def explore(module: torch.nn.Module, inputs: Inputs, batch: bool, size: bool) -> tuple[Freedom, tuple[Probe, ...]]:
    """Which axes the module itself lets vary, and its answers, the example's first.

    The sizes are one doubled, one odd and one halved: a program in which a size was baked in disagrees at one of them.

    Raises:
        Exception: whatever the module raises on the example itself.
    """
    found = [_probe(module, inputs)]
    carriers = _carriers(module, inputs, found) if batch else ()
    sizes: tuple[Callable[[int, int], int], ...] = (
        lambda axis, n: 2 * n if axis == 2 else n,
        lambda axis, n: n + 1,
        lambda axis, n: n // 2,
    )
    small = resized(inputs, 1, carriers)
    same = [tensor.shape for tensor in small.tensors()]
    before = len(found)
    for change in sizes if size else ():
        other = resized(small, size=change)
        if [tensor.shape for tensor in other.tensors()] != same:
            found += _try(module, other)
    return Freedom(carriers, len(found) > before), tuple(found)


def _carriers(module: torch.nn.Module, inputs: Inputs, found: list[Probe]) -> tuple[int, ...]:
    """The tensors whose axis 0 is the batch: the first set with which other lengths run (added to `found`)."""
    for carriers in batch_carriers(inputs):
        traced = _try(module, resized(inputs, TRACED_BATCH, carriers))
        other = _try(module, resized(inputs, TRACED_BATCH + 1, carriers))
        if traced and other:
            found += [*_try(module, resized(inputs, 1, carriers)), *other]
            return carriers
    return ()


def ladder(allowed: Freedom) -> tuple[Freedom, ...]:
    """What to try, the most general first and a program for the example's sizes alone last."""
    steps = [allowed, Freedom(batch=allowed.batch), Freedom(size=allowed.size), Freedom()]
    return tuple(dict.fromkeys(steps))
