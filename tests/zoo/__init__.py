"""Small models of published blocks, written from their formulas, and what must be left of each."""

from tests.zoo import basic, branches, chains, constants, linears
from tests.zoo.case import BlockCase

BLOCKS: list[BlockCase] = [*basic.CASES, *branches.CASES, *chains.CASES, *linears.CASES, *constants.CASES]

__all__ = ["BLOCKS", "BlockCase"]
