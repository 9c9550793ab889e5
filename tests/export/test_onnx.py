"""ONNX files: valid, right at sizes other than the example's, honest about the axes that stayed fixed."""

from __future__ import annotations

import io
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reparam import fuse
from reparam.errors import ExportError
from reparam.export import OnnxFile, OnnxSession, export_onnx, program
from reparam.export import simplify as simplify_module
from reparam.export import staged as staged_module
from reparam.export.check import check_weights, disagreement, rounding_of
from reparam.export.proto import _with_all_constants, save
from reparam.export.shapes import Probe, tensor_leaves
from reparam.inputs import Inputs
from tests.export import nets
from tests.support import sampled

torch.set_num_threads(1)
OPEN = {0: "batch", 2: "height", 3: "width"}


def image(batch: int = 1, height: int = 16, width: int = 16, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(batch + 10 * height + width)
    return torch.randn(batch, channels, height, width, generator=generator)


def keywords(batch: int, size: int = 16) -> dict[str, Any]:
    return {"x": image(batch, size), "double": True, "shift": torch.randn(batch, 4, 1, 1), "scale": torch.rand(1)}


# name, module, example, dynamic axes, other calls that must work
ACCEPT: list[tuple[str, nn.Module, Any, dict[str, dict[int, str]], list[Any]]] = [
    ("plain", nets.Plain(), image(), {"image": OPEN}, [image(3), image(2, 32, 24), image(1, 17, 9)]),
    ("batch of four", nets.Plain(), image(4), {"image": OPEN}, [image(1), image(5, 20, 30)]),
    ("flatten", nets.Flattened(), image(), {"x": {0: "batch"}}, [image(4)]),
    (
        "two inputs, dict of outputs",
        nets.TwoInputs(),
        (image(), image(channels=2)),
        {"left": OPEN, "right": OPEN},
        [(image(3, 20), image(3, 20, channels=2)), {"right": image(2, channels=2), "left": image(2)}],
    ),
    (
        "keywords",
        nets.Keywords(),
        keywords(1),
        {"x": OPEN, "shift": {0: "batch"}, "scale": {}},
        [keywords(3), keywords(2, 24)],
    ),
    ("batch in the code", nets.OneImage(), image(), {"x": {}}, []),
    ("sizes baked in by the exporter", nets.Pooled(), image(), {"x": {0: "batch"}}, [image(3)]),
    ("branch on the size", nets.Padded(), image(), {"x": {0: "batch"}}, [image(3)]),
    (
        "forward(*args)",
        nets.Listed(),
        (image(), image(height=8, width=8).repeat(1, 1, 2, 2)),
        {},
        [(image(2), image(2))],
    ),
]


def same_answers(session: Any, module: nn.Module, example: Any) -> None:
    inputs = Inputs.of(example)
    expected, got = inputs.call(module), inputs.call(session)
    assert torch.utils._pytree.tree_structure(got) == torch.utils._pytree.tree_structure(expected)
    assert not disagreement(tensor_leaves(got), tensor_leaves(expected))


@pytest.mark.parametrize(
    ("name", "module", "example", "axes", "others"), sampled(ACCEPT, 2), ids=[row[0] for row in ACCEPT]
)
def test_file_answers_like_the_module_at_other_sizes(
    name: str, module: nn.Module, example: Any, axes: dict[str, Any], others: list[Any], tmp_path: Path
) -> None:
    nets.lively(module)
    file = export_onnx(module, example, tmp_path / "net.onnx")
    if axes:
        assert file.dynamic_axes == axes
    assert file.checked
    assert file.bytes == (tmp_path / "net.onnx").stat().st_size
    assert "BatchNormalization" not in file.nodes
    session = OnnxSession(file.path, threads=1)
    for call in [example, *others]:
        same_answers(session, module, call)
    graph = onnx.load(str(file.path)).graph
    assert tuple(value.name for value in graph.output) == file.outputs
    assert sorted(value.name for value in graph.input) == sorted(file.inputs)
    assert sum(file.nodes.values()) == len(graph.node)


NAMES = [
    (nets.Plain(), image(), ("image",), ("output",)),
    (nets.TwoInputs(), (image(), image(channels=2)), ("left", "right"), ("sum", "left_only")),
    (nets.Keywords(), keywords(1), ("x", "scale", "shift"), ("output_0", "output_1_0", "output_1_1")),
]


@pytest.mark.parametrize(("module", "example", "inputs", "outputs"), NAMES, ids=["one", "dict", "nested"])
def test_names_come_from_forward(module: nn.Module, example: Any, inputs: Any, outputs: Any, tmp_path: Path) -> None:
    file = export_onnx(module.eval(), example, tmp_path / "n.onnx", dynamic_size=False)
    assert set(file.inputs) == set(inputs)
    assert file.outputs == outputs


def test_weights_keep_their_state_dict_names(tmp_path: Path) -> None:
    module = nets.TwoInputs().eval()
    file = export_onnx(module, (image(), image(channels=2)), tmp_path / "n.onnx", simplify=False)
    names = {tensor.name for tensor in onnx.load(str(file.path)).graph.initializer}
    assert names >= set(module.state_dict())


def test_names_can_be_chosen_and_are_checked(tmp_path: Path) -> None:
    module = nets.TwoInputs().eval()
    example = (image(), image(channels=2))
    file = export_onnx(module, example, tmp_path / "n.onnx", input_names=["a", "b"], output_names=["c", "d"])
    assert (file.inputs, file.outputs) == (("a", "b"), ("c", "d"))
    got = OnnxSession(file.path)(*example)
    assert list(got) == ["sum", "left_only"]
    with pytest.raises(ExportError, match=r"input_names has 1 name\(s\).*2 input"):
        export_onnx(module, example, tmp_path / "m.onnx", input_names=["a"])
    with pytest.raises(ExportError, match="used both"):
        export_onnx(module, example, tmp_path / "m.onnx", input_names=["a", "b"], output_names=["a", "d"])
    assert not (tmp_path / "m.onnx").exists()


def test_dynamic_axes_are_off_when_asked(tmp_path: Path) -> None:
    module = nets.lively(nets.Plain())
    file = export_onnx(module, image(2), tmp_path / "n.onnx", dynamic_batch=False, dynamic_size=False)
    assert file.dynamic_axes == {"image": {}}
    assert file.notes == ()
    with pytest.raises(
        ExportError, match=r"onnxruntime cannot run n\.onnx: Got invalid dimensions .* Got: 3 Expected: 2"
    ):
        OnnxSession(file.path)(image(3))


@pytest.mark.slow
def test_what_stays_fixed_is_said(tmp_path: Path) -> None:
    assert any("size" in n for n in export_onnx(nets.Flattened().eval(), image(), tmp_path / "a.onnx").notes)
    assert any("batch" in n for n in export_onnx(nets.OneImage().eval(), image(), tmp_path / "b.onnx").notes)
    pooled = export_onnx(nets.Pooled().eval(), image(), tmp_path / "c.onnx")
    assert any("disagrees with the module" in note for note in pooled.notes)


def test_module_and_example_are_not_changed(tmp_path: Path) -> None:
    module = nets.lively(nets.Plain()).train()
    module.fc.eval()
    example = image()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    modes = [part.training for part in module.modules()]
    kept = example.clone()
    export_onnx(module, example, tmp_path / "n.onnx")
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(example, kept)
    same_answers(OnnxSession(tmp_path / "n.onnx"), module.eval(), example)


def test_metadata_and_provenance(tmp_path: Path) -> None:
    file = export_onnx(nets.Plain().eval(), image(), tmp_path / "n.onnx", metadata={"dataset": "digits"}, opset=21)
    model = onnx.load(str(file.path))
    props = {entry.key: entry.value for entry in model.metadata_props}
    assert props["dataset"] == "digits"
    assert props["torch.version"] == torch.__version__
    assert "reparam.version" in props
    assert file.opset == 21 == next(o.version for o in model.opset_import if o.domain == "")


def test_external_data_beyond_the_threshold(tmp_path: Path) -> None:
    module = nets.lively(nets.Flattened())
    file = export_onnx(module, image(), tmp_path / "n.onnx", external_data_bytes=10_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["n.onnx", "n.onnx.data"]
    assert file.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    assert (tmp_path / "n.onnx").stat().st_size < 10_000
    same_answers(OnnxSession(file.path), module, image(3))


DTYPES = [(torch.float16, True), (torch.bfloat16, False), (torch.float64, False)]


@pytest.mark.parametrize(("dtype", "runs"), sampled(DTYPES, 3), ids=str)
def test_other_dtypes_are_written_and_the_file_says_whether_it_could_be_run(
    dtype: torch.dtype, runs: bool, tmp_path: Path
) -> None:
    module = nets.Flattened().eval().to(dtype)
    file = export_onnx(module, image().to(dtype), tmp_path / "n.onnx")
    assert file.checked is runs
    assert any("not checked" in note for note in file.notes) is not runs
    if runs:
        same_answers(OnnxSession(file.path), module, image(3).to(dtype))
    else:
        with pytest.raises(ExportError, match="onnxruntime cannot run"):
            OnnxSession(file.path)


REFUSE: list[tuple[str, nn.Module, Any, dict[str, Any], str]] = [
    (
        "no ONNX form",
        nets.Unsupported(),
        image(),
        {},
        r"operator aten::_?linalg_svd in head\.1 \(nets\.py:\d+\) has no ONNX form",
    ),
    ("branch on values", nets.Noisy(), image(), {}, r"torch\.export cannot capture Noisy: .*nets\.py:\d+"),
    ("wrong input", nets.Plain(), image(channels=5), {}, "Plain fails on the example inputs: "),
    ("too many arguments", nets.Plain(), (image(), image()), {}, "example_inputs do not fit Plain.forward"),
    ("opset too old", nets.Plain(), image(), {"opset": 9}, "opset 9 is not possible"),
    ("no tensor out", nn.Module(), image(), {}, "Module fails on the example inputs"),
]


@pytest.mark.parametrize(("name", "module", "example", "options", "message"), REFUSE, ids=[row[0] for row in REFUSE])
def test_failures_are_one_sentence_and_leave_no_file(
    name: str, module: nn.Module, example: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(module.eval(), example, tmp_path / "n.onnx", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


UNSUPPORTED = [
    (nets.Decomposition(), "operator aten::_linalg_svd"),
    (nets.QR(), "operator aten::linalg_qr"),
    (nets.Eigenvalues(), "operator aten::linalg_eig"),
    (nets.Pyramid(), "operator aten::adaptive_max_pool2d"),
    (nets.Bessel(), "operator prims::bessel_j0"),
    (nets.Histogram(), "the ONNX exporter fails on aten.histc"),
]


@pytest.mark.parametrize("fused", sampled([False, True], 2), ids=["as built", "fused"])
@pytest.mark.parametrize(("last", "words"), UNSUPPORTED, ids=[type(row[0]).__name__ for row in UNSUPPORTED])
def test_an_operator_that_cannot_be_exported_is_named_with_its_module(
    last: nn.Module, words: str, fused: bool, tmp_path: Path
) -> None:
    """In a fused model, whose code is generated, too: module and line are those of the user's model."""
    module = nets.Unsupported(last).eval()
    if fused:
        module = fuse(module, image(), verify=False).module
    with pytest.raises(ExportError, match=rf"^{words} in head\.1 \(nets\.py:\d+\)"):
        export_onnx(module, image(), tmp_path / "n.onnx", dynamic_size=False)
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    target = tmp_path / "n.onnx"
    target.write_bytes(b"older")
    with pytest.raises(ExportError):
        export_onnx(nets.Unsupported().eval(), image(), target)
    assert target.read_bytes() == b"older"
    assert [p.name for p in tmp_path.iterdir()] == ["n.onnx"]


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        export_onnx(nets.Plain().eval(), image(), tmp_path / "nowhere" / "n.onnx")


@pytest.mark.slow
def test_the_exporter_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        export_onnx(nets.Pooled().eval(), image(), tmp_path / "n.onnx")
    captured = capfd.readouterr()
    assert out.getvalue() + err.getvalue() + captured.out + captured.err == ""


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


def test_external_data_is_the_same_model(tmp_path: Path) -> None:
    file = export_onnx(nets.lively(nets.Flattened()), image(), tmp_path / "n.onnx", metadata={"who": "me"})
    plain = onnx.load(str(file.path))
    assert save(plain, tmp_path / "e.onnx", 0)
    assert len((tmp_path / "e.onnx.data").read_bytes()) > 0
    apart = onnx.load(str(tmp_path / "e.onnx"), load_external_data=False)
    held = [tensor for tensor in apart.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert held
    assert not any(tensor.raw_data for tensor in held)
    offsets = [int(next(e.value for e in tensor.external_data if e.key == "offset")) for tensor in held]
    assert all(offset % 4096 == 0 for offset in offsets)
    again = onnx.load(str(tmp_path / "e.onnx"))
    for tensor in again.graph.initializer:
        tensor.ClearField("data_location")
        del tensor.external_data[:]
    assert again == plain


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


def test_to_dict_is_plain(tmp_path: Path) -> None:
    import json

    file: OnnxFile = export_onnx(nets.Plain().eval(), image(), tmp_path / "n.onnx")
    plain = json.loads(json.dumps(file.to_dict()))
    assert plain["dynamic_axes"] == {"image": {"0": "batch", "2": "height", "3": "width"}}
    assert plain["nodes"]["Conv"] == 1


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


@pytest.mark.slow
def test_sizes_whose_expressions_explode_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace with open image axes ends after a while, and one without them is made."""
    monkeypatch.setattr(program, "PATIENCE", 0.0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    file = export_onnx(net, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    axes = next(iter(file.dynamic_axes.values()))
    assert list(axes) == [0]


class _Attention(nn.Module):
    def __init__(self, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x * 0.5, x + 1, attn_mask=self.mask)


SHAPES = [(3, 5, 4), (2, 3, 5, 4), (2, 3, 2, 5, 4), (2, 3, 1, 2, 5, 4)]


@pytest.mark.parametrize(
    ("shape", "masked"),
    sampled([(shape, masked) for shape in SHAPES for masked in ("no", "by two axes", "by all axes")], 4),
)
def test_attention_on_any_number_of_axes(shape: tuple[int, ...], masked: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    masks = {
        "no": None,
        "by two axes": torch.randn(5, 5, generator=generator),
        "by all axes": torch.randn(1, *shape[1:-1], 5, generator=generator),
    }
    model, x = _Attention(masks[masked]).eval(), torch.randn(*shape, generator=generator)
    file = export_onnx(model, x, tmp_path / "attention.onnx", dynamic_size=False)
    assert file.checked
    other = torch.randn(shape[0] + 1, *shape[1:], generator=generator)
    torch.testing.assert_close(OnnxSession(file.path)(other), model(other), rtol=1e-4, atol=1e-5)


class _Averages(nn.Module):
    """Averages of channels-last tensors, in every spelling; and a pooling that is none."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(size)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x).permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)
        pooled = F.adaptive_avg_pool2d(y, output_size=[1, 1])
        return (
            self.pool(y),
            pooled.flatten(1),
            F.adaptive_avg_pool1d(y.flatten(2), 1),
            F.adaptive_avg_pool3d(y, (1, 1, 1)),
        )


@pytest.mark.parametrize("size", sampled([1, [1, 1], [1, 2]], 3), ids=str)
def test_an_average_is_one_mean(size: Any, tmp_path: Path) -> None:
    """As a pooling to size 1 it also sets strides, which the exporter writes as a Gather at computed indices."""
    model = _Averages(size).eval()
    file = export_onnx(model, image(2), tmp_path / "averages.onnx")
    types = Counter(node.op_type for node in onnx.load(file.path).graph.node)
    if size != [1, 2]:
        assert not {"Gather", "Range", "AveragePool"} & types.keys()
        assert types["ReduceMean"] == 3  # two of the four are one
    session, x = OnnxSession(file.path), image(3)
    for got, wanted in zip(session(x), model(x), strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_constants_that_the_exporter_left_out_are_held() -> None:
    """Its optimisation may fold a chain into a value that no node makes and the graph does not hold."""
    x, lost, held = (ir.Value(name=name) for name in ("x", "bound", "bound"))
    lost.const_value, held.const_value = (ir.tensor(np.float32(number), name="bound") for number in (6.0, 0.0))
    for value in (x, lost, held):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2] if value is x else [])
    clip = ir.node("Clip", [x, held, lost], name="clip")
    clip.outputs[0].type, clip.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2])
    graph = ir.Graph([x], clip.outputs, nodes=[clip], initializers=[held], opset_imports={"": 20}, name="clips")
    _with_all_constants(graph)
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.array([-1.0, 9.0], np.float32)})[0].tolist() == [0.0, 6.0]
