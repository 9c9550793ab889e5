"""Runs of the original with other roundings (`montecarlo.py`), and the noise that they show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from reparam.equivalence.cases import Case
from reparam.equivalence.gather import Ran
from reparam.equivalence.judge import Spread, spread
from reparam.equivalence.montecarlo import MovedOperands
from reparam.equivalence.outputs import Flat, double
from reparam.equivalence.precision import PrivateCopy, named_tensors
from reparam.equivalence.session import Noises, Session

DRAWS, DEPLOYED_DRAWS = 5, 20
"""How often the original is run with moved operands in float64, for each step, and as it is deployed."""


def noises_of(
    session: Session,
    model: PrivateCopy,
    dtype: torch.dtype | None,
    ran: Ran,
    case: Case,
    truth: Flat,
    draws: int,
    step: float = 1.0,
) -> Noises:
    """By output, how far each answer with moved operands is from the truth, run in `dtype` or as it is.

    Outputs with an element that is not finite are left out. It depends on the original alone, so what is known of it
    from another candidate is not measured again.
    """
    elements = tuple((one.figures.name, one.figures.elements) for one in ran.measured)
    key = (case.name, case.seed, case.is_example, case.shapes, dtype, draws, step, elements)
    if key in session.known:
        return session.known[key]
    found: Noises = {}
    for draw in range(draws):
        with MovedOperands(session.seed + draw, step, named_tensors(model.module).values()):
            answer = session.call(model, case, dtype).tensors()
        for one in ran.measured:
            name = one.figures.name
            if one.truth is None or name not in answer or one.figures.elements != answer[name].numel():
                continue
            error = double(answer[name]) - double(truth.tensors()[name])
            if bool(error.isfinite().all()):
                found.setdefault(name, []).append(spread(error / one.unit))
    session.known[key] = {name: noises for name, noises in found.items() if len(noises) == draws}
    return session.known[key]


def root_mean_square(noises: Sequence[Spread]) -> Spread:
    """Of several spreads of tensors of one shape, figure by figure."""

    def mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.stack(list(values)).square().mean(0).sqrt()

    axes = zip(*(noise.slices for noise in noises), strict=True)
    slices = tuple((mean([rms for rms, _ in axis]), mean([peak for _, peak in axis])) for axis in axes)
    count = math.sqrt(len(noises))
    rms, peak = (math.hypot(*figures) / count for figures in zip(*((n.rms, n.peak) for n in noises), strict=True))
    return Spread(rms, peak, slices)
