"""Linear operations of the user's own: rows of the lift table that are added from outside.

    y = sum_i A_i(x_i)      x_i the operands, A_i the affine maps that the user's formula returns

All other arguments must be constant. The formula is believed as far as its channels and sizes fit the call; whether its
numbers are right is for verification to find. Not handled: operands that broadcast, and results of another rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, overload

import torch
from torch import fx, nn

from reparam.algebra import AffineMap, Inexact
from reparam.capture.captured import Leaves, TensorInfo
from reparam.errors import InputError
from reparam.graph.lift import Call, Lifted, Row
from reparam.graph.nodes import info, module_of, place
from reparam.graph.table import TABLE, read_attribute
from reparam.graph.targets import arguments_of, name_of, spellings_of


@dataclass(frozen=True)
class OpCall:
    """One call of a registered operation. `call["name"]` is a constant argument, or an attribute of the module called.

    Floating-point tensors among them are float64, for they become weights that are rounded once, at the end.

    Attributes:
        what: the operation and where it is called, for messages.
        operands: shape, dtype and device of the tensors it is linear in, by argument name.
        result: the same of its result.
        axis: the axis that carries channels, counted from the front.
        module: the module that is called; None for a function or a method.
    """

    what: str
    operands: Mapping[str, TensorInfo]
    result: TensorInfo
    axis: int
    module: nn.Module | None
    _arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        if name in self._arguments:
            return self._arguments[name]
        *parents, attribute = name.split(".")
        owner: Any = self.module
        for parent in parents:
            owner = getattr(owner, parent, None)
        if not isinstance(owner, nn.Module) or not hasattr(owner, attribute):
            raise InputError(f"{self.what} has no constant argument and no attribute {name!r}; correct its formula")
        return _float64(read_attribute(owner, attribute))

    @property
    def channels(self) -> int:
        """Number of channels of the first operand."""
        return next(iter(self.operands.values())).shape[self.axis]


Maps: TypeAlias = "AffineMap | tuple[AffineMap, ...] | Inexact"
Formula: TypeAlias = "Callable[[OpCall], Maps]"
F = TypeVar("F", bound="Formula")


@overload
def register_linear_op(
    target: Any,
    formula: Formula,
    *,
    signature: Sequence[str] | None = None,
    operands: Sequence[str] | None = None,
    axis: int = 1,
) -> ExitStack: ...


@overload
def register_linear_op(
    target: Any,
    formula: None = None,
    *,
    signature: Sequence[str] | None = None,
    operands: Sequence[str] | None = None,
    axis: int = 1,
) -> Callable[[F], F]: ...


def register_linear_op(
    target: Any,
    formula: Formula | None = None,
    *,
    signature: Sequence[str] | None = None,
    operands: Sequence[str] | None = None,
    axis: int = 1,
) -> Any:
    """Tells `fuse` that an operation is linear, and how. Without `formula` it is a decorator for one.

    The operation is not looked into when a model is captured. A plain function is found where a `forward` calls it by
    a global name; give it `torch.fx.wrap` if it is called otherwise.

    Args:
        target: a function, a `torch.library` operator, the name of a tensor method, or a class of modules (instances of
            exactly this class).
        formula: takes an `OpCall`; returns the affine map of the operand (a tuple with one map for each if there are
            several), or an `Inexact` with the reason why this call is not affine.
        signature: names of the arguments, in order; None reads them off the target.
        operands: which of them are the tensors it is linear in, each of the result's rank; None is the first.
        axis: the axis of operands and result that carries channels.

    Returns:
        With a formula, a context manager that ends the registration; without, the decorator.

    Raises:
        InputError: the target is of the wrong kind or in the table already, or its arguments cannot be read.
    """
    spellings, modules, parameters = spellings_of(target)
    names, defaults = arguments_of(target, parameters, signature)
    linear_in = tuple(names[:1] if operands is None else operands)
    if isinstance(operands, str) or not linear_in or not set(linear_in) <= set(names):
        raise InputError(f"operands={operands!r} must be names out of {names}")
    if not isinstance(axis, int):
        raise InputError(f"axis={axis!r} must be an integer")

    def register(formula: F) -> F:
        if not callable(formula):
            raise InputError(f"the formula for {name_of(target)} must be a function, not {formula!r}")
        op = _Op(name_of(target), formula, linear_in, names, defaults, axis)
        row = Row(op.name, op.lift, names, spellings, modules)
        TABLE.add(row)
        _ROWS.append(row)
        return formula

    if formula is None:
        return register
    register(formula)
    ends = ExitStack()
    ends.callback(unregister_linear_op, target)
    return ends


def unregister_linear_op(target: Any) -> None:
    """Takes back what `register_linear_op` added; does nothing if it is gone already.

    Raises:
        InputError: the target is of the wrong kind.
    """
    spellings, modules, _ = spellings_of(target)
    for row in [row for row in _ROWS if {*row.calls, *row.modules} & {*spellings, *modules}]:
        TABLE.remove(row)
        _ROWS.remove(row)


def leaves() -> Leaves:
    """What capture must not look into: the registered classes and Python functions."""
    functions = tuple(call for row in _ROWS for call in row.calls if inspect.isfunction(call))
    return Leaves(frozenset(cls for row in _ROWS for cls in row.modules), functions)


_ROWS: list[Row] = []


@dataclass(frozen=True)
class _Op:
    """A registered operation; `lift` is the formula of its row."""

    name: str
    formula: Formula
    operands: tuple[str, ...]
    signature: tuple[str, ...]
    defaults: Mapping[str, Any]
    axis: int

    def lift(self, call: Call) -> Lifted | Inexact:
        arguments = {**dict.fromkeys(self.signature), **self.defaults, **call.arguments}
        result, ndim = info(call.node), call.ndim
        nodes = [arguments.get(name) for name in self.operands]
        sources = [info(node) if isinstance(node, fx.Node) else None for node in nodes]
        axis = self.axis + ndim if self.axis < 0 else self.axis
        for name, value in arguments.items():
            if name not in self.signature:
                return Inexact(f"it is called with the further argument {name!r}", "name it in the signature")
            if isinstance(value, fx.Node) and name not in self.operands:
                return Inexact(f"its argument {name!r} is computed from the input", "pass a constant")
        for name, source in zip(self.operands, sources, strict=True):
            if source is None:
                return Inexact(f"its argument {name!r} is no tensor that the model computes")
            if len(source.shape) != ndim:
                return Inexact(f"its argument {name!r} has {len(source.shape)} axes and its result {ndim}")
        if result is None or not 0 <= axis < ndim:
            return Inexact(f"its result has no axis {self.axis} for the channels")
        operands = dict(zip(self.operands, sources, strict=True))
        constants = {name: _float64(value) for name, value in arguments.items() if name not in operands}
        what = f"{self.name} at {place(call.node)}"
        seen = OpCall(what, operands, result, axis, module_of(call.node, call.root), constants)  # type: ignore[arg-type]
        maps = self._maps(seen)
        return maps if isinstance(maps, Inexact) else Lifted(tuple(nodes), lambda channels: maps, axis)  # type: ignore[arg-type]

    def _maps(self, call: OpCall) -> tuple[AffineMap, ...] | Inexact:
        """What the formula says, if it fits the call.

        Raises:
            InputError: the formula fails, or its maps do not fit.
        """
        try:
            found = self.formula(call)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the formula of {call.what} fails: {type(error).__name__}: {error}") from error
        if isinstance(found, Inexact):
            return found
        maps = found if isinstance(found, tuple) else (found,)
        if len(maps) != len(self.operands) or not all(isinstance(made, AffineMap) for made in maps):
            wanted = "an AffineMap" if len(self.operands) == 1 else f"a tuple of {len(self.operands)} AffineMaps"
            raise InputError(f"the formula of {call.what} must return {wanted} or an Inexact, not {found!r}")
        for (name, source), made in zip(call.operands.items(), maps, strict=True):
            shape = _mapped(source.shape, made, call.axis)
            if shape != call.result.shape:
                geometry = made.geometry
                raise InputError(
                    f"the formula of {call.what} does not fit it: its map from {geometry.in_channels} to "
                    f"{geometry.out_channels} channels (kernel {geometry.kernel}) does not take {name!r} of shape "
                    f"{source.shape} to {call.result.shape}; correct it, or return an Inexact for such a call"
                )
        return maps


def _mapped(shape: tuple[int, ...], made: AffineMap, axis: int) -> tuple[int, ...] | None:
    """The shape that a map makes of a shape, or None if it does not take it."""
    geometry = made.geometry
    if geometry.in_channels != shape[axis] or (geometry.rank and (axis != 1 or geometry.rank != len(shape) - 2)):
        return None
    mapped = [*shape[:axis], geometry.out_channels, *shape[axis + 1 :]]
    if geometry.rank:
        mapped[2:] = geometry.output_size(shape[2:])
    return tuple(mapped)


def _float64(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    return value.detach().to(torch.float64) if floating else value


__all__ = ["OpCall", "leaves", "register_linear_op", "unregister_linear_op"]
