"""Compiled code that is given a stand-in for a tensor must refuse it, and never read its memory.

Bindings of C++ ask whether an object is a tensor as `isinstance` does, and a stand-in says that it is one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reparam import fuse
from tests.capture.test_odd_forwards import Forward, call, image, odd
from tests.support import relative_error


class Swish(torch.autograd.Function):
    """As it is written to save memory in training."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, power: float = 1.0) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x * power)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient, None


class Doubled(torch.autograd.Function):
    """In the newer style."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)


swish = Swish.apply


def custom_function(s, x):
    return s.b(Swish.apply(s.a(x), 2.0) + Doubled.apply(x))


def custom_function_by_another_name(s, x):
    return s.b(swish(s.a(x)))


def of_constants_alone(s, x):
    return s.a(x) * Doubled.apply(torch.ones(4, 1, 1, dtype=x.dtype))


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize("forward", [custom_function, custom_function_by_another_name, of_constants_alone])
def test_custom_functions_are_followed(forward: Forward, capture: str) -> None:
    before = torch.autograd.Function.__dict__["apply"], swish
    result = fuse(odd(forward), image(), capture=capture, verify=False)
    assert result.report.after.batch_norms == 0
    for batch in (1, 2):
        assert relative_error(call(odd(forward), (image(batch),)), call(result.module, (image(batch),))) < 1e-12
    assert (torch.autograd.Function.__dict__["apply"], swish) == before


def test_a_module_may_hold_the_function() -> None:
    model: Any = odd(lambda s, x: s.b(s.act(s.a(x))))
    model.act = Swish.apply
    result = fuse(model, image(), capture="symbolic", verify=False)
    assert relative_error(call(model, (image(2),)), call(result.module, (image(2),))) < 1e-12
    assert model.act.__func__ is torch.autograd.Function.__dict__["apply"].__func__


def mapped(s, x):
    return s.b(torch.vmap(lambda one: one * 2)(s.a(x)))


def differentiated(s, x):
    return s.b(torch.func.vjp(torch.sin, s.a(x))[1](x)[0])


@pytest.mark.parametrize("forward", [mapped, differentiated])
def test_transforms_of_functions_are_left_to_python(forward: Forward) -> None:
    result = fuse(odd(forward), image(), verify=False)
    assert result.report.capture == "partial"
    assert "test_compiled_code.py:" in result.report.notes[0]
    assert relative_error(call(odd(forward), (image(2),)), call(result.module, (image(2),))) < 1e-12
    assert torch._C._functorch.peek_interpreter_stack() is None  # an exported program would have left its level open


CALLS = (
    "torch._C._functorch.unwrap_if_dead(x)",
    "torch._C._functorch._add_batch_dim(x, 0, 1)",
    "torch._C._functorch._wrap_for_grad(x, 1)",
    "torch._C._nn.adaptive_avg_pool2d(x, x)",
    "torch.adaptive_avg_pool1d(torch.rand(2, 3, 4), x)",
    "torch.as_tensor(x)",
    "torch.utils.dlpack.to_dlpack(x)",
    "torch.ops.aten.relu(x)",
    "(isinstance(x, torch.Tensor), torch._C._functorch.unwrap_if_dead(x))",
    "torch.rand(3, 4)[x]",
)
PROGRAM = """
import warnings, sys, torch
from torch import nn
from reparam.capture.trace import capture
warnings.simplefilter("ignore")
class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        assert isinstance(x, torch.Tensor) and x.__class__ is torch.Tensor
        CALL
        return self.linear(x)
try:
    capture(Calls().eval(), torch.rand(2, 3, 4, 4), way="symbolic")
except Exception as error:
    assert type(error).__module__.startswith("reparam"), repr(error)
print("alive")
"""


@pytest.mark.slow
def test_compiled_functions_survive_a_stand_in(tmp_path: Path) -> None:
    """One process for all, which ends at the first that does not."""
    program = [PROGRAM.replace("CALL", text).replace("class Calls", f"class Calls{i}").replace("Calls()", f"Calls{i}()")
               for i, text in enumerate(CALLS)]  # fmt: skip
    (tmp_path / "calls.py").write_text("\n".join(program))
    done = subprocess.run([sys.executable, str(tmp_path / "calls.py")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["alive"] * len(CALLS)), done.stderr[-2000:]


def what_python_asks(s, x):
    kinds = [isinstance(item, torch.Tensor) for item in (x, s.scale)]
    match x:
        case torch.Tensor():
            kinds.append(True)
    if all(kinds) and x.__class__ is torch.Tensor and issubclass(x.__class__, torch.Tensor):
        x = x * (2 if isinstance(x.shape[0], int) else 3)
    return s.a(x)


def test_python_is_told_what_the_stand_in_stands_for() -> None:
    fused = fuse(odd(what_python_asks), image(), capture="symbolic", verify=False).module
    assert relative_error(call(odd(what_python_asks), (image(2),)), call(fused, (image(2),))) < 1e-12
