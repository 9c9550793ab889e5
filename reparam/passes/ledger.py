"""Which rewrites are made: all of them, but for those that were found at fault, or only the first few of them.

The passes ask before each rewrite. So any rewrite can be undone without knowing how it works: the model is fused again
without it. And the first `n` rewrites of a run can be made alone, which is what a bisection needs: passes are
deterministic, and what the later ones propose depends on the graph so far and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import fx

from reparam.passes.base import Rewrite

Key: TypeAlias = "tuple[str, str, str | None, tuple[str, ...]]"


def key_of(rewrite: Rewrite) -> Key:
    """What tells a rewrite from the others of a run: the pass, the place, and what it replaces."""
    return (rewrite.pass_name, rewrite.place.module, rewrite.place.source, rewrite.replaced)


@dataclass
class Ledger:
    """The rewrites of one run.

    Attributes:
        undone: rewrites that are not made.
        most: how many are made; None for all.
        made: those that were.
        replaced: for each of them, by `id`, the names of the nodes that it replaced, and of those they stood for.
    """

    undone: frozenset[Key] = frozenset()
    most: int | None = None
    made: list[Rewrite] = field(default_factory=list)
    replaced: dict[int, tuple[str, ...]] = field(default_factory=dict)

    def allows(self, rewrite: Rewrite, *nodes: fx.Node) -> bool:
        """Whether a rewrite, which replaces `nodes`, may be made; if so, it is entered."""
        if key_of(rewrite) in self.undone or (self.most is not None and len(self.made) >= self.most):
            return False
        self.made.append(rewrite)
        names = (name for node in nodes for name in (node.name, node.meta.get("stands_for")) if name is not None)
        self.replaced[id(rewrite)] = tuple(dict.fromkeys(names))
        return True


_LEDGER: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def kept_in(ledger: Ledger) -> Iterator[Ledger]:
    """Within it, the passes ask `ledger`."""
    token = _LEDGER.set(ledger)
    try:
        yield ledger
    finally:
        _LEDGER.reset(token)


def allowed(rewrite: Rewrite, *nodes: fx.Node) -> bool:
    """Whether a pass may make a rewrite, which replaces `nodes`; it must ask right before it does."""
    ledger = _LEDGER.get()
    return ledger is None or ledger.allows(rewrite, *nodes)


def replaced_by(rewrite: Rewrite) -> tuple[str, ...]:
    """Names of the nodes that a rewrite replaced, and of those that they stood for; empty if no ledger is kept."""
    ledger = _LEDGER.get()
    return () if ledger is None else ledger.replaced.get(id(rewrite), ())
