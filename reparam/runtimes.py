"""Runtimes that run an exported file, as backends of `reparam.bench`: onnxruntime's providers and OpenVINO.

They stand here because this is the lowest room that may import both the measurement and the exporters. Each exports the
module for the example's sizes, as `reparam.export_onnx` does, opens the file, and deletes it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from reparam.bench.backends import Backend, Job
from reparam.errors import ExportError
from reparam.export import OnnxFile, OnnxSession, export_onnx
from reparam.export.providers import missing_provider
from reparam.quiet import reason

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
FOLDS = "{} folds BatchNorm into the layer before it by itself when it loads a file"


@contextlib.contextmanager
def _exported(job: Job) -> Iterator[OnnxFile]:
    """The module as a file, for as long as the block runs."""
    with tempfile.TemporaryDirectory(prefix="reparam-") as folder:
        path = Path(folder) / "model.onnx"
        yield export_onnx(job.module, job.inputs, path, dynamic_batch=False, dynamic_size=False, verify="quick")


def _onnxruntime(provider: str) -> Backend:
    """onnxruntime with one of its providers; inputs and outputs are on the host, and moving them is part of a call."""
    device = "cpu" if provider == CPU else "cuda"

    def missing(where: torch.device) -> str:
        if where.type != device:
            return f"{provider} runs on {device}, and the model is on {where.type}; choose --device {device}"
        return missing_provider(provider)

    def build(job: Job) -> Callable[..., Any]:
        providers = dict.fromkeys((provider, *((CUDA,) if provider == TENSORRT else ()), CPU))
        with _exported(job) as file:
            session = OnnxSession(file.path, threads=job.threads or torch.get_num_threads(), providers=list(providers))
        if provider not in session.providers:
            raise ExportError(
                f"onnxruntime fell back from {provider} to {session.providers[0]}; its libraries are missing"
            )
        return session

    return Backend(build, missing, torch=False, folds=FOLDS.format("onnxruntime"))


def _no_openvino(where: torch.device) -> str:
    if where.type != "cpu":
        return f"OpenVINO is measured on the CPU, and the model is on {where.type}; choose --device cpu"
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed; install it with `pip install openvino`"
    return ""


class OpenVinoModel:
    """An ONNX file in OpenVINO on the CPU: tensors in, list of tensors out.

    Args:
        file: what was exported; its inputs are in the order of the tensors of a call.
        threads: of OpenVINO's inference.

    Raises:
        ExportError: OpenVINO cannot read or compile the file.
    """

    def __init__(self, file: OnnxFile, threads: int) -> None:
        openvino = importlib.import_module("openvino")
        try:
            core = openvino.Core()
            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
            self._compiled = core.compile_model(core.read_model(str(file.path)), "CPU", settings)
        except Exception as error:
            raise ExportError(f"OpenVINO cannot load the exported file: {reason(error)}") from error
        self._names = file.inputs
        self._wanted = {value.any_name for value in self._compiled.inputs}

    def __call__(self, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
        """Runs the model on the tensors among the arguments, which stand in the order of the export."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        feeds = {
            name: tensor.detach().numpy()
            for name, tensor in zip(self._names, tensors, strict=True)
            if name in self._wanted
        }
        results = self._compiled(feeds)
        return [torch.from_numpy(results[number]) for number in range(len(self._compiled.outputs))]


def _openvino(job: Job) -> Callable[..., Any]:
    with _exported(job) as file:
        return OpenVinoModel(file, job.threads or torch.get_num_threads())


RUNTIMES: Mapping[str, Backend] = {
    "onnxruntime": _onnxruntime(CPU),
    "onnxruntime-cuda": _onnxruntime(CUDA),
    "onnxruntime-tensorrt": _onnxruntime(TENSORRT),
    "openvino": Backend(_openvino, _no_openvino, torch=False, folds=FOLDS.format("OpenVINO")),
}
"""By name, as for `backends` of `reparam.benchmark`."""
