"""The ordered table of passes."""

from __future__ import annotations

from typing import Protocol

from torch import fx, nn

from reparam.passes.base import Refusal, Rewrite
from reparam.passes.inference_form import InferenceForm
from reparam.passes.rounds import Rounds


class Pass(Protocol):
    """What a pass is: a name, and a function that rewrites a graph in place and says what it did and what it left."""

    @property
    def name(self) -> str: ...

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]: ...


PIPELINE: tuple[Pass, ...] = (
    InferenceForm(),  # first: a dropout or identity between two layers hides that they are neighbours
    Rounds(),  # moves, then the collapse, which merges what they brought together; again if that allows more moves
)
