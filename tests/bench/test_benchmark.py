"""The measurement with a clock that the variants themselves move: no real time, so no test depends on the machine."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reparam.bench import benchmark
from reparam.bench import benchmark as package_benchmark
from reparam.bench.backends import Backend
from reparam.bench.doubts import doubts
from reparam.bench.measure import Measured
from reparam.errors import InputError

X = torch.ones(1, 3)


class FakeClock:
    """Stands still but for what the fake variants add."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def time(self, call: Callable[[], Any]) -> float:
        start = self.seconds
        call()
        return self.seconds - start


class Fake:
    """A variant whose call takes as long as `latency(number of the call)` says."""

    def __init__(self, clock: FakeClock, latency: Callable[[int], float], log: list[str] | None = None, name: str = ""):
        self.clock, self.latency, self.log, self.name, self.calls = clock, latency, log, name, 0

    def __call__(self, x: Tensor) -> Tensor:
        if self.log is not None:
            self.log.append(self.name)
        self.clock.seconds += self.latency(self.calls)
        self.calls += 1
        return x


def run(latencies: dict[str, Callable[[int], float]], **options: Any) -> Any:
    clock = FakeClock()
    variants = {name: Fake(clock, latency) for name, latency in latencies.items()}
    return benchmark(variants, X, clock=clock, **{"max_seconds": 100.0, **options})


VERDICTS = [
    (2.0, 1.0, "faster by x2.00 (2.00-2.00)"),
    (1.0, 1.25, "slower by x1.25 (1.25-1.25)"),
    (1.0, 1.0, "no measurable difference (1.00-1.00)"),
    (1.004, 1.0, "no measurable difference (1.00-1.00)"),
]


@pytest.mark.parametrize(("baseline", "variant", "verdict"), VERDICTS)
def test_verdict(baseline: float, variant: float, verdict: str) -> None:
    timing = run({"original": lambda _: baseline, "fused": lambda _: variant}, max_seconds=60.0)
    assert timing.verdicts == {"fused": verdict}
    assert timing.medians == {"original": pytest.approx(baseline), "fused": pytest.approx(variant)}
    assert timing.ratios["fused"].baseline == "original"


def test_noise_that_disturbs_whole_rounds_cancels() -> None:
    noise = random.Random(1)
    bursts = [noise.uniform(1, 5) for _ in range(1000)]
    # Each variant is called once per round, so that call i of both is in the same round.
    timing = run({"original": lambda i: 1.2 * bursts[i], "fused": lambda i: bursts[i]}, max_seconds=300.0)
    ratio = timing.ratios["fused"]
    assert (ratio.low, ratio.value, ratio.high) == pytest.approx((1.2, 1.2, 1.2))
    assert any("middle half of fused" in warning for warning in timing.warnings)


def test_unpaired_noise_widens_the_interval() -> None:
    one, two = random.Random(1), random.Random(2)
    timing = run(
        {"original": lambda _: one.uniform(0.8, 1.2), "fused": lambda _: two.uniform(0.8, 1.2)}, max_seconds=100.0
    )
    ratio = timing.ratios["fused"]
    assert ratio.low < 1 < ratio.high
    assert timing.verdicts["fused"].startswith("no measurable difference")


def test_rounds_are_complete_and_in_random_order() -> None:
    clock, log = FakeClock(), list[str]()
    variants = {name: Fake(clock, lambda _: 1.0, log, name) for name in "abc"}
    timing = benchmark(variants, X, clock=clock, max_seconds=120.0, seed=3)
    calls = log[3:]  # behind the one call each that shows that the variants run
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6
    assert len(rounds) == timing.runs + len(timing.warmup["a"])
    again = benchmark({n: Fake(clock, lambda _: 1.0) for n in "abc"}, X, clock=clock, max_seconds=120.0, seed=3)
    assert again.to_dict() == timing.to_dict()


def test_warm_up_goes_on_until_the_latencies_settle() -> None:
    slow_start = run({"a": lambda i: max(1.0, 20.0 / (i + 1)), "b": lambda _: 1.0}, max_seconds=1000.0)
    steady = run({"a": lambda _: 1.0, "b": lambda _: 1.0}, max_seconds=1000.0)
    assert len(steady.warmup["a"]) == 6
    assert len(slow_start.warmup["a"]) > 10
    assert max(slow_start.samples["a"]) < 2.0


def test_time_is_kept_but_for_the_least_number_of_runs() -> None:
    assert run({"a": lambda _: 1.0, "b": lambda _: 1.0}, max_seconds=40.0).runs == 15
    slow = run({"a": lambda _: 50.0, "b": lambda _: 50.0}, max_seconds=10.0, min_runs=7)
    assert slow.runs == 7
    assert any("only 7 paired run(s)" in warning for warning in slow.warnings)


def test_interrupt_keeps_the_complete_rounds() -> None:
    def stop(call: int) -> float:
        if call == 20:
            raise KeyboardInterrupt
        return 1.0

    timing = run({"original": lambda _: 2.0, "fused": stop})
    assert timing.partial
    assert len(timing.samples["original"]) == len(timing.samples["fused"]) == timing.runs > 5
    assert timing.verdicts["fused"].startswith("faster by x2.00")
    assert any("interrupted after" in warning for warning in timing.warnings)


def test_interrupt_while_warming_up() -> None:
    def stop(call: int) -> float:
        if call == 3:
            raise KeyboardInterrupt
        return 1.0

    timing = run({"original": lambda _: 2.0, "fused": stop})
    assert timing.partial
    assert timing.runs == 0
    assert timing.verdicts == {}
    plain = json.loads(json.dumps(timing.to_dict(), allow_nan=False))
    assert plain["medians"] == {"original": None, "fused": None}
    assert len(plain["warmup"]["fused"]) == 2


def test_drift_and_progress() -> None:
    seen: list[tuple[float, str]] = []
    timing = run(
        {"a": lambda i: 1.0 + 0.01 * i, "b": lambda _: 1.0},
        max_seconds=100.0,
        progress=lambda share, text: seen.append((share, text)),
    )
    assert any("a became" in warning and "slower" in warning for warning in timing.warnings)
    assert not any(warning.startswith("b became") for warning in timing.warnings)
    assert [share for share, _ in seen] == sorted(share for share, _ in seen)
    assert seen[-1][0] == 1.0
    assert len(seen) == timing.runs + len(timing.warmup["a"])


DOUBTS: list[tuple[list[float], dict[str, Any], str]] = [
    ([1.0] * 40, {}, ""),
    ([1.0] * 19, {}, "only 19"),
    ([1.0] * 40, {"stable": False}, "had not settled"),
    ([1.0] * 40, {"load": 1.6}, "other processes"),
    ([1.0] * 40, {"load": 1.4}, ""),
    ([1.0] * 20 + [0.9] * 20, {}, "faster during the run"),
    ([1.0, 1.4, 1.2] * 13, {}, "middle half"),
]


@pytest.mark.parametrize(("samples", "facts", "phrase"), DOUBTS)
def test_doubts(samples: list[float], facts: dict[str, Any], phrase: str) -> None:
    measured = Measured({"a": tuple(samples)}, {"a": ()}, partial=False, stable=facts.get("stable", True))
    warnings = doubts(measured, threads=1, load=facts.get("load"))
    assert [phrase in warning for warning in warnings] == [True] if phrase else not warnings


class Writes(nn.Module):
    """Writes into its input, and notes the mode and the number of threads it runs with."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.seen: list[tuple[bool, int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((self.training, torch.get_num_threads(), bool((x == 1).all())))
        return self.bn(x.add_(1))


def test_modules_and_inputs_are_left_as_they_were() -> None:
    module, x = Writes().train(), X.clone()
    module.bn.eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    threads = torch.get_num_threads()
    timing = benchmark({"original": module, "same": module}, x, max_seconds=0.0, min_runs=2, threads=1)
    assert timing.runs == 2
    assert set(module.seen) == {(False, 1, True)}
    assert module.training
    assert not module.bn.training
    assert torch.get_num_threads() == threads
    assert timing.threads == 1
    assert torch.equal(x, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_result_names_what_it_ran_on() -> None:
    timing = package_benchmark({"a": nn.Identity(), "b": nn.Identity()}, X, max_seconds=0.0)
    plain = json.loads(json.dumps(timing.to_dict()))
    assert plain["hardware"]
    assert plain["device"] == "cpu"
    assert plain["torch_version"] == torch.__version__
    assert len(plain["samples"]["a"]) == len(plain["samples"]["b"]) == timing.runs == 5
    assert all(seconds > 0 for seconds in plain["samples"]["a"])


def test_several_backends_have_their_own_baselines(monkeypatch: pytest.MonkeyPatch) -> None:
    from reparam.bench import backends

    monkeypatch.setitem(backends.BACKENDS, "again", Backend(lambda job: job.module))  # type: ignore[index]
    timing = benchmark(
        {"a": nn.Identity(), "b": nn.Identity(), "file": lambda x: x}, X, backends=("eager", "again"), max_seconds=0.0
    )
    assert list(timing.samples) == ["a [eager]", "a [again]", "b [eager]", "b [again]", "file"]
    baselines = {label: ratio.baseline for label, ratio in timing.ratios.items()}
    assert baselines == {"b [eager]": "a [eager]", "b [again]": "a [again]", "file": "a [eager]"}


def fails(_: Tensor) -> Tensor:
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\nand more")


REFUSE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {}, "there is no variant"),
    ({"a": 3}, {}, "variant 'a' is a int"),
    ({"a": fails}, {}, "variant 'a' fails on the example inputs: mat1 and mat2 shapes cannot be multiplied$"),
    ({"a": nn.Identity()}, {"backends": ("steam",)}, "no backend 'steam'; choose from eager"),
    ({"a": nn.Identity()}, {"backends": ()}, "no backend is given"),
    ({"a": nn.Identity()}, {"device": "abacus"}, "device 'abacus' cannot be used"),
    ({"a": nn.Identity()}, {"min_runs": 0}, "must be at least 1"),
    ({"a": nn.Identity()}, {"threads": 0}, "must be at least 1"),
    ({"a": nn.Identity()}, {"max_seconds": float("nan")}, "a number of seconds"),
]


@pytest.mark.parametrize(("variants", "options", "message"), REFUSE)
def test_bad_input_is_one_sentence(variants: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        benchmark(variants, X, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_events() -> None:
    small, large = nn.Linear(512, 512).cuda(), nn.Sequential(*[nn.Linear(512, 512) for _ in range(20)]).cuda()
    timing = benchmark({"large": large, "small": small}, torch.randn(64, 512), max_seconds=1.0)
    assert timing.device == "cuda:0"
    assert min(timing.samples["large"]) > 0
    assert timing.hardware == torch.cuda.get_device_name(0)
