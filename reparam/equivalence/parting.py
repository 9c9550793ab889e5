"""Where two models part: the first tensor of one that the other one does not compute.

Both run in float64 on one input while every operation is watched, at the dispatcher, so that it does not matter how a
model is written. Tensors are told by their values, not by name: a fused model has the tensors that it did not merge
away, under whatever name. A tensor of the original is at fault if the candidate has it not, nor anything that is
computed from it; the first of these is where they part.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from reparam.equivalence.comparison import Parting
from reparam.equivalence.precision import deployment_dtype, private_copy, run
from reparam.inputs import ExampleInputs, Inputs

_SAME = 1e-8
"""Relative difference up to which two float64 tensors are one: far above rounding, far below a wrong weight."""
_ROUNDED = 32.0
"""The same for models in another dtype, in units of its roundoff: rounded weights differ by that after many layers."""
_FEWEST = 8
"""Elements below which a tensor says nothing."""
_BLOCK, _PROJECTIONS = 4096, 4


@dataclass
class _Seen:
    """A tensor: what made it, from which ones, and what tells it from others: its sums with random weights."""

    place: str
    operation: str
    shape: tuple[int, ...]
    mark: torch.Tensor
    tells: bool
    made_of: tuple[int, ...] = field(default_factory=tuple)


def parting(original: nn.Module, candidate: nn.Module, example_inputs: ExampleInputs, seed: int = 0) -> Parting | None:
    """The first tensor of the original that the candidate does not compute; None if it has them all.

    Only tensors that depend on the inputs count, and of those only such whose values tell them from others.

    Raises:
        Exception: whatever a model raises on these inputs in float64.
    """
    inputs = Inputs.of(example_inputs)
    eps = torch.finfo(deployment_dtype(candidate, inputs)).eps
    ours, theirs = _watched(original, inputs, seed), _watched(candidate, inputs, seed)
    shared = _shared(ours, theirs, max(_SAME, _ROUNDED * eps))
    reaches = list(shared)  # whether a tensor, or one that is computed from it, is shared
    for index in range(len(ours) - 1, -1, -1):
        if reaches[index]:
            for earlier in ours[index].made_of:
                reaches[earlier] = True
    first = next((index for index, reached in enumerate(reaches) if not reached and ours[index].tells), None)
    if first is None:
        return None
    made_of = [index for index in _ancestors(ours, first) if shared[index] and ours[index].place]
    after = ours[max(made_of)].place if made_of else ""
    return Parting(ours[first].place, ours[first].operation, ours[first].shape, after)


def _shared(ours: Sequence[_Seen], theirs: Sequence[_Seen], tolerance: float) -> list[bool]:
    """Which of the original's tensors the candidate has, too."""
    known: dict[int, list[torch.Tensor]] = {}
    for one in theirs:
        known.setdefault(prod(one.shape), []).append(one.mark)
    stacked = {size: torch.stack(marks) for size, marks in known.items()}
    sizes = {size: marks.norm(dim=1) for size, marks in stacked.items()}

    def has(one: _Seen) -> bool:
        size = prod(one.shape)
        if not one.tells or size not in stacked:
            return False
        scale = sizes[size].clamp_min(float(one.mark.norm()))
        # False where one is not finite
        return bool(((stacked[size] - one.mark).abs().amax(1) <= tolerance * scale).any())

    return [has(one) for one in ours]


def _ancestors(seen: Sequence[_Seen], index: int) -> set[int]:
    found: set[int] = set()
    pending = list(seen[index].made_of)
    while pending:
        one = pending.pop()
        if one not in found:
            found.add(one)
            pending += seen[one].made_of
    return found


def _mark(tensor: torch.Tensor) -> torch.Tensor:
    """A few sums of all elements with weights that are random, and the same for every tensor of that size."""
    flat = tensor.detach().reshape(-1).double()
    blocks = -(-flat.numel() // _BLOCK)
    padded = torch.nn.functional.pad(flat, (0, blocks * _BLOCK - flat.numel())).reshape(blocks, _BLOCK)
    weights, signs = _weights(flat.device)
    return (signs[torch.arange(blocks, device=flat.device) % len(signs), None] * (padded @ weights)).sum(0).cpu()


@cache
def _weights(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    both = (
        torch.randn(_BLOCK, _PROJECTIONS, generator=generator, device="cpu"),
        torch.randn(4099, generator=generator, device="cpu"),
    )
    return both[0].double().to(device), both[1].double().to(device)


def _watched(module: nn.Module, inputs: Inputs, seed: int) -> list[_Seen]:
    """All floating-point tensors that a model computes, in order."""
    copied = private_copy(module, "model", torch.float64)
    watch = _Watch(inputs)
    with _places_told(copied, watch.places), torch.no_grad(), watch:
        run(copied, inputs, seed=seed, dtype=torch.float64)
    return watch.seen


@contextmanager
def _places_told(module: nn.Module, places: list[str]) -> Iterator[None]:
    """Within it, `places` ends with the name of the submodule that runs."""
    handles = []

    def enter(name: str) -> Any:
        return lambda *_: places.append(name)

    def leave(*_: Any) -> None:
        places.pop()

    for name, child in module.named_modules():
        if name and not isinstance(child, torch.jit.ScriptModule):
            handles.append(child.register_forward_pre_hook(enter(name)))
            handles.append(child.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchDispatchMode):
    """Notes every floating-point tensor that an operation makes of the inputs, or of what was made of them."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.seen: list[_Seen] = []
        self.places: list[str] = []
        # Of each tensor that depends on the inputs, what was noted last of what it is made of.
        self._notes: dict[int, tuple[int, ...]] = {id(tensor): () for tensor in inputs.tensors()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [self._notes[id(t)] for t in pytree.tree_leaves((args, kwargs or {})) if id(t) in self._notes]
        if read:
            made_of = tuple(dict.fromkeys(index for notes in read for index in notes))
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, torch.Tensor):
                    self._note(tensor, func, made_of)
        return result

    def _note(self, tensor: torch.Tensor, func: Any, made_of: tuple[int, ...]) -> None:
        if id(tensor) not in self._notes:
            weakref.finalize(tensor, self._notes.pop, id(tensor), None)
        self._notes[id(tensor)] = made_of
        if not tensor.is_floating_point() or not tensor.numel():
            return
        self._notes[id(tensor)] = (len(self.seen),)
        place = self.places[-1] if self.places else ""
        name = func.overloadpacket.__name__.strip("_")
        values = tensor.detach()
        tells = tensor.numel() >= _FEWEST and bool((values != values.reshape(-1)[0]).any())
        self.seen.append(_Seen(place, name, tuple(tensor.shape), _mark(values), tells, made_of))
