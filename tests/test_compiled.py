"""Modules that `torch.compile` has wrapped: fused without it, compared as they run, and compiled still after that."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reparam import InputError, export_archive, export_onnx, fuse, verify
from reparam.compiled import eager, is_compiled, nothing_compiled
from reparam.copying import copied
from tests.equivalence.nets import Plain, example, randomise


class Counting:
    """A backend that runs the graph as it is, or, of float32, `factor` times that; it counts its calls."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.calls = factor, 0

    def __deepcopy__(self, memo: Any) -> Counting:
        return self  # a copy of what is compiled with it counts here, too

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.calls += 1
            return tuple(t * self.factor if t.dtype == torch.float32 else t for t in graph.forward(*args))

        return run


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    """What torch knows of the code of one test shall not decide another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net() -> nn.Module:
    return randomise(Plain(), seed=0).eval()


def compiled(module: nn.Module, backend: Any) -> Any:
    return torch.compile(module, backend=backend, dynamic=False)


class Around(nn.Module):
    """Holds a module."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) + 1.0


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


def test_what_is_compiled_stays_so_when_it_was_looked_at() -> None:
    """Under modes torch runs compiled code uncompiled, and from then on always."""
    model, backend = net(), Counting()
    candidate = compiled(model, backend)
    candidate(example())
    fuse(candidate, example())
    verify(model, candidate, example(), level="quick")
    verify(candidate, model, example(), level="quick")
    fuse(Around(candidate).eval(), example())
    for one in (candidate, compiled(net(), backend)):
        before = backend.calls
        one(example())
        assert backend.calls == before + 1


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


class Doubling(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0


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


def test_a_compiled_module_is_put_back_when_it_was_run() -> None:
    model = net()
    other = compiled(copy.deepcopy(model).train(), Counting())
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert verify(model, other, example(), level="quick").passed
    assert all(part.training for part in other.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())


class Remembering(nn.Module):
    """Writes to a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.full((3,), float("nan")))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.copy_(x.flatten()[:3])
        return x * 2.0


def test_what_a_compiled_module_writes_is_put_back() -> None:
    other = compiled(Remembering(), Counting())
    assert verify(Remembering(), other, example(), level="quick").passed
    assert bool(other.seen.isnan().all())


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


class Assigning(nn.Module):
    """Puts another tensor in place of its buffer, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x.flatten()[:3] + 1.0
        self.calls += 1
        self.last = x
        return x * 2.0


def test_what_a_compiled_module_assigns_is_put_back() -> None:
    inner = Assigning()
    seen = inner.seen
    assert verify(Assigning(), compiled(inner, Counting()), example(), level="quick").passed
    assert inner.seen is seen
    assert not bool(seen.any())
    assert inner.calls == 0
    assert not hasattr(inner, "last")


def test_what_cannot_be_compared_is_refused_in_a_sentence() -> None:
    with pytest.raises(InputError, match="the original is a function"):
        verify(lambda x: x, net(), example())  # type: ignore[arg-type, return-value]
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
        with pytest.raises(InputError, match="is that of another Plain, as in a copy"):
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


def test_what_torch_compiles_no_more_fails() -> None:
    """It has a limit for the code of a class, beyond which it runs eager code without a word."""
    models = [(net(), Counting(1.05)) for _ in range(torch._dynamo.config.recompile_limit + 2)]
    for model, backend in models:
        assert not verify(net(), compiled(model, backend), example(), level="quick").passed


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


def test_two_threads_leave_torch_as_it_was() -> None:
    """The default dtype, the random state and the stance are those of the process."""
    model, state = net(), torch.get_rng_state()
    passed: list[bool] = []

    def look() -> None:
        passed.append(verify(model, copy.deepcopy(model), example(), level="quick").passed)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed == [True] * 4
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    backend = Counting()
    compiled(net(), backend)(example())
    assert backend.calls == 1


def test_two_threads_do_not_take_each_others_compiled_code_for_eager_code() -> None:
    """One leaves `compiled` while the other is in the middle of a call."""
    alone, passed = threading.Event(), {}

    def waiting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        alone.wait(0.5)
        return Counting(1.05)(graph, inputs)

    def look(name: str, backend: Any) -> None:
        model = net()
        candidate = nn.Sequential(Around(compiled(Doubling(), backend)), compiled(copy.deepcopy(model), Counting(1.05)))
        reference = nn.Sequential(Around(Doubling()), model)
        passed[name] = verify(reference, candidate, example(), level="quick").passed

    threads = [
        threading.Thread(target=look, args=("slow", waiting)),
        threading.Thread(target=look, args=("b", Counting())),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert passed == {"slow": False, "b": False}


def test_another_thread_waits() -> None:
    entered, held = threading.Event(), []

    def other() -> None:
        with nothing_compiled():
            entered.set()

    thread = threading.Thread(target=other)
    with nothing_compiled(), nothing_compiled():
        thread.start()
        held.append(entered.wait(0.2))
    thread.join()
    assert held == [False]
    assert entered.is_set()


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
