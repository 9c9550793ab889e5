"""Qualified names for the layers that replace others."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection

from torch import fx, nn

from reparam.graph.lift import Carried, Lifted
from reparam.graph.nodes import info, module_of
from reparam.passes.region import Region
from reparam.passes.search import Search


def going(region: Region, search: Search, plans: Collection[fx.Node]) -> set[fx.Node]:
    """Every node that the rewrites replace, and nothing else needs."""
    found = {other for node in plans for other in search.cone(node)}
    staying = {other for node in search.real if node not in plans for other in search.cone(node)}
    # A step of a chain is called again, for another input.
    steps = {
        node
        for node, affine in region.affine.items()
        if isinstance(affine.lift, Carried) or (isinstance(affine.lift, Lifted) and affine.lift.carried is not None)
    }
    return found - staying - steps


class Names:
    """Qualified names for new layers: that of the largest layer they replace, unless something else still uses it."""

    def __init__(self, graph: fx.Graph, going: set[fx.Node]) -> None:
        self._used: Counter[str] = Counter()
        for node in graph.nodes:
            if node.op not in ("call_module", "get_attr"):
                continue
            gone = node in going or (node.op == "get_attr" and all(user in going for user in node.users))
            if gone and node.op == "get_attr":
                continue
            # Until all new layers stand, those that go are looked at: the modules that hold them stay where they are.
            self._used.update(_path(str(node.target))[: -1 if gone else None])
        self._made: set[str] = set()

    def for_cone(self, cone: list[fx.Node], root: nn.Module, count: int) -> list[str]:
        """`count` names, marked as used."""
        wanted = sorted((self._candidate(node, root) for node in cone), key=lambda c: (-c[0], c[1]))
        names: list[str] = []
        for _ in range(count):
            stem = next((name for _, name in wanted if name), cone[-1].name)
            numbered = (f"{stem}_fused{index or ''}" for index in itertools.count())
            known = (name for _, name in wanted if name)
            base = next(name for name in itertools.chain(known, numbered) if self._is_free(name))
            # No new layer may stand inside of another one, or in the place of the module that holds it.
            self._used.update(_path(base))
            self._made.add(base)
            names.append(base)
        return names

    def _is_free(self, name: str) -> bool:
        return not self._used[name] and self._made.isdisjoint(_path(name))

    @staticmethod
    def _candidate(node: fx.Node, root: nn.Module) -> tuple[int, str]:
        module = module_of(node, root)
        if module is not None:
            return sum(p.numel() for p in module.parameters(recurse=False)), str(node.target)
        sizes = [(t.numel, o) for o in node.all_input_nodes if o.op == "get_attr" and (t := info(o)) is not None]
        if not sizes:
            return 0, ""
        size, weight = max(sizes, key=lambda pair: pair[0])
        return size, str(weight.target).rpartition(".")[0]


def _path(name: str) -> list[str]:
    """A qualified name, after the names of all modules that it is in."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
