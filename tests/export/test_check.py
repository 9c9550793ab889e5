"""What is damaged on the way into an ONNX file is found, and what rounding explains is no damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from reparam import fuse
from reparam.errors import ExportError
from reparam.export import OnnxSession, export_onnx
from reparam.export import simplify as simplify_module
from reparam.export import staged as staged_module
from reparam.export.check import check_weights, disagreement, rounding_of
from reparam.export.proto import save
from reparam.export.shapes import Probe
from reparam.inputs import Inputs
from tests.export import nets
from tests.export.test_onnx import image, same_answers


def sabotaged(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """From now on the exporter's graph is damaged before it is saved."""
    from reparam.export import proto

    genuine = proto.build

    def build(plan: Any, freedom: Any) -> Any:
        built = genuine(plan, freedom)
        change(built.proto.graph)
        return built

    monkeypatch.setattr(staged_module, "build", build)


def _scale_weight(graph: Any) -> None:
    tensor = next(t for t in graph.initializer if len(t.dims) == 4)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] += 0.5
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _drop_bias(graph: Any) -> None:
    node = next(n for n in graph.node if n.op_type == "Conv")
    del node.input[2]


def _insert_nan(graph: Any) -> None:
    tensor = next(t for t in graph.initializer if len(t.dims) == 1)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[0] = float("nan")
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _nudge_weight(graph: Any) -> None:
    """One weight by one part in ten thousand: nothing that a run would show."""
    tensor = next(t for t in graph.initializer if len(t.dims) == 4)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array.reshape(-1)[0] *= 1.0001
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))


def _swap_channels(graph: Any) -> None:
    tensor = next(t for t in graph.initializer if len(t.dims) == 1)
    array = onnx.numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(onnx.numpy_helper.from_array(array[[1, 0, *range(2, len(array))]], tensor.name))


def _break_name(graph: Any) -> None:
    graph.node[0].input[0] = "nothing"


@pytest.mark.parametrize("change", [_scale_weight, _nudge_weight, _swap_channels, _drop_bias, _insert_nan, _break_name])
def test_a_damaged_graph_is_not_published(change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged(monkeypatch, change)
    with pytest.raises(ExportError, match=r"disagrees with the module|invalid ONNX|other values than"):
        export_onnx(
            fuse(nets.lively(nets.Plain()), image(), verify=False).module,
            image(),
            tmp_path / "n.onnx",
            dynamic_size=False,
            dynamic_batch=False,
        )
    assert list(tmp_path.iterdir()) == []


def simplified_by(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """From now on this is what onnxsim does to a graph."""

    def run(source: Path, target: Path, seconds: float) -> None:
        model = onnx.load(str(source))
        change(model.graph)
        onnx.save_model(model, str(target))

    monkeypatch.setattr(simplify_module, "_run", run)


def test_a_simplification_with_other_weights_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(graph: Any) -> None:
        del graph.node[-1]  # the second ReLU
        graph.node[-1].output[0] = graph.output[0].name
        _nudge_weight(graph)

    simplified_by(monkeypatch, change)
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.ReLU()).eval()
    file = export_onnx(module, image(), tmp_path / "n.onnx")
    assert not file.simplified
    assert any("other values" in note for note in file.notes)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (4, 3), (12,), (3, 4, 1, 1)])
def test_weights_are_compared_to_the_last_bit(
    shape: tuple[int, ...], external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reparam.export.check._BLOCK", 5)
    monkeypatch.setattr("reparam.export.proto.LEAST_EXTERNAL_BYTES", 1)
    weight = torch.randn(3, 4)
    stored = weight.T.contiguous() if shape == (4, 3) else weight.reshape(shape)
    graph = onnx.GraphProto(initializer=[onnx.numpy_helper.from_array(stored.numpy(), "w")])
    path = tmp_path / "n.onnx"
    assert save(onnx.ModelProto(graph=graph), path, 0 if external else 1000) == external
    check_weights(path, {"w": weight})
    # A weight that the file has not was combined with others; those may then differ.
    check_weights(path, {"w": weight + 1, "other": weight})
    for place in ((0, 0), (1, 2), (2, 3)):
        off = weight.clone()
        off[place] = torch.nextafter(off[place], torch.tensor(9.0))
        with pytest.raises(ExportError, match="the weight w"):
            check_weights(path, {"w": off})


def test_a_scalar_weight_is_compared_too(tmp_path: Path) -> None:
    graph = onnx.GraphProto(initializer=[onnx.numpy_helper.from_array(np.float32(2.5), "w")])
    save(onnx.ModelProto(graph=graph), tmp_path / "n.onnx", 1000)
    check_weights(tmp_path / "n.onnx", {"w": torch.tensor(2.5)})
    with pytest.raises(ExportError, match="the weight w"):
        check_weights(tmp_path / "n.onnx", {"w": torch.tensor(2.0)})


def test_a_wrong_simplification_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(graph: Any) -> None:
        assert graph.node[-1].op_type == "Conv"
        del graph.node[0]  # an invalid graph

    simplified_by(monkeypatch, change)
    module = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)).eval()
    file = export_onnx(module, image(), tmp_path / "n.onnx")
    assert not file.simplified
    assert any("onnxsim's result was dropped" in note for note in file.notes)
    same_answers(OnnxSession(file.path), module, image(2))


DIFFERENCES = [
    ([torch.ones(3)], [torch.ones(3)], ""),
    ([torch.ones(3)], [torch.ones(2)], "shape"),
    ([torch.ones(3)], [torch.ones(3), torch.ones(3)], "1 outputs instead of 2"),
    ([torch.ones(3).double()], [torch.ones(3)], "float64"),
    ([torch.ones(3) * 1.01], [torch.ones(3)], "off by"),
    ([torch.tensor([1.0, float("nan")])], [torch.ones(2)], "not a number"),
    ([torch.zeros(3)], [torch.zeros(3)], ""),
    ([torch.full((3,), 1e-9)], [torch.zeros(3)], "off by"),
    ([torch.arange(4)], [torch.arange(4)], ""),
    ([torch.arange(4)], [torch.arange(4).flip(0)], "100% of output 0 differ"),
    ([torch.tensor([1.0, float("inf")])], [torch.tensor([1.0, -float("inf")])], "infinite"),
]


@pytest.mark.parametrize(("got", "expected", "phrase"), DIFFERENCES)
def test_disagreement(got: list[torch.Tensor], expected: list[torch.Tensor], phrase: str) -> None:
    assert phrase in disagreement(got, expected)
    assert bool(phrase) == bool(disagreement(got, expected))


class _Amplifier(nn.Module):
    """A sum that cancels: in float32 little of the answer is left."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return (y + 1e5) - 1e5  # type: ignore[no-any-return]


def test_what_rounding_explains_is_no_disagreement() -> None:
    model = _Amplifier().eval()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer = model(x)
    noise = rounding_of(model, Probe(Inputs.of(x), (answer,)))
    assert noise[0] > 1e-4
    moved = answer + 2.0 * noise[0]
    assert "off by" in disagreement([moved], [answer])
    assert not disagreement([moved], [answer], noise)
    assert "off by" in disagreement([answer + 10.0 * noise[0]], [answer], noise)


class _OnlyFloat32(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.float32
        return x * 2


def test_a_module_that_does_not_run_in_float64_excuses_nothing() -> None:
    x = torch.ones(2, 3)
    assert rounding_of(_OnlyFloat32(), Probe(Inputs.of(x), (x * 2,))) == [0.0]
