"""`reparam verify` and `reparam bench` on files of every format."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
import torch

from reparam.cli import main
from reparam.export import export_onnx
from tests.cli.test_fuse import network


def invoke(*arguments: Any) -> click.testing.Result:
    return click.testing.CliRunner(env={"COLUMNS": "200"}).invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One network in each format, and its weights; `other.*` holds another network."""
    folder = tmp_path_factory.mktemp("files")
    model, x = network(), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save(model, folder / "model.pt")
    torch.save(model.state_dict(), folder / "weights.pt")
    auto = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=(auto,)), folder / "model.pt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), folder / "model.ts")
    export_onnx(model, x, folder / "model.onnx")
    export_onnx(model, x, folder / "fixed.onnx", dynamic_batch=False, dynamic_size=False)
    with torch.no_grad():
        model[6].bias[2] += 1e-3
    torch.save(model, folder / "other.pt")
    export_onnx(model, x, folder / "other.onnx")
    return {path.name: path for path in folder.iterdir()}


INPUT = ("--input", "2x3x8x8")


SAME = [
    ("model.pt", "model.pt2"), ("model.pt", "model.ts"), ("model.pt", "model.onnx"), ("model.pt", "fixed.onnx"),
    ("model.pt2", "model.pt"), ("model.pt2", "model.onnx"), ("model.ts", "model.onnx"), ("model.ts", "model.pt2"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("original", "candidate"), SAME)
def test_the_same_model_in_two_formats(files: dict[str, Path], original: str, candidate: str) -> None:
    result = invoke("verify", files[original], files[candidate], *INPUT)
    assert result.exit_code == 0, result.output
    assert f"{files[candidate]}: equivalent on" in result.stdout


def test_a_file_whose_batch_alone_is_open_is_compared_at_another_batch(files: dict[str, Path], tmp_path: Path) -> None:
    model = torch.load(files["model.pt"], weights_only=False)
    export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "batch.onnx", dynamic_size=False)
    result = invoke("verify", files["model.pt"], tmp_path / "batch.onnx", *INPUT, "--json")
    assert result.exit_code == 0, result.output
    shapes = {tuple(case["shapes"][0]) for case in json.loads(result.stdout)["cases"] if case["status"] == "passed"}
    assert {shape[0] for shape in shapes} == {1, 2}
    assert {shape[2:] for shape in shapes} == {(8, 8)}


OTHERS = [("model.pt", "other.pt"), ("model.pt2", "other.onnx"), ("model.ts", "other.pt")]


@pytest.mark.parametrize(("original", "candidate"), OTHERS)
def test_another_model_is_told(files: dict[str, Path], original: str, candidate: str) -> None:
    result = invoke("verify", files[original], files[candidate], *INPUT, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["passed"]) == (1, False)
    assert found["outputs"][0]["worst_index"][1] == 2


def test_builder_and_key_go_to_the_files_that_need_them(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    arch = ("--arch", "tests.cli.test_fuse:network")
    result = invoke("verify", files["weights.pt"], files["model.pt2"], *INPUT, *arch)
    assert result.exit_code == 0, result.output
    assert invoke("verify", files["model.pt2"], files["weights.pt"], *INPUT, *arch).exit_code == 0
    assert invoke("bench", files["model.pt2"], files["weights.pt"], *INPUT, *arch, "--seconds", 0).exit_code == 0


def test_data_is_compared_besides(files: dict[str, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "own.npy", np.ones((3, 3, 8, 8), np.float32))
    data = ("--data", tmp_path / "own.npy", "--data-limit", 2, "--input", "1x3x8x8")
    result = invoke("verify", files["model.pt"], files["model.onnx"], *data, "--json", "--level", "quick")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [case["name"] for case in found["cases"]] == ["example", "own.npy row 0", "own.npy row 1"]
    assert found["notes"] == ["the first 2 of 3 rows of own.npy were tried"]
    result = invoke("fuse", files["model.pt"], *data, "--json", "--no-bench", "--out", f"{tmp_path}/out/")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    for comparison in (report["comparison"], report["onnx_comparison"]):
        assert [case["name"] for case in comparison["cases"]][-2:] == ["own.npy row 0", "own.npy row 1"]
    bad = invoke("verify", files["model.pt"], files["model.onnx"], *INPUT, "--data", "nowhere")
    assert (bad.exit_code, "nowhere does not exist" in bad.stderr) == (2, True)


OF_ONNX = [
    ("model.onnx", "model.pt", True), ("model.onnx", "model.pt2", True), ("model.onnx", "model.ts", True),
    ("model.onnx", "fixed.onnx", True), ("fixed.onnx", "model.pt", True), ("model.onnx", "other.onnx", False),
    ("model.onnx", "other.pt", False), ("other.onnx", "model.ts", False),
]  # fmt: skip


@pytest.mark.parametrize(("original", "candidate", "same"), OF_ONNX)
def test_an_onnx_file_is_a_reference(files: dict[str, Path], original: str, candidate: str, same: bool) -> None:
    result = invoke("verify", files[original], files[candidate], *INPUT, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["passed"]) == (0 if same else 1, same), found["failures"]
    assert found["algebra_error"] is not None
    assert (found["algebra_error"] < 1e-6) is same
    if not same:
        assert found["outputs"][0]["worst_index"][1] == 2


def test_sizes_come_from_the_onnx_file(files: dict[str, Path]) -> None:
    result = invoke("verify", files["fixed.onnx"], files["model.onnx"], "--json")
    assert result.exit_code == 0, result.output
    assert {tuple(map(tuple, case["shapes"])) for case in json.loads(result.stdout)["cases"]} == {((2, 3, 8, 8),)}
    for arguments, sentence in (
        (
            (),
            "input=batchx3xheightxwidth:float32 of model.onnx has open sizes; give them, as in --input input=",
        ),
        (("--input", "1x4x8x8"), "--input 1x4x8x8 does not fit the input input=batchx3x"),
        (("--input", "1x3x8x8:int64"), "--input 1x3x8x8:int64 does not fit"),
        (("--input", "y=1x3x8x8"), "--input does not fit model.onnx, whose inputs are input="),
        (("--input", "1x3x8x8", "--input", "1x3"), "--input does not fit model.onnx"),
    ):
        result = invoke("verify", files["model.onnx"], files["fixed.onnx"], *arguments)
        assert result.exit_code == 2
        assert sentence in result.stderr


def test_thorough_asks_the_algebra_of_an_onnx_file(files: dict[str, Path]) -> None:
    result = invoke("verify", files["model.pt"], files["model.onnx"], *INPUT, "--level", "thorough", "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found["failures"]
    assert found["algebra_error"] is not None
    assert len(found["cases"]) > 12


def foreign(path: Path, bias: float = 0.0) -> Path:
    """A file with an operator that nothing runs in float64."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    weights = [
        generator.normal(size=(6, 3, 3, 3)) / 5,
        generator.normal(size=6) + bias,
        generator.normal(size=(6, 6, 3, 3)) / 7,
    ]
    stored = [numpy_helper.from_array(w.astype(np.float32), f"w{n}") for n, w in enumerate(weights)]
    nodes = [
        helper.make_node("Conv", ["x", "w0", "w1"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Gelu", ["a"], ["b"], domain="com.microsoft"),
        helper.make_node("Conv", ["b", "w2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    kind = (TensorProto.FLOAT, ["n", 3, "h", "w"])
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", *kind)], [helper.make_tensor_value_info("y", 1, None)], stored
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), str(path))
    return path


def test_a_reference_without_float64_is_held_against_its_estimated_noise(tmp_path: Path) -> None:
    one, same, other = foreign(tmp_path / "a.onnx"), foreign(tmp_path / "b.onnx"), foreign(tmp_path / "c.onnx", 1e-4)
    result = invoke("verify", one, same, *INPUT, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found["failures"]
    assert found["algebra_error"] is None
    assert "com.microsoft::Gelu has no float64 form" in found["notes"][0]
    assert 1e-9 < found["original_noise"] < 1e-6
    found = json.loads(invoke("verify", one, other, *INPUT, "--json").stdout)
    assert not found["passed"]
    assert "the error of the candidate is" in found["failures"][0]


def text_model(path: Path, names: tuple[str, str], twice: bool = False) -> Path:
    """Two integer inputs: tokens that choose rows of a table, and a mask."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    table = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]),
        helper.make_node("Unsqueeze", ["mask", "two"], ["b"]),
        helper.make_node("Cast", ["b"], ["c"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["a", "c"], ["y" if not twice else "d"]),
        *([helper.make_node("Add", ["d", "d"], ["y"])] if twice else []),
    ]
    kinds = {"ids": TensorProto.INT64, "mask": TensorProto.BOOL}
    inputs = [helper.make_tensor_value_info(name, kinds[name], ["n", 5]) for name in names]
    stored = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([2]), "two")]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", 1, None)], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))
    return path


def test_integer_inputs_are_rows_of_the_table_and_go_by_name(tmp_path: Path) -> None:
    one, turned = text_model(tmp_path / "a.onnx", ("ids", "mask")), text_model(tmp_path / "b.onnx", ("mask", "ids"))
    result = invoke("verify", one, turned, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0, found["failures"]
    assert found["algebra_error"] == 0.0
    assert len(found["cases"]) > 1
    twice = text_model(tmp_path / "c.onnx", ("mask", "ids"), twice=True)
    assert invoke("verify", one, twice).exit_code == 1
    np.savez(tmp_path / "own.npz", ids=np.array([[0, 6, 1, 2, 3]]), mask=np.array([[True, False, True, True, True]]))
    result = invoke("verify", one, turned, "--json", "--data", tmp_path / "own.npz")
    assert "own.npz" in [case["name"] for case in json.loads(result.stdout)["cases"]]


def test_a_quantised_file_says_why_it_has_no_float64(tmp_path: Path, files: dict[str, Path]) -> None:
    from onnxruntime.quantization import quantize_dynamic

    made = tmp_path / "quantised.onnx"
    quantize_dynamic(files["model.onnx"], made, op_types_to_quantize=["Gemm", "MatMul"])
    found = json.loads(invoke("verify", made, files["model.onnx"], *INPUT, "--json").stdout)
    assert not found["passed"]
    assert "it is quantised" in " ".join(found["notes"])


@pytest.mark.parametrize("name", ["missing.pt", "missing.onnx"])
def test_a_missing_file_is_one_sentence(files: dict[str, Path], name: str) -> None:
    for arguments in (("verify", files["model.pt"], name), ("bench", files["model.pt"], name)):
        result = invoke(*arguments, *INPUT)
        assert result.exit_code == 2
        assert f"{name} does not exist" in result.stderr
        assert "Traceback" not in result.output


def test_a_damaged_onnx_file_is_one_sentence(files: dict[str, Path], tmp_path: Path) -> None:
    content = bytearray(files["model.onnx"].read_bytes())
    content[40:80] = b"\xff" * 40
    (tmp_path / "bad.onnx").write_bytes(bytes(content))
    result = invoke("verify", files["model.pt"], tmp_path / "bad.onnx", *INPUT)
    assert result.exit_code == 2
    assert len(result.stderr.strip().splitlines()[-1]) > 20
    assert "internal error" not in result.stderr


def samples_of(result: click.testing.Result) -> dict[str, Any]:
    """Label -> samples of the only cell."""
    (cell,) = json.loads(result.stdout)["cells"]
    return cell["timing"]["samples"]  # type: ignore[no-any-return]


def test_every_format_is_measured(files: dict[str, Path]) -> None:
    names = ["model.pt", "model.pt2", "model.ts", "model.onnx"]
    result = invoke("bench", *(files[name] for name in names), *INPUT, "--json", "--seconds", 0)
    assert result.exit_code == 0, result.output
    assert list(samples_of(result)) == names
    assert all(len(samples) >= 5 for samples in samples_of(result).values())
    table = invoke("bench", *(files[name] for name in names), *INPUT, "--seconds", 0).stdout
    assert "against model.pt" in table


def test_a_file_given_again_is_measured_again(files: dict[str, Path]) -> None:
    path = files["model.pt"]
    result = invoke("bench", path, path, path, path, *INPUT, "--json", "--seconds", 0)
    assert list(samples_of(result)) == ["model.pt", str(path), f"{path} (2)", f"{path} (3)"]


def test_the_pytorch_model_tells_the_inputs_wherever_it_stands(files: dict[str, Path]) -> None:
    result = invoke("bench", files["model.onnx"], files["model.pt2"], "--json", "--seconds", 0)
    assert list(samples_of(result)) == ["model.onnx", "model.pt2"]
    fixed = invoke("bench", files["fixed.onnx"], files["model.onnx"], "--json", "--seconds", 0)
    assert list(samples_of(fixed)) == ["fixed.onnx", "model.onnx"]
    alone = invoke("bench", files["model.onnx"])
    assert alone.exit_code == 2
    assert "is an ONNX file, which cannot be fused; give the PyTorch model" in alone.stderr


def test_fuse_says_what_it_needs_of_an_onnx_file(files: dict[str, Path]) -> None:
    result = invoke("fuse", files["model.onnx"])
    assert result.exit_code == 2
    assert "needs the PyTorch model" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.pt2", "model.ts"])
def test_archives_are_fused_to_files(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    options = () if name == "model.pt2" else INPUT  # an archive of torch.export brings its example along
    result = invoke("fuse", files[name], *options, "--out", f"{tmp_path}/", "--no-bench")
    assert result.exit_code == 0, result.output
    written = tmp_path / "model.fused.pt2"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model.fused.json", tmp_path / "model.fused.onnx", written]
    assert invoke("verify", files["model.pt"], written, *INPUT).exit_code == 0


def test_the_package_is_a_command() -> None:
    made = subprocess.run([sys.executable, "-m", "reparam", "--version"], capture_output=True, text=True, check=True)
    assert made.stdout.startswith("reparam, version")
