"""Which of timm's models are one network under several names: they differ in the weights that were trained for them.

A model is described attribute by attribute, through all of its modules: classes, settings, functions, shapes of
parameters, and the values of buffers. Two of the same description, at the image size that the sweeps use, compute the
same function of the same weights.
"""

from __future__ import annotations

import functools
import hashlib
import types
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from torch import nn

from tools import timm_zoo

_ABOUT_WEIGHTS = ("pretrained_cfg", "default_cfg")
_PLAIN = (str, int, float, complex, bool, bytes, type(None), torch.dtype, torch.device, torch.Size)


def fingerprint(name: str) -> tuple[str, str | None]:
    """The name, and a digest of the network at the smallest image it takes; None where that cannot be told."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for size, settings in timm_zoo.small_sizes(name):
        with torch.device("meta"):
            try:
                model = timm_zoo.create_plain(name, size, **settings).eval()
                model(torch.randn(2, *size))
            except (RuntimeError, AssertionError, ValueError, TypeError):  # as in `create_small`
                continue
        try:
            with _weights_without_values():
                text = f"{size} {_described(timm_zoo.create_plain(name, size, **settings).eval(), set())}"
        except Exception:  # a constructor that needs the values of its weights
            return name, None
        return name, hashlib.sha256(text.encode()).hexdigest()[:16]
    return name, None


def fingerprints(names: list[str], jobs: int) -> dict[str, str | None]:
    """Those of several models."""
    print("describing every model, to know which are the same network", flush=True)
    with get_context("spawn").Pool(jobs) as pool:
        return dict(pool.imap_unordered(fingerprint, names, chunksize=8))


def same_as(digests: Mapping[str, str | None], asked: set[str]) -> dict[str, str]:
    """For each model that was not asked, one that was asked and is the same network; none for others."""
    by_digest = {digest: name for name, digest in sorted(digests.items()) if digest and name in asked}
    return {
        name: by_digest[digest]
        for name, digest in sorted(digests.items())
        if digest and digest in by_digest and name not in asked
    }


@contextmanager
def _weights_without_values() -> Iterator[None]:
    """Within it parameters are on the meta device, and buffers are what they are."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    with mock.patch.object(nn.Module, "register_parameter", on_meta):
        yield


def _described(value: Any, within: set[int]) -> str:
    """Everything that decides what a value does, as text."""
    if isinstance(value, torch.Tensor):
        values = (
            ""
            if value.is_meta
            else hashlib.sha256(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy()).hexdigest()
        )
        return f"{value.dtype}{tuple(value.shape)}{values}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, types.MethodType):
        return _named(value.__func__)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return _named(value)
    if id(value) in within:
        return "itself"
    inside = within | {id(value)}
    name = _named(type(value))
    if isinstance(value, functools.partial):
        return f"{name}{[_described(one, inside) for one in (value.func, value.args, value.keywords)]}"
    if isinstance(value, Mapping):
        return f"{name}{[(repr(key), _described(one, inside)) for key, one in value.items()]}"
    if isinstance(value, (list, tuple)):
        return f"{name}{[_described(one, inside) for one in value]}"
    if isinstance(value, (set, frozenset)):
        return f"{name}{sorted(_described(one, inside) for one in value)}"
    held = {key: one for key, one in sorted(getattr(value, "__dict__", {}).items()) if key not in _ABOUT_WEIGHTS}
    return f"{name}{[(key, _described(one, inside)) for key, one in held.items()]}"


def _named(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
