"""The ordered table of passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import fx, nn

from reparam.passes.apart import Apart
from reparam.passes.base import Choice, Refusal, Rewrite
from reparam.passes.bias_maps import BiasMaps
from reparam.passes.cleanup import Cleanup
from reparam.passes.collapse import Collapse
from reparam.passes.constant_folding import ConstantFolding
from reparam.passes.cost import CostModel
from reparam.passes.fixed_sizes import FixedSizes, KnownSizes
from reparam.passes.hooked_weights import HookedWeights
from reparam.passes.inference_form import InferenceForm
from reparam.passes.join import Join
from reparam.passes.moves import Moves
from reparam.passes.norm_weights import NormWeights
from reparam.passes.repeats import Repeats
from reparam.passes.rounds import Rounds
from reparam.passes.scores import Scores


class Pass(Protocol):
    """What a pass is: a name, and a function that rewrites a graph in place and says what it did and what it left."""

    @property
    def name(self) -> str: ...

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]: ...


def pipeline(
    cost: CostModel, explain: Callable[[list[Choice]], None] | None = None, *, fixed_sizes: bool = False
) -> tuple[Pass, ...]:
    """The passes in order, choosing by `cost`; `explain` is called with the choices of each collapse.

    With `fixed_sizes` the graph needs to hold for the sizes of the example only, the batch apart.
    """
    return (
        *((FixedSizes(),) if fixed_sizes else ()),  # before all that asks what is constant
        InferenceForm(),  # first: a dropout or identity between two layers hides that they are neighbours
        HookedWeights(),  # a layer whose weight a hook computes is a layer like any other
        KnownSizes(),  # 1 / sqrt(q.shape[-1]) and its like are constants, as much as those of parameters
        Cleanup(final=False),  # so does an operation that returns what it reads
        Repeats(affine=False),  # two tensors that are one: their readers are neighbours then
        Apart(),  # an image normalised channel by channel: one scale and shift, for the moves
        NormWeights(cost=cost),  # to be merged by the collapse, like any scale and shift
        # moves, then the collapse, which merges what they brought together; again if that allows more moves
        Rounds(
            collapse=Collapse(cost=cost, explain=explain),
            scores=Scores(cost=cost),
            maps=BiasMaps(cost=cost) if fixed_sizes else None,
        ),
        Join(cost=cost),  # by now a layer and its BatchNorm, or a sum of branches, are one
        Cleanup(),  # what the collapse left of scales that are 1 and of reshapes whose sizes it found
        Repeats(),  # a layer called twice: by now it is known that each call has stayed what it was
        ConstantFolding(),  # last: what feeds a merged weight has been merged in float64
    )


PIPELINE = pipeline(CostModel())
ASKING = (
    *(Apart, BiasMaps, Cleanup, Collapse, ConstantFolding, FixedSizes, HookedWeights, InferenceForm),
    *(Join, Moves, NormWeights, Repeats, Rounds, Scores),
)
"""Passes that ask the ledger before each rewrite; any other one is asked for as a whole."""
