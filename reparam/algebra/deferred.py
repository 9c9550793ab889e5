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

    def evaluate_as(self, dtype: torch.dtype, memo: dict[Deferred, torch.Tensor] | None = None) -> torch.Tensor:
        """The tensor, computed in float64 and rounded to `dtype` once."""
        return self.evaluate(memo).to(torch.float64).to(dtype)


class ScaledRows(Deferred):
    """`weight[o, ...] * scale[o]`: what folding a normalisation into the layer before it comes to.

    Args:
        weight: `[C, ...]`.
        scale: any shape with `C` elements.
    """

    __slots__ = ("_scale", "_weight")

    def __init__(self, weight: Deferred, scale: Deferred) -> None:
        super().__init__(lambda w, s: w * s.to(torch.float64).reshape(-1, *(1,) * (w.ndim - 1)), weight, scale)
        self._weight, self._scale = weight, scale

    def evaluate_as(self, dtype: torch.dtype, memo: dict[Deferred, torch.Tensor] | None = None) -> torch.Tensor:
        """The same numbers block by block, so that no float64 copy of a large weight is ever written to memory."""
        memo = {} if memo is None else memo
        weight, scale = self._weight.evaluate(memo), self._scale.evaluate(memo).to(torch.float64).reshape(-1, 1)
        rows = max(1, _BLOCK * weight.shape[0] // max(weight.numel(), 1))
        flat, out = weight.reshape(weight.shape[0], -1), torch.empty_like(weight, dtype=dtype).contiguous()
        for start in range(0, weight.shape[0], rows):
            block = slice(start, start + rows)
            out.view(flat.shape)[block] = flat[block] * scale[block]
        return out


_BLOCK = 1 << 16  # elements; a float64 block of this size stays in the second-level cache
