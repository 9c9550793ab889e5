"""What looking at compiled modules leaves of them, and of what is the whole process's."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from reparam import fuse, verify
from reparam.compiled import nothing_compiled
from tests.compiling import Around, Counting, Doubling, compiled, net
from tests.equivalence.nets import example

pytestmark = pytest.mark.usefixtures("nothing_compiled_before")


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


def test_what_torch_compiles_no_more_fails() -> None:
    """It has a limit for the code of a class, beyond which it runs eager code without a word."""
    models = [(net(), Counting(1.05)) for _ in range(torch._dynamo.config.recompile_limit + 2)]
    for model, backend in models:
        assert not verify(net(), compiled(model, backend), example(), level="quick").passed


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


class Growing(nn.Module):
    """Makes a child and puts another parameter in the place of its own when it is called, and resizes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(self, "child"):
            self.child = nn.Identity()
        self.scale = nn.Parameter(self.scale.detach() + 1.0)
        self.seen.resize_(5)
        return self.child(x) * self.scale


def test_children_parameters_and_sizes_are_put_back() -> None:
    inner = Growing().train()
    scale = inner.scale
    assert verify(Growing(), compiled(inner, Counting()), example(), level="quick").passed
    assert inner.scale is scale
    assert scale.item() == 2.0
    assert [name for name, _ in inner.named_modules()] == [""]
    assert inner.seen.tolist() == [0.0, 0.0]


class Signalling(nn.Module):
    """Tells when it is run with another default dtype, and gives others the time to do something meanwhile."""

    def __init__(self, begin: threading.Event) -> None:
        super().__init__()
        object.__setattr__(self, "begin", begin)

    def __deepcopy__(self, memo: Any) -> Signalling:
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.get_default_dtype() == torch.float64:
            self.begin.set()
            time.sleep(0.2)
        return x * 2.0


def test_what_another_thread_compiles_meanwhile_leaves_the_default_dtype() -> None:
    """Torch puts back the default dtype that it has found when it began to compile."""
    begin, found = threading.Event(), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        found.append(torch.get_default_dtype())
        time.sleep(0.5)
        return graph.forward

    @torch._dynamo.disable
    def pause() -> None:
        begin.wait(10.0)

    @torch.compile(backend=backend)
    def serve(x: torch.Tensor) -> torch.Tensor:
        pause()  # within what is compiled: the rest is compiled when it is reached
        return x * 3.0

    thread = threading.Thread(target=serve, args=(torch.ones(3),))
    thread.start()
    assert verify(Signalling(begin), Signalling(begin), example(), level="quick").passed
    thread.join()
    assert begin.is_set()
    assert found == [torch.float32]
    assert torch.get_default_dtype() == torch.float32


class Pooled(nn.Module):
    """Has another thread compile and call a function, and waits for it."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.elsewhere(x) + 1.0

    @torch._dynamo.disable
    def elsewhere(self, x: torch.Tensor) -> torch.Tensor:
        """What the thread answers."""
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(self.function(x)), daemon=True)
        thread.start()
        thread.join(30.0)
        return found[0]


def test_a_candidate_may_compile_in_another_thread() -> None:
    function = torch.compile(lambda x: x * 2.0, backend=Counting(), dynamic=False)
    candidate = compiled(Pooled(function), Counting())
    assert verify(Pooled(lambda x: x * 2.0), candidate, example(), level="quick").passed
