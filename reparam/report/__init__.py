"""What happened to a model, as a value, as text and as JSON. Reads result values only; pure functions."""

from __future__ import annotations

from reparam.report.values import OperationCounts, Report

__all__ = ["OperationCounts", "Report"]
