"""One number behind a product of matrices, or behind views of a layer's output, enters the layer.

    s * (q @ k) = (s * q) @ k,    s * v(A(x)) = v(s_R * A(x))      (1 / sqrt(d) goes into the query projection)

The product may be written as an `einsum` of two tensors, which is linear in either, too.
`v` is a chain of reshapes, permutations and choices of elements; it commutes with any one number. Where it chooses
(query, key and value come from one layer), `R` are the rows of the layer that it reads, found by running the chain on
the numbers of the channels, at the example's sizes and at others. Preconditions: every step has no other reader, what
else is chosen from the layer's output reads none of the rows `R`, and the layer's weight is used nowhere else. It is
done if the cost model prices the operation that goes, which is all that changes; the collapse then merges `s_R` into
the layer.

Not done: factors of heads, which are no single number; a rotation of the query in between.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import fx, nn

from reparam.algebra import Inexact, from_scale_shift
from reparam.checks import CHECKS
from reparam.graph.emit import Layer, insert_layer, layer_for
from reparam.graph.lift import LiftTable
from reparam.graph.nodes import described, free_name, info, kind, pinned, place, stand_for
from reparam.graph.normal import eliminate_dead_code
from reparam.graph.sizes import Atom, Sizes, example_size, shape_read, size_read
from reparam.graph.table import TABLE
from reparam.passes.base import Cost, Refusal, Rewrite
from reparam.passes.cost import CostModel
from reparam.passes.join import shared_weights
from reparam.passes.ledger import allowed
from reparam.passes.repeats import Repeats
from reparam.passes.scaling import Scaling, Surroundings, only_reader

_PRODUCTS = (operator.matmul, torch.matmul, torch.bmm, "matmul", "bmm", "__matmul__")
_VIEWS = frozenset(
    "reshape view permute transpose swapaxes movedim unsqueeze squeeze flatten unflatten contiguous clone t".split()
)
_CHOICES = frozenset("getitem select narrow unbind chunk split split_with_sizes tensor_split index_select".split())


@dataclass(frozen=True)
class Scores:
    """The pass. `table` says what is affine, `cost` what is cheap."""

    table: LiftTable = TABLE
    cost: CostModel = field(default_factory=CostModel)
    name = "scores"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        # Of one chain of views that is written twice, as the collapse may do, each seems to read all of the layer.
        rewrites, _ = Repeats(self.table, only=_VIEWS).run(graph, root) if _scales(graph) else ([], [])
        surroundings = Surroundings(graph, root, self.table)
        shared: set[fx.Node] | None = None
        for node in list(graph.nodes):
            run = surroundings.single(node)
            if run is None or run.axis is not None or run.shifts or not run.scales or pinned(node) is not None:
                continue
            ways = [way for way in _ways(run.source, node, (), surroundings) if way.chain or way.product]
            if not ways or self.cost.of_node(node, root).seconds <= 0 or not bool(torch.isfinite(run.scale).all()):
                continue
            shared = shared_weights(graph, root) if shared is None else shared
            plans = [_planned(way, run, shared, surroundings) for way in ways]
            plan = next((plan for plan in plans if isinstance(plan, _Plan)), None)
            if plan is None:
                why = next(plan for plan in plans if isinstance(plan, Inexact))
                node.meta["refused"] = Refusal(self.name, place(node), kind(node, root), why.reason, why.remedy)
                continue
            rewrite = self._rewrite(plan, node, root)
            if not allowed(rewrite, node):
                continue
            rewrites.append(rewrite)
            _apply(plan, run, graph, root)  # what is known of other nodes stays true
        eliminate_dead_code(graph)
        return rewrites, []

    def _rewrite(self, plan: _Plan, node: fx.Node, root: nn.Module) -> Rewrite:
        return Rewrite(
            self.name,
            place(node),
            (described(node, root),),
            f"{plan.layer.description} behind {described(plan.way.layer, root)}",
            "s * (q @ k) = (s * q) @ k, s * v(A(x)) = v(s_R * A(x))",
            self.cost.of_node(node, root),
            Cost(),
        )


def _scales(graph: fx.Graph) -> bool:
    """Whether something is multiplied or divided at all."""
    return any(word in _name(node) for node in graph.nodes for word in ("mul", "div", "neg", "multiply", "divide"))


@dataclass(frozen=True)
class _Way:
    """From a scale back to a layer.

    Attributes:
        layer: the layer's call.
        chain: views and choices between the layer and the product or scale, in graph order.
        product: whether a product of matrices stands in between.
    """

    layer: fx.Node
    chain: tuple[fx.Node, ...]
    product: bool


@dataclass(frozen=True)
class _Plan:
    """What to insert behind the layer of a way."""

    way: _Way
    layer: Layer


def _ways(
    value: fx.Node, reader: fx.Node, chain: tuple[fx.Node, ...], surroundings: Surroundings, product: bool = False
) -> Iterator[_Way]:
    while pinned(value) is None:
        if surroundings.is_layer(value):
            if only_reader(value) is reader:
                yield _Way(value, chain, product)
            return
        name = _name(value)
        if value.target in (*_PRODUCTS, torch.einsum) and not product:
            operands = _operands(value)
            if only_reader(value) is reader and not value.kwargs and len(set(operands)) == 2:
                for operand in operands:
                    if isinstance(operand, fx.Node):
                        yield from _ways(operand, value, (), surroundings, True)
            return
        source = value.args[0] if value.args else None
        if name not in _VIEWS | _CHOICES or value.op == "call_module" or not isinstance(source, fx.Node):
            return
        # What else is chosen further up is held against the rows that are scaled; what is scaled itself is read once.
        harmless = _is_choice if chain else _reads_sizes
        if only_reader(value) is not reader and not all(user is reader or harmless(user) for user in value.users):
            return
        value, reader, chain = source, value, (value, *chain)


def _operands(product: fx.Node) -> tuple[Any, ...]:
    """The two tensors that a product is linear in."""
    if product.target is not torch.einsum:
        return product.args[:2]
    rest = product.args[1] if isinstance(product.args[1], (list, tuple)) else product.args[1:]
    return tuple(rest) if isinstance(product.args[0], str) and len(rest) == 2 else ()


def _is_choice(node: fx.Node) -> bool:
    """Whether it takes a part of a tensor, or only reads its size."""
    return _reads_sizes(node) or (node.op != "call_module" and _name(node) in _CHOICES)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _planned(way: _Way, run: Scaling, shared: set[fx.Node], surroundings: Surroundings) -> _Plan | Inexact:
    tensor = info(way.layer)
    found = surroundings.map_of(way.layer)
    if found is None or found[2] is None or tensor is None:
        return Inexact("the layer it would go into is not affine")
    if way.layer in shared:
        return Inexact("the layer it would go into shares its weight", "give each call a layer of its own")
    axis = found[2]
    rows = _rows(way, axis, surroundings.sizes)
    if isinstance(rows, Inexact):
        return rows
    scale = torch.ones(tensor.shape[axis], dtype=torch.float64, device=run.scale.device)
    scale[rows] = run.scale
    whole = replace(run, source=way.layer, scale=scale, shift=torch.zeros_like(scale), axis=axis)
    reader = only_reader(way.layer)
    assert reader is not None
    absorbed = surroundings.absorbs_behind(way.layer, reader, whole, axis, rounded=True)
    if absorbed is not True:
        return absorbed or Inexact("the layer it would go into cannot absorb it")
    made = layer_for(from_scale_shift(scale, None), tensor, axis, None)
    return made if isinstance(made, Inexact) else _Plan(way, made)


def _rows(way: _Way, axis: int, sizes: Sizes) -> torch.Tensor | Inexact:
    """Which channels of the layer the chain reads; a reason if the layer's other readers read one of them, too."""
    tensor = info(way.layer)
    assert tensor is not None
    if all(len(node.users) == 1 for node in way.chain):
        return torch.arange(tensor.shape[axis], device="cpu")
    known = {
        atom: value
        for size in sizes.dims(way.layer)
        for atom in size.atoms
        if (value := example_size(atom)) is not None
    }
    unknown = Inexact("which rows of the layer it scales cannot be told")
    rows = _rows_at(way, axis, known, sizes) or unknown
    for doubled in (known, *({atom} for atom in known)):
        if isinstance(rows, Inexact):
            break
        there = _rows_at(way, axis, {atom: value * (1 + (atom in doubled)) for atom, value in known.items()}, sizes)
        if isinstance(there, Inexact):
            return there
        # Where the chain does not run the model does not either, as when an export has fixed that size.
        if there and not torch.equal(there[0], rows[0]):
            return Inexact("which rows of the layer it scales depends on the sizes of the input")
    return rows if isinstance(rows, Inexact) else rows[0]


def _rows_at(way: _Way, axis: int, known: dict[Atom, int], sizes: Sizes) -> tuple[torch.Tensor] | Inexact | None:
    """The same for certain sizes; None where the chain does not run with them."""
    unknown = Inexact("which rows of the layer it scales cannot be told")

    def number(argument: fx.Node) -> int:
        size = sizes.value(argument)
        if size is None or any(atom not in known for atom in size.atoms):
            raise LookupError
        return size.number * prod(known[atom] for atom in size.atoms)

    def made(node: fx.Node, source: fx.Node, value: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda one: value if one is source else number(one))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = node.target
        return function(*args, **kwargs)

    try:
        dims = sizes.dims(way.layer)
        shape = [size.number * prod(known[atom] for atom in size.atoms) for size in dims]
        where = [1] * len(shape)
        where[axis] = shape[axis]
        value: Any = torch.arange(shape[axis], dtype=torch.int32, device="cpu").view(where).expand(shape).contiguous()
        others: list[Any] = []
        for index, (node, source) in enumerate(zip(way.chain, (way.layer, *way.chain), strict=False)):
            after = made(node, source, value)
            if index:
                rest = [user for user in source.users if user is not node and not _reads_sizes(user)]
                others += [made(user, source, value) for user in rest]
            value = after
    except LookupError:
        return unknown
    except Exception:
        return None
    if not isinstance(value, torch.Tensor) or not all(isinstance(other, torch.Tensor) for other in others):
        return unknown
    rows: torch.Tensor = value.unique().long()
    if any(bool(torch.isin(other, rows).any()) for other in others):
        return Inexact("other operations read the same channels of the layer it would go into")
    return (rows,)


def _reads_sizes(node: fx.Node) -> bool:
    """Whether it only looks at a size, or at how many parts there are."""
    return node.target in CHECKS or size_read(node) is not None or shape_read(node) is not None


def _apply(plan: _Plan, run: Scaling, graph: fx.Graph, root: nn.Module) -> None:
    layer = plan.way.layer
    node = run.result
    with graph.inserting_after(layer):
        made = insert_layer(graph, root, layer, plan.layer, free_name(root, node))
    order = {other: index for index, other in enumerate(graph.nodes)}
    for constant in made.all_input_nodes:
        if order[constant] > order[made]:
            made.prepend(constant)
    stand_for(made, node)
    made.meta["tensor"] = info(layer)
    layer.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    node.replace_all_uses_with(run.source)


__all__ = ["Scores"]
