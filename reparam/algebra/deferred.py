"""Tensors that are computed when they are needed.

The search for the cheapest form of a region composes many maps and keeps few. A composition therefore fixes its
geometry at once and its numbers later: a `Deferred` remembers how to compute a tensor from other deferred tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from reparam.lazy import Lazy, passing, row_blocks


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
        if isinstance(tensor, Lazy):
            deferred = isinstance(tensor.source, Deferred) and not tensor.flipped
            return tensor.source if deferred else cls(tensor.whole)  # type: ignore[return-value]
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

    def whole(self) -> torch.Tensor:
        """The tensor in float64, as the source of a `Lazy`."""
        return self.evaluate().to(torch.float64)

    def reader(self) -> Callable[[slice], torch.Tensor]:
        """Makes some rows of it in float64."""
        memo: dict[Deferred, torch.Tensor] = {}
        return lambda block: self.rows(block, memo).to(torch.float64)

    def reshaped(self, shape: tuple[int, ...]) -> Deferred:
        """The same rows in another shape."""
        return RowWise(lambda w: w.reshape(-1, *shape[1:]), shape, (self,))

    @property
    def depth(self) -> int:
        """How many tensors behind each other can be computed by rows; 0 if this one cannot."""
        return 0

    def rows(self, block: slice, memo: dict[Deferred, torch.Tensor]) -> torch.Tensor:
        """Some rows of the tensor; if it cannot be computed by rows, all of it is computed into `memo`."""
        return self.evaluate(memo)[block]


class RowWise(Deferred):
    """A tensor whose rows are made of the same rows of others: large ones need never exist in float64 as a whole.

    Args:
        compute: maps the values of `operands` and `fixed`, in this order, to the tensor; given some rows of each of
            `operands`, it makes these rows.
        shape: of the tensor.
        operands: tensors with as many rows.
        fixed: what is needed as a whole for any row.
    """

    __slots__ = ("_depth", "_fixed", "_rows", "shape")

    def __init__(
        self,
        compute: Callable[..., torch.Tensor],
        shape: tuple[int, ...],
        operands: tuple[Deferred, ...],
        fixed: tuple[Deferred, ...] = (),
    ) -> None:
        super().__init__(compute, *operands, *fixed)
        self.shape, self._rows, self._fixed = shape, operands, fixed
        self._depth = 1 + max(operand.depth for operand in operands)
        if self._depth > _DEEPEST:
            self._depth = 0

    @property
    def depth(self) -> int:
        """How many tensors behind each other can be computed by rows; 0 if this one cannot."""
        return self._depth

    def rows(self, block: slice, memo: dict[Deferred, torch.Tensor]) -> torch.Tensor:
        """Some rows of the tensor, and no others."""
        if not self._depth or self in memo:
            return self.evaluate(memo)[block]
        return self._compute(
            *(operand.rows(block, memo) for operand in self._rows), *(one.evaluate(memo) for one in self._fixed)
        )

    def evaluate_as(self, dtype: torch.dtype, memo: dict[Deferred, torch.Tensor] | None = None) -> torch.Tensor:
        """The same numbers block by block, so that no float64 copy of a large weight is ever written to memory."""
        memo = {} if memo is None else memo
        made = self._made(slice(0, self.shape[0]), memo, lambda rows: rows.new_empty(self.shape, dtype=dtype))
        return super().evaluate_as(dtype, memo) if made is None else made

    def whole(self) -> torch.Tensor:
        """The tensor in float64, as the source of a `Lazy`."""
        return self.reader()(slice(0, self.shape[0]))

    def reader(self) -> Callable[[slice], torch.Tensor]:
        """Makes some rows of it in float64."""
        memo: dict[Deferred, torch.Tensor] = {}

        def read(block: slice) -> torch.Tensor:
            shape = (min(block.stop, self.shape[0]) - block.start, *self.shape[1:])
            made = self._made(block, memo, lambda rows: passing(shape, torch.float64, rows.device))
            return self.rows(block, memo).to(torch.float64) if made is None else made

        return read

    def _made(
        self, block: slice, memo: dict[Deferred, torch.Tensor], empty: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor | None:
        """Rows that are made a few at a time and put into a tensor that `empty` makes; None without elements."""
        out: torch.Tensor | None = None
        start, stop = block.start, min(block.stop, self.shape[0])
        for part in row_blocks((stop - start, *self.shape[1:])):
            rows = self.rows(slice(start + part.start, min(start + part.stop, stop)), memo).to(torch.float64)
            out = empty(rows) if out is None else out
            out[part] = rows
        return out


def scaled_rows(weight: Deferred, scale: Deferred, shape: tuple[int, ...]) -> Deferred:
    """`weight[o, ...] * scale[o]`: what folding a normalisation into the layer before it comes to.

    Args:
        weight: of this shape, `[C, ...]`.
        scale: `[C, 1, ...]`.
    """
    return RowWise(lambda w, s: w * s.to(torch.float64).reshape(-1, *(1,) * (w.ndim - 1)), shape, (weight, scale))


_DEEPEST = 64  # Python's stack is finite
