"""What is computed twice is computed once: `f(x), f(x)  ->  y = f(x); y, y`.

Two nodes are the same if they call the same operation with the same arguments, literals of the same type included
(`x * 1` and `x * 1.0` differ). Preconditions: the operation is one of torch's own, draws no random numbers and writes
nothing; a layer is torch's own, in eval mode and without hooks; nothing that it reads or makes is written to under
another name; and the model does not return both, for the caller would get one tensor twice.

One layer called twice may be two in the end, each merged with what follows it. So affine operations with affine readers
are left alone until the collapse is done (`affine=False`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from reparam.checks import CHECKS
from reparam.graph.constants import Constants, computes_the_same
from reparam.graph.lift import LiftTable
from reparam.graph.lifted import LiftedGraph
from reparam.graph.nodes import described, escapes, info, module_of, pinned, place
from reparam.graph.normal import eliminate_dead_code, mutated
from reparam.graph.table import TABLE
from reparam.passes.base import Refusal, Rewrite
from reparam.passes.ledger import allowed

_UNDEFINED = ("empty", "rand", "bernoulli", "multinomial", "normal_", "poisson", "dropout", "rrelu")
_PURE = ("torch", "_operator", "builtins", "math")


@dataclass(frozen=True)
class Repeats:
    """The pass.

    Attributes:
        table: what is affine.
        affine: whether affine operations whose readers are affine may become one, too.
        only: names of the functions and methods that are looked at; None for all.
    """

    table: LiftTable = TABLE
    affine: bool = True
    only: frozenset[str] | None = None
    name = "repeats"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        rewrites: list[Rewrite] = []
        lifted: LiftedGraph | None = None
        first: dict[Hashable, fx.Node] = {}
        for node in list(graph.nodes):
            if self.only is not None and _name(node) not in self.only:
                continue
            key = _key(node, root)
            if key is None:
                continue
            earlier = first.setdefault(key, node)
            if earlier is node or (escapes(earlier) and escapes(node)):
                continue
            if not self.affine:
                lifted = lifted or LiftedGraph(graph, root, self.table, Constants(graph, root))
                if lifted.is_affine(node) and any(map(lifted.is_affine, (*earlier.users, *node.users))):
                    continue
            if info(node) is not None and node.op != "get_attr":
                what = described(node, root)
                identity = "f(x) and f(x) are one tensor"
                rewrite = Rewrite(self.name, place(node), (what,), f"the same in {place(earlier)}", identity)
                if not allowed(rewrite, node):
                    continue
                rewrites.append(rewrite)
            node.replace_all_uses_with(earlier)
        eliminate_dead_code(graph)
        return rewrites, []


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _key(node: fx.Node, root: nn.Module) -> Hashable:
    """Equal for nodes that compute the same; None for one that must stay."""
    if node.op in ("placeholder", "output") or node.target in CHECKS:
        return None
    if any(pinned(other) is not None for other in (node, *node.all_input_nodes)):
        return None
    if node.meta.get("draws") or node.meta.get("writes") or mutated(node, root) is not None:
        return None
    target: Any = node.target
    if node.op == "call_module":
        module = module_of(node, root)
        if not computes_the_same(module):
            return None
        target = id(module)
    elif isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)) and not _is_own(target):
        return None
    elif node.op != "get_attr":
        home = (
            "torch" if isinstance(target, str) else (getattr(target, "__module__", None) or "torch").partition(".")[0]
        )
        if home not in _PURE or any(word in _name(node) for word in _UNDEFINED) or node.is_impure():
            return None
    try:
        key = (node.op, target, _frozen(node.args), _frozen(node.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _is_own(operator: torch._ops.OpOverload | torch._ops.OpOverloadPacket) -> bool:
    """Whether an operator is torch's, and no user's, which may keep state."""
    return str(operator).partition(".")[0] in ("aten", "prims")


def _frozen(value: Any) -> Hashable:
    """A literal or a structure of literals and nodes as something that can be compared, types included.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return ("dict", *((_frozen(key), _frozen(item)) for key, item in sorted(value.items(), key=str)))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    if isinstance(value, float):
        return (float, math.copysign(1.0, value), str(value))
    known = (fx.Node, str, bytes, int, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout)
    if isinstance(value, (*known, torch.memory_format)):
        return (type(value), value)
    raise TypeError(type(value))


__all__ = ["Repeats"]
