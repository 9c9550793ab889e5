"""Why two things that stand beside each other were not merged, found by merging them.

The merge is either not exact, or no layer of `torch.nn`; or one of the tensors that would go is read elsewhere; or the
merged layer is dearer, which is then said in numbers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx, nn

from reparam import algebra
from reparam.algebra import Geometry, Inexact
from reparam.graph.nodes import kind, place
from reparam.passes.base import Cost
from reparam.passes.cost import OBJECTIVES, CostModel
from reparam.passes.form import Term, same_chain
from reparam.passes.placing import Placement, placement, priced
from reparam.passes.region import Blocked
from reparam.passes.standing import Standing

_DEARER = 1.05
"""Shares below are not worth a sentence."""


def substituting(standing: Standing, bottom: fx.Node, going: Collection[fx.Node], into: str) -> Inexact:
    """Why the real tensors `going` were not substituted into `bottom`; `into` is what they would be merged into."""
    region = standing.region
    fewer = standing.real - set(going)
    cone = region.cone(bottom, fewer)
    form = region.form(cone)
    if isinstance(form, Blocked):
        return _said_of(form.user, form.why, standing.root)
    cost = priced(form, bottom, standing.cost)
    if isinstance(cost, Inexact):
        return cost
    for node in sorted(going, key=region.order.__getitem__):
        others = [reader for reader in standing.readers(node) if reader not in cone]
        if others:
            return read_elsewhere(node, others, standing)
        if standing.sizes_are_read(node):
            name = named(standing.main(node), standing.root)
            return Inexact(f"the sizes of the output of {name} are read", "read the sizes of another tensor")
    if not any(map(standing.is_layer, cone)):
        for (node, user), why in standing.search.blocked.items():
            if user in cone and node in going:
                return why
    parts = [node for node in cone if node in standing.real]
    now = sum((standing.native(node) for node in parts), Cost())
    layers = sum(standing.sort(node) == "layer" for node in parts)
    words = _layers_in_words([term for term in form.terms if not term.map.is_identity], standing.cost)
    return _priced(f"merging it into {into}", now, cost, words, layers, standing.cost)


def adding(standing: Standing, first: Term, second: Term, other: str) -> Inexact:
    """Why two terms of one sum that read the same tensor were not merged; `other` is the name of the first."""
    if not (same_chain(first.before, second.before) and same_chain(first.after, second.after)):
        steps = (*first.before, *first.after, *second.before, *second.after)
        names = " and ".join(dict.fromkeys(kind(step.node, standing.root) for step in steps))
        return Inexact(
            f"it is added to {other}, but the two read one tensor through different operations ({names})",
            "let both branches read the same tensor",
        )
    if first.axis != second.axis:
        return Inexact(
            f"it and {other}, to which it is added, have their channels in different axes",
            "give both layers one channel axis",
        )
    if len({first.map.geometry.rank, second.map.geometry.rank} - {0}) > 1:
        return Inexact(f"it and {other}, to which it is added, have different numbers of spatial axes")
    both = algebra.plus(first.map, second.map)
    if isinstance(both, Inexact):
        return both
    apart, one = (
        [placement(term, standing.cost) for term in (first, second)],
        placement(replace(first, map=both, otherwise=None), standing.cost),
    )
    if isinstance(one, Inexact):
        return one
    now = sum((found.cost for found in apart if isinstance(found, Placement)), Cost())
    now += standing.cost.of_sum(one.like.numel, one.like.dtype.itemsize)
    words = _layers_in_words([one.term], standing.cost)
    return _priced(f"merging it with {other}", now, one.cost, words, 2, standing.cost)


def bordering(standing: Standing, borders: Collection[fx.Node], into: str) -> Inexact:
    """Operations that no layer is known to commute with stand in between."""
    names = listed([named(node, standing.root) for node in borders])
    stand = "stands" if len(set(borders)) == 1 else "stand"
    return Inexact(
        f"{names} {stand} between it and {into}, and may mix channels with positions or with the batch",
        f"put it right beside {into}",
    )


def named(node: fx.Node, root: nn.Module) -> str:
    """What a sentence calls a node: a module by its name, a function by its place."""
    if node.op in ("placeholder", "output"):
        return kind(node, root)
    where = place(node)
    if node.op == "call_module":
        return where.module
    if node.meta.get("module_path"):
        return f"{kind(node, root)} in {where}"
    return f"{kind(node, root)} ({where.source})" if where.source else kind(node, root)


def listed(names: Collection[str], most: int = 3) -> str:
    """`a`, `a and b`, `a, b and 4 more`."""
    unique = list(dict.fromkeys(names))
    if len(unique) > most:
        unique = [*unique[: most - 1], f"{len(unique) - most + 1} more"]
    return unique[0] if len(unique) == 1 else f"{', '.join(unique[:-1])} and {unique[-1]}"


def _said_of(user: fx.Node, why: Inexact, root: nn.Module) -> Inexact:
    """A reason that speaks of the operation that reads, with its name in place of "it"."""
    for verb in ("it reads", "it adds"):
        if why.reason.startswith(verb):
            return replace(why, reason=named(user, root) + why.reason.removeprefix("it"))
    return why


def read_elsewhere(node: fx.Node, others: Collection[fx.Node], standing: Standing) -> Inexact:
    name = named(node if standing.joins(node) else standing.main(node), standing.root)
    readers = listed([named(reader, standing.root) for reader in others])
    return Inexact(f"the output of {name} also feeds {readers}, so merging would take a layer of its own for each")


def _layers_in_words(terms: Collection[Term], model: CostModel) -> str:
    """`one dense 5x5 layer`, `one 1x1 layer`, `3 layers`."""
    if len(terms) != 1:
        return f"{len(terms)} layers"
    (term,) = terms
    found = placement(term, model)
    geometry: Geometry = (found.term if isinstance(found, Placement) else term).map.geometry
    groups = "dense " if geometry.groups == 1 else ""
    if geometry.rank == 1:
        return f"one {groups}layer with a kernel of {geometry.kernel[0]}"
    return f"one {groups}{'x'.join(map(str, geometry.kernel))} layer".replace("  ", " ")


def _priced(what: str, now: Cost, merged: Cost, words: str, layers: int, model: CostModel) -> Inexact:
    """That a merge is exact and dearer, in the units that it is dearest in."""
    of = "of the two" if layers == 2 else "of what stands there now"
    several = not words.startswith("one ")
    says = "compute" if several else "computes"
    if merged.macs > _DEARER * max(now.macs, 1):
        told = f"{says} {_times(merged.macs, now.macs)} the multiply-adds {of}"
    elif merged.seconds > _DEARER * now.seconds:
        slow = merged.seconds / now.seconds
        told = f"{'are' if several else 'is'} priced {_factor(slow)} times as slow, for the example's sizes"
    elif merged.parameters > _DEARER * max(now.parameters, 1):
        told = f"{'hold' if several else 'holds'} {_times(merged.parameters, now.parameters)} the weights {of}"
    elif _chosen(merged, now, model):
        return Inexact(f"{what} is exact and cheaper, but the search did not find it", "report it, as this is a gap")
    else:
        return Inexact(f"{what} is exact, but would not be cheaper", _other_objective(now, merged, model))
    return Inexact(f"{what} is exact, but {words} {told}", _other_objective(now, merged, model))


def _other_objective(now: Cost, merged: Cost, model: CostModel) -> str:
    """The objective under which the merged form would be chosen, if there is one."""
    for objective in OBJECTIVES:
        if objective != model.objective and _chosen(merged, now, CostModel(model.machine, objective)):
            return f"choose the objective {objective}"
    return ""


def _chosen(merged: Cost, now: Cost, model: CostModel) -> bool:
    return model.key(merged) < model.key(now) and model.no_slower(merged, now) and model.is_lean(merged, now)


def _times(a: int, b: int) -> str:
    return f"{_factor(a / b)} times" if b else f"{a}"


def _factor(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.2f}" if ratio < 1.1 else f"{ratio:.1f}"
