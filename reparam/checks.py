"""Checks that stand in a graph where the example decided what was made of it; they stop it on other inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from reparam.errors import OtherInputError


def require_value(actual: Any, expected: Any, name: str) -> None:
    """Stands in a captured graph where an argument was fixed to the value of the example.

    Raises:
        OtherInputError: the argument is given another value than the one the graph was captured for.
    """
    if actual is not expected and (type(actual) is not type(expected) or actual != expected):
        given = "a tensor" if isinstance(actual, torch.Tensor) else repr(actual)
        raise OtherInputError(f"this model was captured for {name}={expected!r} and cannot run with {name}={given}")


def require_length(actual: Any, expected: int, where: str | None = None, what: str = "sizes") -> None:
    """Stands in a captured graph where the elements of an argument or of a tensor were taken one by one.

    Raises:
        OtherInputError: there is another number of elements than the example had.
    """
    if len(actual) != expected:
        raise OtherInputError(
            f"this model was captured for {expected} elements{_at(where)} and cannot take {len(actual)}; "
            "capture it with an example of that size"
        )


def require_decision(actual: Any, expected: bool, where: str | None, what: str = "sizes") -> None:
    """Stands in a captured graph where a condition on sizes (or dtypes: `what`) decided what the model does.

    Raises:
        OtherInputError: on this input it decides otherwise.
    """
    if bool(actual) != expected:
        raise OtherInputError(
            f"this model was captured for {what} that make a condition {expected}{_at(where)}, and those of "
            "this input do not; capture it with such an example"
        )


def require_number(actual: Any, expected: Any, where: str | None, what: str = "sizes") -> None:
    """Stands in a captured graph where Python used what depends on sizes (or dtypes: `what`): in `range` or a dict.

    Raises:
        OtherInputError: on this input it is another number.
    """
    if actual != expected:
        made = f"a number {expected}" if isinstance(expected, (int, float)) else str(expected)
        raise OtherInputError(
            f"this model was captured for {what} that make {made}{_at(where)}, and those of this input make {actual}; "
            "capture it with such an example"
        )


def require_tensor(actual: Any, rank: int | None, name: str) -> None:
    """Stands at the head of a captured graph for every tensor that is an argument, or in one.

    Args:
        actual: the argument.
        rank: its number of dims in the example; None where all that the model does with it goes with any.
        name: what it is called.

    Raises:
        OtherInputError: it is no tensor (as an optional argument that is left out), or has another rank.
    """
    if not isinstance(actual, torch.Tensor):
        raise OtherInputError(
            f"this model was captured for a tensor as {name} and cannot run with {name}={actual!r}; capture it with "
            "such an example"
        )
    if rank is not None and actual.dim() != rank:
        raise OtherInputError(
            f"this model was captured for a tensor of {rank} dims as {name} and cannot take shape {list(actual.shape)}"
        )


def require_fact(actual: torch.Tensor, fact: str, expected: Any, name: str, where: str | None) -> None:
    """Stands in a graph captured by torch.export where the model asks what its tensors are.

    Args:
        actual: an argument.
        fact: `dtype`, `layout`, or `device` (its type).
        expected: that of the example.
        name: what the argument is called.
        where: the line that asks for it.

    Raises:
        OtherInputError: the argument has another one.
    """
    found = actual.device.type if fact == "device" else getattr(actual, fact)
    if found != expected:
        raise OtherInputError(
            f"this model was captured for {name} with {fact} {expected}, which it asks for{_at(where)}, and cannot "
            f"take {found}; capture it with such an example"
        )


def require_member(actual: Any, key: int | str, name: str) -> None:
    """Stands in a captured graph where the model reads an element of an argument that is a container.

    The original may have another way for a container without it, which no graph holds.

    Raises:
        OtherInputError: there is no such element.
    """
    try:
        actual[key]
    except (KeyError, IndexError):
        raise OtherInputError(
            f"this model was captured for {name} with {name}[{key!r}], which is missing; "
            "capture it with such an example"
        ) from None


def require_rank(actual: torch.Tensor, expected: int) -> None:
    """Stands in a captured graph where the number of dims of a tensor decided what the model does.

    Raises:
        OtherInputError: the tensor has another number of dims than the example gave it.
    """
    if actual.dim() != expected:
        raise OtherInputError(
            f"this model was captured for a tensor of {expected} dims and cannot take shape {list(actual.shape)} there"
        )


def require_sizes(actual: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Stands in a graph that was fused for one image size: `expected` are all sizes of a tensor but the batch.

    Raises:
        OtherInputError: the tensor has other sizes.
    """
    if tuple(actual.shape[1:]) != tuple(expected):
        raise OtherInputError(
            f"this model was fused with fixed sizes, {list(expected)} there, and cannot take {list(actual.shape[1:])}; "
            "fuse it with an example of that size, or without fixed sizes"
        )


def require_keys(actual: Mapping[Any, Any], expected: tuple[Any, ...]) -> None:
    """Stands in a captured graph where the keys of a dict argument were asked for.

    Raises:
        OtherInputError: the dict has other keys, or the same in another order.
    """
    if tuple(actual) != tuple(expected):
        raise OtherInputError(f"this model was captured for the keys {list(expected)} and cannot take {list(actual)}")


CHECKS = (
    *(require_decision, require_fact, require_keys, require_length, require_member, require_number, require_rank),
    *(require_sizes, require_tensor, require_value),
)
"""All functions of this module that stand in graphs; none has a result."""


def _at(where: str | None) -> str:
    return f" at {where}" if where else ""


class Guards(nn.Module):
    """What torch.export found out about the sizes of the inputs, as a check at the head of a captured graph.

    Args:
        check: takes the inputs, and raises an `AssertionError` for those that the program was not exported for.
    """

    def __init__(self, check: nn.Module) -> None:
        super().__init__()
        self.check = check

    def forward(self, *inputs: Any) -> None:
        """Raises `OtherInputError` for inputs that the program was not exported for."""
        try:
            self.check(*inputs)
        except AssertionError as error:
            raise OtherInputError(
                f"this model was captured for other inputs ({str(error).splitlines()[0]}); "
                "capture it with an example of that size"
            ) from error
