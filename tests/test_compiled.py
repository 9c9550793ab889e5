"""Modules that `torch.compile` has wrapped: fused without it, and compared as they run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reparam import InputError, export_archive, export_onnx, fuse, verify
from reparam.compiled import eager, is_compiled
from reparam.copying import copied
from tests.compiling import Around, Counting, Doubling, compiled, net
from tests.equivalence.nets import example

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")


def test_what_is_compiled_is_fused_as_what_it_was() -> None:
    model = net()
    plain, found = fuse(model, example()), fuse(compiled(model, Counting()), example())
    assert len(found.report.rewrites) == len(plain.report.rewrites) > 0
    assert [str(one.place) for one in found.report.rewrites] == [str(one.place) for one in plain.report.rewrites]
    assert found.report.model == "Plain"
    assert any("compiled by torch.compile" in note for note in found.report.notes)
    assert not is_compiled(found.module)
    assert torch.equal(found.module(example()), plain.module(example()))


def test_so_is_what_is_compiled_within() -> None:
    model = Around(net())
    plain = fuse(model, example())
    found = fuse(Around(compiled(model.inner, Counting())).eval(), example())
    assert len(found.report.rewrites) == len(plain.report.rewrites) > 0


def test_a_fault_of_what_was_compiled_is_found() -> None:
    model = net()
    backend = Counting(1.05)
    candidate = compiled(copy.deepcopy(model), backend)
    for one in (candidate, lambda x: candidate(x)):
        before = backend.calls
        comparison = verify(model, one, example(), level="quick")
        assert backend.calls > before
        assert not comparison.passed
        assert any("float32 error" in failure for failure in comparison.failures)


def test_what_was_compiled_well_agrees() -> None:
    model, backend = net(), Counting()
    comparison = verify(model, compiled(copy.deepcopy(model), backend), example())
    assert comparison.passed
    assert backend.calls
    assert comparison.algebra_error is not None
    assert any("as torch.compile has made it" in note for note in comparison.notes)
    assert verify(compiled(model, backend), model, example()).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_in_other_dtypes_it_is_compared_as_it_runs_too(dtype: torch.dtype) -> None:
    model, backend = net().to(dtype), Counting()
    assert verify(model, compiled(copy.deepcopy(model), backend), example().to(dtype), level="quick").passed
    assert backend.calls


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend, dynamic=False)
    return model


def in_its_forward(model: nn.Module, backend: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend, dynamic=False)
    return model


@pytest.mark.parametrize("way", [in_place, in_its_forward, compiled])
def test_every_way_to_compile_is_compared_as_it_runs(way: Callable[..., nn.Module]) -> None:
    model, good, bad = net(), Counting(), Counting(1.05)
    other = way(copy.deepcopy(model), good)
    assert verify(model, other, example(), level="quick").passed
    assert good.calls
    assert verify(other, model, example()).passed
    found = fuse(other, example())
    assert found.report.rewrites
    assert any("compiled by torch.compile" in note for note in found.report.notes)
    assert not verify(model, way(copy.deepcopy(model), bad), example(), level="quick").passed


BACKEND = Counting(1.05)


@torch.compile(backend=BACKEND, dynamic=False)
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2.0


class Calling(nn.Module):
    """Calls a function that is compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return doubled(x) + 1.0


class Keeping(nn.Module):
    """Keeps a module where it is no child."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [compiled(Doubling(), BACKEND)]

    def forward(self, x: torch.Tensor) -> Any:
        return self.kept[0](x) + 1.0


class Decorated(nn.Module):
    """The usual way to write it."""

    @torch.compile(backend=BACKEND, dynamic=False)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0 + 1.0


class Helped(nn.Module):
    """Calls a method that calls a function that calls what is compiled."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.further(x) + 1.0

    def further(self, x: torch.Tensor) -> torch.Tensor:
        return indirectly(x)


class Nested(nn.Module):
    """Keeps a function deep in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"a": [functools.partial(doubled)]}

    def forward(self, x: torch.Tensor) -> Any:
        return self.kept["a"][0](x) + 1.0


def indirectly(x: torch.Tensor) -> torch.Tensor:
    return doubled(x)


class Plainly(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0 + 1.0


@pytest.mark.parametrize("kind", [Calling, Keeping, Decorated, Helped, Nested])
def test_what_a_module_calls_is_run_as_it_is_compiled(kind: type[nn.Module]) -> None:
    before = BACKEND.calls
    comparison = verify(Plainly(), kind(), example(), level="quick")
    assert BACKEND.calls > before
    assert not comparison.passed
    assert any("as torch.compile has made it" in note for note in comparison.notes)


@pytest.mark.parametrize("kind", [Calling, Decorated, Helped, Nested])
def test_what_calls_compiled_code_is_fused_through_it(kind: type[nn.Module]) -> None:
    result = fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), kind()).eval(), torch.randn(1, 3, 8, 8))
    assert result.report.capture == "symbolic"
    assert (result.report.after.convolutions, result.report.after.nodes) == (1, 1)
    assert result.report.notes == ("the model was compiled by torch.compile; the fused one is not: compile it anew",)


class Accumulating(nn.Module):
    """Its answer depends on what it was asked before, and is its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seen.add_(x.mean())


def test_state_is_carried_on_as_the_original_carries_it() -> None:
    other = compiled(Accumulating(), Counting())
    assert verify(Accumulating(), other, example()).passed
    assert not bool(other.seen.any())


def test_what_cannot_be_compared_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="the original is a function"):
        verify(lambda x: x, net(), example())  # type: ignore[arg-type, return-value]
    with pytest.raises(InputError, match="the candidate is a NoneType; give a module or a function"):
        verify(net(), None, example())  # type: ignore[arg-type]
    other = net()
    other.register_buffer("odd", torch.eye(3).to_sparse())
    with pytest.raises(InputError, match="the candidate cannot be compared: odd is a sparse_coo tensor; make it"):
        verify(net(), other, example())
    other.odd = torch.zeros(3, device="meta")
    with pytest.raises(InputError, match="the candidate cannot be compared: odd is on the meta device"):
        verify(net(), other, example())


def test_a_copy_whose_compiled_forward_is_that_of_its_model_is_refused() -> None:
    model = net()
    model.forward = torch.compile(model.forward, backend=Counting())  # type: ignore[method-assign]
    twin = copy.deepcopy(model)
    for ask in (lambda: fuse(twin, example()), lambda: verify(net(), twin, example())):
        with pytest.raises(InputError, match="the compiled forward is a method of a Plain that is not in the model"):
            ask()
    assert fuse(model, example()).report.comparison.passed


def test_a_layer_of_torch_whose_forward_is_compiled_is_fused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[0].forward = torch.compile(model[0].forward, backend=Counting(1.05))  # type: ignore[method-assign]
    result = fuse(model, torch.randn(1, 3, 8, 8))
    assert result.report.after.batch_norms == 0
    assert not is_compiled(result.module)
    assert not verify(result.module, model, torch.randn(1, 3, 8, 8), level="quick").passed


def test_what_is_no_module_is_refused_in_a_sentence(tmp_path: Path) -> None:
    for ask in (
        fuse,
        lambda model, x: export_onnx(model, x, tmp_path / "a"),
        lambda model, x: export_archive(model, x, tmp_path / "a"),
    ):
        with pytest.raises(InputError, match=r"expected a torch\.nn\.Module, got str"):
            ask("model", example())  # type: ignore[operator]


def test_hooks_on_what_was_compiled_are_not_lost() -> None:
    candidate = compiled(net(), Counting())
    candidate.register_forward_hook(lambda module, inputs, output: output * 2.0)
    for ask in (lambda: fuse(candidate, example()), lambda: verify(net(), Around(candidate), example())):
        with pytest.raises(InputError, match="has forward hooks"):
            ask()


def test_what_is_shared_stays_shared() -> None:
    inner = nn.Linear(3, 3)
    block = Around(compiled(inner, Counting()))
    twin = eager(nn.Sequential(compiled(block, Counting()), block))
    assert isinstance(twin, nn.Sequential)
    assert twin[0] is twin[1]
    assert twin[0].inner.weight is inner.weight


def test_a_copy_of_such_a_module_does_not_call_it() -> None:
    model = nn.Linear(3, 2)
    model.compile(backend=Counting())
    twin = copied(model)
    twin.weight = nn.Parameter(torch.zeros(2, 3))
    twin.bias = nn.Parameter(torch.zeros(2))
    assert not bool(twin(torch.ones(1, 3)).any())


def test_what_is_not_compiled_is_left_as_it_is() -> None:
    model = Around(net())
    assert eager(model) is model
    inner = compiled(model.inner, Counting())
    assert eager(inner) is model.inner
    outer = Around(inner)
    twin = eager(outer)
    assert outer.inner is inner, "the caller's module is not changed"
    assert not is_compiled(twin)
    assert {id(one) for one in twin.parameters()} == {id(one) for one in model.parameters()}


@pytest.mark.slow
def test_what_is_compiled_is_exported(tmp_path: Path) -> None:
    model = net()
    candidate = compiled(model, Counting())
    file = export_onnx(candidate, example(), tmp_path / "model.onnx")
    assert file.checked
    program = torch.export.load(export_archive(candidate, example(), tmp_path / "model.pt2")).module()
    torch.testing.assert_close(program(example()), model(example()))


class Scaling(nn.Module):
    """Counts its calls, and multiplies by that; it calls a function that may be compiled."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], start: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("count", torch.full((1,), start))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1.0)
        return self.function(x) * self.count


@pytest.mark.parametrize("level", ["quick", "standard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_code_that_is_found_late_begins_with_the_same_state(level: str, dtype: torch.dtype) -> None:
    well = torch.compile(lambda x: x * 2.0, backend=Counting(), dynamic=False)
    reference = Scaling(lambda x: x * 2.0).to(dtype)
    assert verify(reference, Scaling(well).to(dtype), example().to(dtype), level=level).passed
    assert not verify(reference, Scaling(well, start=1.0).to(dtype), example().to(dtype), level=level).passed


def test_within_a_mode_that_keeps_it_from_running_it_is_refused() -> None:
    with FlopCounterMode(display=False), pytest.raises(InputError, match="within FlopCounterMode what torch"):
        verify(net(), compiled(net(), Counting(1.05)), example(), level="quick")


def test_what_a_backend_says_is_told() -> None:
    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise ZeroDivisionError("of all things")

    comparison = verify(net(), compiled(net(), backend), example(), level="quick")
    assert not comparison.passed
    assert "ZeroDivisionError: of all things" in comparison.cases[0].failures[0]


@pytest.mark.filterwarnings("ignore:.*jit.script.*deprecated")
def test_scripts_beside_what_is_compiled_are_left() -> None:
    script = torch.jit.script(net())
    reference = nn.Sequential(net(), nn.ReLU()).train()
    for candidate in (
        compiled(nn.Sequential(script, nn.ReLU()).train(), Counting()),
        nn.Sequential(script, compiled(nn.ReLU(), Counting())).train(),
    ):
        assert verify(reference, candidate, example(), level="quick").passed
        assert [part.training for part in candidate.modules()] == [True] * len([*candidate.modules()])
        assert any("TorchScript" in note for note in fuse(candidate, example()).report.notes)


def test_a_backend_may_fuse() -> None:
    fused = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        fused.append(fuse(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), example()).report.comparison.passed)
        return graph.forward

    compiled(net(), backend)(example())
    assert fused == [True]
