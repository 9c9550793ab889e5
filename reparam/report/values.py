"""The report's values: `OperationCounts` and `Report`. Plain data; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from reparam.report.headline import headline

if TYPE_CHECKING:
    from reparam.bench import Timing
    from reparam.equivalence import Comparison
    from reparam.passes.base import Choice, Refusal, Rewrite, Undone
    from reparam.report.view import GraphView


@dataclass(frozen=True)
class OperationCounts:
    """What a model does in one call, counted on its graph: a layer called twice counts twice.

    Attributes:
        convolutions: convolutions and transposed convolutions of any rank.
        batch_norms: batch normalisations.
        linears: linear layers and matrix products with weights.
        additions: additions of two activations, and of constants to an activation.
        dropouts: dropout and its relatives (stochastic depth, alpha dropout).
        nodes: operations in all, counting neither inputs, outputs nor weights.
        parameters: elements of all weights, each counted once.
        macs: multiply-adds of convolutions and linear layers on the example inputs.
    """

    convolutions: int = 0
    batch_norms: int = 0
    linears: int = 0
    additions: int = 0
    dropouts: int = 0
    nodes: int = 0
    parameters: int = 0
    macs: int = 0

    def to_dict(self) -> dict[str, int]:
        """The counts as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Report:
    """Everything that is known about one run.

    Attributes:
        model: the model's name: its class, or the file it came from.
        capture: how the graph was captured (`symbolic`, `export`, `partial`, `modules`).
        before, after: operations of the original and of the fused model.
        rewrites: what was changed, in the order in which it was.
        refusals: what looks foldable and was left, and why.
        undone: rewrites that verification found at fault, and that were undone; they are not among `rewrites`.
        choices: what was compared for each region, and why one form won; None if not asked.
        comparison: fused against original; None if not asked.
        archive_comparison: the `torch.export` archive against the original; None if none was written.
        onnx_comparison: the ONNX file in its runtime against the original; None if none was written.
        timing: latency of original and fused in eager PyTorch; None if not measured.
        onnx_timing: latency of the exported original and the exported fused model; None if not measured.
        files: kind (`onnx`, `archive`, `certificate`) -> path of each file written.
        environment: versions, hardware and settings, by name.
        seconds: stage -> wall-clock time it took, in seconds.
        notes: further sentences for the user.
        interrupted: what was being done when the run was interrupted from the keyboard; empty if it was not.
        graph: the graph before and after, and which part became which; None if it is not known.
    """

    model: str
    capture: str
    before: OperationCounts
    after: OperationCounts
    rewrites: tuple[Rewrite, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    undone: tuple[Undone, ...] = ()
    choices: tuple[Choice, ...] | None = None
    comparison: Comparison | None = None
    archive_comparison: Comparison | None = None
    onnx_comparison: Comparison | None = None
    timing: Timing | None = None
    onnx_timing: Timing | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    interrupted: str = ""
    graph: GraphView | None = None

    @property
    def partial(self) -> bool:
        """Whether the run was interrupted before everything was measured."""
        return bool(self.interrupted) or any(timing is not None and timing.partial for timing in self._timings)

    @property
    def _timings(self) -> tuple[Timing | None, ...]:
        return (self.timing, self.onnx_timing)

    @property
    def equivalent(self) -> bool | None:
        """Whether every comparison that was made passed; None if none was made."""
        every = (self.comparison, self.archive_comparison, self.onnx_comparison)
        made = [comparison for comparison in every if comparison is not None]
        return all(comparison.passed for comparison in made) if made else None

    def to_html(self) -> str:
        """The report as one HTML page that needs nothing else."""
        from reparam.report.html import render_html

        return render_html(self)

    def to_markdown(self) -> str:
        """The report as GitHub's Markdown."""
        from reparam.report.markdown import render_markdown

        return render_markdown(self)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON types; infinities and NaN become strings, since JSON has no literal for them."""
        plain = _plain(
            {
                "model": self.model,
                "capture": self.capture,
                "equivalent": self.equivalent,
                "headline": headline(self).to_dict(),
                "before": self.before.to_dict(),
                "after": self.after.to_dict(),
                "rewrites": [rewrite.to_dict() for rewrite in self.rewrites],
                "refusals": [refusal.to_dict() for refusal in self.refusals],
                "undone": [undone.to_dict() for undone in self.undone],
                "choices": None if self.choices is None else [choice.to_dict() for choice in self.choices],
                "comparison": self.comparison and self.comparison.to_dict(),
                "archive_comparison": self.archive_comparison and self.archive_comparison.to_dict(),
                "onnx_comparison": self.onnx_comparison and self.onnx_comparison.to_dict(),
                "timing": self.timing and self.timing.to_dict(),
                "onnx_timing": self.onnx_timing and self.onnx_timing.to_dict(),
                "files": dict(self.files),
                "environment": dict(self.environment),
                "seconds": dict(self.seconds),
                "notes": list(self.notes),
                "partial": self.partial,
                "interrupted": self.interrupted,
                "graph": self.graph and self.graph.to_dict(),
            }
        )
        assert isinstance(plain, dict)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
