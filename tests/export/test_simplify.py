"""onnxsim works in another process, may crash or hang there, and is believed only where its result is worth it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from reparam.export import export_onnx, helper, simplify
from reparam.export.helper import Helper, HelperError
from reparam.export.proto import save
from reparam.export.simplify import NotSimplifiedError, simplified
from tests.export.test_leftovers import N, model

PROGRAMS = {
    "echoes": "import sys\nfor line in sys.stdin: print(line.strip(), flush=True)",
    "echoes once": "import sys\nprint(sys.stdin.readline().strip(), flush=True)",
    "crashes": "import os, sys\nsys.stdin.readline()\nos.abort()",
    "leaves": "import sys\nsys.stdin.readline()\nsys.exit(5)",
    "hangs": "import sys, time\nsys.stdin.readline()\ntime.sleep(600)",
}


def asking(folder: Path, name: str) -> Helper:
    program = folder / "program.py"
    program.write_text(PROGRAMS[name])
    return Helper(program)


@pytest.mark.parametrize(
    ("name", "seconds", "words"),
    [
        ("crashes", 60.0, "crashed with signal 6"),
        ("leaves", 60.0, "ended with status 5"),
        ("hangs", 0.2, "was stopped after 0 seconds"),
    ],
)
def test_a_process_that_fails_is_told(name: str, seconds: float, words: str, tmp_path: Path) -> None:
    one = asking(tmp_path, name)
    with pytest.raises(HelperError, match=words):
        one.ask(["a"], seconds)
    assert one._process is None
    one.stop()


@pytest.mark.parametrize("name", ["echoes", "echoes once"])
def test_it_is_asked_again_and_started_again(name: str, tmp_path: Path) -> None:
    one = asking(tmp_path, name)
    assert [one.ask(word, 60.0) for word in ("a", "b")] == ["a", "b"]
    process = one._process
    assert process is not None
    one.stop()
    assert process.poll() is not None
    assert one.ask("c", 60.0) == "c"
    one.stop()


def test_a_program_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper.sys, "executable", str(tmp_path / "nowhere"))
    with pytest.raises(HelperError, match="could not be started"):
        Helper().ask(["a"], 1.0)


TWICE = [N("Relu", ["x"], ["a"]), N("Identity", ["a"], ["b"]), N("Neg", ["b"], ["y"])]


def test_the_metadata_survives(tmp_path: Path) -> None:
    given = model(*TWICE)
    given.metadata_props.add(key="k", value="v")
    given.producer_name = "somebody"
    made = simplified(given, tmp_path)
    assert made is not None
    assert [node.op_type for node in made.graph.node] == ["Relu", "Neg"]
    assert [(prop.key, prop.value) for prop in made.metadata_props] == [("k", "v")]
    assert made.producer_name == "somebody"
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_gain(tmp_path: Path) -> None:
    assert simplified(model(N("Relu", ["x"], ["y"])), tmp_path) is None


def rewritten(monkeypatch: pytest.MonkeyPatch, made: onnx.ModelProto) -> None:
    monkeypatch.setattr(simplify, "_run", lambda source, target, seconds: onnx.save_model(made, str(target)))


def test_a_result_that_grows_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = model(N("Relu", ["x"], ["y"]))
    large.graph.initializer.append(onnx.numpy_helper.from_array(torch.zeros(100_000).numpy(), "table"))
    rewritten(monkeypatch, large)
    with pytest.raises(NotSimplifiedError, match=r"bytes instead of .* for 2 nodes less"):
        simplified(model(*TWICE), tmp_path)


def test_another_interface_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewritten(monkeypatch, model(N("Relu", ["x"], ["y"]), sizes=(4, 3)))
    with pytest.raises(NotSimplifiedError, match="the inputs, the outputs or their axes"):
        simplified(model(*TWICE), tmp_path)


def test_a_model_beyond_its_limit_is_not_given_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplify, "MOST_BYTES", 10)
    with pytest.raises(NotSimplifiedError, match="exceed what onnxsim can hold"):
        simplified(model(*TWICE), tmp_path)


@pytest.mark.slow
def test_a_model_beyond_two_gigabytes_is_saved_beside_itself_and_not_given_to_it(tmp_path: Path) -> None:
    """Where protobuf itself fails: no message of that size can be written, nor its size be told."""
    large = model(*TWICE)
    tensor = large.graph.initializer.add(name="w", data_type=onnx.TensorProto.INT8, dims=[2_200_000_000])
    tensor.raw_data = bytes(2_200_000_000)
    assert save(large, tmp_path / "n.onnx", 2_000_000_000)
    assert (tmp_path / "n.onnx.data").stat().st_size == 2_200_000_000
    assert (tmp_path / "n.onnx").stat().st_size < 10_000
    with pytest.raises(NotSimplifiedError, match="exceed what onnxsim can hold"):
        simplified(large, tmp_path)


def test_without_onnxsim_the_plain_file_is_written_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(source: Path, target: Path, seconds: float) -> None:
        raise NotSimplifiedError("onnxsim is not installed")

    monkeypatch.setattr(simplify, "_run", run)
    file = export_onnx(nn.Conv2d(3, 2, 1).eval(), torch.randn(1, 3, 4, 4), tmp_path / "n.onnx")
    assert file.notes == ("not simplified: onnxsim is not installed",)
    assert not file.simplified


def test_the_program_leaves_when_nobody_asks_and_does_not_take_our_files_for_packages() -> None:
    done = subprocess.run(
        [sys.executable, str(helper.PROGRAM)],
        input='["nowhere.onnx", "out.onnx"]\n',
        capture_output=True,
        text=True,
        check=True,
    )
    assert "nowhere.onnx" in done.stdout
