"""Functions in which a tensor may stand for a number crash torch on a proxy; wherever they are kept, none gets one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import reparam
from tests.capture import imported


class Imported(nn.Module):
    """By name in another file, in an attribute of the module, and in one of its class."""

    power = torch.pow

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.choose = torch.where

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = imported.squared_if_positive(self.conv(x))
        y = self.power(y, 3) + type(self).power(y, 2)
        return self.choose(y > 1, y, 1.0)


@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_they_are_traced_and_put_back(capture: str) -> None:
    model, x = Imported().eval(), torch.randn(2, 3, 4, 4)
    result = reparam.fuse(model, x, capture=capture)
    torch.testing.assert_close(result.module(x), model(x))
    assert imported.pow is torch.pow is Imported.power
    assert imported.where is torch.where is model.choose
    assert type(torch.pow).__name__ == type(torch.where).__name__ == "builtin_function_or_method"


@pytest.mark.slow
def test_a_crash_would_end_the_process(tmp_path: Path) -> None:
    """In a process of its own, as a failure here is no exception."""
    (tmp_path / "shapes.py").write_text("from torch import clamp, remainder\n\ndef f(x):\n    return clamp(x, 0, 1)\n")
    program = (
        "import torch, reparam, shapes\n"
        "class M(torch.nn.Module):\n"
        "    def forward(self, x): return shapes.remainder(shapes.f(x), 0.3)\n"
        "x = torch.rand(2, 3)\n"
        "assert torch.equal(reparam.fuse(M(), x).module(x), M()(x))\n"
    )
    root = Path(__file__).resolve().parents[2]
    path = {"PYTHONPATH": f"{tmp_path}:{root}"}
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=path)
    assert finished.returncode == 0, finished.stderr


class Disabled(nn.Module):
    """Switches automatic casts off, for the device that its input is on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.norm(self.conv(x)).relu()  # type: ignore[no-any-return]


def test_autocast_that_is_off_on_the_input_s_device() -> None:
    result = reparam.fuse(Disabled().eval(), torch.randn(2, 3, 4, 4))
    assert (result.report.capture, result.report.after.batch_norms) == ("symbolic", 0)
