"""The errors a user can cause. Each message is one sentence: what happened, where, and what to do next.

The command line prints the message and exits with `exit_status`; it never shows a traceback for one of these.
"""

from __future__ import annotations

from typing import Any


class ReparamError(Exception):
    """Base of every error this package raises on purpose."""

    exit_status = 2


class InputError(ReparamError):
    """A file, an option or an example input cannot be used."""


class CaptureError(ReparamError):
    """The model's graph cannot be captured."""


class UnfitModelError(CaptureError):
    """The model does what no graph can hold, however it is captured: it keeps state in Python, or draws numbers."""


class ExportError(ReparamError):
    """The model cannot be written to, or read back from, an exchange format."""


class OtherInputError(ReparamError, ValueError):
    """A fused model was given an input for which its graph does not hold: another rank, other keys, another flag."""


class NotEquivalentError(ReparamError):
    """The fused model does not compute what the original computes.

    `report` is the full `reparam.Report`, so that the figures are not lost with the model; `comparison` is that of an
    ONNX file, where there is no such report.
    """

    exit_status = 1

    def __init__(self, message: str, report: Any = None, comparison: Any = None) -> None:
        super().__init__(message)
        self.report = report
        self.comparison = comparison
