"""Which rewrites are made: all of them, but for those that were found at fault, or only the first few of them.

The passes ask before each rewrite. So any rewrite can be undone without knowing how it works: the model is fused again
without it. And the first `n` rewrites of a run can be made alone, which is what a bisection needs: passes are
deterministic, and what the later ones propose depends on the graph so far and nothing else. And it is known which
rewrite a change of the graph belongs to, which is what checking each of them by itself needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import fx, nn

from reparam.inputs import Inputs
from reparam.passes.base import Rewrite
from reparam.passes.watch import Fault, Judge, Watch

Key: TypeAlias = "tuple[str, str, str | None, tuple[str, ...]]"


def key_of(rewrite: Rewrite) -> Key:
    """What tells a rewrite from the others of a run: the pass, the place, and what it replaces.

    Two calls of one layer from one line have one key, and so have the repetitions of a rewrite in several rounds: what
    is undone there is undone everywhere.
    """
    return (rewrite.pass_name, rewrite.place.module, rewrite.place.source, rewrite.replaced)


@dataclass
class Ledger:
    """The rewrites of one run.

    Attributes:
        undone: rewrites that are not made.
        most: how many are made; None for all.
        judge: tells whether two values are one; None if rewrites are not checked where they stand.
        one_by_one: whether they are so after each rewrite, which tells which one is at fault, and costs more than once
            when all are made.
        made: those that were made, with places as seen from the whole model.
        replaced: for each of them, by `id`, the names of the nodes that it replaced, and of those they stood for.
        faults: what checking them where they stand found.
        unchecked: why some could not be checked so: sentences.
        path: qualified name of the part that is being fused; empty for the whole model.
        whole, work: what computing the graphs once costs, and what all the checks did.
    """

    undone: frozenset[Key] = frozenset()
    most: int | None = None
    judge: Judge | None = None
    one_by_one: bool = False
    made: list[Rewrite] = field(default_factory=list)
    replaced: dict[int, tuple[str, ...]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    whole: float = 0.0
    work: float = 0.0
    path: str = ""
    _full: bool = False
    _held: list[Rewrite] = field(default_factory=list)
    _last: Rewrite | None = None
    _watch: Watch | None = None

    @property
    def passes(self) -> float:
        """What checking the rewrites where they stand cost, in float64 passes of what was fused."""
        return self.work / self.whole if self.whole else 0.0

    def allows(self, rewrite: Rewrite, *nodes: fx.Node) -> bool:
        """Whether a rewrite, which replaces `nodes`, may be made; if so, it is entered."""
        return self.allows_all([(rewrite, nodes)])

    def allows_all(self, rewrites: Sequence[tuple[Rewrite, tuple[fx.Node, ...]]]) -> bool:
        """Whether rewrites that hang together may be made, each with the nodes that it replaces; if so, all enter."""
        self.settle()
        placed = [replace(one, place=one.place.under(self.path)) if self.path else one for one, _ in rewrites]
        if any(key_of(rewrite) in self.undone for rewrite in placed):
            return False
        # From the first one that is too many on, none is made, or it would not be the first few.
        self._full = self._full or (self.most is not None and len(self.made) + len(placed) > self.most)
        if self._full:
            return False
        self.made += placed
        self._last = placed[-1] if placed else None
        for rewrite, nodes in rewrites:
            names = (name for node in nodes for name in (node.name, node.meta.get("stands_for")) if name is not None)
            self.replaced[id(rewrite)] = tuple(dict.fromkeys(names))
            self._held.append(rewrite)  # its id is its own as long as it lives
        return True

    def settle(self) -> None:
        """Checks the last rewrite, which has been made by now."""
        if self._watch is not None and self.one_by_one:
            self._watch.settle(self._last)
        self._last = None

    def next_pass(self) -> None:
        """Called between two passes."""
        self.settle()
        if self._watch is not None and self.one_by_one:
            self._watch.forget()

    @contextmanager
    def watching(self, graph: fx.Graph, root: nn.Module, inputs: Inputs) -> Iterator[None]:
        """Within it, the rewrites of a graph are checked where they stand, if there is a judge."""
        if self.judge is None:
            yield
            return
        watch = self._watch = Watch(self.judge)
        watch.begin(graph, root, inputs)
        try:
            yield
            watch.settle(self._last if self.one_by_one else None)
        finally:
            self._watch = None
            watch.end()
            self.faults += watch.faults
            self.whole += watch.whole
            self.work += watch.work
            if watch.off:
                self.unchecked.append(f"{self.path or 'the model'}: {watch.off}")

    @contextmanager
    def within(self, path: str) -> Iterator[None]:
        """Within it, places are those inside of the module of that qualified name."""
        before, self.path = self.path, path
        try:
            yield
        finally:
            self.path = before


_LEDGER: ContextVar[Ledger | None] = ContextVar("ledger", default=None)


@contextmanager
def kept_in(ledger: Ledger) -> Iterator[Ledger]:
    """Within it, the passes ask `ledger`."""
    token = _LEDGER.set(ledger)
    try:
        yield ledger
    finally:
        _LEDGER.reset(token)


def current() -> Ledger:
    """The ledger that the passes ask; one that allows everything, where there is none."""
    return _LEDGER.get() or Ledger()


def allowed(rewrite: Rewrite, *nodes: fx.Node) -> bool:
    """Whether a pass may make a rewrite, which replaces `nodes`; it must ask right before it does."""
    ledger = _LEDGER.get()
    return ledger is None or ledger.allows(rewrite, *nodes)


def all_allowed(rewrites: Sequence[tuple[Rewrite, tuple[fx.Node, ...]]]) -> bool:
    """Whether a pass may make rewrites that hang together, each with the nodes that it replaces."""
    ledger = _LEDGER.get()
    return ledger is None or ledger.allows_all(rewrites)


def replaced_by(rewrite: Rewrite) -> tuple[str, ...]:
    """Names of the nodes that a rewrite replaced, and of those that they stood for; empty if no ledger is kept."""
    ledger = _LEDGER.get()
    return () if ledger is None else ledger.replaced.get(id(rewrite), ())
