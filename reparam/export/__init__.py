"""A module becomes a file: ONNX, or a `torch.export` archive. onnx, onnxsim and onnxruntime are imported lazily."""

from __future__ import annotations

from reparam.export.archive import export_archive
from reparam.export.onnx import export_onnx
from reparam.export.runtime import OnnxSession, UnsupportedByRuntimeError
from reparam.export.specs import OnnxInput, onnx_inputs
from reparam.export.wide import OnnxWeights
from reparam.export.written import OnnxFile

__all__ = [
    "OnnxFile",
    "OnnxInput",
    "OnnxSession",
    "OnnxWeights",
    "UnsupportedByRuntimeError",
    "export_archive",
    "export_onnx",
    "onnx_inputs",
]
