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


@pytest.mark.parametrize(("original", "candidate"), SAME)
def test_the_same_model_in_two_formats(files: dict[str, Path], original: str, candidate: str) -> None:
    result = invoke("verify", files[original], files[candidate], *INPUT)
    assert result.exit_code == 0, result.output
    assert f"{files[candidate]}: equivalent on" in result.stdout


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


def test_an_onnx_file_is_no_reference(files: dict[str, Path]) -> None:
    result = invoke("verify", files["model.onnx"], files["model.pt"], *INPUT)
    assert result.exit_code == 2
    assert "give the PyTorch model first" in result.stderr


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


def test_every_format_is_measured(files: dict[str, Path]) -> None:
    names = ["model.pt", "model.pt2", "model.ts", "model.onnx"]
    result = invoke("bench", *(files[name] for name in names), *INPUT, "--json", "--seconds", 0)
    assert result.exit_code == 0, result.output
    timing = json.loads(result.stdout)
    assert list(timing["samples"]) == names
    assert all(len(samples) >= 5 for samples in timing["samples"].values())
    table = invoke("bench", *(files[name] for name in names), *INPUT, "--seconds", 0).stdout
    assert "against model.pt" in table


def test_a_file_given_again_is_measured_again(files: dict[str, Path]) -> None:
    path = files["model.pt"]
    result = invoke("bench", path, path, path, path, *INPUT, "--json", "--seconds", 0)
    assert list(json.loads(result.stdout)["samples"]) == ["model.pt", str(path), f"{path} (2)", f"{path} (3)"]


def test_the_pytorch_model_tells_the_inputs_wherever_it_stands(files: dict[str, Path]) -> None:
    result = invoke("bench", files["model.onnx"], files["model.pt2"], "--json", "--seconds", 0)
    assert list(json.loads(result.stdout)["samples"]) == ["model.onnx", "model.pt2"]
    alone = invoke("bench", files["model.onnx"])
    assert alone.exit_code == 2
    assert "none of the files is a PyTorch model" in alone.stderr


def test_fuse_says_what_it_needs_of_an_onnx_file(files: dict[str, Path]) -> None:
    result = invoke("fuse", files["model.onnx"])
    assert result.exit_code == 2
    assert "needs the PyTorch model" in result.stderr


@pytest.mark.parametrize("name", ["model.pt2", "model.ts"])
def test_archives_are_fused_to_files(files: dict[str, Path], name: str, tmp_path: Path) -> None:
    options = () if name == "model.pt2" else INPUT  # an archive of torch.export brings its example along
    result = invoke("fuse", files[name], *options, "--out", f"{tmp_path}/", "--no-bench")
    assert result.exit_code == 0, result.output
    written = tmp_path / "model.fused.pt2"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "model.fused.onnx", written]
    assert invoke("verify", files["model.pt"], written, *INPUT).exit_code == 0


def test_the_package_is_a_command() -> None:
    made = subprocess.run([sys.executable, "-m", "reparam", "--version"], capture_output=True, text=True, check=True)
    assert made.stdout.startswith("reparam, version")
