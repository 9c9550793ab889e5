"""What happened to a model, as a value, as text and as JSON. Reads result values only; pure functions."""

from __future__ import annotations

from reparam.report.files import write_report
from reparam.report.values import OperationCounts, Report
from reparam.report.view import GraphView, NodeView

__all__ = ["GraphView", "NodeView", "OperationCounts", "Report", "write_report"]
