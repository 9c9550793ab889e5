"""The code of docs/extending.md runs as it is printed, and what it says of names and options holds."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reparam
from reparam import algebra

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_blocks_run_as_printed() -> None:
    finished = run("\n".join(BLOCKS))
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert "conv: Conv2d" in lines[0]
    assert lines[0].endswith("-> Conv2d(3, 8, 3x3)")
    assert lines[1] == "Conv2d(3, 3, 3x3, stride 2x2, groups 3)"
    assert lines[2].startswith("norm: BatchNorm2d: it differs by")
    assert lines[3].startswith("1 rewrite(s) of Block at fault, the first at norm")


@pytest.mark.slow
def test_blocks_can_fail() -> None:
    """Without the formula, the page's own assertions stop the program."""
    program = "\n".join(BLOCKS)
    broken = program.replace("@reparam.register_linear_op(channel_affine)\n", "", 1)
    assert broken != program
    assert "AssertionError" in run(broken).stderr


def test_tables_name_what_there_is() -> None:
    arguments = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert arguments == [name for name in inspect.signature(reparam.register_linear_op).parameters if name != "formula"]
    constructors = re.findall(r"^\| `(\w+)\((.*?)\)` \|", PAGE, re.MULTILINE)
    assert len(constructors) >= 8
    assert {name for name, _ in constructors} <= set(algebra.__all__)
    for name, parameters in constructors:
        wanted = parameters.split(", ")
        assert list(inspect.signature(getattr(algebra, name)).parameters)[: len(wanted)] == wanted
