"""Why something that looks foldable stayed: one `Refusal` for each.

What looks foldable is

    a BatchNorm                         always
    another constant scale or shift     with a layer or scale in front of it or behind it
    a layer                             whose output the next layer reads with nothing but plain operations in between
    a layer                             added to another branch of the tensor it reads
    an operation of the table           whose call is not affine, beside a layer or scale

Of two layers in a row the first has the refusal, of two branches the second. A layer between nonlinearities, a pooling
and a view have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx, nn

from reparam.algebra import Inexact
from reparam.graph.lifted import EMPTY
from reparam.graph.nodes import is_floating, kind, place
from reparam.graph.table import TABLE
from reparam.passes.base import Refusal
from reparam.passes.form import Term
from reparam.passes.obstacles import adding, bordering, listed, named, read_elsewhere, substituting
from reparam.passes.standing import Standing


def reasons(standing: Standing, failed: dict[fx.Node, Inexact]) -> list[Refusal]:
    """A refusal for each node that stays although it looks foldable; `failed` are tensors that were not written."""
    standing.keep_apart(list(failed))
    root = standing.root
    found: dict[fx.Node, Inexact] = {}
    for node, why in standing.region.inexact.items():
        beside = why is not EMPTY and _beside_weights(node, standing)
        if is_floating(node) and (_is_norm(node, root) or beside):
            found[node] = why
    for node, why in failed.items():
        for other in standing.search.cone(node):
            if standing.is_layer(other) or standing.is_scale(other):
                found[other] = why
    for node in standing.nodes:
        for subject, why in (*_about_scale(node, standing), *_about_layer(node, standing), *_about_sum(node, standing)):
            # an earlier pass may have said why
            if not subject.meta.get("refused"):
                found.setdefault(subject, why)
    order = standing.region.order
    return [
        Refusal("collapse", place(node), _subject(node, standing), why.reason, why.remedy)
        for node, why in sorted(found.items(), key=lambda pair: order[pair[0]])
    ]


def _subject(node: fx.Node, standing: Standing) -> str:
    """What stays: the operation itself, or the scale that it became part of."""
    region, search = standing.region, standing.search
    merged = node in region and not standing.is_layer(node) and node not in standing.apart
    stays = node in search.real and len(search.cone(node)) == 1
    return "scale and shift" if merged and not stays else kind(node, standing.root)


def _is_norm(node: fx.Node, root: nn.Module) -> bool:
    row = TABLE.row(node, root)
    return row is not None and row.name == "batch normalisation"


def _beside_weights(node: fx.Node, standing: Standing) -> bool:
    """Whether a layer, or a scale of channels, is beside a node that is not affine."""
    for other in standing.around(node):
        for part in standing.cone(other) if other in standing.region else []:
            if standing.is_layer(part) or (standing.is_scale(part) and standing.varies_by_channel(part)):
                return True
        if other in standing.region.inexact:
            return True
    return False


def _about_scale(node: fx.Node, standing: Standing) -> Iterator[tuple[fx.Node, Inexact]]:
    """A scale that was merged with nothing in front of it, and with nothing behind it."""
    root = standing.root
    if len(standing.terms(node)) > 1:
        yield from _about_scaled_terms(node, standing)
        return
    if standing.sort(node) != "scale":
        return
    subject = standing.main(node)
    before, behind = standing.before(node), standing.behind(node)
    if before.ends:
        into = listed([named(standing.main(end), root) for end in before.ends])
        if before.borders:
            yield subject, bordering(standing, before.borders, into)
        elif before.others and before.crossed:
            others = listed([named(other, root) for other in before.others])
            yield (
                subject,
                Inexact(f"it scales {into} together with {others}, which no layer makes that could absorb it"),
            )
        else:
            yield subject, substituting(standing, node, {*before.ends, *before.crossed}, into)
    elif behind.ends:
        end = behind.ends[0]
        into = named(standing.main(end), root)
        crossed = {other for other in behind.crossed if other in standing.before(end).crossed}
        border = bool(behind.borders) and node not in standing.before(end, borders=False).ends
        why = bordering(standing, behind.borders, into) if border else None
        yield subject, why or substituting(standing, end, {node, *crossed}, into)
    elif _is_norm(subject, root):
        for source in standing.sources(node):
            if source in standing.real and (readers := [r for r in standing.readers(source) if r is not node]):
                yield subject, read_elsewhere(source, readers, standing)
                return
        for other in (*standing.sources(node), *standing.readers(node)):
            if standing.is_weighted_call(other):
                why = standing.region.inexact[other]
                yield subject, replace(why, reason=f"{named(other, root)} beside it stays as it is: {why.reason}")
                return
        inputs = listed([named(other, root) for other in standing.sources(node)])
        outputs = listed([named(other, root) for other in standing.readers(node)])
        yield subject, Inexact(f"nothing linear is beside it: it reads {inputs} and feeds {outputs}")


def _about_scaled_terms(node: fx.Node, standing: Standing) -> Iterator[tuple[fx.Node, Inexact]]:
    """Scales among the terms of a sum or of a concatenation."""
    for term in standing.terms(node):
        if term.map.is_identity or not term.map.geometry.is_diagonal:
            continue
        way = standing.before_term(term)
        if not way.ends:
            continue
        into = listed([named(standing.main(end), standing.root) for end in way.ends])
        for part in standing.scales_of(node, term.source):
            yield part, substituting(standing, node, {*way.ends, *way.crossed}, into)


def _about_layer(node: fx.Node, standing: Standing) -> Iterator[tuple[fx.Node, Inexact]]:
    """A layer whose output another layer reads."""
    if standing.sort(node) != "layer":
        return
    into = named(standing.main(node), standing.root)
    near = standing.before(node, borders=False)
    for end in near.ends:
        if standing.sort(end) == "layer":
            yield standing.main(end), substituting(standing, node, {*near.crossed, end}, into)
    way = standing.before(node)
    for end in way.ends:
        if end not in near.ends and standing.sort(end) == "layer":
            yield standing.main(end), bordering(standing, way.borders, into)


def _about_sum(node: fx.Node, standing: Standing) -> Iterator[tuple[fx.Node, Inexact]]:
    """Summands that read one tensor."""
    summands = list(_summands(node, standing))
    for index, (layer, term) in enumerate(summands):
        for other, earlier in summands[:index]:
            same = (earlier.source, earlier.rows, earlier.columns) == (term.source, term.rows, term.columns)
            if not same or (layer is None and other is None):
                continue
            subject, beside = (layer, other) if layer is not None else (other, None)
            assert subject is not None
            name = "its own input" if beside is None else named(beside, standing.root)
            yield subject, adding(standing, earlier, term, name)
            break


def _summands(node: fx.Node, standing: Standing) -> Iterator[tuple[fx.Node | None, Term]]:
    """The terms of a sum, with the layer that each is; sums that nobody else reads are taken apart."""
    terms = standing.terms(node)
    if len(terms) < 2:
        return
    layers = [part for part in standing.cone(node) if standing.is_layer(part)]
    for term in terms:
        source = term.source
        whole = term.map.is_identity and term.columns is None
        if whole and source in standing.real and standing.readers(source) == [node]:
            inner = standing.terms(source)
            if len(inner) == 1 and inner[0].rows is None:
                branch = replace(inner[0], rows=term.rows, otherwise=None)
                yield (standing.main(source) if standing.sort(source) == "layer" else None), branch
            elif len(inner) > 1 and term.rows is None:
                yield from _summands(source, standing)
        else:
            mixes = layers and not term.map.geometry.is_diagonal
            yield (layers.pop(0) if mixes else None), term
