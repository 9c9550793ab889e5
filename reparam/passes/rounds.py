"""Moves and collapse in turn, until nothing moves.

What the collapse makes one layer may be what a scale can then move to: a BatchNorm in front of branches, a scale behind
their sum. Without further rounds, fusing the result again would change it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from reparam.passes.base import Refusal, Rewrite
from reparam.passes.bias_maps import BiasMaps
from reparam.passes.collapse import Collapse
from reparam.passes.moves import Moves
from reparam.passes.scores import Scores

_MOST_ROUNDS = 4


@dataclass(frozen=True)
class Rounds:
    """The pass. Rewrites are those of all rounds; refusals those about what stands in the end, one for each place and
    operation. With `maps`, shifts may become constants for one image size.
    """

    moves: Moves = field(default_factory=Moves)
    collapse: Collapse = field(default_factory=Collapse)
    scores: Scores = field(default_factory=Scores)
    maps: BiasMaps | None = None
    name = "moves and collapse"

    def run(self, graph: fx.Graph, root: nn.Module) -> tuple[list[Rewrite], list[Refusal]]:
        """Rewrites the graph in place."""
        rewrites, _ = self.moves.run(graph, root)
        for _ in range(_MOST_ROUNDS):
            made, kept = self.collapse.run(graph, root)
            rewrites += made
            again, _ = self.moves.run(graph, root)
            if not again:
                scored, _ = self.scores.run(graph, root)
                again = [rewrite for rewrite in scored if rewrite.pass_name == self.scores.name]
                rewrites += [rewrite for rewrite in scored if rewrite.pass_name != self.scores.name]
            if not again and self.maps is not None:
                again, _ = self.maps.run(graph, root)
            rewrites += again
            if not again:
                break
        # A later round may not look again at what an earlier one has refused to move.
        refused = list(dict.fromkeys(node.meta["refused"] for node in graph.nodes if "refused" in node.meta))
        known = {(refusal.place, refusal.subject) for refusal in refused}
        return rewrites, refused + [refusal for refusal in kept if (refusal.place, refusal.subject) not in known]
