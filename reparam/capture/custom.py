"""Functions of `torch.autograd.Function`: a traced model is followed into their `forward`, as without gradients.

`Swish.apply(x)` goes to compiled code, which takes no proxy. What it computes is `Swish.forward(ctx, x)`, and at
inference nobody reads what is left in `ctx`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

_ORIGINAL = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]
_NO_SETUP = torch.autograd.Function.setup_context


class _Context:
    """What `forward` gets to leave things in for `backward`."""

    saved_tensors = ()

    def __init__(self, arguments: int) -> None:
        self.needs_input_grad = (False,) * arguments

    def _ignore(self, *_: Any) -> None:
        pass

    save_for_backward = save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = _ignore


@contextmanager
def custom_functions_followed(tracer: Any, root: nn.Module) -> Iterator[None]:
    """Within it `apply` with a proxy runs `forward`, also where `Swish.apply` itself was given a name.

    Such names are looked for in the attributes of the modules in `root`, and beside their forwards.
    """

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        if tracer.executing or not any(issubclass(type(leaf), fx.Proxy) for leaf in leaves):
            return _ORIGINAL(cls, *args, **kwargs)
        context = () if cls.setup_context is not _NO_SETUP else (_Context(len(args)),)
        return cls.forward(*context, *args, **kwargs)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)))
        for names in _places(root):
            for name, value in list(names.items()):
                if type(value) is MethodType and value.__func__ is _ORIGINAL:
                    stack.enter_context(replaced(names, {name: MethodType(apply, value.__self__)}))
        yield


def _places(root: nn.Module) -> list[dict[str, Any]]:
    parts = [part for part in root.modules() if not isinstance(part, torch.jit.ScriptModule)]  # these run elsewhere
    beside = [getattr(type(part).forward, "__globals__", {}) for part in parts]
    return [*(vars(part) for part in parts), *{id(names): names for names in beside}.values()]


@contextmanager
def replaced(names: dict[str, Any], stand_ins: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Other values for some names, of which those that are still there afterwards go back."""
    before = {name: names[name] for name in stand_ins}
    names.update(stand_ins)
    try:
        yield
    finally:
        names.update({name: value for name, value in before.items() if names.get(name) is stand_ins[name]})
