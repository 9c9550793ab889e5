"""`Exported`: what `reparam export` did. Plain data; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reparam.export.written import OnnxFile
    from reparam.report.values import Report


@dataclass(frozen=True)
class Exported:
    """What `export` did.

    Attributes:
        model: class and file of the model.
        file: what was written.
        report: what fusing did; None where the original was exported as it is.
        kept: a sentence for each node of the file that inference does not need: why it stays.
        seconds: wall-clock time of each stage.
    """

    model: str
    file: OnnxFile
    report: Report | None = None
    kept: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The value as plain JSON types."""
        return {
            "model": self.model,
            "fused": self.report is not None,
            "file": self.file.to_dict(),
            "kept": list(self.kept),
            "fusing": self.report and self.report.to_dict(),
            "seconds": dict(self.seconds),
        }
