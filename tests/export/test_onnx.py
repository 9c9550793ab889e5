"""ONNX files: valid, right at sizes other than the example's, honest about the axes that stayed fixed."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from reparam import fuse
from reparam.errors import ExportError
from reparam.export import OnnxFile, OnnxSession, export_onnx, program
from reparam.export.check import disagreement
from reparam.export.proto import save
from reparam.export.shapes import tensor_leaves
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
@pytest.mark.parametrize(("last", "words"), sampled(UNSUPPORTED, 3), ids=[type(row[0]).__name__ for row in UNSUPPORTED])
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


def test_to_dict_is_plain(tmp_path: Path) -> None:
    import json

    file: OnnxFile = export_onnx(nets.Plain().eval(), image(), tmp_path / "n.onnx")
    plain = json.loads(json.dumps(file.to_dict()))
    assert plain["dynamic_axes"] == {"image": {"0": "batch", "2": "height", "3": "width"}}
    assert plain["nodes"]["Conv"] == 1


@pytest.mark.slow
def test_sizes_whose_expressions_explode_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace with open image axes ends after a while, and one without them is made."""
    monkeypatch.setattr(program, "PATIENCE", 0.0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    file = export_onnx(net, torch.randn(2, 3, 8, 8), tmp_path / "net.onnx")
    axes = next(iter(file.dynamic_axes.values()))
    assert list(axes) == [0]
