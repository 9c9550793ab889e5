"""Ways to run a module. One row per backend; a variant that is no module is run as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from reparam.errors import InputError
from reparam.inputs import Inputs
from reparam.quiet import without_copying_warnings

Variant: TypeAlias = "nn.Module | Callable[..., Any]"


def eager(module: nn.Module, inputs: Inputs) -> Callable[..., Any]:
    """The module itself, operator by operator."""
    return module


# name -> (module, example inputs on its device) -> callable with the module's signature
BACKENDS: Mapping[str, Callable[[nn.Module, Inputs], Callable[..., Any]]] = {
    "eager": eager,
}


def chosen(backends: Iterable[str]) -> tuple[str, ...]:
    """The backends, checked.

    Raises:
        InputError: none, or one that is not in `BACKENDS`.
    """
    names = tuple(dict.fromkeys([backends] if isinstance(backends, str) else backends))
    for name in names:
        if name not in BACKENDS:
            raise InputError(f"there is no backend {name!r}; choose from {', '.join(BACKENDS)}")
    if not names:
        raise InputError(f"no backend is given; choose from {', '.join(BACKENDS)}")
    return names


def device_of(variant: Variant, inputs: Inputs, device: torch.device | None) -> torch.device:
    """Where a variant runs: `device` if given, else where its weights are, else where the inputs are."""
    if device is not None:
        return device
    if isinstance(variant, nn.Module):
        for tensor in [*variant.parameters(), *variant.buffers()]:
            return tensor.device
    return next(inputs.tensors()).device


def placed(variant: Variant, device: torch.device) -> Variant:
    """The variant on `device`; a copy if it has to move, because the caller's module stays where it is."""
    if not isinstance(variant, nn.Module):
        return variant
    if all(tensor.device == device for tensor in [*variant.parameters(), *variant.buffers()]):
        return variant
    with without_copying_warnings():
        return copy.deepcopy(variant).to(device)


@contextmanager
def in_eval_mode(variants: Iterable[Variant]) -> Iterator[None]:
    """All modules in eval mode while active, then each submodule in the mode it was in."""
    modules = [part for v in variants if isinstance(v, nn.Module) for part in v.modules()]
    modes = [(part, part.training) for part in modules]
    try:
        for part in modules:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode
