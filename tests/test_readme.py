"""The README's Python runs as it is printed, and the files and commands it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_python_blocks_run_as_printed(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    program = "\n".join(blocks)
    finished = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "True" in finished.stdout
    assert (tmp_path / "digits.onnx").stat().st_size > 0


def test_named_files_exist() -> None:
    named = set(re.findall(r"(?:bash |`)((?:tools|examples|\.ci)/[\w./]+|[A-Z]+\.md|constraints\.txt)", README))
    assert len(named) >= 6
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
