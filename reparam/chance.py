"""Random numbers that a model draws: whether, where, and what to say of it.

Drawing moves a generator, whatever the operation is called: `Generators` compares their states before and after. It
knows those of torch, Python's `random` and `numpy.random`, and generators that modules of a model keep as attributes
(or in lists of their own) or that their forward reads as a global name. Not known: generators that are kept elsewhere.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn


class Generators:
    """The states of all generators at the time it is made.

    Args:
        model: whose modules' own generators are watched, too.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._sources = [*_global_sources(), *(() if model is None else _own_sources(model))]
        self._states = [source.read() for source in self._sources]

    def moved(self) -> list[str]:
        """Names of the generators that were drawn from since: `torch`, `random`, `numpy.random`, `head.generator`."""
        pairs = zip(self._sources, self._states, strict=True)
        return [source.name for source, state in pairs if not _same(state, source.read())]

    def restore(self) -> None:
        """Puts all states back."""
        for source, state in zip(self._sources, self._states, strict=True):
            if not _same(state, source.read()):
                source.write(state)


def _numpy_random() -> Any:
    """The module, which numpy loads only when it is asked for; None where there is no numpy."""
    return import_module("numpy.random") if "numpy" in sys.modules else None


@dataclass(frozen=True)
class _Source:
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


def _global_sources() -> Iterator[_Source]:
    yield _Source("torch", torch.get_rng_state, torch.set_rng_state)
    if torch.cuda.is_initialized():
        yield _Source("torch.cuda", torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all)
    yield _Source("random", random.getstate, random.setstate)
    if numpy_random := _numpy_random():
        yield _Source("numpy.random", numpy_random.get_state, numpy_random.set_state)


def _own_sources(model: nn.Module) -> Iterator[_Source]:
    seen: set[int] = set()
    for path, module in model.named_modules():
        kept = [
            (f"{path}.{key}" if path else key, item) for key, value in vars(module).items() for item in _items(value)
        ]
        if not type(module).__module__.startswith("torch."):
            forward = getattr(module.forward, "__func__", module.forward)
            names, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
            kept += [(name, known[name]) for name in getattr(names, "co_names", ()) if name in known]
        for name, value in kept:
            source = _of_generator(name, value)
            if source is not None and id(value) not in seen:
                seen.add(id(value))
                yield source


def _items(value: Any) -> Sequence[Any]:
    """The elements of a plain container that may hold generators; anything else by itself."""
    if type(value) is dict:
        value = [*value.values()]
    return value if type(value) in (list, tuple) else (value,)


def _of_generator(name: str, value: Any) -> _Source | None:
    if isinstance(value, torch.Generator):
        return _Source(name, value.get_state, value.set_state)
    if isinstance(value, random.Random):
        return _Source(name, value.getstate, value.setstate)
    numpy_random = _numpy_random()
    if numpy_random is None or not isinstance(value, (numpy_random.RandomState, numpy_random.Generator)):
        return None
    if isinstance(value, numpy_random.RandomState):
        return _Source(name, value.get_state, value.set_state)
    bits: Any = value.bit_generator
    return _Source(name, lambda: bits.state, partial(setattr, bits, "state"))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and (a == b if _is_plain(a) else all(map(_same, a, b)))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if hasattr(a, "tobytes"):
        return bool(a.tobytes() == b.tobytes())
    return bool(a == b)


def _is_plain(items: Sequence[Any]) -> bool:
    return len(items) > 8  # the state of Python's generator: 625 integers


@dataclass(frozen=True)
class Draw:
    """One place where random numbers are drawn.

    Attributes:
        what: the operation (`randn_like`, `dropout`) or the generator (`numpy.random`).
        module: qualified name of the module in whose forward it stands; empty for the model itself.
        kind: class of that module; empty if it is not known.
        source: `file.py:line`, or None where it is not known.
        alone: whether the module has neither parameters nor modules inside, so that it may well do nothing else.
    """

    what: str
    module: str = ""
    kind: str = ""
    source: str | None = None
    alone: bool = True

    @classmethod
    def of(cls, what: str, path: str, module: nn.Module, source: str | None) -> Draw:
        """A draw in the forward of this module."""
        alone = next(module.children(), None) is None and next(module.parameters(), None) is None
        return cls(what, path, type(module).__name__, source, alone)

    def __str__(self) -> str:
        where = " ".join(filter(None, (self.kind or "forward", self.module)))
        return f"{self.what} in {where}" + (f" ({self.source})" if self.source else "")


_MOST = 4
_DROPPING = re.compile(r"(feature|alpha|native|featurealpha)?dropout(\dd)?")


def refusal(model: str, draws: Sequence[Draw]) -> str:
    """One sentence: that a model draws random numbers, where, and what would make it a function of its input."""
    draws = tuple(dict.fromkeys(draws))
    listed = ", ".join(map(str, draws[:_MOST])) + (f" and {len(draws) - _MOST} more" if len(draws) > _MOST else "")
    samples = "its answers are samples, which no fixed model gives"
    if not all(map(_drops, draws)):
        lift = "let it check self.training"
        why = f"{model} draws random numbers in eval mode, so that no fixed model computes what it does: {listed}"
    elif all(map(_is_layer, draws)):
        lift = "let eval() reach it"
        why = f"{model} drops at random in eval mode too, as it keeps dropout in train mode: {listed}; {samples}"
    else:
        lift = "pass training=self.training"
        how = "as Monte-Carlo dropout does (training=True)"
        why = f"{model} drops at random in eval mode too, {how}: {listed}; {samples}"
    named = next((draw for draw in draws if draw.module and draw.alone), None)
    named = named or next((draw for draw in draws if draw.module), None)
    if named is None or not named.alone:
        return f"{why}; {lift}, or give what draws a module of its own and say with inference_form what that is"
    name = named.module if _is_layer(named) or not named.kind else named.kind
    return (
        f"{why}; if that is off at inference, say so with inference_form={{{name!r}: 'identity'}} "
        f"(--inference-form {name}=identity), or {lift}"
    )


def _drops(draw: Draw) -> bool:
    return _DROPPING.fullmatch(draw.what.lower().replace("_", "")) is not None


def _is_layer(draw: Draw) -> bool:
    """Whether it is in one of torch's own layers, which asks for its mode."""
    return _DROPPING.fullmatch(draw.kind.lower()) is not None


__all__ = ["Draw", "Generators", "refusal"]
