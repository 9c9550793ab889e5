"""`--report`, `--format`, and what is left of a run that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch

from reparam import workflow
from reparam.cli import main
from reparam.report import write_report
from tests.cli.test_fuse import network
from tests.report.cases import FULL

QUICK = ("--input", "1x3x8x8", "--no-onnx", "--bench-seconds", 0)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    torch.save(network(), tmp_path / "net.pt")
    return tmp_path / "net.pt"


def invoke(*arguments: Any) -> click.testing.Result:
    return click.testing.CliRunner(env={"COLUMNS": "200"}).invoke(main, list(map(str, arguments)))


BEGINNINGS = {".html": "<!doctype html>", ".md": "## ✅ Sequential from ", ".json": "{"}


@pytest.mark.parametrize("ending", BEGINNINGS)
def test_the_ending_says_the_form(model_file: Path, ending: str) -> None:
    target = model_file.parent / "new" / f"out{ending}"
    result = invoke("fuse", model_file, *QUICK, "--no-archive", "--report", target)
    assert result.exit_code == 0, result.output
    written = target.read_text(encoding="utf-8")
    assert written.startswith(BEGINNINGS[ending])
    assert str(target) in result.stdout
    assert str(target) in written
    assert [path.name for path in target.parent.iterdir()] == [target.name]


BAD = [("out.txt", "use .html, .md or .json"), ("folder.html", "is a folder"), ("net.pt/out.html", "cannot be written"),
       ("net.fused.json", "is where the net.fused.json of this run goes"),
       ("link.html", "is the model file itself")]  # fmt: skip


@pytest.mark.parametrize(("name", "message"), BAD)
def test_a_bad_place_is_said_before_the_work_begins(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (model_file.parent / "folder.html").mkdir()
    (model_file.parent / "link.html").symlink_to(model_file)
    monkeypatch.setattr(workflow, "fuse", None)
    result = invoke("fuse", model_file, *QUICK, "--report", model_file.parent / name)
    assert result.exit_code == 2
    assert message in result.stderr
    assert sorted(path.name for path in model_file.parent.iterdir()) == ["folder.html", "link.html", "net.pt"]


@pytest.mark.slow
def test_a_report_is_written_of_what_failed(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage: the session's answers are off by a thousandth."""

    class Wrong(workflow.OnnxSession):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs) * 1.001

    monkeypatch.setattr("reparam.export.staged.OnnxSession", Wrong)  # what the harness runs
    target = model_file.parent / "out.html"
    result = invoke("fuse", model_file, "--input", "1x3x8x8", "--no-bench", "--report", target)
    assert result.exit_code == 1
    assert sorted(path.name for path in model_file.parent.iterdir()) == ["net.pt", "out.html"]
    assert "<b>NOT equivalent</b>" in target.read_text()


def test_an_older_report_stays_whole_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.md"
    write_report(FULL, target)
    before = target.read_text()

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(workflow.InputError, match=r"cannot be written \(No space left on device"):
        write_report(FULL, target)
    assert target.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.md"]


FORMS: list[tuple[tuple[str, ...], Callable[[str], bool]]] = [
    ((), lambda out: "## " not in out and "{" not in out),
    (("--format", "text"), lambda out: "## " not in out and "{" not in out),
    (("--format", "json"), lambda out: isinstance(json.loads(out), dict)),
    (("--json",), lambda out: isinstance(json.loads(out), dict)),
    (("--json", "--format", "json"), lambda out: isinstance(json.loads(out), dict)),
    (("--format", "markdown"), lambda out: out.startswith("## ")),
]


ASKED = [("fuse", *case) for case in FORMS] + [(name, *case) for name in ("verify", "bench") for case in FORMS[1::2]]


@pytest.mark.parametrize(("command", "flags", "is_form"), ASKED, ids=[f"{one[0]} {' '.join(one[1])}" for one in ASKED])
def test_every_command_prints_every_form(
    model_file: Path, command: str, flags: tuple[str, ...], is_form: Callable[[str], bool]
) -> None:
    more = {"fuse": ("--no-onnx", "--no-archive", "--no-bench"), "verify": (model_file, "--level", "quick"),
            "bench": (model_file, "--seconds", 0)}  # fmt: skip
    result = invoke(command, model_file, *more[command], "--input", "1x3x8x8", *flags)
    assert result.exit_code == 0, result.output
    assert is_form(result.stdout), result.stdout


def test_two_forms_are_a_mistake(model_file: Path) -> None:
    result = invoke("fuse", model_file, *QUICK, "--json", "--format", "markdown")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


def test_a_failure_is_a_document_too(tmp_path: Path) -> None:
    assert json.loads(invoke("fuse", tmp_path / "no|ne.pt", "--json").stdout)["exit_status"] == 2
    shown = invoke("fuse", tmp_path / "no|ne.pt", "--format", "markdown")
    assert shown.exit_code == 2
    assert shown.stdout.startswith("## ❌ reparam failed\n\n")
    assert "no\\|ne.pt does not exist" in shown.stdout


def interrupts(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def test_what_is_verified_survives_an_interrupt(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "benchmark", interrupts)
    target = model_file.parent / "out.html"
    result = invoke("fuse", model_file, *QUICK, "--report", target, "--json")
    assert result.exit_code == 130
    plain = json.loads(result.stdout)
    assert (plain["partial"], plain["interrupted"], plain["timing"]) == (True, "measuring latency", None)
    assert set(plain["files"]) == {"archive", "certificate", "report"}
    assert all(Path(path).exists() for path in plain["files"].values())
    assert "no round was complete" in target.read_text()


def test_before_that_nothing_is_written(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "export_archive", interrupts)
    result = invoke("fuse", model_file, *QUICK, "--report", model_file.parent / "out.html")
    assert result.exit_code == 130
    assert "interrupted; nothing was written" in result.stderr
    assert [path.name for path in model_file.parent.iterdir()] == ["net.pt"]


def test_an_interrupt_behind_the_models_is_told_apart(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workflow, "write_report", interrupts)
    result = invoke("fuse", model_file, *QUICK, "--report", model_file.parent / "out.html")
    assert result.exit_code == 130
    assert "interrupted; the models were written, the report was not" in result.stderr
    assert sorted(path.name for path in model_file.parent.iterdir()) == ["net.fused.json", "net.fused.pt2", "net.pt"]


MAIN = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("reparam", run_name="__main__", alter_sys=True)
"""
"""The command, in whose process an interrupt is one: tests that run in the background of a shell inherit that it is
ignored."""


@pytest.mark.slow
def test_a_real_interrupt_keeps_what_is_there(model_file: Path) -> None:
    report = model_file.parent / "out.json"
    # An image large enough for the measurement to last until it is interrupted.
    command = [sys.executable, "-c", MAIN, "fuse", str(model_file), "--input", "4x3x256x256", "--no-onnx"]
    command += ["--bench-seconds", "600", "--format", "markdown", "--report", str(report)]
    environment = {**os.environ, "PYTHONPATH": str(Path(workflow.__file__).parents[1])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "measuring latency" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out.startswith("## ✅ Sequential")
    assert "Partial: interrupted while measuring latency" in out
    plain = json.loads(report.read_text())
    assert plain["partial"] is True
    assert all(Path(path).exists() for path in plain["files"].values())
