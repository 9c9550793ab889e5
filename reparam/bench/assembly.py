"""Every variant on every backend becomes a runner: placed, built, seen to run, its footprint taken."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from reparam.bench.backends import Backend, Job, Variant
from reparam.bench.footprint import Footprint, peak_of, weights_of
from reparam.bench.graphs import GraphedCall
from reparam.bench.machine import Clock, WallClock, clock_for
from reparam.bench.measure import Runner
from reparam.bench.placement import Placement, check_on, device_of
from reparam.errors import InputError, ReparamError
from reparam.inputs import Inputs


@dataclass
class Assembly:
    """The runners, with what is known of each before it is measured.

    Attributes:
        runners: in the order of the labels in the result.
        devices: of each runner.
        footprints: by label.
        backends: label -> backend; empty for a callable that is run as it is.
        left_out: label -> why it was not measured.
    """

    runners: list[Runner] = field(default_factory=list)
    devices: list[torch.device] = field(default_factory=list)
    footprints: dict[str, Footprint] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, runner: Runner, device: torch.device, backend: str, footprint: Footprint) -> None:
        """Takes a runner that was seen to run."""
        self.runners.append(runner)
        self.devices.append(device)
        self.backends[runner.label] = backend
        self.footprints[runner.label] = footprint


def assemble(
    variants: Mapping[str, Variant],
    inputs: Inputs,
    backends: Mapping[str, Backend],
    place: Placement,
    *,
    clock: Clock | None,
    memory: bool,
    lenient: bool,
) -> Assembly:
    """Runners for every variant on every backend.

    Args:
        backends: those to use, by name.
        memory: whether to measure the peak of memory, which takes a further call.
        lenient: whether a variant that cannot be built or run is left out with its reason; else it raises.

    Raises:
        InputError: a variant is no callable, or fails on the inputs.
    """
    made = Assembly()

    @contextmanager
    def left_out(label: str) -> Iterator[None]:
        try:
            yield
        except ReparamError as error:
            if not lenient:
                raise
            made.left_out[label] = str(error)

    baselines: dict[str, str] = {}
    for name, variant in variants.items():
        if not callable(variant):
            raise InputError(f"variant {name!r} is a {type(variant).__name__}; pass a module or a callable")
        device = device_of(variant, inputs, place.device)
        if not isinstance(variant, nn.Module):
            baseline = made.runners[0].label if made.runners else name
            runner = Runner(name, _prepare(variant, inputs), clock or clock_for(device), baseline)
            with left_out(name):
                made.add(runner, device, "", Footprint(first_seconds=_runs(name, runner)))
            continue
        check_on(place, device)
        local, module = place.inputs(inputs, device), place.module(variant, device)
        for backend, row in backends.items():
            label = f"{name} [{backend}]" if len(backends) > 1 else name
            job = Job(module, local, device, place.threads, place.precision)
            with left_out(label):
                runner, footprint = _build(label, name, row, job, place, clock, baselines.get(backend, label), memory)
                baselines.setdefault(backend, label)
                made.add(runner, device, backend, footprint)
    return made


def _build(
    label: str, name: str, row: Backend, job: Job, place: Placement, clock: Clock | None, baseline: str, memory: bool
) -> tuple[Runner, Footprint]:
    """The runner of a module on a backend, which was seen to run."""
    start = time.perf_counter()
    peak: int | None = None

    def make() -> Callable[..., Any]:
        call = row.build(job)
        if not (place.cuda_graphs and row.torch):
            return call
        with torch.inference_mode():
            return GraphedCall(call, job.inputs, job.device)

    try:
        if place.cuda_graphs and row.torch and memory:
            kept: list[Any] = []  # what a graph needs is allocated while it is recorded, and stays
            peak = peak_of(lambda: kept.append(make()), job.device)
            call = kept[0]
        else:
            call = make()
    except ReparamError:
        raise
    except Exception as error:
        raise InputError(f"variant {name!r} fails on the example inputs: {_first_line(error)}") from error
    built = time.perf_counter() - start
    timer = clock or (clock_for(job.device) if row.torch else WallClock())
    runner = Runner(label, _prepare(call, job.inputs), timer, baseline)
    first = _runs(name, runner)
    if memory and row.torch and peak is None:
        with torch.inference_mode():
            peak = peak_of(runner.prepare(), job.device)
    return runner, Footprint(weights_of(job.module), peak, built, first)


def _prepare(call: Callable[..., Any], inputs: Inputs) -> Callable[[], Callable[[], Any]]:
    """Makes calls with fresh copies of the inputs; the copying stays outside what is timed."""

    def prepare() -> Callable[[], Any]:
        fresh = inputs.clone()
        args, kwargs = fresh.args, dict(fresh.kwargs)
        return lambda: call(*args, **kwargs)

    return prepare


def _runs(name: str, runner: Runner) -> float:
    """Seconds of the first call."""
    try:
        with torch.inference_mode():
            return runner.clock.time(runner.prepare())
    except Exception as error:
        raise InputError(f"variant {name!r} fails on the example inputs: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
