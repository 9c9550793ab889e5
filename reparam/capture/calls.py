"""Functions that take sizes and no traced tensor, as in `torch.arange(height)` and `constant.expand(n, -1)`.

torch checks their arguments before anything could tell the tracer of a traced size, so while a model is traced
other functions stand in their place, which ask the tracer first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch.utils import _pytree as pytree

_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "logspace", "ones", "zeros", "tensor")
_METHODS = ("expand", "new_empty", "new_full", "new_ones", "new_zeros", "repeat", "reshape", "tile", "view")


@contextmanager
def traced_calls(tracer: fx.Tracer) -> Iterator[None]:
    """Within it, calls of these functions with a proxy make a node."""
    with ExitStack() as stack:
        for name in _FACTORIES:
            function = getattr(torch, name)
            stack.enter_context(mock.patch.object(torch, name, _traced(tracer, "call_function", function, function)))
        for name in _METHODS:
            method = getattr(torch.Tensor, name)
            stack.enter_context(mock.patch.object(torch.Tensor, name, _traced(tracer, "call_method", name, method)))
        yield


def _traced(tracer: fx.Tracer, kind: str, target: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(map(_is_proxy, pytree.tree_leaves((args, kwargs)))):
            return tracer.create_proxy(kind, target, args, kwargs)
        return original(*args, **kwargs)

    return call


def _is_proxy(value: Any) -> bool:
    return issubclass(type(value), fx.Proxy)  # isinstance believes a proxy that says it is an int
