"""`benchmark`: variants of a model, timed side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from reparam.bench import statistics
from reparam.bench.backends import BACKENDS, Variant, chosen, device_of, in_eval_mode, placed
from reparam.bench.machine import Clock, clock_for, hardware_name, system_load
from reparam.bench.measure import Measured, Progress, Runner, measure
from reparam.bench.timing import Ratio, Timing
from reparam.errors import InputError
from reparam.inputs import ExampleInputs, Inputs

FEW_RUNS = 20
DRIFT = 0.05
SPREAD = 0.2


def benchmark(
    variants: Mapping[str, Variant],
    example_inputs: ExampleInputs,
    *,
    backends: Iterable[str] = ("eager",),
    threads: int | None = None,
    min_runs: int = 5,
    max_seconds: float = 5.0,
    seed: int = 0,
    progress: Progress | None = None,
    device: torch.device | str | None = None,
    clock: Clock | None = None,
) -> Timing:
    """Times variants of a model in pairs: every round runs each of them once, in random order.

    Args:
        variants: modules (timed in eval mode and put back afterwards) or callables with the same signature, by name.
            The first is the baseline.
        example_inputs: tensor, tuple of arguments or dict of keyword arguments; each call gets fresh copies.
        backends: how to run the modules; with several, labels become `name [backend]` and each backend has the first
            variant on it as its baseline. Callables are run as they are, against the first label of all.
        threads: torch's threads within an operator while measuring; None leaves them. A callable that is no torch code
            keeps its own.
        min_runs: complete rounds to take in any case.
        max_seconds: time for all of it, warm-up included; exceeded only for `min_runs`.
        seed: of the order within rounds and of the bootstrap.
        progress: called after each round with the share done, 0 to 1, and a text.
        device: where to run modules (copies, if they have to move); None is where each one's weights are.
        clock: how to time a call; None takes CUDA events on a CUDA device and wall-clock time elsewhere.

    Returns:
        All samples, ratios with intervals, verdicts and warnings. After an interrupt from the keyboard it holds the
        rounds that were complete, and `partial` is set.

    Raises:
        InputError: nothing to time, an unknown backend or device, or a variant that fails on the inputs.
    """
    inputs = Inputs.of(example_inputs)
    if not variants:
        raise InputError('there is no variant to time; pass a dict such as {"original": model, "fused": fused}')
    if min_runs < 1 or not math.isfinite(max_seconds) or max_seconds < 0 or (threads is not None and threads < 1):
        raise InputError("min_runs and threads must be at least 1, and max_seconds a number of seconds, not negative")
    names = chosen(backends)
    where = _device(device)
    with in_eval_mode(variants.values()), _threads(threads), torch.inference_mode():
        runners, devices = _runners(variants, inputs, names, where, clock)
        load = system_load()
        measured = measure(runners, min_runs=min_runs, max_seconds=max_seconds, seed=seed, progress=progress)
        used = torch.get_num_threads()
    ratios = _ratios(runners, measured, seed)
    return Timing(
        samples=measured.samples,
        warmup=measured.warmup,
        ratios=ratios,
        hardware=" and ".join(dict.fromkeys(hardware_name(d) for d in devices)),
        device=" and ".join(dict.fromkeys(str(d) for d in devices)),
        threads=used,
        torch_version=torch.__version__,
        seed=seed,
        partial=measured.partial,
        warnings=doubts(measured, used, load),
    )


def _runners(
    variants: Mapping[str, Variant],
    inputs: Inputs,
    backends: tuple[str, ...],
    device: torch.device | None,
    clock: Clock | None,
) -> tuple[list[Runner], list[torch.device]]:
    """Every variant on every backend, and the devices in use."""
    runners: list[Runner] = []
    devices: list[torch.device] = []
    baselines: dict[str, str] = {}
    for name, variant in variants.items():
        if not callable(variant):
            raise InputError(f"variant {name!r} is a {type(variant).__name__}; pass a module or a callable")
        where = device_of(variant, inputs, device)
        local = inputs.map(lambda tensor, where=where: tensor.to(where))  # type: ignore[misc]
        here = placed(variant, where)
        is_module = isinstance(here, torch.nn.Module)
        for backend in backends if is_module else ("",):
            label = f"{name} [{backend}]" if is_module and len(backends) > 1 else name
            if isinstance(here, torch.nn.Module):
                here.eval() if here is not variant else None
                call = BACKENDS[backend](here, local)
            else:
                call = here
            baseline = baselines.setdefault(backend, label) if backend else (runners[0].label if runners else label)
            prepare = _prepare(call, local)
            _runs(name, prepare)
            runners.append(Runner(label, prepare, clock or clock_for(where), baseline))
            devices.append(where)
    return runners, devices


def _prepare(call: Callable[..., Any], inputs: Inputs) -> Callable[[], Callable[[], Any]]:
    """Makes calls with fresh copies of the inputs; the copying stays outside what is timed."""

    def prepare() -> Callable[[], Any]:
        fresh = inputs.clone()
        args, kwargs = fresh.args, dict(fresh.kwargs)
        return lambda: call(*args, **kwargs)

    return prepare


def _runs(name: str, prepare: Callable[[], Callable[[], Any]]) -> None:
    try:
        prepare()()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise InputError(f"variant {name!r} fails on the example inputs: {lines[0]}") from error


def _ratios(runners: list[Runner], measured: Measured, seed: int) -> dict[str, Ratio]:
    ratios = {}
    for runner in runners:
        samples = measured.samples[runner.label]
        if runner.label == runner.baseline or not samples:
            continue
        value, low, high = statistics.ratio_interval(measured.samples[runner.baseline], samples, seed)
        ratios[runner.label] = Ratio(runner.baseline, value, low, high, len(samples))
    return ratios


def doubts(measured: Measured, threads: int, load: float | None) -> tuple[str, ...]:
    """What makes the figures doubtful and what to do, a sentence each."""
    runs = len(next(iter(measured.samples.values())))
    found = []
    if measured.partial:
        found.append(f"the measurement was interrupted after {runs} complete round(s); run it again for full figures")
    if runs < FEW_RUNS:
        found.append(f"only {runs} paired run(s) were taken; raise max_seconds or make the example inputs smaller")
    if not measured.stable:
        found.append("the latencies had not settled when warm-up ended; raise max_seconds")
    for label, samples in measured.samples.items():
        change = statistics.drift(samples)
        if abs(change) > DRIFT:
            found.append(
                f"{label} became {abs(change):.0%} {'slower' if change > 0 else 'faster'} during the run; "
                "let the machine settle or cool down, then measure again"
            )
        if statistics.spread(samples) > SPREAD:
            found.append(
                f"the middle half of {label}'s latencies spans {statistics.spread(samples):.0%} of their median; "
                "close other programs or use fewer threads"
            )
    if load is not None and load > threads + 0.5:
        found.append(
            f"other processes were running (load {load:.1f} with {threads} thread(s) of ours); "
            "stop them and measure again"
        )
    return tuple(found)


def _device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    # An index makes devices comparable: `cuda` and `cuda:0` are the same one.
    return torch.empty(1, device=found).device


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)
