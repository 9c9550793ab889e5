"""What the search compared and why one candidate won: a `Choice` for each region and for each shared tensor.

A region is what is computed between real tensors. Its candidates are those of `Search`: as it is, merged into one, and
cut; of a cut that won, each part that was merged has a choice of its own. A tensor read by several regions has another
one: computed once, or merged into each of its readers. The reasons repeat the rules of the search in words: none slower
than the original, under latency none that computes a tenth more than the leanest, the best of the rest.

Regions are solved once more when the search is over, so that what is told is what was finally decided; rejected
attempts cost time and are told of shared tensors only. Regions of views alone are left out. Where scales move is not a
comparison of costs, and not explained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from reparam.algebra import Inexact
from reparam.graph.emit import layer_name
from reparam.graph.lift import Concatenated, Sliced
from reparam.graph.nodes import info, kind, place
from reparam.passes.base import Candidate, Choice, Cost
from reparam.passes.cost import CostModel
from reparam.passes.form import Form, Term
from reparam.passes.machines import MACHINES
from reparam.passes.placing import placement
from reparam.passes.region import Blocked, Region
from reparam.passes.search import Search, Solution

_SHOWN = 4


@dataclass(frozen=True)
class Decision:
    """The options for one node between the real nodes given, the original first.

    Attributes:
        node, real: the node, and the real nodes around it.
        form: what it is when merged, or what forbids that; None if that was not looked at.
        options, chosen: what was compared, and the best of it.
        certain: whether no other option can be better, so that no more were looked at.
    """

    node: fx.Node
    real: frozenset[fx.Node]
    form: Form | Blocked | None
    options: tuple[Solution, ...]
    chosen: Solution
    certain: bool


@dataclass(frozen=True)
class Sharing:
    """An attempt to do without a shared node.

    Attributes:
        node, readers: the node, and the ends of the regions that read it.
        old, new: cost of all of these regions with and without it; None if one of them needs it.
        merged: whether it was done.
        needed_by: the end of a region that is better, or only exact, with it.
    """

    node: fx.Node
    readers: tuple[fx.Node, ...]
    old: Cost
    new: Cost | None
    merged: bool
    needed_by: fx.Node | None


@dataclass
class Recorder:
    """What a `Search` is given to be explained."""

    decisions: dict[int, Decision] = field(default_factory=dict)
    sharings: list[Sharing] = field(default_factory=list)

    def decided(
        self,
        node: fx.Node,
        real: Iterable[fx.Node],
        form: Form | Blocked | None,
        options: Sequence[Solution],
        chosen: Solution,
        certain: bool,
    ) -> None:
        """Notes a comparison."""
        self.decisions[id(chosen)] = Decision(node, frozenset(real), form, tuple(options), chosen, certain)

    def tried(
        self,
        node: fx.Node,
        readers: tuple[fx.Node, ...],
        old: Cost,
        new: Cost | None,
        merged: bool,
        needed_by: fx.Node | None,
    ) -> None:
        """Notes an attempt to do without a shared node."""
        self.sharings.append(Sharing(node, readers, old, new, merged, needed_by))


@dataclass
class Choices:
    """The choices of one run of the passes, in which the collapse may run several times."""

    made: list[Choice] = field(default_factory=list)
    runs: int = 0

    def add(self, choices: Sequence[Choice]) -> None:
        """Adds those of one more collapse: those of a later one that confirm what is there say nothing new."""
        self.runs += 1
        known = {choice.place for choice in self.made}
        for choice in choices:
            if self.runs == 1:
                self.made.append(choice)
            elif choice.chosen or choice.place not in known:
                self.made.append(replace(choice, why=f"{choice.why} (collapse {self.runs}, after scales were moved)"))


def explained(
    search: Search, region: Region, root: nn.Module, model: CostModel, recorder: Recorder
) -> list[tuple[fx.Node | None, Choice]]:
    """The choices of a search that is over, and the node that each merges into one if it does.

    The graph must be as it was when it was searched.
    """
    blocked = dict(search.blocked)
    recorder.decisions.clear()
    found = list(_Explainer(search, region, root, model, recorder).choices())
    search.blocked = blocked
    return found


def not_written(choice: Choice, why: Inexact) -> Choice:
    """A choice whose layers could not be written, so that the original stays."""
    best = choice.candidates[choice.chosen]
    refused = replace(best, excluded=f"the best by its price, but not written: {why.reason}")
    candidates = tuple(refused if candidate is best else candidate for candidate in choice.candidates)
    return replace(choice, candidates=candidates, chosen=0, why="it stays, since the best could not be written")


class _Explainer:
    def __init__(self, search: Search, region: Region, root: nn.Module, model: CostModel, recorder: Recorder) -> None:
        self._search = search
        self._region = region
        self._root = root
        self._model = model
        self._recorder = recorder
        self._machine = next((name for name, one in MACHINES.items() if one == model.machine), "a machine of your own")

    def choices(self) -> Iterator[tuple[fx.Node | None, Choice]]:
        found = {
            sharing.node: sharing
            for sharing in self._recorder.sharings
            # Merged, and real again because of what was decided later: the regions tell.
            if not (sharing.merged and sharing.node in self._search.real) and not self._search.is_view(sharing.node)
        }
        ends = self._search.ends
        for node in sorted({*ends, *found}, key=self._region.order.__getitem__):
            if node in found:
                yield None, self._shared(found[node])
            if node in ends:
                cone = self._region.cone(node, set(ends))
                if len(cone) > 1 and not all(map(self._search.is_view, cone)):
                    solution = self._search.solved(node)
                    yield from self._of_region(node, solution, self._search.real & set(cone))

    def _of_region(
        self, node: fx.Node, solution: Solution, real: set[fx.Node] | frozenset[fx.Node]
    ) -> Iterator[tuple[fx.Node | None, Choice]]:
        decision = self._recorder.decisions.get(id(solution))
        if decision is None:
            return
        if solution.real != real:
            yield (node if real == {node} else None), self._of_several(decision, real)
            return
        yield (node if real == {node} else None), self._of_one(decision)
        for part, inner in solution.parts:
            for other, choice in self._of_region(part, inner, inner.real):
                yield other, replace(choice, part=True)

    def _of_one(self, decision: Decision) -> Choice:
        original, chosen = decision.options[0], decision.chosen
        cone = self._region.cone(decision.node, set(decision.real))
        distinct = {original.real: original, chosen.real: chosen}
        for option in decision.options:
            distinct.setdefault(option.real, option)  # two cuts may end in the same layers
        options = [option for option in decision.options if distinct[option.real] is option]
        if chosen.real == original.real:
            options = [original if option is chosen else option for option in options]
        candidates = [
            replace(candidate, description=self._described(option, decision, cone))
            for candidate, option in zip(self._ruled([option.cost for option in options]), options, strict=True)
        ]
        index = next(i for i, option in enumerate(options) if option.real == chosen.real)
        if decision.form is None:
            why = f"a region of {len(cone)} operations is too large to be searched"
        elif decision.certain:
            why = "it costs no more than its largest operation alone, which nothing can beat"
        else:
            why = self._why(candidates, index)
        best = candidates[index]
        candidates = list(dict.fromkeys(candidates))  # cuts of parts that are alike
        index = candidates.index(best)
        if isinstance(decision.form, Blocked):
            candidates.append(Candidate("one layer", None, self._stays(decision.form)))
        return self._choice(decision.node, candidates, index, why)

    def _of_several(self, decision: Decision, real: set[fx.Node] | frozenset[fx.Node]) -> Choice:
        """A region whose real nodes were chosen together with those of others that share tensors with it."""
        first = self._of_one(decision)
        cone = frozenset(self._region.cone(decision.node, set(decision.real)))
        cost = self._search.total(set(real), set(self._search.real) - cone)
        layers = self._layers(frozenset(real), decision)
        candidates = [*first.candidates, Candidate(f"as its neighbours need it: {layers}", cost)]
        why = "chosen together with the other regions that read its tensors"
        return replace(first, candidates=tuple(candidates), chosen=len(candidates) - 1, why=why)

    def _shared(self, sharing: Sharing) -> Choice:
        readers = _listed([self._named(reader) for reader in sharing.readers])
        old = Candidate(f"computed once, for {readers}", sharing.old)
        new = Candidate("merged into each of its readers", sharing.new)
        if sharing.new is None:
            assert sharing.needed_by is not None
            candidates = [old, replace(new, excluded=self._needed(sharing.node, sharing.needed_by))]
        else:
            ruled = self._ruled([sharing.old, sharing.new], original_too=False)
            candidates = [old, replace(new, excluded=ruled[1].excluded)]
        index = int(sharing.merged)
        return self._choice(sharing.node, candidates, index, self._why(candidates, index))

    def _choice(self, node: fx.Node, candidates: Sequence[Candidate], chosen: int, why: str) -> Choice:
        return Choice(place(node), tuple(candidates), chosen, why, self._model.objective, self._machine)

    def _needed(self, node: fx.Node, end: fx.Node) -> str:
        for user in self._region.readers(node):
            why = self._search.blocked.get((node, user))
            if why is not None:
                return self._stays(Blocked(node, user, why))
        return f"{self._named(end)} is cheaper with it"

    def _stays(self, blocked: Blocked) -> str:
        return f"{self._named(blocked.node)} stays in front of {self._named(blocked.user)}: {blocked.why.reason}"

    def _ruled(self, costs: Sequence[Cost], original_too: bool = True) -> list[Candidate]:
        """Nameless candidates with these costs, the original first, and what rules some of them out."""
        model, original = self._model, costs[0]
        kept = [cost for cost in costs if model.no_slower(cost, original)]
        leanest = min(kept, key=lambda cost: cost.macs) if original_too else original
        found = []
        for cost in costs:
            excluded = ""
            if not model.no_slower(cost, original):
                excluded = f"slower: it takes an estimated {_beyond(cost.seconds, original.seconds)} the original"
            elif not model.is_lean(cost, leanest):
                excluded = f"computes {_beyond(cost.macs, leanest.macs)} the leanest"
            found.append(Candidate("", cost, excluded))
        return found

    def _why(self, candidates: Sequence[Candidate], chosen: int) -> str:
        """In which respect one candidate is the best of those that are not ruled out."""
        others = [one for index, one in enumerate(candidates) if index != chosen and not one.excluded]
        best = candidates[chosen].cost
        keys = [(self._model.key(one.cost), one) for one in others if one.cost is not None]
        if best is None or not keys:
            return "the only one that is not ruled out"
        key = self._model.key(best)
        (closest, rival) = min(keys, key=lambda pair: pair[0])
        words = {"latency": [], "macs": ["multiply-adds"], "parameters": ["weights"]}[self._model.objective]
        words = [*(f"fewest {word}" for word in words), "least estimated time"]
        respect = next((index for index, (a, b) in enumerate(zip(key, closest, strict=True)) if a != b), None)
        if respect is None:
            return f"as cheap as {rival.description.partition(':')[0]!r}, and nearer to the original"
        if respect:
            return f"{words[0]}, as another one, and the {words[1]} of the two"
        return words[0]

    def _described(self, option: Solution, decision: Decision, cone: list[fx.Node]) -> str:
        if option is decision.options[0] or option.real == decision.options[0].real:
            return f"as it is: {_counted(kind(node, self._root) for node in cone)}"
        layers = self._layers(option.real, decision)
        if not option.parts:
            assert isinstance(decision.form, Form)
            return f"{'one layer' if _is_one_layer(decision.form) else 'all merged'}: {layers}"
        cuts = {part for part, _ in option.parts[:-1]}
        return f"{self._cut(cuts, cone)}: {layers}"

    def _cut(self, cuts: set[fx.Node], cone: list[fx.Node]) -> str:
        inside = set(cone)
        for node in cone:
            affine = self._region.affine[node]
            if len(affine.operands) > 1 and inside & set(affine.operands) == cuts:
                joined = isinstance(affine.lift, Concatenated)
                return "separately merged parts, joined" if joined else "sum of separately merged branches"
        return f"cut behind {_listed(sorted(map(self._named, cuts)))}"

    def _layers(self, real: frozenset[fx.Node], decision: Decision) -> str:
        """What is computed when these nodes are real."""
        around = real | decision.real
        names = []
        for node in sorted(real, key=self._region.order.__getitem__):
            cone = self._region.cone(node, set(around))
            form = self._region.form(cone) if len(cone) > 1 else None
            names.append(self._sum(form) if isinstance(form, Form) else self._operation(node))
        shown = names if len(names) <= _SHOWN + 1 else [*names[:_SHOWN], f"{len(names) - _SHOWN} more"]
        return ", ".join(shown)

    def _operation(self, node: fx.Node) -> str:
        """An operation as it stands, with its sizes if it has weights."""
        affine, tensor = self._region.affine[node], info(node)
        if len(affine.maps) == 1 and affine.maps[0].has_weights and not affine.maps[0].geometry.is_diagonal and tensor:
            return layer_name(affine.maps[0].geometry, len(tensor.shape), affine.axis)
        return kind(node, self._root)

    def _sum(self, form: Form) -> str:
        whole = [self._term(term) for term in form.terms if term.rows is None]
        if form.windows:
            parts = [" + ".join(self._term(t) for t in form.terms if t.rows == window) for window in form.windows]
            whole.append(f"cat({', '.join(parts)})")
        return " + ".join(whole)

    def _term(self, term: Term) -> str:
        found = placement(term, self._model)
        if isinstance(found, Inexact):
            return "?"
        term = found.term
        chain = ["" if step.carried.free else kind(step.node, self._root) for step in (*term.before, *term.after)]
        layer = "" if term.map.is_identity else layer_name(term.map.geometry, len(found.like.shape), found.axis)
        chain.insert(found.at, layer)
        return " then ".join(name for name in chain if name) or "x"

    def _named(self, node: fx.Node) -> str:
        """`layer1.conv1` for a module; `add in layer1` for what its forward does itself."""
        if node.op == "call_module":
            return place(node).module
        what = "part" if isinstance(self._region.affine[node].lift, Sliced) else kind(node, self._root)
        module = place(node).module
        return what if module == node.name else f"{what} in {module}"


def _is_one_layer(form: Form) -> bool:
    steps = [step for term in form.terms for step in (*term.before, *term.after)]
    return len(form.terms) == 1 and all(step.carried.free for step in steps)


def _counted(kinds: Iterable[str]) -> str:
    """`2 Conv2d + BatchNorm2d`, in the order in which they come."""
    return " + ".join(f"{number} {name}" if number > 1 else name for name, number in Counter(kinds).items())


def _listed(names: Sequence[str]) -> str:
    shown = list(names) if len(names) <= _SHOWN else [*names[: _SHOWN - 1], f"{len(names) - _SHOWN + 1} more"]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def _beyond(value: float, base: float) -> str:
    """`12% more than`, or from twice on `2.5 times as much as`."""
    ratio = value / max(base, 1e-12)
    if ratio >= 1.95:
        return f"{ratio:.1f} times as much as" if base else "more than"
    return f"{ratio - 1:.0%} more than" if ratio >= 1.005 else "under 1% more than"
