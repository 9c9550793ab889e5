"""reparam: turn a trained PyTorch model into its inference form, and prove by measurement that nothing changed.

The public names are loaded when they are first used, so that `reparam --help` need not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from reparam.bench import Timing
    from reparam.capture.inference import register_inference_form, unregister_inference_form
    from reparam.capture.load import load
    from reparam.equivalence import Comparison, verify
    from reparam.errors import CaptureError, ExportError, InputError, NotEquivalentError, OtherInputError, ReparamError
    from reparam.export import export_archive, export_onnx
    from reparam.graph.register import OpCall, register_linear_op, unregister_linear_op
    from reparam.latency import benchmark
    from reparam.passes.base import Refusal, Rewrite
    from reparam.pipeline import FuseResult, fuse
    from reparam.report import Report

_HOMES = {
    "CaptureError": "reparam.errors",
    "Comparison": "reparam.equivalence",
    "ExportError": "reparam.errors",
    "FuseResult": "reparam.pipeline",
    "InputError": "reparam.errors",
    "NotEquivalentError": "reparam.errors",
    "OpCall": "reparam.graph.register",
    "OtherInputError": "reparam.errors",
    "Refusal": "reparam.passes.base",
    "ReparamError": "reparam.errors",
    "Report": "reparam.report",
    "Rewrite": "reparam.passes.base",
    "Timing": "reparam.bench",
    "benchmark": "reparam.latency",
    "export_archive": "reparam.export",
    "export_onnx": "reparam.export",
    "fuse": "reparam.pipeline",
    "load": "reparam.capture.load",
    "register_inference_form": "reparam.capture.inference",
    "register_linear_op": "reparam.graph.register",
    "unregister_inference_form": "reparam.capture.inference",
    "unregister_linear_op": "reparam.graph.register",
    "verify": "reparam.equivalence",
}

__all__ = [
    "CaptureError",
    "Comparison",
    "ExportError",
    "FuseResult",
    "InputError",
    "NotEquivalentError",
    "OpCall",
    "OtherInputError",
    "Refusal",
    "ReparamError",
    "Report",
    "Rewrite",
    "Timing",
    "__version__",
    "benchmark",
    "export_archive",
    "export_onnx",
    "fuse",
    "load",
    "register_inference_form",
    "register_linear_op",
    "unregister_inference_form",
    "unregister_linear_op",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'reparam' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
