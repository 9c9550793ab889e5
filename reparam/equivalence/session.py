"""Private copies of the two models, in every precision that is asked of them, and what running them has cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import nn

from reparam.compiled import entered
from reparam.equivalence.cases import Case
from reparam.equivalence.judge import Spread
from reparam.equivalence.measured import Rules
from reparam.equivalence.outputs import Flat
from reparam.equivalence.precision import PrivateCopy, disturbed, named_tensors, run
from reparam.equivalence.scripted import names_narrow_dtypes

Model: TypeAlias = "Callable[..., Any] | PrivateCopy"
Noises: TypeAlias = "dict[str, list[Spread]]"
"""By output, how far the original's answers are from the truth when it is run with other roundings."""

NARROW_COST = 0.5


@dataclass(frozen=True)
class Elsewhere:
    """A model that torch does not run, so that its precision cannot be changed from here.

    Attributes:
        run: calls it as it is deployed.
        dtype: the deployment dtype.
        weights: by name, as they are deployed.
        float64: calls it in float64; None if that cannot be done.
        rounded64: makes the same with weights that are wrong by what one rounding to `dtype` makes them wrong, but for
            those given, which were not changed; None if none of them was.
        disturbed: calls it as it is deployed, with weights that are wrong by one rounding: how its noise is estimated
            where `float64` is None.
        without: why `float64` is None.
        input_names: of its inputs, in the order in which they are given.
    """

    run: Callable[..., Any]
    dtype: torch.dtype
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    float64: Callable[..., Any] | None = None
    rounded64: Callable[[Mapping[str, torch.Tensor]], Callable[..., Any] | None] | None = None
    disturbed: Callable[..., Any] | None = None
    without: str = ""
    input_names: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class Asked(Enum):
    """Which of the two questions a case is asked."""

    BOTH = "both"
    ALGEBRA = "algebra"
    NUMERIC = "numeric"


@dataclass
class Session:
    """The models of one comparison, and what has been spent.

    `original64` is None for an original that does not run in float64; `candidate64` is None where, or once, the algebra
    cannot be asked; `original` is None once it is known to be `original64`. `judged64`: whether the float64
    difference is held against a bar. `single`: the original in float32, of a model in half precision. `known`: what was
    measured of the original's noise; comparisons of several candidates with it may share that. `compiled`: whether a
    candidate that is a copy has called what `torch.compile` has made, which then ran uncompiled.
    """

    rules: Rules
    seed: int
    original64: Model | None
    original: Model | None
    noise: Model | None
    candidate: Model
    candidate64: Model | None = None
    rounded64: Model | None = None
    exact: bool = False
    judged64: bool = True
    single: Model | None = None
    spent: float = 0.0
    notes: list[str] = field(default_factory=list)
    known: dict[Any, Noises] = field(default_factory=dict)
    compiled: bool = False

    def affordable(self, case: Case, budget: float) -> Asked | None:
        """The most that can be asked of a case; None if nothing can. Of what the user gave everything is."""
        if case.is_given or self.spent + self.price(case, Asked.BOTH) <= budget:
            return Asked.BOTH
        fewer = Asked.ALGEBRA if self.exact and self.candidate64 is not None else Asked.NUMERIC
        return fewer if self.spent + self.price(case, fewer) <= budget else None

    def price(self, case: Case, asked: Asked) -> float:
        """What a case costs, in float64 forward passes of the original on the example inputs."""
        if self.rules.dtype == torch.float64:
            return case.relative_size * (2.0 + NARROW_COST)
        exact, rounded = self.candidate64 is not None, self.rounded64 is not None
        wide, narrow = {
            Asked.BOTH: (1 + exact + rounded, 2),
            Asked.NUMERIC: (1, 2),
            Asked.ALGEBRA: (1 + exact, 1),
        }[asked]
        return case.relative_size * (wide + narrow * NARROW_COST)

    def call(self, model: Model, case: Case, dtype: torch.dtype | None, drawn: list[str] | None = None) -> Flat:
        """Runs a model on a case, in `dtype` or as it is, and counts what it costs."""
        wide = self.rules.dtype == torch.float64 if dtype is None else dtype == torch.float64
        self.spent += case.relative_size * (1.0 if wide else NARROW_COST)
        default = self.rules.dtype != dtype
        with entered() as called:
            answer = run(model, case.inputs, seed=self.seed, dtype=dtype, drawn=drawn, default=default)
        self.compiled |= bool(called) and model is self.candidate and isinstance(model, PrivateCopy)
        return answer


def session_of(
    original: nn.Module | Elsewhere,
    candidate: Callable[..., Any],
    candidate_float64: nn.Module | None,
    rules: Rules,
    seed: int,
) -> Session:
    """Copies of what `verify` was given."""
    session = _with_original(original, candidate, rules, seed)
    if session.original64 is None:
        return session
    module = candidate if isinstance(candidate, nn.Module) else None
    known = dict(original.weights) if isinstance(original, Elsewhere) else named_tensors(original)
    if rules.dtype == torch.float64:
        session.candidate64 = session.candidate
    elif isinstance(candidate, Elsewhere):
        session.candidate64 = candidate.float64
        if candidate.float64 is None:
            session.notes.append(
                f"the candidate cannot be run in float64, so the algebra is not asked ({candidate.without})"
            )
        elif candidate.rounded64 is not None:
            session.rounded64 = candidate.rounded64(known)
    elif candidate_float64 is not None:
        session.candidate64 = PrivateCopy(candidate_float64, "candidate", torch.float64)
        session.exact = True
        # With both at hand, what rounding costs is measured and not estimated.
        session.rounded64 = (
            disturbed(candidate_float64, known, rules.dtype, seed)
            if module is None
            else PrivateCopy(module, "candidate", torch.float64)
        )
    elif module is not None:
        session.candidate64 = PrivateCopy(module, "candidate", torch.float64)
        session.rounded64 = disturbed(module, known, rules.dtype, seed)
    if any(isinstance(model, nn.Module) and names_narrow_dtypes(model) for model in (original, candidate)):
        session.judged64 = False
        where = "float64 by what float32 costs" if rules.dtype == torch.float64 else str(rules.dtype)[6:]
        session.notes.append(
            "TorchScript code names dtypes, in which it runs in float64, too: the float64 difference is told, and "
            f"judged is the error in {where}"
        )
    if session.rounded64 is not None and (isinstance(original, Elsewhere) or isinstance(candidate, Elsewhere)):
        # Exporters merge weights in float32, and what that costs depends on terms that nobody has any more.
        session.judged64 = False
        session.notes.append(
            "the weights of the two are not the same numbers, as one of them was merged or rounded when it was "
            f"exported: the float64 difference is told, and judged is the error in {str(rules.dtype)[6:]}"
        )
    return session


def _with_original(original: nn.Module | Elsewhere, candidate: Callable[..., Any], rules: Rules, seed: int) -> Session:
    ours: Model = PrivateCopy(candidate, "candidate") if isinstance(candidate, nn.Module) else candidate
    if isinstance(original, nn.Module):
        wide = rules.dtype == torch.float64
        noise = PrivateCopy(original, "original", torch.float32) if wide else None
        exact = PrivateCopy(original, "original", torch.float64)
        half = rules.dtype in (torch.float16, torch.bfloat16)
        single = PrivateCopy(original, "original", torch.float32) if half else None
        return Session(rules, seed, exact, PrivateCopy(original, "original"), noise, ours, single=single)
    session = Session(rules, seed, original.float64, original.run, None, ours)
    if original.float64 is None:
        session.noise = original.disturbed
        session.notes.append(
            f"the original cannot be run in float64 ({original.without}), so the algebra is not asked: the candidate "
            "is held against the original's own answer, whose noise is taken to be what one rounding of every weight "
            "changes of it"
        )
    return session
