"""Private copies of a model in another precision, and calls of a model that leave no trace.

Nothing here changes a module it was given: copies are deep, calls get copies of their inputs, and the global random
state is the same after a call as before it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from reparam.chance import Generators
from reparam.compiled import compiled
from reparam.equivalence.outputs import Flat, flatten
from reparam.errors import InputError
from reparam.inputs import Inputs
from reparam.lazy import (
    Guarded,
    Lazy,
    WrittenError,
    lean_copy,
    pairs_of_blocks,
    results_held,
    shared_storages,
)
from reparam.quiet import without_copying_warnings
from reparam.widen import all_in, told_dtype


def deployment_dtype(module: nn.Module, inputs: Inputs) -> torch.dtype:
    """The floating-point dtype of most weights; of the inputs, where there are no weights; float32 failing both."""
    counts: dict[torch.dtype, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    if not counts:
        for tensor in inputs.tensors():
            if tensor.is_floating_point():
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


class PrivateCopy:
    """A copy for calls that leave no trace. It shares the large weights, as long as nobody writes to them.

    Args:
        module: what is copied; in eval mode then.
        what: what to call it in errors.
        dtype: as for `private_copy`.

    Raises:
        InputError: the module cannot be copied.
    """

    def __init__(self, module: nn.Module, what: str, dtype: torch.dtype | None = None) -> None:
        self._given = (module, what, dtype)
        self._has_run = False
        self._lean = False
        try:
            lean = lean_copy(module, dtype)
        except Exception:
            lean = None  # the whole copy says what is wrong
        if lean is None:
            self._become_whole()
            return
        with contextlib.suppress(NotImplementedError):
            lean.eval()
        self.module, self._lean = lean, True
        self._guard = Guarded(shared_storages(lean))

    def _become_whole(self) -> None:
        self.module, self._lean = private_copy(*self._given), False

    def run(self, call: Callable[[nn.Module], Flat]) -> Flat:
        """What `call` makes of the module; if sharing may be why it fails, of a copy that shares nothing."""
        if self._lean:
            try:
                with self._guard:
                    result = call(self.module)
                self._has_run = True
                return result
            except Exception as error:
                if self._has_run and not isinstance(error, WrittenError):
                    raise
            self._become_whole()
        return call(self.module)


def private_copy(module: nn.Module, what: str, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy in eval mode; with `dtype` (float64 or float32), floating-point weights and attributes cast to it.

    Raises:
        InputError: the module cannot be copied.
    """
    try:
        lazy = {id(one): nn.Parameter(one.whole(), False) for one in module.parameters() if isinstance(one, Lazy)}
        known = results_held(module) | lazy
        with without_copying_warnings():
            duplicate = copy.deepcopy(module, cast(Any, known))
    except Exception as error:
        raise InputError(f"the {what} cannot be copied, so it cannot be verified ({first_line(error)})") from error
    # An exported program's module has no modes: what it does was fixed when it was exported.
    with contextlib.suppress(NotImplementedError):
        duplicate.eval()
    if dtype is not None:
        with without_copying_warnings():
            duplicate.double() if dtype == torch.float64 else duplicate.float()
        for part in duplicate.modules():
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    vars(part)[name] = value.detach().to(dtype)
    return duplicate


def run(
    model: Callable[..., Any] | PrivateCopy,
    inputs: Inputs,
    *,
    seed: int,
    dtype: torch.dtype | None = None,
    drawn: list[str] | None = None,
    default: bool = True,
) -> Flat:
    """Calls a model and flattens what it returns, with its random numbers drawn from `seed`.

    Args:
        model: a module or any other callable; the inputs are moved to the module's device.
        dtype: float64 or float32 casts the floating-point inputs, and makes every cast to a narrower dtype inside the
            model a cast to this one; None runs the model as it is.
        default: with `dtype`, whether tensors that the model makes without a dtype have it, too. Not so for a model
            that is deployed in that dtype: there they have torch's default dtype.
        drawn: where given, gets the names of the generators that the model drew from.
    """
    if isinstance(model, PrivateCopy):
        return model.run(lambda module: _run(module, inputs, seed, dtype, drawn, default))
    # A function may call what torch.compile has made.
    with contextlib.nullcontext() if isinstance(model, nn.Module) or dtype is not None else compiled():
        return _run(model, inputs, seed, dtype, drawn, default)


def _run(
    model: Callable[..., Any],
    inputs: Inputs,
    seed: int,
    dtype: torch.dtype | None,
    drawn: list[str] | None,
    default: bool,
) -> Flat:
    device = _device(model)
    if device is not None:
        inputs = inputs.map(lambda tensor: tensor.to(device))
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        generators = None if drawn is None else Generators()
        told = told_dtype(inputs) if dtype == torch.float64 else None
        with contextlib.nullcontext() if dtype is None else all_in(dtype, told, default=default):
            result = flatten((inputs if dtype is None else inputs.to(dtype)).call(model))
        if drawn is not None and generators is not None:
            drawn += generators.moved()
        return result


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters and buffers, by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def disturbed(
    candidate: nn.Module, reference: Mapping[str, torch.Tensor], dtype: torch.dtype, seed: int
) -> nn.Module | None:
    """A float64 copy of `candidate` whose changed weights are wrong by what rounding them to `dtype` makes them wrong.

    Each element moves by up to a unit roundoff of itself. One that stands unchanged in `reference`, the original's, has
    not been rounded and stays: a candidate is excused for no more than it did.

    Returns:
        None if nothing was changed.
    """
    known = {_fingerprint(tensor): tensor for tensor in reference.values() if tensor.is_floating_point()}
    generator = torch.Generator().manual_seed(seed)
    copied = private_copy(candidate, "candidate", torch.float64)
    targets = named_tensors(copied)
    found = False
    for name, tensor in named_tensors(candidate).items():
        if not tensor.is_floating_point():
            continue
        same = reference.get(name)
        if same is None or same.shape != tensor.shape:
            same = known.get(_fingerprint(tensor))
        changed = torch.ones_like(tensor, dtype=torch.bool) if same is None else tensor != same.to(tensor.device)
        if not bool(changed.any()):
            continue
        found = True
        target = targets[name]
        target.data += torch.where(changed, _rounding(target.data, dtype, generator), 0.0)
    return copied if found else None


def rounding_failures(candidate: Any, candidate_float64: nn.Module) -> tuple[str, ...]:
    """Sentences on weights of `candidate` that are not the float64 ones rounded to its dtype (one ULP is allowed)."""
    if not isinstance(candidate, nn.Module):
        return ()
    exact = named_tensors(candidate_float64)
    failures = []
    for name, tensor in named_tensors(candidate).items():
        wanted = exact.pop(name, None)
        if wanted is None or wanted.shape != tensor.shape:
            failures.append(f"weight {name} has no counterpart of its shape in the float64 candidate")
        elif tensor.is_floating_point():
            count = _not_rounded(tensor.detach(), wanted.detach())
            if count:
                failures.append(
                    f"weight {name} is not the float64 weight rounded: {count} of {tensor.numel()} elements"
                )
    return tuple(failures)


def _not_rounded(tensor: torch.Tensor, exact: torch.Tensor) -> int:
    """How many elements are further than one ULP from the exact ones."""
    info = torch.finfo(tensor.dtype)
    count = 0
    for ours, wide in pairs_of_blocks(tensor, exact):
        rounded = wide.to(ours)
        close = (ours == rounded) | (
            (ours - rounded).abs() <= info.eps * rounded.abs() + info.smallest_normal * info.eps
        )
        count += int((~close).sum())
    return count


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    if len(lines) > 1 and lines[0].endswith(" raised:"):  # that of a compiler, around the one that tells something
        lines[0] = f"{lines[0]} {lines[1]}"
    return f"{type(error).__name__}: {lines[0]:.200}" if lines else type(error).__name__


def _rounding(weight: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Uniform in +-u of each element; below the smallest normal number the spacing is constant."""
    info = torch.finfo(dtype)
    draws = torch.rand(weight.shape, generator=generator, device="cpu").mul_(2).sub_(1).to(weight.device)
    return draws * (weight.abs() * (info.eps / 2)).clamp_min(info.tiny * info.eps / 2)


def _fingerprint(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Shape and first elements: enough to find a weight that stands under another name, since elements are compared."""
    return (tensor.shape, *tensor.detach().flatten()[:16].tolist())


def _device(model: Callable[..., Any]) -> torch.device | None:
    """The device of a module's first tensor; None for other callables and modules without tensors."""
    if not isinstance(model, nn.Module):
        return None
    tensors: Iterator[torch.Tensor] = iter((*model.parameters(), *model.buffers()))
    first = next(tensors, None)
    return None if first is None else first.device
