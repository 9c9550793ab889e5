"""`reparam export`: the file is written after its check passed, and every refusal is a sentence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click.testing
import onnx
import pytest
import torch
from torch import nn

from reparam.cli import main
from reparam.export import OnnxSession, staged
from tests.cli.test_compare import INPUT, invoke
from tests.cli.test_fuse import network


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "net.pt"
    torch.save(network(40), path)
    return path


def test_what_is_written_and_said(model: Path, tmp_path: Path) -> None:
    result = invoke("export", model, *INPUT, "--out", tmp_path / "new" / "n.onnx", "--metadata", "data=digits")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "Sequential from" in said
    assert "input input [batch, 3, 8, 8] float32" in said
    assert "equivalent on" in said
    written = onnx.load(str(tmp_path / "new" / "n.onnx"))
    facts = {prop.key: prop.value for prop in written.metadata_props}
    assert facts["data"] == "digits"
    assert facts["reparam.source"] == "net.pt"
    assert facts["reparam.source.sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
    assert facts["reparam.fused"] == "yes"
    assert "BatchNormalization" not in {node.op_type for node in written.graph.node}
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(OnnxSession(tmp_path / "new" / "n.onnx")(x), network(40)(x), rtol=1e-4, atol=1e-5)


def test_every_option_of_the_file(model: Path, tmp_path: Path) -> None:
    result = invoke(
        *(
            "export",
            model,
            *INPUT,
            "--out",
            tmp_path / "n.onnx",
            "--json",
            "--no-fuse",
            "--opset",
            21,
            "--dynamic-size",
        ),
        *(
            "--input-names",
            "photo",
            "--output-names",
            "logits",
            "--float16",
            "--external-data-bytes",
            0,
            "--no-simplify",
        ),
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    file = found["file"]
    assert (found["fused"], file["opset"], file["float16"], file["simplified"]) == (False, 21, True, False)
    assert file["dynamic_axes"] == {"photo": {"0": "batch", "2": "height", "3": "width"}}
    assert (file["inputs"], file["outputs"]) == (["photo"], ["logits"])
    assert file["comparison"]["passed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.onnx", "n.onnx.data"]
    assert OnnxSession(tmp_path / "n.onnx")(torch.randn(3, 3, 12, 10)).shape[0] == 3


def test_beside_the_model_and_with_everything_fixed(model: Path) -> None:
    result = invoke("export", model, *INPUT, "--json", "--no-dynamic-batch", "--verify", "quick")
    assert result.exit_code == 0, result.output
    file = json.loads(result.stdout)["file"]
    assert file["path"] == str(model.with_name("net.onnx"))
    assert file["dynamic_axes"] == {"input": {}}
    assert file["shapes"]["input"] == [2, 3, 8, 8]
    assert [case["name"] for case in file["comparison"]["cases"]] == ["example"]


class Decomposed(nn.Module):
    """Has an operator that ONNX has not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3, 3), Singular())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


class Singular(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(x)[1]


def decomposed() -> nn.Module:
    return Decomposed().eval()


BAD: list[tuple[tuple[Any, ...], str]] = [
    (("--opset", 9), "opset 9 is not possible for this model"),
    (("--input-names", "a,b"), "input_names has 2 name(s)"),
    (("--metadata", "nothing"), "--metadata 'nothing' is no KEY=VALUE"),
    (("--dtype", "bfloat16"), "the file cannot be compared with the original: onnxruntime cannot run"),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=[row[0][0] for row in BAD])
def test_refusals_are_sentences_and_nothing_is_written(
    model: Path, options: tuple[Any, ...], words: str, tmp_path: Path
) -> None:
    result = invoke("export", model, *INPUT, "--out", tmp_path / "new" / "n.onnx", *options)
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_operator_without_onnx_form_names_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    torch.save(decomposed().state_dict(), tmp_path / "w.pt")
    result = invoke("export", tmp_path / "w.pt", "--arch", "tests.cli.test_export:decomposed", "--input", "2x3x3")
    assert result.exit_code == 2
    assert "svd in head.1 (test_export.py:" in result.stderr
    assert "has no ONNX form" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.pt"]


@pytest.mark.parametrize("options", [pytest.param((), marks=pytest.mark.slow), ("--json",)])
def test_a_file_that_does_not_agree_is_not_written(
    model: Path, options: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Off(OnnxSession):
        def run_flat(self, tensors: Any) -> list[torch.Tensor]:
            return [tensor * 1.001 for tensor in super().run_flat(tensors)]

    monkeypatch.setattr(staged, "OnnxSession", Off)  # what the harness runs
    result = invoke("export", model, *INPUT, "--out", tmp_path / "n.onnx", "--no-simplify", *options)
    assert result.exit_code == 1, result.output
    assert "the ONNX file does not agree with the original model" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_model_itself_is_never_overwritten(model: Path) -> None:
    before = model.read_bytes()
    result = invoke("export", model, *INPUT, "--out", model)
    assert result.exit_code == 2
    assert "never overwritten" in result.stderr
    assert model.read_bytes() == before


def test_help() -> None:
    text = click.testing.CliRunner().invoke(main, ["export", "--help"]).output
    for option in ("--dynamic-batch", "--dynamic-size", "--opset", "--float16", "--no-fuse", "--external-data-bytes"):
        assert option in text
