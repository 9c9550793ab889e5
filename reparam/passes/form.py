"""What a tensor is in terms of others: the values that regions compute with.

    v = cat over row windows (sum_j  after_j( A_j( before_j( u_j[columns_j] ) ) )) + b

`A_j` is a map without shift, `before_j` and `after_j` are chains of operations that move positions or average them
(`Carried`). A map that acts on each position alone commutes with such a chain; so it has no `after`, and stands
anywhere along `before`. A convolution stands between the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import fx

from reparam import algebra
from reparam.algebra import AffineMap, Inexact
from reparam.algebra.borders import shift_crossing
from reparam.algebra.compose import added_bias, carried_bias
from reparam.algebra.deferred import Deferred
from reparam.algebra.windows import Window
from reparam.graph.lift import Carried


@dataclass(frozen=True)
class Step:
    """One operation of a chain.

    Attributes:
        node: the operation as it stands in the user's graph.
        carried: what it does.
        axis: the axis of its operand that carries the channels.
        whole: key under which equal operations are equal.
    """

    node: fx.Node
    carried: Carried
    axis: int
    key: object

    @property
    def repeat(self) -> int:
        """How many neighbouring channels each channel becomes."""
        moved = self.carried.moved[self.axis]
        return 1 if moved is None else moved.repeat

    @property
    def axis_after(self) -> int:
        """The axis of its result that carries the channels."""
        moved = self.carried.moved[self.axis]
        assert moved is not None
        return moved.axis


@dataclass(frozen=True)
class Term:
    """`after(map(before(source[columns])))`, the channels `rows` of the whole.

    Attributes:
        source: the tensor it starts from.
        axis: the axis of the source that carries its channels.
        channels: number of the source's channels.
        columns: the channels of the source that are read; None for all.
        map: without shift; it acts behind `before`.
        rows: which channels of the result it makes; None for all.
        stood: how many steps of `before` ran in front of the layers that the map is made of.
        otherwise: the same value as another term, for operations that are a map and a step alike.
        memo: what was found out about this very term, by who found it.
    """

    source: fx.Node
    axis: int
    channels: int
    map: AffineMap
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()
    columns: Window | None = None
    rows: Window | None = None
    stood: int = 0
    otherwise: Term | None = None
    memo: dict[object, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def is_free(self) -> bool:
        """Whether the map acts on each position alone, so that it commutes with chains."""
        return self.map.geometry.rank == 0 and not self.after

    @property
    def map_axis(self) -> int:
        """The axis that carries channels where the map stands."""
        return self.before[-1].axis_after if self.before else self.axis

    @property
    def is_source(self) -> bool:
        """Whether it is the source itself."""
        return self.map.is_identity and not self.before and not self.after and self.columns is None

    @property
    def reads(self) -> Window:
        """The channels of the source that are read."""
        return self.columns or (0, self.channels)

    def reading(self, columns: Window, map_: AffineMap) -> Term:
        """Another map of other channels of the source."""
        return replace(self, map=map_, columns=None if columns == (0, self.channels) else columns, otherwise=None)

    def alike(self, other: Term) -> bool:
        """Whether the two differ in their maps only."""
        return (
            self.source is other.source
            and self.columns == other.columns
            and self.rows == other.rows
            and same_chain(self.before, other.before)
            and same_chain(self.after, other.after)
        )


@dataclass(frozen=True)
class Form:
    """A sum of terms and a shift `[channels]`. Terms that make some rows only have windows that tile all rows."""

    terms: tuple[Term, ...]
    channels: int
    bias: Deferred | None = None

    @property
    def windows(self) -> list[Window]:
        """The windows that tile the rows, in order; empty if every term makes all of them."""
        return sorted({term.rows for term in self.terms if term.rows is not None})

    def has_zero_bias(self) -> bool:
        """Whether the shift is exactly zero; computes it if need be."""
        return self.bias is None or not bool(self.bias.evaluate().any())


Merge: TypeAlias = "Callable[[Term, Term, Term], bool]"
"""Whether two terms are cheaper as the one given last."""


def same_chain(a: Sequence[Step], b: Sequence[Step]) -> bool:
    """Whether two chains do the same."""
    return [(step.key, step.axis) for step in a] == [(step.key, step.axis) for step in b]


def mapped(form: Form, g: AffineMap, pays: Merge) -> Form | Inexact:
    """The form behind the map `g`."""
    bias = form.bias
    if bias is not None:
        crossing = shift_crossing(g.geometry)
        if crossing is not None:
            if not form.has_zero_bias():
                return crossing
            bias = None
    terms: list[Term] = []
    for term in form.terms:
        found = _mapped_term(term, g.linear_part if g.bias is not None else g)
        if isinstance(found, Inexact):
            return found
        terms = with_term(terms, found, pays)
    if _is_long(terms):
        return _TOO_LONG
    channels = g.geometry.out_channels
    if not g.geometry.is_diagonal and any(term.rows is not None for term in terms):
        return Inexact("it reads concatenated parts, and a layer for each of them would be more layers than there are")
    if any(term.rows is not None for term in terms) and not _tiles(terms, channels):
        return Inexact("the next layer mixes some of the concatenated parts and not others")
    return Form(tuple(terms), channels, carried_bias(bias, g))


def _mapped_term(term: Term, g: AffineMap) -> Term | Inexact:
    return _either(term, lambda one: _mapped_one(one, g))


def _either(term: Term, change: Callable[[Term], Term | Inexact]) -> Term | Inexact:
    """A change of a term and of what it is otherwise."""
    if term.otherwise is None:
        return change(term)
    first = change(replace(term, otherwise=None))
    second = change(term.otherwise)
    if isinstance(first, Inexact) or isinstance(second, Inexact):
        return second if isinstance(first, Inexact) else first
    return replace(first, otherwise=second)


def _mapped_one(term: Term, g: AffineMap) -> Term | Inexact:
    rows = term.rows
    if rows is not None:
        part = algebra.columns(g, rows)
        if isinstance(part, Inexact):
            return part
        g, rows = part.map, (None if part.other == (0, g.geometry.out_channels) else part.other)
    if term.after and (g.geometry.rank or any(step.repeat != 1 for step in term.after)):
        return Inexact("the axes are rearranged between the two layers")
    if len({term.map.geometry.rank, g.geometry.rank} - {0}) > 1:
        return Inexact("the two layers have different numbers of spatial axes")
    composed = algebra.then(term.map, g)
    if isinstance(composed, Inexact):
        return composed
    stood = term.stood if g.geometry.is_diagonal and not term.map.is_identity else len(term.before)
    return replace(term, map=composed, rows=rows, stood=stood)


def carried(form: Form, step: Step, cancels: Callable[[Sequence[Step]], int]) -> Form | Inexact:
    """The form behind an operation of a chain. `cancels` tells how many last steps of a chain come to nothing."""
    terms = []
    for term in form.terms:
        found = _either(term, lambda one: _carried_one(one, step, cancels))
        if isinstance(found, Inexact):
            return found
        terms.append(found)
    times = step.repeat
    bias = form.bias
    if bias is not None and times > 1:
        bias = Deferred(lambda b: b.repeat_interleave(times), bias)
    return Form(tuple(terms), form.channels * times, bias)


def _carried_one(term: Term, step: Step, cancels: Callable[[Sequence[Step]], int]) -> Term | Inexact:
    times = step.repeat
    rows = None if term.rows is None else (term.rows[0] * times, term.rows[1] * times)
    if term.is_free and (times == 1 or term.map.geometry.is_diagonal):
        chain = (*term.before, step)
        chain = chain[: len(chain) - cancels(chain)]
        stood = min(term.stood, len(chain))
        return replace(term, map=algebra.repeated(term.map, times), before=chain, rows=rows, stood=stood)
    if times != 1:
        return Inexact("its positions become channels, which the layer before it cannot take into account")
    chain = (*term.after, step)
    return replace(term, after=chain[: len(chain) - cancels(chain)], rows=rows)


def either(form: Form, other: Form | Inexact) -> Form:
    """A form, and what it is otherwise."""
    if isinstance(other, Inexact) or len(other.terms) != len(form.terms):
        return form
    pairs = zip(form.terms, other.terms, strict=True)
    if any(a.source is not b.source or a.rows != b.rows for a, b in zip(form.terms, other.terms, strict=True)):
        return form
    return replace(form, terms=tuple(replace(a, otherwise=b) for a, b in pairs))


def added(a: Form, b: Form, pays: Merge) -> Form | Inexact:
    """The sum of two forms."""
    if a.windows and b.windows and a.windows != b.windows:
        return Inexact("it adds tensors that are concatenated from parts of different sizes")
    terms = list(a.terms)
    for term in b.terms:
        terms = with_term(terms, term, pays)
    if _is_long(terms):
        return _TOO_LONG
    return Form(tuple(terms), a.channels, added_bias(a.bias, b.bias))


_MOST_TERMS = 16
_TOO_LONG = Inexact(f"it would be the sum of more than {_MOST_TERMS} layers")


def _is_long(terms: Sequence[Term]) -> bool:
    """Whether a sum has so many terms that no search through it could pay: nested sums double them level by level."""
    counts = Counter(term.rows for term in terms)
    return max(counts.values(), default=0) > _MOST_TERMS


def concatenated(forms: Sequence[Form], pays: Merge) -> Form | Inexact:
    """The forms one after the other."""
    terms: list[Term] = []
    start, total = 0, sum(form.channels for form in forms)
    for form in forms:
        if form.windows and any(term.rows is None for term in form.terms):
            return Inexact("one of its parts is the sum of a whole and of something concatenated")
        for term in form.terms:
            low, high = term.rows or (0, form.channels)
            terms.append(_with_rows(term, (start + low, start + high)))
        start += form.channels
    bias = None
    if any(form.bias is not None for form in forms):
        bias = concatenated_bias([(form.bias, form.channels) for form in forms])
    joined = _joined(terms, total, pays)
    return Form((joined,) if joined is not None else tuple(terms), total, bias)


def _with_rows(term: Term, rows: Window | None) -> Term:
    otherwise = None if term.otherwise is None else replace(term.otherwise, rows=rows)
    return replace(term, rows=rows, otherwise=otherwise)


def concatenated_bias(parts: Sequence[tuple[Deferred | None, int]]) -> Deferred:
    """Shifts one after the other, None standing for zeros."""
    present = [bias for bias, _ in parts if bias is not None]

    def whole(*values: torch.Tensor) -> torch.Tensor:
        given = iter(values)
        return torch.cat(
            [
                values[0].new_zeros(channels, dtype=torch.float64) if bias is None else next(given).to(torch.float64)
                for bias, channels in parts
            ]
        )

    return Deferred(whole, *present)


def sliced(form: Form, window: Window) -> Form | Inexact:
    """Some channels of a form."""
    terms = []
    for term in form.terms:
        low, high = term.rows or (0, form.channels)
        start, stop = max(low, window[0]), min(high, window[1])
        if start >= stop:
            continue
        part = (start - low, stop - low)
        found = _either(term, lambda one, part=part: _sliced_one(one, part))  # type: ignore[misc]
        if isinstance(found, Inexact):
            return found
        rows = (start - window[0], stop - window[0])
        terms.append(_with_rows(found, None if rows == (0, window[1] - window[0]) else rows))
    return Form(tuple(terms), window[1] - window[0], algebra.sliced_bias(form.bias, window))


def _sliced_one(term: Term, window: Window) -> Term | Inexact:
    if window == (0, term.map.geometry.out_channels):
        return term
    if any(step.repeat != 1 for step in (*term.before, *term.after)):
        return Inexact("its channels were positions before, and only some of them are taken")
    part = algebra.rows(term.map, window)
    if isinstance(part, Inexact):
        return part
    start = term.reads[0]
    return term.reading((part.other[0] + start, part.other[1] + start), part.map)


def with_term(terms: list[Term], new: Term, pays: Merge) -> list[Term]:
    """The terms and one more, merged with another one if that is exact and pays."""
    for index, term in enumerate(terms):
        merged = _merged(term, new)
        if merged is not None and pays(term, new, merged):
            return with_term([*terms[:index], *terms[index + 1 :]], merged, pays)  # it may merge with others now
    return [*terms, new]


def _merged(a: Term, b: Term) -> Term | None:
    if len({a.map.geometry.rank, b.map.geometry.rank} - {0}) > 1:
        return None
    if a.alike(b):
        both = algebra.plus(a.map, b.map)
        return None if isinstance(both, Inexact) else replace(a, map=both, otherwise=None)
    if not a.alike(replace(b, columns=a.columns)) or any(step.repeat != 1 for step in a.before):
        return None
    start, stop = min(a.reads[0], b.reads[0]), max(a.reads[1], b.reads[1])
    out = a.map.geometry.out_channels
    wide = [algebra.placed(term.map, 0, out, term.reads[0] - start, stop - start) for term in (a, b)]
    both = algebra.plus(*wide)
    return None if isinstance(both, Inexact) else a.reading((start, stop), both)


def _joined(terms: Sequence[Term], channels: int, pays: Merge) -> Term | None:
    """All parts as one map, if each is one term of the same source and that pays; None otherwise."""
    terms = sorted(terms, key=lambda term: term.rows or (0, 0))
    first = terms[0]
    if any(not first.alike(replace(term, rows=first.rows, columns=first.columns)) for term in terms):
        return None
    if any(a.rows is None or b.rows is None or a.rows[1] != b.rows[0] for a, b in pairwise(terms)):
        return None
    tiled = _tiled(terms)
    if tiled is not None:
        return tiled
    total = first
    for term in terms[1:]:
        stacked = _stacked(total, term)
        if stacked is None or not pays(total, term, stacked):
            return None
        total = stacked
    return replace(total, rows=None) if total.rows == (0, channels) else None


def _tiled(terms: Sequence[Term]) -> Term | None:
    """Parts of neighbouring columns as one grouped map."""
    windows = [term.reads for term in terms]
    if any(a[1] != b[0] for a, b in pairwise(windows)):
        return None
    if len({term.map.geometry.rank for term in terms}) > 1 or any(step.repeat != 1 for step in terms[0].before):
        return None
    whole = algebra.side_by_side([term.map for term in terms])
    if isinstance(whole, Inexact):
        return None
    return replace(terms[0].reading((windows[0][0], windows[-1][1]), whole), rows=None)


def _stacked(a: Term, b: Term) -> Term | None:
    """Two parts of the same columns as one map with the rows of both."""
    if a.columns != b.columns or a.rows is None or b.rows is None:
        return None
    if len({a.map.geometry.rank, b.map.geometry.rank} - {0}) > 1:
        return None
    start, stop = a.rows[0], b.rows[1]
    wide = [
        algebra.placed(t.map, t.rows[0] - start, stop - start, 0, t.map.geometry.in_channels)
        for t in (a, b)
        if t.rows is not None
    ]
    both = algebra.plus(*wide)
    return None if isinstance(both, Inexact) else replace(a, map=both, rows=(start, stop), otherwise=None)


def _tiles(terms: Sequence[Term], channels: int) -> bool:
    """Whether the windows of the terms tile all channels."""
    windows = sorted({term.rows for term in terms if term.rows is not None})
    ends = [0, *(stop for _, stop in windows)]
    return [start for start, _ in windows] == ends[:-1] and ends[-1] == channels
