"""Methods that `torch.compile` has made, kept in their modules: a copy of the module has its own, which are not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from reparam import InputError, fuse, verify
from reparam.compiled import eager, is_compiled
from tests.compiling import Around, Counting, net
from tests.equivalence.nets import example

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")


class Encoder(nn.Module):
    """Calls a method that may be compiled; trained it answers otherwise, and it counts its calls."""

    def __init__(self, backend: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.register_buffer("calls", torch.zeros(1))
        if backend is not None:
            self.encode = torch.compile(self.encode, backend=backend, dynamic=False)  # type: ignore[method-assign]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1.0)
        return self.norm(self.conv(x)) * (3.0 if self.training else 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x) + 1.0


class Ungraded(nn.Module):
    """Its forward is wrapped by a decorator of torch, which compiling sees through."""

    def __init__(self, backend: Any = None) -> None:
        super().__init__()
        self.inner = Encoder()
        if backend is not None:
            self.forward = torch.compile(self.forward, backend=backend, dynamic=False)  # type: ignore[method-assign]

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Outer(nn.Module):
    """Keeps a compiled method of a child."""

    def __init__(self, backend: Any = None) -> None:
        super().__init__()
        self.inner = Encoder()
        encode = self.inner.encode
        self.run = encode if backend is None else torch.compile(encode, backend=backend, dynamic=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(x)


KINDS = pytest.mark.parametrize("kind", [Encoder, Ungraded, Outer])
Kind = Callable[..., nn.Module]


@KINDS
def test_it_is_fused_in_its_inference_form(kind: Kind) -> None:
    model = kind(Counting()).train()
    before = copy.deepcopy(model.state_dict())
    result = fuse(model, example())
    assert result.report.after.batch_norms == 0
    torch.testing.assert_close(result.module(example()), kind().eval()(example()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "it was run itself"
    assert model.training
    assert any("compiled by torch.compile" in note for note in result.report.notes)


@KINDS
def test_as_an_original_it_is_run_as_it_was(kind: Kind) -> None:
    model = kind(Counting()).train()
    before = copy.deepcopy(model.state_dict())
    assert verify(model, kind().eval(), example()).passed
    wrong = kind().eval()
    next(wrong.parameters()).data.mul_(3.0)
    assert not verify(model, wrong, example(), level="quick").passed
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@KINDS
def test_as_a_candidate_it_is_run_as_it_is(kind: Kind) -> None:
    right, wrong = Counting(), Counting(1.05)
    comparison = verify(kind().eval(), kind(right).eval(), example())
    assert comparison.passed
    assert comparison.algebra_error is not None
    assert right.calls
    assert not verify(kind().eval(), kind(wrong).eval(), example(), level="quick").passed


@KINDS
def test_its_twin_has_methods_of_its_own(kind: Kind) -> None:
    model = kind(Counting())
    twin = eager(model)
    assert is_compiled(model)
    assert not is_compiled(twin)
    assert all(parameter is other for parameter, other in zip(twin.parameters(), model.parameters(), strict=True))
    twin.eval()(example())
    assert all(not bool(value.any()) for name, value in model.state_dict().items() if name.endswith("calls"))


@KINDS
def test_a_copy_that_calls_its_model_is_refused(kind: Kind) -> None:
    twin = copy.deepcopy(kind(Counting()))  # what torch.compile has made is no method to deepcopy, and stays
    for ask in (lambda: fuse(twin, example()), lambda: verify(kind(), twin, example())):
        with pytest.raises(InputError, match=r"is a method of a .* that is not in the model, as in a copy"):
            ask()


def test_a_forward_of_another_module_in_it_is_its_forward() -> None:
    model = Around(net())
    model.forward = torch.compile(model.inner.forward, backend=Counting())  # type: ignore[assignment, method-assign]
    assert verify(net(), model, example()).passed
    assert verify(model, net(), example()).passed


def test_what_is_no_method_of_a_module_is_left() -> None:
    model = net()
    model.helper = torch.compile(lambda x: x * 2.0, backend=Counting())  # type: ignore[assignment]
    model.disabled = torch._dynamo.disable(model.forward)  # type: ignore[assignment]
    assert not is_compiled(model)
    assert eager(model) is model
