"""What depends on parameters, buffers and literals only is computed once: `f(W) = C` for every input.

Evaluated in float64 and rounded once. What stays: views of a parameter, which cost nothing; what the model returns; and
tables that would make the file much larger than the parameters they are made of. Random operations and storages that
the forward writes to are no constants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from reparam.graph.constants import Constants
from reparam.graph.emit import Constant, insert_constant
from reparam.graph.nodes import attribute, escapes, info, kind, module_of, place, replace_by_literal, stand_for
from reparam.graph.normal import eliminate_dead_code
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.ledger import allowed

_VIEWS = [
    "chunk",
    "detach",
    "expand",
    "expand_as",
    "flatten",
    "getattr",
    "movedim",
    "narrow",
    "permute",
    "reshape",
    "select",
    "size",
    "split",
    "squeeze",
    "t",
    "transpose",
    "unflatten",
    "unsqueeze",
    "view",
]


@dataclass(frozen=True)
class ConstantFolding:
    """The pass.

    Attributes:
        most: bytes that one constant may have, if it is larger than what it is made of.
        growth: bytes that all constants together may add to the model; or a quarter of its size if that is more.
    """

    most: int = 4 << 20
    growth: int = 16 << 20

    name = "constants"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        constants = Constants(graph, root, layers=True)
        rewrites: list[Rewrite] = []
        refusals: list[Refusal] = []
        left = max(self.growth, _size_of(root) // 4)
        for node in [node for node in graph.nodes if _is_result(node, constants)]:
            if info(node) is None:
                _write_number(node, constants)
                continue
            cone = list(_cone(node))
            if escapes(node):
                continue  # a caller who writes to what they got would change the model
            if all(map(_is_view, cone)) and not _is_its_own(node, cone, graph, root):
                continue
            added = _bytes(node) - sum(_bytes(other) for other in cone if other.op == "get_attr")
            if added > 0 and (_bytes(node) > self.most or added > left):
                refusals.append(_too_large(node, added, root))
                continue
            rewrite = self._rewrite(node, cone, root)
            if not allowed(rewrite, *cone):
                continue
            left -= max(added, 0)
            rewrites.append(rewrite)
            _fold(node, constants, graph, root)
        eliminate_dead_code(graph)
        return rewrites, refusals

    def _rewrite(self, node: fx.Node, cone: list[fx.Node], root: nn.Module) -> Rewrite:
        replaced = tuple(
            f"{place(part).module}: {kind(part, root)}" for part in reversed(cone) if part.op != "get_attr"
        )
        made = f"a constant of shape {list(info(node).shape)}"  # type: ignore[union-attr]
        return Rewrite(self.name, place(node), replaced, made, "f(W) = C for every input")


def _fold(node: fx.Node, constants: Constants, graph: fx.Graph, root: nn.Module) -> None:
    tensor = info(node)
    assert tensor is not None
    exact = constants.value(node)
    value = exact.to(tensor.dtype).to(tensor.device).contiguous().clone()
    with graph.inserting_before(node):
        made = insert_constant(graph, root, node.name, value, _remembered(exact))
    stand_for(made, node)
    node.replace_all_uses_with(made)
    constants.forget(node)


def _remembered(exact: torch.Tensor) -> Callable[[], Constant]:
    return lambda: Constant(exact)


def _is_result(node: fx.Node, constants: Constants) -> bool:
    """Whether a constant is read by something that is none."""
    if node not in constants or node.op == "get_attr":
        return False
    if info(node) is None and type(constants.value(node)) not in (int, float, bool):
        return False
    return any(user not in constants for user in node.users)


def _write_number(node: fx.Node, constants: Constants) -> None:
    """A Python number, such as the size of a parameter, becomes a literal."""
    value = constants.value(node)
    if all(user.op != "output" for user in node.users):
        replace_by_literal(node, value)


def _cone(node: fx.Node) -> Iterator[fx.Node]:
    """A constant and everything that it is computed from; each once, the constant itself first."""
    pending, seen = [node], {node}
    while pending:
        part = pending.pop()
        yield part
        for other in part.all_input_nodes:
            if other not in seen:
                seen.add(other)
                pending.append(other)


def _is_view(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.target is operator.getitem:
        return not any(other.op == "get_attr" or info(other) is not None for other in node.all_input_nodes[1:])
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name in _VIEWS


def _is_its_own(node: fx.Node, cone: list[fx.Node], graph: fx.Graph, root: nn.Module) -> bool:
    """Whether a view shows the whole of one buffer that nobody else reads, so that it can be kept as the view."""
    held = [part for part in cone if part.op == "get_attr"]
    if len(held) != 1 or any(len(part.users) != 1 for part in cone if part is not node):
        return False
    name = str(held[0].target)
    value = attribute(root, name)
    if isinstance(value, nn.Parameter) or not isinstance(value, torch.Tensor) or info(node) is None:
        return False
    if value.numel() != info(node).numel or any(o is not held[0] and o.target == name for o in graph.nodes):  # type: ignore[union-attr]
        return False
    storage = value.untyped_storage().data_ptr()
    called = [module for one in graph.nodes if (module := module_of(one, root)) is not None]
    return not any(t.untyped_storage().data_ptr() == storage for module in called for t in module.buffers())


def _bytes(node: fx.Node) -> int:
    tensor = info(node)
    return 0 if tensor is None else tensor.numel * tensor.dtype.itemsize


def _size_of(root: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in root.parameters())


def _too_large(node: fx.Node, added: int, root: nn.Module) -> Refusal:
    return Refusal(
        "constants",
        place(node),
        kind(node, root),
        f"it depends on parameters only, but its value would add {added / 2**20:.1f} MiB to the model",
        "give ConstantFolding a larger limit if the file may grow",
    )
