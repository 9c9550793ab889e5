"""An ONNX file as a callable: torch tensors in, torch tensors out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from reparam.errors import ExportError
from reparam.quiet import MAX_REASON, deepest

CALL_KEY = "reparam.call"
# onnxruntime's log severities: only fatal ones, because every failure arrives as an exception as well.
FATAL = 4


class UnsupportedByRuntimeError(ExportError):
    """onnxruntime is missing, or has no kernel for an operator or element type of a valid file."""


class OnnxSession:
    """Runs an ONNX file with onnxruntime.

    Called like the module that was exported: the same positional and keyword arguments (flags and other arguments that
    are no tensors are fixed in the file and may not differ). The outputs come in the module's containers where the file
    was written by this package and the module returns nothing but tensors and None; otherwise as a list of tensors.

    Args:
        path: the file.
        threads: number of threads within an operator; None leaves it to onnxruntime.
        providers: onnxruntime's execution providers in order of preference; None is the CPU alone.

    Attributes:
        inputs, outputs: names, in the file's order.
        providers: the execution providers in use.

    Raises:
        UnsupportedByRuntimeError: onnxruntime is not installed, a provider is not there, or a kernel is missing.
        ExportError: the file is missing or is not a valid ONNX model.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, providers: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ExportError(f"{path} does not exist; give the path of an ONNX file")
        self._session = _open(self.path, threads, tuple(providers or ("CPUExecutionProvider",)))
        self.inputs = tuple(value.name for value in self._session.get_inputs())
        self.outputs = tuple(value.name for value in self._session.get_outputs())
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        text = self._session.get_modelmeta().custom_metadata_map.get(CALL_KEY)
        call: dict[str, Any] = json.loads(text) if text else {}
        # Order in which the tensors of a call arrive, which need not be the order of the file's inputs.
        self._names: list[str] = call.get("inputs") or list(self.inputs)
        self._parameters: list[str] | None = call.get("parameters", list(self.inputs))
        self._arguments: list[str] = call.get("arguments", list(self.inputs))
        self._fixed: dict[str, list[str]] = call.get("fixed", {})
        self._output_names: list[str] = call.get("outputs") or list(self.outputs)
        structure = call.get("structure")
        self._structure = pytree.treespec_loads(structure) if structure else None
        self._present: list[bool] = call.get("present", [])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        flat = self.run_flat(self._flatten(args, kwargs))
        if self._structure is None:
            return flat
        tensors = iter(flat)
        return pytree.tree_unflatten([next(tensors) if p else None for p in self._present], self._structure)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the inputs in the order in which a call gives their tensors."""
        return tuple(self._names)

    @property
    def metadata(self) -> dict[str, str]:
        """Text that the file keeps beside the model."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    @property
    def returns_a_list(self) -> bool:
        """Whether a call returns a list of tensors, and not the containers of the module that was exported."""
        return self._structure is None

    @property
    def takes_names(self) -> bool:
        """Whether a call may give the tensors by the names of the inputs."""
        return self._arguments == self._names

    def takes_other_sizes(self, tensors: Sequence[torch.Tensor]) -> bool | Literal["batch"]:
        """Whether the file leaves every axis but the channels open, for tensors given in the order of a call.

        Returns:
            "batch" if axis 0 is open in all of them, and another axis in not all.
        """
        shapes = {value.name: value.shape for value in self._session.get_inputs()}
        fixed = {
            axis
            for name, tensor in zip(self._names, tensors, strict=False)
            if name in shapes and len(shapes[name]) == tensor.ndim
            for axis in range(tensor.ndim)
            if axis != 1 and isinstance(shapes[name][axis], int)
        }
        return not fixed if 0 in fixed or not fixed else "batch"

    def run_flat(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Runs the file on tensors in the order in which the exported call had them.

        Raises:
            ExportError: number, dtype or size of the tensors does not fit the file.
        """
        if len(tensors) != len(self._names):
            raise ExportError(f"{self.path.name} takes {len(self._names)} tensor(s) {self._names}, got {len(tensors)}")
        try:
            feeds = {
                name: tensor.detach().cpu().numpy()
                for name, tensor in zip(self._names, tensors, strict=True)
                if name in self.inputs
            }
            arrays = self._session.run(self._output_names, feeds)
        except Exception as error:
            raise ExportError(f"onnxruntime cannot run {self.path.name}: {_plainly(error)}") from error
        device = tensors[0].device if tensors else torch.device("cpu")
        return [torch.from_numpy(array).to(device) for array in arrays]

    def _flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """The tensors of a call in the order of the exported call, whether given by position or by name."""
        if self._parameters is None or len(args) > len(self._parameters):
            # forward(*args) has no names for them; a wrong number is reported by run_flat.
            given = [*args, *(kwargs[name] for name in self._arguments if name in kwargs)]
        else:
            by_name = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
            for name, value in by_name.items():
                if name not in self._arguments and any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value)):
                    raise ExportError(f"{self.path.name} has no input for {name!r}; it takes {self._arguments}")
                if fixed_values(value) != self._fixed.get(name, fixed_values(value)):
                    raise ExportError(f"{name!r} is fixed in {self.path.name}; export again with the value you need")
            given = [by_name[name] for name in self._arguments if name in by_name]
        return [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]


def fixed_values(argument: Any) -> list[str]:
    """What of an argument becomes a constant in an exported file: everything that is no tensor."""
    return [repr(leaf) for leaf in pytree.tree_leaves(argument) if not isinstance(leaf, torch.Tensor)]


def _open(path: Path, threads: int | None, providers: tuple[str, ...]) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UnsupportedByRuntimeError(
            "onnxruntime is not installed; install it with `pip install onnxruntime`"
        ) from error
    missing = [provider for provider in providers if provider not in onnxruntime.get_available_providers()]
    if missing:
        raise UnsupportedByRuntimeError(
            f"onnxruntime has no {missing[0]} here; available: {', '.join(onnxruntime.get_available_providers())}"
        )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=list(providers))
    except Exception as error:
        if type(error).__name__ == "NotImplemented":
            raise UnsupportedByRuntimeError(f"onnxruntime cannot run {path.name}: {_plainly(error)}") from error
        raise ExportError(f"onnxruntime cannot open {path.name}: {_plainly(error)}") from error


def _plainly(error: BaseException) -> str:
    """onnxruntime's message on one line, without its codes and its advice."""
    text = " ".join(str(deepest(error)).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = text.removesuffix("Please fix either the inputs/outputs or the model.").rstrip(" .")
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
