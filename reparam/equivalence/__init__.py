"""Does a candidate compute what the original computes? Two callables and inputs become a `Comparison`.

`verify` runs both; `compare_outputs` judges outputs that were already computed. Knows neither `torch.fx` nor passes, so
that it cannot share their mistakes.
"""

from __future__ import annotations

from reparam.equivalence.comparison import CaseResult, Comparison, OutputComparison, Parting
from reparam.equivalence.local import Difference, difference
from reparam.equivalence.measure import compare_outputs
from reparam.equivalence.parting import parting
from reparam.equivalence.runner import verify
from reparam.equivalence.session import Elsewhere

__all__ = [
    "CaseResult",
    "Comparison",
    "Difference",
    "Elsewhere",
    "OutputComparison",
    "Parting",
    "compare_outputs",
    "difference",
    "parting",
    "verify",
]
