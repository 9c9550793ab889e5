"""`reparam fuse` from file to files, on small models with the real stages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from torch import nn

from reparam import workflow
from reparam.cli import main
from reparam.errors import InputError, NotEquivalentError
from reparam.workflow import Request, output_paths, run


def network(channels: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 5),
    )
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.running_mean.normal_()  # type: ignore[union-attr]
        norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        norm.weight.uniform_(-1, 1)
        norm.bias.normal_()
    return model.eval()


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    torch.save(network(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def invoke(*arguments: Any) -> click.testing.Result:
    """Runs the command on a terminal so wide that no line is wrapped."""
    return click.testing.CliRunner(env={"COLUMNS": "200"}).invoke(main, ["fuse", *map(str, arguments)])


QUICK = ("--input", "1x3x8x8", "--no-bench")


def test_help_does_not_import_torch() -> None:
    for arguments in (["--help"], ["fuse", "--help"], ["--version"]):
        program = (
            f"import sys; sys.argv = ['reparam', *{arguments!r}]\n"
            "from reparam.cli import main\n"
            "try: main()\n"
            "except SystemExit as end: assert end.code == 0\n"
            "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(workflow.__file__).parents[1])}
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "reparam" in done.stdout or "Usage" in done.stdout


def test_files_are_written_and_compute_the_same(model_file: Path) -> None:
    before = model_file.read_bytes()
    result = invoke(model_file, *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "equivalent on" in result.stdout
    assert "NOT" not in result.stdout
    folder = model_file.parent
    written = ["net.fused.json", "net.fused.onnx", "net.fused.pt2"]
    assert sorted(path.name for path in folder.iterdir()) == [*written, "net.pt"]
    assert model_file.read_bytes() == before
    x = torch.randn(3, 3, 11, 9)
    with torch.no_grad():
        expected = network()(x)
        archive = torch.export.load(str(folder / "net.fused.pt2")).module()(x)
    from reparam.export import OnnxSession

    torch.testing.assert_close(archive, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(OnnxSession(folder / "net.fused.onnx")(x), expected, rtol=1e-4, atol=1e-5)


def test_json_is_one_document(model_file: Path) -> None:
    result = invoke(model_file, "--input", "1x3x8x8", "--json", "--no-onnx", "--bench-seconds", 0)
    assert result.exit_code == 0, result.stderr
    plain = json.loads(result.stdout)
    assert plain["equivalent"] is True
    assert (plain["before"]["batch_norms"], plain["after"]["batch_norms"]) == (1, 0)
    assert plain["after"]["dropouts"] == 0
    assert plain["files"] == {
        "archive": str(model_file.parent / "net.fused.pt2"),
        "certificate": str(model_file.parent / "net.fused.json"),
    }
    assert set(plain["timing"]["samples"]) == {"original", "fused"}
    assert plain["environment"]["inputs"] == "1x3x8x8"
    assert "reparam: verifying" in result.stderr


def test_weights_with_arch_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cli_nets.py").write_text(
        "from torch import nn\ndef build(channels):\n"
        "    return nn.Sequential(nn.Conv1d(2, channels, 3), nn.BatchNorm1d(channels))\n"
    )
    monkeypatch.chdir(tmp_path)
    norm = nn.BatchNorm1d(3)
    assert norm.running_mean is not None
    norm.running_mean.normal_()
    torch.save({"model": nn.Sequential(nn.Conv1d(2, 3, 3), norm).state_dict()}, "weights.pth")
    result = invoke("weights.pth", "--arch", "cli_nets:build", "--arch-args", "channels=3", "--input", "x=1x2x9",
                    "--no-bench", "--no-onnx", "--no-archive")  # fmt: skip
    assert result.exit_code == 2
    assert "Sequential.forward takes (input) and not the inputs given" in result.stderr
    result = invoke("weights.pth", "--arch", "cli_nets:build", "--arch-args", "channels=3", "--input", "1x2x9",
                    "--no-bench", "--no-onnx", "--no-archive")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in tmp_path.glob("*.p*")) == ["cli_nets.py", "weights.pth"]
    sys.modules.pop("cli_nets", None)


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("sub/", ["sub/net.fused.onnx", "sub/net.fused.pt2"]),
        ("there", ["there/net.fused.onnx", "there/net.fused.pt2"]),
        ("sub/small", ["sub/small.onnx", "sub/small.pt2"]),
        ("small.onnx", ["small.onnx", "small.pt2"]),
        ("v1.5", ["v1.5.onnx", "v1.5.pt2"]),
        (None, ["net.fused.onnx", "net.fused.pt2"]),
    ],
)
def test_out_is_a_folder_or_a_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | None, expected: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    found = {kind: str(path) for kind, path in output_paths(Request("net.pt", out=out)).items()}
    assert [found["onnx"], found["archive"]] == expected
    assert found["certificate"] == expected[0].replace(".onnx", ".json")
    with pytest.raises(InputError, match="is where the"):
        output_paths(Request("net.pt", out=out, report=found["certificate"]))


def test_the_input_is_never_overwritten(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "net.pt2")
    before = (tmp_path / "net.pt2").read_bytes()
    (tmp_path / "link.pt2").symlink_to(tmp_path / "net.pt2")
    for out in ("net", "link"):
        with pytest.raises(InputError, match="the model file itself"):
            run(Request(str(tmp_path / "net.pt2"), out=str(tmp_path / out)))
    assert (tmp_path / "net.pt2").read_bytes() == before


def test_explain_shows_what_was_compared(model_file: Path) -> None:
    options = (*QUICK, "--no-onnx", "--no-archive", "--objective", "macs", "--machine", "onnxruntime-cpu")
    printed = invoke(model_file, *options, "--explain").stdout
    assert "for the fewest multiply-adds on onnxruntime-cpu; times are estimated" in printed
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert any(line.startswith("as it is: Conv2d + BatchNorm2d ") for line in lines)
    assert any(line.startswith("* one layer: Conv2d(3, 4, 3x3) ") for line in lines)
    assert "Choices" not in invoke(model_file, *options).stdout
    plain = json.loads(invoke(model_file, *options, "--explain", "--json").stdout)
    merged, head = plain["choices"]
    assert merged["place"]["module"] == "1"
    assert merged["candidates"][merged["chosen"]]["description"] == "one layer: Conv2d(3, 4, 3x3)"
    assert all(candidate["cost"]["estimated_seconds"] > 0 for candidate in merged["candidates"])
    assert (head["place"]["module"], head["chosen"]) == ("6", 0)
    assert json.loads(invoke(model_file, *options, "--json").stdout)["choices"] is None


@pytest.mark.slow
def test_nothing_is_left_when_the_onnx_file_disagrees(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the session's answers are off by a thousandth."""

    class Wrong(workflow.OnnxSession):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 1.001

    monkeypatch.setattr("reparam.export.staged.OnnxSession", Wrong)
    (model_file.parent / "net.fused.onnx").write_bytes(b"of an earlier run")
    result = invoke(model_file, *QUICK, "--json")
    assert result.exit_code == 1
    assert "does not agree" in result.stderr
    plain = json.loads(result.stdout)
    assert plain["equivalent"] is False
    assert plain["comparison"]["passed"] is True
    assert plain["onnx_comparison"]["passed"] is False
    assert plain["files"] == {}
    assert sorted(path.name for path in model_file.parent.iterdir()) == ["net.fused.onnx", "net.pt"]
    assert (model_file.parent / "net.fused.onnx").read_bytes() == b"of an earlier run"


def test_nothing_is_left_when_the_fused_model_disagrees(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = run(Request(str(model_file), inputs=("1x3x8x8",), onnx=False, archive=False, bench=False))
    assert report.comparison is not None
    case = replace(report.comparison.cases[0], status="failed", failures=("output: off by one",))
    failed = replace(
        report, comparison=replace(report.comparison, passed=False, cases=(case,), failures=("output: off by one",))
    )

    def disagree(*_: Any, **__: Any) -> Any:
        raise NotEquivalentError("the fused model does not agree", failed)

    monkeypatch.setattr(workflow, "fuse", disagree)
    result = invoke(model_file, *QUICK)
    assert result.exit_code == 1
    assert "NOT equivalent: output: off by one" in result.stdout
    assert result.stderr.splitlines()[-1] == "reparam: error: the fused model does not agree"
    assert [path.name for path in model_file.parent.iterdir()] == ["net.pt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--input", "1x4x8x8"), "the model fails on the input 1x4x8x8 in 0 (Conv2d): RuntimeError: Given groups=1"),
        (("--input", "3,8,8"), "no known form"),
        (("--input", "1x0x8"), "has no element"),
        (("--input", "1x3x8x8:float99"), "no dtype is called float99"),
        (("--input", "x=1x3x8x8", "--input", "x=1x3x8x8"), "one name twice"),
        (("--input", "y=1x3x8x8"), "Sequential.forward takes (input) and not the inputs given (missing a required arg"),
        (("--input", "1x3x8x8", "--input", "1x3"), "too many positional arguments); name them with --input NAME=SIZE"),
        (("--out", ""), "--out is empty"),
        (("--arch", "./nets.py:build"), "names a file; run in the folder that holds it and write nets:build"),
        (("--arch-args", "3"), "key=value"),
        (("--key", "ema"), "nothing under --key ema"),
    ],
)
def test_bad_options_are_one_sentence(model_file: Path, options: tuple[str, ...], message: str) -> None:
    result = invoke(model_file, *options, "--json")
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert last.startswith("reparam: error: ")
    assert message in last
    assert "Traceback" not in result.output
    assert json.loads(result.stdout) == {"error": last.removeprefix("reparam: error: "), "exit_status": 2}
    assert [path.name for path in model_file.parent.iterdir()] == ["net.pt"]


def test_missing_file_and_usage(tmp_path: Path) -> None:
    result = invoke(tmp_path / "none.pt")
    assert result.exit_code == 2
    assert "does not exist" in result.stderr
    assert result.stdout == ""
    assert invoke(tmp_path / "none.pt", "--no-such-option").exit_code == 2
    assert "(File name too long); give a place with --out" in invoke(tmp_path / ("x" * 5000)).stderr
    for seed in (-1, 2**64):
        assert "is not in the range" in invoke(tmp_path / "none.pt", "--seed", seed).stderr
    assert invoke().exit_code == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ModuleList([nn.Linear(3, 3)]), "ModuleList has no forward; pass the module that calls what is in it"),
        (nn.Sequential(nn.Embedding(4, 3)), "is not known; give it with --input, as in 1x77:int64"),
    ],
)
def test_models_that_cannot_be_run_as_they_are(tmp_path: Path, model: nn.Module, message: str) -> None:
    torch.save(model, tmp_path / "model.pt")
    result = invoke(tmp_path / "model.pt")
    assert (result.exit_code, message in result.stderr) == (2, True), result.stderr


def test_an_archive_says_which_sizes_it_is_for(tmp_path: Path) -> None:
    example = torch.randn(1, 3, 8, 8)
    torch.export.save(torch.export.export(network(), (example,)), tmp_path / "model.pt2")
    result = invoke(tmp_path / "model.pt2", "--input", "1x3x9x9")
    assert result.exit_code == 2
    assert "ExportedProgram does not take the input 1x3x9x9: this model was captured for other inputs" in result.stderr


def test_a_place_that_cannot_be_written(model_file: Path) -> None:
    (model_file.parent / "file").write_text("x")
    result = invoke(model_file, *QUICK, "--no-onnx", "--out", model_file.parent / "file" / "net")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
    assert sorted(path.name for path in model_file.parent.iterdir()) == ["file", "net.pt"]


def test_faults_of_our_own_are_not_blamed_on_the_user(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(workflow, "fuse", broken)
    result = invoke(model_file, *QUICK)
    assert result.exit_code == 70
    assert "internal error: ZeroDivisionError: division by zero" in result.stderr
    assert "please report" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in invoke(model_file, *QUICK, "--debug").stderr
    assert [path.name for path in model_file.parent.iterdir()] == ["net.pt"]


def test_dtype_is_converted_first(model_file: Path) -> None:
    report = run(Request(str(model_file), inputs=("1x3x8x8",), dtype="float64", onnx=False, archive=False, bench=False))
    assert report.comparison is not None
    assert report.comparison.dtype == "float64"
    assert report.comparison.algebra_error is not None
    assert report.comparison.algebra_error < 1e-12
