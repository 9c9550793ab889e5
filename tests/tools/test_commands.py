"""The shell side: a sentence when no Python is new enough, and parseable scripts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def clone(folder: Path) -> Path:
    """A folder that holds what the commands need to start, and no .venv."""
    (folder / "tools").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "tools/setup.sh", "tools/test.sh", "tools/demo.sh"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def run(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key != "PYTHON"} | environment
    return subprocess.run(["bash", str(script)], cwd="/", env=variables, capture_output=True, text=True, check=False)


def fake_python(folder: Path, name: str = "python3") -> Path:
    """A program that answers every question with no, as a Python that is too old does."""
    path = folder / name
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("command", ["test.sh", "demo.sh"])
def test_python_named_by_the_user_is_too_old(command: str, tmp_path: Path) -> None:
    root = clone(tmp_path)
    finished = run(root / "tools" / command, PYTHON=str(fake_python(tmp_path)))
    assert finished.returncode == 2
    assert finished.stderr.strip() == (
        f"PYTHON={tmp_path}/python3 is not a Python 3.10 or newer: set PYTHON to one, or unset it."
    )
    assert not (root / ".venv").exists()


def test_no_python_is_new_enough(tmp_path: Path) -> None:
    root = clone(tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat"):
        (tools / name).symlink_to(shutil.which(name) or name)
    fake_python(tools)
    finished = run(root / "tools" / "test.sh", PATH=str(tools))
    assert finished.returncode == 2
    assert finished.stderr.strip().startswith("reparam needs Python 3.10 or newer and found none on the path")
    assert len(finished.stderr.strip().splitlines()) == 1


def test_old_environment_is_named_and_kept(tmp_path: Path) -> None:
    root = clone(tmp_path)
    (root / ".venv" / "bin").mkdir(parents=True)
    fake_python(root / ".venv" / "bin", "python")
    finished = run(root / "tools" / "test.sh")
    assert finished.returncode == 2
    assert "holds a Python older than 3.10: remove that folder" in finished.stderr
    assert (root / ".venv" / "bin" / "python").exists()


@pytest.mark.parametrize(
    "script", ["tools/setup.sh", "tools/test.sh", "tools/demo.sh", "tools/example_report.sh", ".ci/run"]
)
def test_script_parses(script: str) -> None:
    finished = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
