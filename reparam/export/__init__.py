"""A module becomes a file: ONNX, or a `torch.export` archive. onnx, onnxsim and onnxruntime are imported lazily."""

from __future__ import annotations

from reparam.export.archive import export_archive
from reparam.export.onnx import OnnxFile, export_onnx
from reparam.export.runtime import OnnxSession

__all__ = ["OnnxFile", "OnnxSession", "export_archive", "export_onnx"]
