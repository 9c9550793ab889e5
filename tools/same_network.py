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
from collections.abc import Iterable, Iterator, Mapping
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
                text = f"{size} {_described(timm_zoo.create_plain(name, size, **settings).eval(), {})}"
        except Exception:  # a constructor that needs the values of its weights
            return name, None
        return name, hashlib.sha256(text.encode()).hexdigest()[:16]
    return name, None


def fingerprints(names: Iterable[str], jobs: int) -> dict[str, str | None]:
    """Those of several models."""
    print("describing every model, to know which are the same network", flush=True)
    with get_context("spawn").Pool(jobs) as pool:
        return dict(sorted(pool.imap_unordered(fingerprint, names, chunksize=4)))


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


def _described(value: Any, known: dict[int, str]) -> str:
    """Everything that decides what a value does, as text; `known` are the containers that were seen, by their id."""
    if isinstance(value, torch.Tensor):
        flat = None if value.is_meta else value.detach().reshape(-1).contiguous().view(torch.uint8).numpy()
        return f"{value.dtype}{tuple(value.shape)}{'' if flat is None else hashlib.sha256(flat).hexdigest()}"
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, types.MethodType):
        return _named(value.__func__)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, type)):
        return _named(value)
    if id(value) not in known:
        known[id(value)] = f"number {len(known)}"  # what it is called where it holds itself
        text = f"{_named(type(value))}{[(key, _described(one, known)) for key, one in _held(value)]}"
        known[id(value)] = hashlib.sha256(text.encode()).hexdigest()
    return known[id(value)]


def _held(value: Any) -> list[tuple[str, Any]]:
    """What a container or an object holds, by key."""
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, Mapping):
        return [(repr(key), one) for key, one in value.items()]
    if isinstance(value, (list, tuple)):
        return [(str(index), one) for index, one in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [(one, None) for one in sorted(map(repr, value))]
    return [(key, one) for key, one in sorted(getattr(value, "__dict__", {}).items()) if key not in _ABOUT_WEIGHTS]


def _named(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
