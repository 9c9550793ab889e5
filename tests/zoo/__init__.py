"""Small models of published blocks, written from their formulas, and what must be left of each."""

from tests.zoo import (
    basic,
    branches,
    chains,
    concats,
    constants,
    corner_chains,
    corners,
    dropouts,
    heads,
    layouts,
    linears,
    notes,
    selections,
)
from tests.zoo.case import BlockCase

_ROOMS = (
    basic,
    branches,
    corners,
    chains,
    corner_chains,
    linears,
    constants,
    concats,
    selections,
    layouts,
    heads,
    notes,
    dropouts,
)
BLOCKS: list[BlockCase] = [case for room in _ROOMS for case in room.CASES]

__all__ = ["BLOCKS", "BlockCase"]
