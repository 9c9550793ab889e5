"""Rows of the comparison with other tools, what would be wrong in them, and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

OURS = "reparam"
EXACT = 1e-11
"""Largest error of ours that rounding explains: relative on models, absolute on the trivial ones (outputs near 1)."""
WRONG = 1e-4
"""An error above this is bold: no rounding explains it, not even in float32."""

TITLES = {
    "conv_called_twice_each_with_its_norm": "one conv called twice, each call with its own BN",
    "conv_called_twice_once_with_norm": "one conv called twice, one call followed by BN",
    "block_called_twice": "a conv-BN block called twice",
    "linear_then_norm_over_tokens": "Linear, then BatchNorm1d over the tokens of (N, C, L)",
    "second_consumer_besides_the_norm": "conv output with a second consumer besides the BN",
    "conv_transpose_norm_same_channels": "ConvTranspose + BN, as many channels in as out",
    "conv_transpose_times_constant": "ConvTranspose times a constant, as many channels in as out",
    "grouped_conv_transpose_norm": "grouped ConvTranspose + BN",
    "grouped_conv_transpose_norm_wider": "grouped ConvTranspose + BN, more channels out than in",
    "biased_conv_norm": "conv with bias + BN",
    "norm_without_affine": "conv + BN with affine=False",
    "registered_in_another_order": "layers registered in another order than called",
    "norm_before_padded_conv": "BN before a padded conv",
    "relu_between_conv_and_norm": "ReLU between conv and BN",
    "three_branches": "three parallel branches",
    "grouped_branches_with_identity": "grouped parallel branches with identity",
    "norm_that_cannot_be_fused": "BN between two ReLUs",
    "all_dropouts": "dropouts of five kinds between conv and BN",
}


@dataclass(frozen=True)
class ModelRow:
    """What each tool leaves of a real model.

    Attributes:
        model: its name.
        left: tool (or "as built") -> counts by kind (see `LayerCounts`); tools that raised are missing.
        errors: tool -> relative float64 error against the original.
        raised: tool -> first line of its exception.
    """

    model: str
    left: Mapping[str, Mapping[str, int]]
    errors: Mapping[str, float]
    raised: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return asdict(self)

    def cell(self, tool: str) -> str:
        """`convs / BNs (error)`, or `-`."""
        if tool not in self.left:
            return "-"
        counts = f"{self.left[tool]['convolutions']} / {self.left[tool]['batch_norms']}"
        return f"{counts} ({self.errors[tool]:.0e})" if tool in self.errors else counts

    def line(self) -> str:
        """The row for the terminal."""
        return f"{self.model:16} " + ", ".join(f"{tool} {self.cell(tool)}" for tool in (*self.left, *self.raised))


@dataclass(frozen=True)
class TrapRow:
    """How wrong each tool is on a trivial model.

    Attributes:
        model: its name.
        largest: largest absolute value of the original's output.
        errors: tool -> largest absolute float64 error.
        raised: tool -> first line of its exception.
    """

    model: str
    largest: float
    errors: Mapping[str, float]
    raised: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        return asdict(self)

    def cell(self, tool: str) -> str:
        """The error, bold if wrong, or `-`."""
        if tool not in self.errors:
            return "-"
        error = self.errors[tool]
        return f"{error:.0e}" if error <= WRONG else f"**{error:.2g}**"

    def line(self) -> str:
        """The row for the terminal."""
        return f"{self.model:38} " + ", ".join(f"{tool} {self.cell(tool)}" for tool in (*self.errors, *self.raised))


def verdict(models: Sequence[ModelRow], traps: Sequence[TrapRow]) -> list[str]:
    """One sentence for every row in which ours raised or is not exact."""

    def sentences() -> Iterator[str]:
        for row in (*models, *traps):
            if OURS not in row.errors:
                yield f"{row.model}: reparam raised {row.raised.get(OURS, 'nothing, and gave no result')}"
            elif not row.errors[OURS] <= EXACT:
                yield f"{row.model}: reparam is off by {row.errors[OURS]:.1e}"

    return list(sentences())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---|" + "--:|" * (len(header) - 1)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def _tools(rows: Sequence[ModelRow] | Sequence[TrapRow]) -> list[str]:
    """Every tool that was run, in the order of the first row that has all, ours last."""
    found = dict.fromkeys(tool for row in rows for tool in (*row.errors, *row.raised) if tool != OURS)
    return [*found, OURS]


def markdown(models: Sequence[ModelRow], traps: Sequence[TrapRow], facts: Mapping[str, Any]) -> str:
    """The page: both tables, each with how it was measured. Holds no heading, so that it can be included anywhere."""
    tools = ["as built", *_tools(models)]
    lines = [
        f"Convolutions / BatchNorms that one forward pass executes, and in brackets the relative float64 error against "
        f"the original (timm {facts['timm']}, random weights and BatchNorm statistics, {facts['size']}-pixel images):",
        "",
        *_table(["model", *tools], [[row.model, *(row.cell(tool) for tool in tools)] for row in models]),
    ]
    if traps:
        tools = _tools(traps)
        lines += [
            "",
            "Trivial models on which some tool is silently wrong: largest absolute error, in float64 unless said "
            "otherwise; `-` where the tool raises, bold where its answer is wrong:",
            "",
            *_table(
                ["model", *tools],
                [[TITLES.get(row.model, row.model), *(row.cell(tool) for tool in tools)] for row in traps],
            ),
        ]
    left = facts["dropouts"]
    lines += [
        "",
        f"Of {left['as built']} dropouts of several kinds in one traced graph, torch.fx `remove_dropout` leaves "
        f"{left['remove_dropout']}, reparam {left[OURS]}.",
    ]
    lines += ["", f"Measured by `{facts['command']}` on {facts['hardware']} with torch {facts['torch']}.", ""]
    return "\n".join(lines)
