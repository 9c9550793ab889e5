"""Tensors that are computed when they are needed.

The search for the cheapest form of a region composes many maps and keeps few. A composition therefore fixes its
geometry at once and its numbers later: a `Deferred` remembers how to compute a tensor from other deferred tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


class Deferred:
    """A tensor as a function of other deferred tensors.

    Args:
        compute: maps the values of `operands` to the tensor.
        operands: what it is computed from.
    """

    __slots__ = ("_compute", "_operands")

    def __init__(self, compute: Callable[..., torch.Tensor], *operands: Deferred) -> None:
        self._compute = compute
        self._operands = operands

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Deferred:
        """An existing tensor, shared and not cast: the operations on it promote to float64, or cast it first."""
        tensor = tensor.detach()
        return cls(lambda: tensor)

    def evaluate(self, memo: dict[Deferred, torch.Tensor] | None = None) -> torch.Tensor:
        """Computes the tensor. `memo` holds the values computed so far, so that shared operands cost once.

        Iterative, because a region can be thousands of operations deep.
        """
        memo = {} if memo is None else memo
        pending = [self]
        while pending:
            node = pending[-1]
            if node in memo:
                pending.pop()
                continue
            missing = [operand for operand in node._operands if operand not in memo]
            if missing:
                pending.extend(missing)
                continue
            memo[node] = node._compute(*(memo[operand] for operand in node._operands))
            pending.pop()
        return memo[self]
