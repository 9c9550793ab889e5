"""An ONNX file in float64, and with weights that are wrong by one rounding: what a comparison needs of a reference.

In float64 every floating-point weight, constant, cast and input is one; attributes keep the values that they have. It
is run by onnxruntime where it has kernels for that, else by the `onnx` package's own evaluator, and only believed if
it agrees with the file as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reparam.errors import ExportError
from reparam.export.check import disagreement
from reparam.export.runtime import OnnxSession, UnsupportedByRuntimeError
from reparam.quiet import quiet, reason

if TYPE_CHECKING:
    import onnx

_QUANTISED = ("QuantizeLinear", "Integer", "QLinear", "QGemm", "QAttention")
# Their constants say how, not how much: a size that is wrong in its last bit is another size.
_STRUCTURAL = ("Resize", "Upsample", "Range", "Clip", "Pad", "Pow", "RoiAlign", "MaxRoiPool", "TopK", "OneHot", "Where")
_DTYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
_NARROW = (1, 10, 16)
_FLOAT64 = 11
_MOST_BYTES = 1_900_000_000
_TYPE_ATTRIBUTES = ("to", "dtype")

Arrays = Mapping[str, Any]
Runner = Callable[[list[str], Arrays], Sequence[Any]]


class Variant(OnnxSession):
    """The file of another session, run by something else: called alike, with the same names.

    Args:
        like: the session.
        runner: takes names of outputs and the inputs by name, and returns the outputs; NumPy arrays.
        dtype: of the floating-point inputs; None leaves them.
    """

    def __init__(self, like: OnnxSession, runner: Runner, dtype: torch.dtype | None) -> None:
        self.__dict__.update(like.__dict__)
        self._runner, self._dtype = runner, dtype

    def run_flat(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As `OnnxSession.run_flat`."""
        if len(tensors) != len(self._names):
            raise ExportError(f"{self.path.name} takes {len(self._names)} tensor(s) {self._names}, got {len(tensors)}")
        given = [t.to(self._dtype) if self._dtype and t.is_floating_point() else t for t in tensors]
        feeds = {
            name: t.detach().cpu().numpy() for name, t in zip(self._names, given, strict=True) if name in self.inputs
        }
        with quiet():
            arrays = self._runner(self._output_names, feeds)
        return [torch.from_numpy(np.array(array)) for array in arrays]


@dataclass(frozen=True)
class OnnxWeights:
    """The content of an ONNX file, and other files that can be made of it.

    Attributes:
        session: of the file as it is.
        proto: its content, with its external data.
        weights: the floating-point tensors in it, by name.
    """

    session: OnnxSession
    proto: onnx.ModelProto
    weights: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, session: OnnxSession) -> OnnxWeights:
        """Reads the file of a session.

        Raises:
            ExportError: it cannot be read.
        """
        import onnx
        from onnx.numpy_helper import to_array

        try:
            proto = onnx.load(str(session.path))
        except Exception as error:
            raise ExportError(f"{session.path} cannot be read: {reason(error)}") from error
        found = {
            name: _torch_of(to_array(tensor)).to(_DTYPES[tensor.data_type])
            for name, tensor in _tensors(proto)
            if tensor.data_type in _DTYPES
        }
        return cls(session, proto, found)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most weights; of the inputs where there are none; float32 failing both."""
        counts: dict[torch.dtype, int] = {}
        for tensor in self.weights.values():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        if not counts:
            kinds = [_DTYPES.get(value.type.tensor_type.elem_type) for value in self.proto.graph.input]
            counts = {kind: 1 for kind in kinds if kind is not None}
        return max(counts, key=lambda kind: counts[kind], default=torch.float32)

    def float64(self, example: Sequence[torch.Tensor]) -> Variant:
        """The file in float64, after it was seen to agree with the file as it is on an example.

        Raises:
            UnsupportedByRuntimeError: it cannot be had; the message is the reason.
        """
        self._require_widenable()
        made = self._wide(None)
        try:
            got, expected = made.run_flat(example), self.session.run_flat(example)
        except Exception as error:
            raise UnsupportedByRuntimeError(f"its evaluation fails: {reason(error)}") from error
        wrong = next(
            (a.dtype for a, b in zip(got, expected, strict=True) if b.is_floating_point() and a.dtype != torch.float64),
            None,
        )
        if wrong is not None:
            raise UnsupportedByRuntimeError(f"its evaluation falls back to {wrong}")
        difference = disagreement([a.to(b.dtype) for a, b in zip(got, expected, strict=True)], expected)
        if difference:
            raise UnsupportedByRuntimeError(f"its evaluation disagrees with onnxruntime: {difference}")
        return made

    def rounded64(self, known: Mapping[str, torch.Tensor], seed: int) -> Variant | None:
        """The file in float64 with the weights that are not among `known` wrong by one rounding; None if all are."""
        changed = {name: mask for name, mask in self._changed(known).items() if bool(mask.any())}
        return self._wide(self._moved(seed, changed)) if changed else None

    def disturbed(self, seed: int) -> Variant:
        """The file as it is, with all weights wrong by one rounding, in onnxruntime.

        Raises:
            UnsupportedByRuntimeError: its weights exceed what can be held in one piece.
        """
        every = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in self.weights.items()}
        return Variant(self.session, _in_onnxruntime(self._with(self._moved(seed, every), wide=False)), None)

    def _wide(self, values: Mapping[str, torch.Tensor] | None) -> Variant:
        from onnx.reference import ReferenceEvaluator

        proto = self._with(values or {}, wide=True)
        try:
            runner = _in_onnxruntime(proto)
        except UnsupportedByRuntimeError:
            try:
                evaluator = ReferenceEvaluator(proto)
            except Exception as error:
                raise UnsupportedByRuntimeError(f"nothing here runs it in float64: {reason(error)}") from error
            runner = lambda names, feeds: evaluator.run(names, dict(feeds))  # noqa: E731
        return Variant(self.session, runner, torch.float64)

    def _require_widenable(self) -> None:
        local = {(function.domain, function.name) for function in self.proto.functions}
        for node in _nodes(self.proto):
            if any(part in node.op_type for part in _QUANTISED):
                raise UnsupportedByRuntimeError(f"it is quantised ({node.op_type})")
            if node.domain not in ("", "ai.onnx") and (node.domain, node.op_type) not in local:
                raise UnsupportedByRuntimeError(f"{node.domain}::{node.op_type} has no float64 form")

    def _with(self, values: Mapping[str, torch.Tensor], *, wide: bool) -> onnx.ModelProto:
        """A copy with other values of some weights; in float64 throughout if `wide`."""
        import onnx

        if sum(weight.numel() * 8 for weight in self.weights.values()) > _MOST_BYTES:
            raise UnsupportedByRuntimeError("its weights exceed what one ONNX message can hold")
        copied = onnx.ModelProto()
        copied.CopyFrom(self.proto)
        for name, tensor in _tensors(copied):
            if tensor.data_type in _DTYPES:
                _store(tensor, values.get(name, self.weights[name]), wide)
        if wide:
            _widen(copied)
        return copied

    def _moved(self, seed: int, changed: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights in float64, moved by up to a unit roundoff of each element where `changed` says so."""
        generator = torch.Generator().manual_seed(seed)
        structural = {name for node in _nodes(self.proto) if node.op_type in _STRUCTURAL for name in node.input}
        moved = {}
        for name, weight in self.weights.items():
            if name in changed and name not in structural:
                draws = torch.rand(weight.shape, generator=generator, dtype=torch.float64, device="cpu").mul_(2).sub_(1)
                exact = weight.double()
                step = draws * exact.abs() * (torch.finfo(self.dtype).eps / 2)
                moved[name] = torch.where(changed[name] & exact.isfinite(), exact + step, exact)
        return moved

    def _changed(self, known: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Where each weight differs from the one of `known` that it was; a matrix may have been transposed."""
        by_print: dict[Any, torch.Tensor] = {}
        for tensor in known.values():
            if tensor.is_floating_point():
                for form in (tensor, tensor.T) if tensor.dim() == 2 else (tensor,):
                    by_print.setdefault(_fingerprint(form), form)
        found = {}
        for name, weight in self.weights.items():
            same = by_print.get(_fingerprint(weight))
            found[name] = torch.ones_like(weight, dtype=torch.bool) if same is None else weight != same.to(weight.dtype)
        return found


def _in_onnxruntime(proto: onnx.ModelProto) -> Runner:
    """A session of a model in memory, on the CPU, without optimisations.

    Raises:
        UnsupportedByRuntimeError: onnxruntime cannot run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), sess_options=options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise UnsupportedByRuntimeError(f"onnxruntime cannot run it: {reason(error)}") from error
    return lambda names, feeds: session.run(names, dict(feeds))


def _graphs(proto: onnx.ModelProto) -> Iterator[Any]:
    """The graph, all graphs inside of its nodes, and local functions."""
    waiting: list[Any] = [proto.graph, *proto.functions]
    while waiting:
        graph = waiting.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    waiting.append(attribute.g)
                waiting += attribute.graphs


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(proto):
        yield from graph.node


def _tensors(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Every stored tensor with a name: initializers, and the values of constants."""
    for number, graph in enumerate(_graphs(proto)):
        inside = f"{number}/" if number else ""
        for tensor in getattr(graph, "initializer", ()):
            yield f"{inside}{tensor.name}", tensor
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name == "value" and attribute.HasField("t"):
                    yield f"{inside}{node.output[0]}", attribute.t


def _store(tensor: onnx.TensorProto, value: torch.Tensor, wide: bool) -> None:
    """Other values for a tensor; float64 if `wide`, else in its own type."""
    from onnx.numpy_helper import from_array

    if wide:
        made = from_array(value.double().numpy())
    elif tensor.data_type == 16:  # NumPy has no bfloat16
        made = from_array(value.to(torch.bfloat16).view(torch.int16).numpy())
        made.data_type = tensor.data_type
    else:
        made = from_array(value.to(_DTYPES[tensor.data_type]).numpy())
    made.name = tensor.name
    tensor.CopyFrom(made)


def _widen(proto: onnx.ModelProto) -> None:
    """Types of inputs and outputs, and of what nodes cast to or make."""
    from onnx.numpy_helper import from_array

    for graph in _graphs(proto):
        for value in [*getattr(graph, "input", ()), *getattr(graph, "output", ())]:
            if not isinstance(value, str) and value.type.tensor_type.elem_type in _NARROW:
                value.type.tensor_type.elem_type = _FLOAT64
        del graph.value_info[:]
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name in _TYPE_ATTRIBUTES and attribute.i in _NARROW:
                    attribute.i = _FLOAT64
                elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                    numbers = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                    attribute.Clear()
                    attribute.name, attribute.type = "value", 4
                    attribute.t.CopyFrom(from_array(np.array(numbers, np.float64)))


def _torch_of(array: Any) -> torch.Tensor:
    wide = array if array.dtype in (np.float16, np.float32, np.float64) else array.astype(np.float32)
    return torch.from_numpy(np.array(wide))


def _fingerprint(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.shape, *tensor.detach().flatten()[:16].double().tolist())
