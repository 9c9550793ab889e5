"""Operations that return what they read, and negations that cancel.

    x * 1 = x / 1 = x ** 1 = x - 0 = x + 0 = x,  -(-x) = x,  not not b = b,  cat([x]) = x,  x[:, :] = x
    reshape(x, sizes of x) = x,  permute(x, (0, 1, ...)) = x,  transpose(x, i, i) = x,  flatten(x, i, i) = x

Preconditions: the result has the shape and dtype of `x` for every input, not for the example alone: `x * 1.0` makes an
integer tensor a floating one, ones of shape `[4, 1, 1]` broadcast an `x` of one channel, `reshape(x, (2, 4))` is none
for another batch. So sizes are compared as `reparam.graph.sizes` knows them, and a constant needs one element, or sizes
that are known. `x + 0` turns -0.0 into 0.0, so it stays where an operation behind it can tell the two apart.

What other functions, and modules, do nothing is in `reparam.passes.idle`.

Not done: casts and `contiguous`, which do something in another precision or memory layout.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from reparam.graph.constants import Constants
from reparam.graph.lift import LiftTable
from reparam.graph.lifted import LiftedGraph
from reparam.graph.nodes import described, escapes, info, kind, pinned, place, same_kind_of_tensor
from reparam.graph.normal import eliminate_dead_code, mutated
from reparam.graph.sizes import Sizes, spell_out
from reparam.graph.table import TABLE
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.idle import idle
from reparam.passes.ledger import allowed

_TIMES = (operator.mul, torch.mul, torch.multiply, "mul", "multiply")
_OVER = (operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide", "true_divide")
_PLUS = (operator.add, torch.add, "add")
_MINUS = (operator.sub, torch.sub, torch.subtract, "sub", "subtract")
_POWER = (operator.pow, torch.pow, "pow")
_NEGATIONS = (operator.neg, torch.neg, torch.negative, "neg", "negative")
_NOTS = (operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "bitwise_not")
_RESHAPES = (torch.reshape, "reshape", "view")
_SIGN_OF_ZERO = frozenset(
    "reciprocal rsqrt atan2 arctan2 copysign signbit angle nextafter pow float_power divide div truediv true_divide "
    "rtruediv frexp heaviside xlogy".split()
)
"""What answers otherwise for -0.0 than for 0.0 by more than the sign of a zero, or may."""


@dataclass(frozen=True)
class Cleanup:
    """The pass. `table` says what is affine, which tells sizes; `final`: whether it says what it left."""

    table: LiftTable = TABLE
    final: bool = True
    name = "cleanup"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        rewrites: list[Rewrite] = []
        refusals: list[Refusal] = []
        spell_out(graph)
        about = _About(graph, root, self.table)
        for node in list(graph.nodes):
            found = None if node in about.constants or _must_stay(node, root) else _no_op(node, about)
            if found is None:
                continue
            source, identity = found
            if escapes(node) and not _may_be_handed_out(source, node):
                continue
            if identity is _PLUS_ZERO and (sensitive := _tells_zeros_apart(node)) is not None:
                why = f"adding 0 turns -0.0 into 0.0, and {kind(sensitive, root)} behind it can tell the two apart"
                refusals.append(Refusal(self.name, place(node), kind(node, root), why, "leave the addition out"))
                continue
            rewrite = Rewrite(self.name, place(node), (described(node, root),), "", identity)
            if not allowed(rewrite, node):
                continue
            rewrites.append(rewrite)
            node.replace_all_uses_with(source)
        eliminate_dead_code(graph)
        return rewrites, refusals if self.final else []


_PLUS_ZERO = "x + 0 = x"


class _About:
    """What is constant, and which sizes are known; the latter found when first asked for."""

    def __init__(self, graph: fx.Graph, root: nn.Module, table: LiftTable) -> None:
        self.root = root
        self.constants = Constants(graph, root)
        self._graph, self._table = graph, table

    @cached_property
    def _lifted(self) -> LiftedGraph:
        return LiftedGraph(self._graph, self.root, self._table, self.constants)

    @property
    def sizes(self) -> Sizes:
        return self._lifted.sizes

    def is_all(self, argument: Any, number: int) -> bool:
        """Whether an argument is this number, or a constant tensor of nothing else."""
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return argument == number
        value = self.tensor(argument)
        return isinstance(value, torch.Tensor) and not value.is_complex() and bool((value == number).all())

    def tensor(self, argument: Any) -> torch.Tensor | None:
        """The value of a constant tensor; None for anything else."""
        value = self.constants.value(argument) if isinstance(argument, fx.Node) and argument in self.constants else None
        return value if isinstance(value, torch.Tensor) else None

    def has_sign(self, argument: Any) -> bool:
        """Whether a zero is a negative one, or one of several is."""
        is_number = isinstance(argument, (int, float))
        value = torch.as_tensor(argument, device="cpu") if is_number else self.tensor(argument)
        return value is not None and not value.is_complex() and bool(torch.signbit(value).any())


def _may_be_handed_out(source: fx.Node, node: fx.Node) -> bool:
    """Whether a caller may get a tensor in place of the node: else they could write to the input or to a weight."""
    if source in node.meta.get("aliases", ()):
        return True
    fresh = source.op.startswith("call") and not source.meta.get("aliases")
    return fresh and len(source.users) == 1


def _must_stay(node: fx.Node, root: nn.Module) -> bool:
    if not node.op.startswith("call") or info(node) is None or pinned(node) is not None:
        return True
    if any(pinned(other) is not None for other in node.all_input_nodes):
        return True
    return mutated(node, root) is not None or bool(node.meta.get("writes"))


def _no_op(node: fx.Node, about: _About) -> tuple[fx.Node, str] | None:
    """The tensor that a node's value is, and why; None if it is another one."""
    rules = () if node.op == "call_module" else (_arithmetic, _cancelled, _rearranged)
    for rule in (*rules, None):
        found = idle(node, about.root) if rule is None else rule(node, about)
        if found is not None and same_kind_of_tensor(found[0], node) and pinned(found[0]) is None:
            return found
    return None


def _arithmetic(node: fx.Node, about: _About) -> tuple[fx.Node, str] | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    if node.target in _TIMES:
        pairs, number, identity = ((a, b), (b, a)), 1, "x * 1 = x"
    elif node.target in _OVER:
        pairs, number, identity = ((a, b),), 1, "x / 1 = x"  # type: ignore[assignment]
    elif node.target in _POWER:
        pairs, number, identity = ((a, b),), 1, "x ** 1 = x"  # type: ignore[assignment]
    elif node.target in _PLUS:
        pairs, number, identity = ((a, b), (b, a)), 0, _PLUS_ZERO
    elif node.target in _MINUS:
        pairs, number = ((a, b),), 0  # type: ignore[assignment]
        identity = _PLUS_ZERO if about.has_sign(b) else "x - 0 = x"
    else:
        return None
    for x, other in pairs:
        if isinstance(x, fx.Node) and about.is_all(other, number) and _broadcasts_nothing(x, other, about):
            return x, identity
    return None


def _broadcasts_nothing(x: fx.Node, other: Any, about: _About) -> bool:
    """Whether the result of elementwise arithmetic has the sizes of `x`, whatever those are."""
    tensor, constant = info(x), about.tensor(other)
    if tensor is None or constant is None:
        return tensor is not None
    if len(constant.shape) > len(tensor.shape):
        return False
    dims = about.sizes.dims(x)[len(tensor.shape) - len(constant.shape) :]
    return all(size in (1, known.literal) for size, known in zip(constant.shape, dims, strict=True))


def _cancelled(node: fx.Node, about: _About) -> tuple[fx.Node, str] | None:
    inner = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(inner, fx.Node) or len(inner.args) != 1 or inner.kwargs or pinned(inner) is not None:
        return None
    source = inner.args[0]
    if not isinstance(source, fx.Node) or info(source) is None:
        return None
    if node.target in _NEGATIONS and inner.target in _NEGATIONS:
        return source, "-(-x) = x"
    is_bool = info(source).dtype == torch.bool  # type: ignore[union-attr]
    return (source, "not not b = b") if is_bool and node.target in _NOTS and inner.target in _NOTS else None


def _rearranged(node: fx.Node, about: _About) -> tuple[fx.Node, str] | None:
    """Views, and copies of one tensor, that leave every element where it is."""
    if node.target in (torch.cat, torch.concat, torch.concatenate):
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        alone = parts[0] if isinstance(parts, (list, tuple)) and len(parts) == 1 else None
        return (alone, "cat([x]) = x") if isinstance(alone, fx.Node) else None
    source = node.args[0] if node.args and not node.kwargs else None
    tensor = info(source) if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or tensor is None or not tensor.shape:
        return None
    rest, rank = node.args[1:], len(tensor.shape)
    spread = tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
    if node.target in _RESHAPES:
        return (source, "reshape(x, sizes of x) = x") if _are_sizes(spread, source, about) else None
    if node.target in (torch.permute, "permute") and all(type(axis) is int for axis in spread):
        stays = [axis % rank for axis in spread] == list(range(rank))  # type: ignore[operator]
        return (source, "permute(x, (0, 1, ...)) = x") if stays else None
    if node.target in (torch.transpose, torch.swapaxes, "transpose", "swapaxes", torch.flatten, "flatten"):
        if node.target in (torch.flatten, "flatten"):
            rest = (*rest, *(0, -1)[len(rest) :])
        same = all(type(axis) is int for axis in rest) and len({axis % rank for axis in rest}) == 1  # type: ignore[operator]
        return (source, f"{getattr(node.target, '__name__', node.target)}(x, i, i) = x") if same else None
    if node.target is operator.getitem:
        parts = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        whole = all(part is Ellipsis or part in (slice(None), slice(0, None), slice(None, None, 1)) for part in parts)
        return (source, "x[:] = x") if whole else None
    return None


def _are_sizes(sizes: tuple[Any, ...], source: fx.Node, about: _About) -> bool:
    """Whether sizes are those of a tensor for every input; one of them may be left to be found (-1)."""
    dims = about.sizes.dims(source)
    if len(sizes) != len(dims) or sum(type(size) is int and size == -1 for size in sizes) > 1:
        return False
    return all(
        (type(size) is int and size == -1) or about.sizes.value(size) == known
        for size, known in zip(sizes, dims, strict=True)
    )


def _tells_zeros_apart(node: fx.Node) -> fx.Node | None:
    """An operation that the value goes into, by whatever way, and that answers otherwise for -0.0."""
    seen, pending = {node}, [node]
    while pending:
        for user in pending.pop().users:
            name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
            retyped = name == "view" and any(isinstance(argument, torch.dtype) for argument in user.args)
            if (name.strip("_") in _SIGN_OF_ZERO and not _harmless(user)) or retyped:
                return user
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return None


def _harmless(node: fx.Node) -> bool:
    """A division by a constant, or a power with a positive exponent: at most the sign of a zero differs."""
    if len(node.args) < 2:
        return False
    other = node.args[1]
    if isinstance(other, fx.Node):
        return other.op == "get_attr" and "pow" not in str(node.target)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return isinstance(other, (int, float)) and ("pow" not in name or other > 0)


__all__ = ["Cleanup"]
