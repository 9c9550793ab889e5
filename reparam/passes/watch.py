"""Each rewrite is checked where it stands: do the tensors that are left have the values that they had?

The float64 value of every node is kept while the graph is rewritten. Then only what changed is computed anew: from the
first new nodes on, up to where the values are again those from before. What is right ends there, at the tensors that
were left alone. If the model's result is another one, something is at fault. Asked after each rewrite, that tells
which: what a wrong one made of the result is what later ones are held against, so that each is judged by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import fx, nn

from reparam.graph.evaluate import Evaluator, cost_of, filled
from reparam.graph.nodes import described, info
from reparam.graph.normal import mutated
from reparam.inputs import Inputs
from reparam.passes.base import Rewrite

MOST_BYTES = 1 << 30
"""Bytes that the values of a graph may have for it to be watched."""
MOST_PASSES = 24.0
"""Computations of the whole after which a graph with faults is no longer followed: each fault costs up to one."""
_FURTHEST = 64  # nodes back from a tensor, in which its rounding is looked for
_DISTURBED = 2.0**-30
_ROUNDINGS = 8.0  # a kernel's own sums round more than once


class Difference(Protocol):
    """How a value differs from what it was."""

    @property
    def error(self) -> float: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def worst_index(self) -> tuple[int, ...]: ...
    @property
    def worst_location(self) -> str: ...
    @property
    def what(self) -> str: ...


Judge = Callable[[Any, Any, Callable[[], "torch.Tensor | None"]], "Difference | None"]
"""Tells how a value differs from what it was; the function says what float64 rounding does to that."""


@dataclass(frozen=True)
class Fault:
    """Something after which the model returns something else.

    Attributes:
        rewrite: the rewrite; None where it is not known which one it is.
        tensor: what its first wrong tensor stands for; without a difference, what happens instead.
        difference: how that differs; None if the graph cannot be computed any more, or builds its result otherwise.
    """

    rewrite: Rewrite | None
    tensor: str
    difference: Difference | None


@dataclass
class _Known:
    """A node as it was seen last; `holder` is what holds its module, under the name that follows."""

    target: Any
    args: Any
    kwargs: Any
    module: nn.Module | None
    value: Any
    holder: tuple[dict[str, nn.Module | None], str] | None = None

    def is_still(self, node: fx.Node) -> bool:
        """Whether the node is what it was; asked of every node after every rewrite, so it must be quick."""
        if self.args is not node._args or self.kwargs is not node._kwargs or self.target is not node.target:
            return False
        return self.holder is None or self.holder[0].get(self.holder[1]) is self.module


@dataclass
class Watch:
    """Follows one graph.

    Attributes:
        judge: tells whether two values are one.
        faults: what was found.
        off: why it is not, or no longer, followed; empty if it is.
        whole: the cost of computing the graph once, as it was captured.
        work: the cost of all that was computed.
    """

    judge: Judge
    faults: list[Fault] = field(default_factory=list)
    off: str = ""
    whole: float = 0.0
    work: float = 0.0

    def begin(self, graph: fx.Graph, root: nn.Module, inputs: Inputs) -> None:
        """Computes a graph as it was captured."""
        self._graph, self._root = graph, root
        self._known: dict[fx.Node, _Known] = {}
        bytes_ = sum(
            8 * tensor.numel for node in graph.nodes if (tensor := info(node)) and not node.meta.get("aliases")
        )
        if bytes_ > MOST_BYTES:
            self.off = f"its tensors would take {bytes_ / 2**30:.1f} GiB in float64"
        elif any(_writes(node, root) for node in graph.nodes):
            self.off = "it has in-place operations that must stay"
        if not self.off:
            self._guarded(lambda: self._start(inputs))
            self.whole += self.work

    def settle(self, rewrite: Rewrite | None) -> None:
        """Looks at what has changed, and was changed by `rewrite`."""
        if self.off:
            return
        found = self._guarded(lambda: self._settle(rewrite))
        if found is not None:
            # It could be computed before.
            self.faults.append(Fault(rewrite, found, None))
        if self.faults and self.work > MOST_PASSES * self.whole:
            self.off = f"{len(self.faults)} rewrites were found at fault, and there may be more"

    def forget(self) -> None:
        """Drops the values of nodes that are gone."""
        if not self.off:
            left = set(self._graph.nodes)
            self._known = {node: known for node, known in self._known.items() if node in left}

    def end(self) -> None:
        """Drops everything but what was found."""
        self._known = {}
        self.__dict__.pop("_evaluate", None)

    def _guarded(self, function: Callable[[], None]) -> str | None:
        """Any operation may fail in float64, and then nothing more can be told: the reason."""
        try:
            function()
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            why = f"{type(error).__name__}: {line:.120}"
            self.off = f"it does not run in float64 node by node ({why})"
            self._known = {}
            return why
        return None

    def _start(self, inputs: Inputs) -> None:
        self._evaluate = Evaluator(self._graph, self._root, inputs)
        with self._evaluate.wide():
            for node in self._graph.nodes:
                self._note(node)

    def _note(self, node: fx.Node) -> None:
        module = self._evaluate.module(node)
        value = None if node.op == "output" else self._computed(node, module, node.args, node.kwargs, self._value)
        self._known[node] = _Known(node.target, node._args, node._kwargs, module, value, self._holder(node))

    def _holder(self, node: fx.Node) -> tuple[dict[str, nn.Module | None], str] | None:
        if node.op != "call_module":
            return None
        path, _, name = str(node.target).rpartition(".")
        return self._root.get_submodule(path)._modules, name

    def _value(self, node: fx.Node) -> Any:
        return self._known[node].value

    def _computed(self, node: fx.Node, module: Any, args: Any, kwargs: Any, value: Callable[[fx.Node], Any]) -> Any:
        self.work += cost_of(node, module)
        given = () if node.op in ("placeholder", "get_attr") else args
        return self._evaluate(node, module, filled(given, _Lookup(value)), filled(kwargs, _Lookup(value)))

    def _settle(self, rewrite: Rewrite | None) -> None:
        change = _Change(self)
        with self._evaluate.wide():
            for node in _live(self._graph):
                known = self._known.get(node)
                if known is None:
                    self._note(node)
                    change.fresh.add(node)
                    continue
                if known.is_still(node) and not (change.before and _reads(node, change.before)):
                    continue
                module = self._evaluate.module(node)
                alike = known.target == node.target and known.module is module and change.alike(known, node)
                change.was.setdefault(node, replace(known))
                known.target, known.args, known.kwargs = node.target, node._args, node._kwargs
                known.module, known.holder = module, self._holder(node)
                if alike:
                    continue
                if node.op == "output":
                    self.faults.append(change.fault(rewrite))
                    continue
                value = self._computed(node, module, node.args, node.kwargs, self._value)
                if change.differs(node, known.value, node, value):
                    change.before[node], known.value = known.value, value


class _Lookup(dict[fx.Node, Any]):
    """Looks values up by a function."""

    def __init__(self, value: Callable[[fx.Node], Any]) -> None:
        super().__init__()
        self._value = value

    def __missing__(self, node: fx.Node) -> Any:
        return self._value(node)


@dataclass
class _Change:
    """What one rewrite did.

    Attributes:
        fresh: nodes that are new.
        before: of nodes that have another value now, the one they had.
        was: of nodes that were written otherwise, how.
        seen: pairs of nodes that were held against each other: the first one's old value and the other one's new one.
    """

    watch: Watch
    fresh: set[fx.Node] = field(default_factory=set)
    before: dict[fx.Node, Any] = field(default_factory=dict)
    was: dict[fx.Node, _Known] = field(default_factory=dict)
    seen: dict[tuple[fx.Node, fx.Node], Difference | None] = field(default_factory=dict)

    def old(self, node: fx.Node) -> Any:
        """The value that a node had."""
        return self.before[node] if node in self.before else self.watch._known[node].value

    def alike(self, known: _Known, node: fx.Node) -> bool:
        """Whether what a node reads now has the values of what it read."""
        return self._same(known.args, node.args) and self._same(known.kwargs, node.kwargs)

    def _same(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return not self.differs(a, self.old(a), b, self.watch._value(b))
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            ours = self.old(a) if isinstance(a, fx.Node) else a
            theirs = self.watch._value(b) if isinstance(b, fx.Node) else b
            return self.watch.judge(ours, theirs, lambda: None) is None
        if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
            return len(a) == len(b) and all(map(self._same, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(self._same(a[key], b[key]) for key in a)
        if isinstance(a, slice) and isinstance(b, slice):
            return all(map(self._same, (a.start, a.stop, a.step), (b.start, b.stop, b.step)))
        return type(a) is type(b) and bool(a == b)

    def differs(self, a: fx.Node, before: Any, b: fx.Node, after: Any) -> bool:
        """Whether a value, the new one of `b`, is another one than the old one of `a`."""
        if a is b and a not in self.before and before is after:
            return False
        if (a, b) not in self.seen:
            noise = (lambda: None) if a is b else (lambda: self._rounding(a, b))
            self.seen[a, b] = self.watch.judge(before, after, noise)
        return self.seen[a, b] is not None

    def fault(self, rewrite: Rewrite | None) -> Fault:
        """What is wrong first: where something new stands for something that was, if there is such a place."""
        wrong = [(a, b, found) for (a, b), found in self.seen.items() if found is not None]
        if not wrong:
            return Fault(rewrite, "the model's result is built otherwise", None)
        node, _, found = next((one for one in wrong if one[1] in self.fresh), wrong[0])
        return Fault(rewrite, described(node, self.watch._root), found)

    def _rounding(self, node: fx.Node, stand_in: fx.Node) -> torch.Tensor | None:
        """What rounding does to the old value of `node`: every value behind what both read is disturbed a little."""
        ends = self._ends(stand_in)
        order: list[fx.Node] = []
        self._old_cone(node, ends, order)
        generator = torch.Generator().manual_seed(0)
        values: dict[fx.Node, Any] = {}

        def value(other: fx.Node) -> Any:
            if other not in values:
                values[other] = _disturbed(self.old(other), generator)
            return values[other]

        for other in order:
            known = self.was.get(other) or self.watch._known[other]
            made = self.watch._computed(other, known.module, known.args, known.kwargs, value)
            values[other] = _disturbed(made, generator)
        before, after = self.old(node), value(node)
        if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.shape != after.shape:
            return None
        return (after - before) * (_ROUNDINGS * torch.finfo(torch.float64).eps / _DISTURBED)

    def _ends(self, node: fx.Node) -> set[fx.Node]:
        """What a new node is computed from that is not new."""
        found, pending, seen = set[fx.Node](), [node], {node}
        while pending:
            one = pending.pop()
            if one not in self.fresh:
                found.add(one)
                continue
            new = [other for other in one.all_input_nodes if other not in seen]
            seen.update(new)
            pending += new
        return found

    def _old_cone(self, node: fx.Node, ends: set[fx.Node], order: list[fx.Node]) -> None:
        """What a node was computed from, in order, up to `ends`, inputs and constants, and not too far."""
        pending, done = [(node, False)], set[fx.Node]()
        while pending:
            one, ready = pending.pop()
            if ready:
                order.append(one)
                continue
            if one in done or one.op in ("placeholder", "get_attr") or (one in ends and one is not node):
                continue
            if len(done) >= _FURTHEST:
                continue
            done.add(one)
            known = self.was.get(one) or self.watch._known[one]
            pending.append((one, True))
            read: list[fx.Node] = []
            fx.node.map_arg((known.args, known.kwargs), read.append)
            pending += [(other, False) for other in read]


def _writes(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node changes a tensor that others may read."""
    if node.meta.get("writes") and node.meta.get("in_place") is None:
        return True
    return mutated(node, root) is not None


def _disturbed(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    draws = torch.rand(value.shape, generator=generator, dtype=torch.float64, device="cpu").mul_(2).sub_(1)
    return value * (1.0 + _DISTURBED * draws.to(value.device))


def _reads(node: fx.Node, changed: dict[fx.Node, Any]) -> bool:
    return any(other in changed for other in node._input_nodes)


def _live(graph: fx.Graph) -> list[fx.Node]:
    """What the result is computed from, in order; replaced nodes stand in the graph until it is cleaned up."""
    live: set[fx.Node] = set(graph.find_nodes(op="output"))
    for node in reversed(graph.nodes):
        if node in live:
            live.update(node._input_nodes)
    return [node for node in graph.nodes if node in live]
