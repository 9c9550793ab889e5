"""Lifting: from a graph node to the affine maps of its tensor operands, by a table of rows.

One row holds the spellings of one operation (module, function, method) and its formula. A row answers with a `Lifted`,
or with the `Inexact` reason why this call is not affine, or not known to be. An operation without a row is not affine.
The rows themselves are in `reparam.graph.table`, the formulas in `reparam.graph.formulas`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeAlias, TypeVar

from torch import fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from reparam.algebra import AffineMap, Inexact
from reparam.errors import InputError
from reparam.graph.constants import Constants
from reparam.graph.nodes import info, is_parametrized, module_of, pinned
from reparam.graph.sizes import Dims, Sizes


@dataclass(frozen=True)
class Moved:
    """Where an axis goes: to `axis` of the result, each of its elements becoming `repeat` neighbouring ones."""

    axis: int
    repeat: int = 1


@dataclass(frozen=True)
class Carried:
    """An operation that moves positions or averages them, does the same to every channel and keeps constants.

    So it commutes with every map that acts on each position alone: a scale, a shift, a linear layer.

    Attributes:
        operand: the tensor it reads.
        moved: for each axis of the operand, where it goes if it carries the channels; None if it must not.
        sizes: of the result.
        kind: "permutation" of axes, "reshape" (the order of elements is kept), or "other".
        order: for a permutation, the operand's axis that each axis of the result is.
        free: it is a view, and moves no bytes.
    """

    operand: fx.Node
    moved: tuple[Moved | None, ...]
    sizes: Dims
    kind: str = "other"
    order: tuple[int, ...] = ()
    free: bool = False


@dataclass(frozen=True)
class Lifted:
    """An operation as a sum of affine maps of its operands; they and the result have one rank and one channel axis.

    Attributes:
        operands: the tensors it is affine in.
        maps: given the number of channels, one map per operand.
        axis: the axis that carries channels, in operands and result alike; None if any axis will do.
        via: nodes between operand and this one that nobody else reads, and that are a part of it.
        carried: the same operation as one that commutes with maps of positions, if it is that too.
    """

    operands: tuple[fx.Node, ...]
    maps: Callable[[int], tuple[AffineMap, ...]]
    axis: int | None
    via: tuple[fx.Node, ...] = ()
    carried: Carried | None = None


@dataclass(frozen=True)
class Concatenated:
    """The operands' channels one after the other; `axis` carries them."""

    operands: tuple[fx.Node, ...]
    axis: int


@dataclass(frozen=True)
class Sliced:
    """The channels `window` of the operand; `axis` carries them. `via` is a split between the two, if there is one."""

    operand: fx.Node
    axis: int
    window: tuple[int, int]
    via: tuple[fx.Node, ...] = ()


One: TypeAlias = "Lifted | Carried | Concatenated | Sliced"


@dataclass(frozen=True)
class Either:
    """An operation that is one thing or another, depending on which axis carries the channels; the first that fits."""

    options: tuple[One, ...]


Lift: TypeAlias = "One | Either"


def is_view(lift: One) -> bool:
    """Whether it only looks at its operand in another way, and moves no bytes."""
    carried = lift.carried if isinstance(lift, Lifted) else lift
    return isinstance(lift, Sliced) or (isinstance(carried, Carried) and carried.free)


@dataclass(frozen=True)
class Call:
    """One call of an operation, its arguments by name, whatever the spelling.

    Attributes:
        node: the graph node.
        arguments: by the names of the row's signature. Tensors of constants are values (float64), others are nodes.
        root: the module that the graph's targets refer to.
        sizes: what is known of the sizes of the graph's tensors.
        constants: the graph's constants.
    """

    node: fx.Node
    arguments: Mapping[str, Any]
    root: nn.Module
    sizes: Sizes
    constants: Constants

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def tensor(self, name: str = "input") -> fx.Node | None:
        """The argument called `name` if it is a tensor that the model computes, None if it is constant or missing."""
        value = self[name]
        return value if isinstance(value, fx.Node) else None

    @property
    def ndim(self) -> int:
        """Number of axes of the result."""
        return len(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result for the example inputs."""
        tensor = info(self.node)
        return () if tensor is None else tensor.shape


Found = TypeVar("Found")


@dataclass(frozen=True)
class CallRow(Generic[Found]):
    """One operation of a table.

    Attributes:
        name: what the operation is.
        lift: the formula: what the table knows of a call.
        signature: argument names, in order, of the function and method spellings.
        modules: module classes, by exact type, and how to read the arguments off such a module.
        calls: functions, and names of tensor methods, that spell it.
        raw: the formula takes arguments as the graph has them (lists of nodes, sizes) and reads constants itself.
        spread: of a raw row: the second argument may be spread, `permute(0, 2, 1)` for `permute((0, 2, 1))`.
    """

    name: str
    lift: Callable[[Call], Found | Inexact | None]
    signature: tuple[str, ...]
    calls: tuple[Any, ...] = ()
    modules: tuple[type[nn.Module], ...] = ()
    read_module: Callable[[Any], dict[str, Any]] = field(default=lambda module: {})
    raw: bool = False
    spread: bool = False


class CallTable(Generic[Found]):
    """Finds the row of a node and applies it."""

    def __init__(self, rows: tuple[CallRow[Found], ...]) -> None:
        self._by_module = {cls: row for row in rows for cls in row.modules}
        self._by_call = {call: row for row in rows for call in row.calls}

    def add(self, row: CallRow[Found]) -> None:
        """Adds a row.

        Raises:
            InputError: one of its spellings has a row already.
        """
        for spelling in (*row.calls, *row.modules):
            there = self._by_call.get(spelling) or self._by_module.get(spelling)
            if there is not None:
                raise InputError(f"{row.name} is in the lift table already: {there.name}")
        self._by_call.update(dict.fromkeys(row.calls, row))
        self._by_module.update(dict.fromkeys(row.modules, row))

    def remove(self, row: CallRow[Found]) -> None:
        """Takes back a row that was added."""
        for call in row.calls:
            del self._by_call[call]
        for cls in row.modules:
            del self._by_module[cls]

    def row(self, node: fx.Node, root: nn.Module) -> CallRow[Found] | None:
        """The row for a node, or None if the operation has none."""
        if node.op == "call_module":
            return self._by_module.get(plain_type(module_of(node, root)))
        return self._by_call.get(node.target) if node.op in ("call_function", "call_method") else None

    def lift(self, node: fx.Node, root: nn.Module, constants: Constants, sizes: Sizes) -> Found | Inexact | None:
        """What the table knows of the node, the reason why nothing, or None if it is no operation of the table."""
        row = self.row(node, root)
        if row is None or node in constants:
            return None
        if isinstance(decided := node.meta.get("stays"), Inexact):  # an earlier pass needs it where it is
            return decided
        inexact = _untouchable(node, root, constants)
        if inexact is not None:
            return None if row.raw else inexact
        if row.raw:
            return _lift_raw(row, node, root, constants, sizes)
        # A row with function spellings too gets all but its input from the module itself.
        known = row.signature[:1] if node.op == "call_module" and row.calls else row.signature
        if len(node.args) > len(known) or not set(node.kwargs) <= {*known, *_HARMLESS}:
            return _further(node, row)
        arguments: dict[str, Any] = dict(zip(row.signature, node.args, strict=False))
        arguments.update(node.kwargs)
        if node.op == "call_module":
            arguments.update(row.read_module(_unrounded(node, root)))
        for name, value in arguments.items():
            if isinstance(value, fx.Node) and value in constants:
                # What can be read off a module comes as the module has it, so a formula for modules takes it so.
                arguments[name] = constants.held(value) if row.modules else constants.value(value)
            elif isinstance(value, fx.Node) and name == "groups" and "number" in value.meta:
                arguments[name] = value.meta["number"]  # a channel count; the weight's shape fixes it
            elif isinstance(value, fx.Node) and info(value) is None:
                return Inexact(f"its argument {name!r} is computed when the model runs", "pass a constant")
            elif isinstance(value, (list, tuple)) and any(isinstance(item, fx.Node) for item in value):
                return Inexact(f"its argument {name!r} is computed when the model runs", "pass constants")
        return row.lift(Call(node, arguments, root, sizes, constants))


def _further(node: fx.Node, row: CallRow[Found]) -> Inexact:
    """What is said of a call with arguments that the row does not know."""
    if node.op == "call_module" and row.name == "transposed convolution":
        return Inexact(
            "its output_size is an argument of the call, so that the size of its input decides how it pads",
            "set output_padding on the layer instead, and call it with its input alone",
        )
    return Inexact("it is called with further arguments", "call it with its input alone")


def _lift_raw(
    row: CallRow[Found], node: fx.Node, root: nn.Module, constants: Constants, sizes: Sizes
) -> Found | Inexact | None:
    args = node.args
    if row.spread and len(args) > 1 and not isinstance(args[1], (tuple, list)):
        args = (args[0], args[1:])
    if len(args) > len(row.signature) or not set(node.kwargs) <= set(row.signature):
        return None
    arguments: dict[str, Any] = {**dict(zip(row.signature, args, strict=False)), **node.kwargs}
    if node.op == "call_module":
        arguments.update(row.read_module(module_of(node, root)))
    return row.lift(Call(node, arguments, root, sizes, constants))


Row = CallRow[Lift]
LiftTable = CallTable[Lift]

_HARMLESS = {"alpha", "rounding_mode", "value", "inplace"}


def _unrounded(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The module a node calls; as it was before it was rounded to the model's dtype, if a pass made it."""
    make = node.meta.get("float64")
    return module_of(node, root) if make is None else getattr(make(), "module", None) or module_of(node, root)


def plain_type(module: nn.Module | None) -> type:
    """The class of a module, that of the unparametrised module if it is parametrised."""
    cls = type(module)
    return cls.__mro__[1] if module is not None and is_parametrized(module) else cls


def _untouchable(node: fx.Node, root: nn.Module, constants: Constants) -> Inexact | None:
    tensor = info(node)
    if tensor is None or not tensor.dtype.is_floating_point:
        return Inexact("its result is not a floating-point tensor")
    reason = pinned(node) or next((pinned(other) for other in node.all_input_nodes if pinned(other)), None)
    if reason is not None:
        return Inexact(f"a tensor it reads or makes must stay: {reason}", "use the out-of-place form of the operation")
    for other in node.all_input_nodes:
        operand = info(other)
        if operand is None or operand.dtype == tensor.dtype:
            continue
        if operand.dtype.is_floating_point:
            return Inexact("it converts between floating-point types", "run the model in one type")
        if other not in constants:
            return Inexact(
                "it makes floating-point numbers of others, which a layer does not", "convert them first, by x.float()"
            )
    module = module_of(node, root)
    parts = () if module is None else module.modules() if module._modules else (module,)
    return next((found for part in parts if (found := _module_hides_something(part)) is not None), None)


def _module_hides_something(module: nn.Module) -> Inexact | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            name = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return Inexact(
                f"torch.nn.utils.{name} computes its {hook.name} in a hook, whenever it is called",
                f"take it off (torch.nn.utils.remove_{name}), which leaves the {hook.name} it has, or put it on by "
                f"torch.nn.utils.parametrizations.{name}, then fuse",
            )
    if module._forward_hooks or module._forward_pre_hooks:
        return Inexact("it has forward hooks, which fusing would lose", "remove the hooks, then fuse")
    if "forward" in module.__dict__:
        return Inexact("its forward method was replaced on the instance", "give the module a class of its own")
    return None
