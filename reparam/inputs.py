"""Example inputs in one normal form: positional and keyword arguments of the model's `forward`.

A tensor is one positional argument, a tuple or list is several, a dict is keyword arguments.
Imports torch and nothing of ours but the errors, so that every room may use it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from reparam.errors import InputError

ExampleInputs: TypeAlias = "torch.Tensor | Sequence[Any] | Mapping[str, Any] | Inputs"


@dataclass(frozen=True)
class Inputs:
    """Arguments for one call of a model.

    Attributes:
        args: positional arguments; tensors, or nested containers and plain values that hold them.
        kwargs: keyword arguments, likewise.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, example_inputs: ExampleInputs) -> Inputs:
        """Normalises what a user passes as `example_inputs`.

        Raises:
            InputError: it is not a tensor, sequence or dict, or it holds no tensor at all.
        """
        if isinstance(example_inputs, Inputs):
            inputs = example_inputs
        elif isinstance(example_inputs, torch.Tensor):
            inputs = cls((example_inputs,))
        elif isinstance(example_inputs, Mapping):
            inputs = cls((), dict(example_inputs))
        elif isinstance(example_inputs, (tuple, list)):
            inputs = cls(tuple(example_inputs))
        else:
            raise InputError(
                f"example_inputs is a {type(example_inputs).__name__}; pass a tensor, a tuple of arguments, "
                "or a dict of keyword arguments"
            )
        if not any(True for _ in inputs.tensors()):
            raise InputError("example_inputs holds no tensor; pass at least one, shaped as the model expects it")
        return inputs

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor in the arguments, in order."""
        for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))):
            if isinstance(leaf, torch.Tensor):
                yield leaf

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The same arguments with `function` applied to each tensor."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, function, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same arguments with the floating-point tensors cast to `dtype`; integer tensors stay."""
        return self.map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def clone(self) -> Inputs:
        """Copies of the tensors, for a model that may write into its inputs."""
        return self.map(lambda t: t.clone())

    def call(self, function: Callable[..., Any]) -> Any:
        """Calls `function` with copies of these arguments, without gradients."""
        fresh = self.clone()
        with torch.no_grad():
            return function(*fresh.args, **fresh.kwargs)


_OF_A_DTYPE = re.compile(r"not implemented for '|dtypes? (is |are )?not supported", re.IGNORECASE)


def cannot_run(error: BaseException, inputs: Inputs, where: str) -> InputError:
    """What to say of a model that raised `error` on the example inputs, at the module `where`."""
    given = ", ".join(f"{_dtype(t)} of {'x'.join(map(str, t.shape)) or 'no dimensions'}" for t in inputs.tensors())
    lines = str(error).strip().splitlines()
    what = lines[0].rstrip(".") if lines else type(error).__name__
    remedy = (
        "take the model and its inputs in another dtype"
        if _OF_A_DTYPE.search(what)
        else "pass inputs of the shape and dtype that it expects"
    )
    return InputError(f"the model cannot run on the example input ({given}): {where}: {what}; {remedy}")


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def unusable(held: Iterable[tuple[str, torch.Tensor]], *, meta: bool = False) -> str | None:
    """What is wrong with the first of these tensors that has no values, or is not dense; None if all are of use.

    Args:
        held: tensors of a model, or given to it, by name.
        meta: whether those of the meta device will do.
    """
    for name, tensor in held:
        if is_lazy(tensor):
            return f"{name} has no values yet; run the model once, or load its weights"
        if tensor.is_meta and not meta:
            return f"{name} is on the meta device and has no values; load the weights first"
        kind = not_dense(tensor)
        if kind is not None:
            return f"{name} is a {kind} tensor; make it a dense one, with .to_dense()"
    return None


def not_dense(tensor: torch.Tensor) -> str | None:
    """What a tensor is, if it is no dense one: nothing here compares or stores others."""
    if tensor.is_nested:
        return "nested"
    return None if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")
