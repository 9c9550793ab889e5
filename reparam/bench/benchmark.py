"""`benchmark`: variants of a model, timed side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from reparam.bench import statistics
from reparam.bench.assembly import Assembly, assemble
from reparam.bench.backends import ALL, BACKENDS, Backend, Variant, chosen
from reparam.bench.doubts import doubts
from reparam.bench.machine import Clock, Pace, hardware_name, pace, system_load
from reparam.bench.measure import Measured, Progress, Runner, measure
from reparam.bench.placement import Placement, device_of, in_effect, in_eval_mode, placement, precision_in_use
from reparam.bench.timing import Ratio, Timing
from reparam.errors import InputError
from reparam.inputs import ExampleInputs, Inputs


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
    dtype: str | None = None,
    channels_last: bool = False,
    cuda_graphs: bool = False,
    memory: bool = True,
    strict: bool = True,
    clock: Clock | None = None,
    more: Mapping[str, Backend] | None = None,
) -> Timing:
    """Times variants of a model in pairs: every round runs each of them once, in random order.

    Args:
        variants: modules (timed in eval mode and put back afterwards) or callables with the same signature, by name.
            The first is the baseline.
        example_inputs: tensor, tuple of arguments or dict of keyword arguments; each call gets fresh copies.
        backends: how to run the modules: names of `BACKENDS` or of `more`, or "all" for those that are here; with
            several, labels become `name [backend]` and each backend has the first variant on it as its baseline.
            Callables are run as they are, on the inputs as given, against the first label of all.
        threads: torch's threads within an operator while measuring; None leaves them. A callable that is no torch code
            keeps its own.
        min_runs: complete rounds to take in any case.
        max_seconds: time for all of it, warm-up included; exceeded only for `min_runs`. Building is not counted.
        seed: of the order within rounds and of the bootstrap.
        progress: called after each round with the share done, 0 to 1, and a text.
        device: where to run modules (copies, if they have to move); None is where each one's weights are.
        dtype: what modules and inputs are converted to: "float32", "float16", "bfloat16", or "tf32", which is float32
            whose products a GPU may round ("float32" forbids that); None leaves them, and torch's setting.
        channels_last: whether images and weights of convolutions are stored with the channels last.
        cuda_graphs: whether the torch backends' calls are recorded as a CUDA graph and replayed.
        memory: whether to measure the peak of torch's memory, which takes one call more.
        strict: whether a module that a backend cannot build or run is an error; else, and with "all", it is left out
            with its reason (`Timing.left_out`).
        clock: how to time a call; None takes CUDA events on a CUDA device and wall-clock time elsewhere.
        more: further backends.

    Returns:
        All samples, ratios with intervals, verdicts and warnings. After an interrupt from the keyboard it holds the
        rounds that were complete, and `partial` is set.

    Raises:
        InputError: nothing to time, an unknown backend, device or dtype, a backend that is not here, or a variant that
            fails on the inputs.
    """
    inputs = Inputs.of(example_inputs)
    if not variants:
        raise InputError('there is no variant to time; pass a dict such as {"original": model, "fused": fused}')
    if min_runs < 1 or not math.isfinite(max_seconds) or max_seconds < 0 or (threads is not None and threads < 1):
        raise InputError("min_runs and threads must be at least 1, and max_seconds a number of seconds, not negative")
    place = placement(device, dtype, channels_last, cuda_graphs, threads)
    known = {**BACKENDS, **(more or {})}
    backends = (backends,) if isinstance(backends, str) else tuple(backends)
    names, left_out = chosen(backends, known, _first_device(variants, inputs, place))
    rows = {name: known[name] for name in names}
    with in_eval_mode(variants.values()), in_effect(place), torch.inference_mode():
        made = assemble(
            variants, inputs, rows, place, clock=clock, memory=memory, lenient=not strict or ALL in backends
        )
        _require_something(made)
        load, paces = system_load(), list[Pace]()

        def note_pace() -> None:
            if clock is None:
                paces.append(pace(made.devices[0]))

        options: dict[str, Any] = {"seed": seed, "progress": progress, "warm": note_pace}
        with torch.inference_mode():
            measured = measure(made.runners, min_runs=min_runs, max_seconds=max_seconds, **options)
        note_pace()
        used, precision = torch.get_num_threads(), precision_in_use()
    return Timing(
        samples=measured.samples,
        warmup=measured.warmup,
        ratios=_ratios(made.runners, measured, seed),
        hardware=" and ".join(dict.fromkeys(hardware_name(d) for d in made.devices)),
        device=" and ".join(dict.fromkeys(str(d) for d in made.devices)),
        threads=used,
        torch_version=torch.__version__,
        seed=seed,
        partial=measured.partial,
        warnings=doubts(measured, used, load, *(paces if len(paces) == 2 else ())),
        conditions=_conditions(inputs, place, made.devices, precision),
        footprints=made.footprints,
        backends=made.backends,
        left_out={**left_out, **made.left_out},
    )


def _first_device(variants: Mapping[str, Variant], inputs: Inputs, place: Placement) -> torch.device:
    """The device that backends have to be there for: that of the first module, else of the first variant."""
    first = next((one for one in variants.values() if isinstance(one, nn.Module)), next(iter(variants.values())))
    return device_of(first, inputs, place.device)


def _require_something(made: Assembly) -> None:
    if not made.runners:
        label, reason = next(iter(made.left_out.items()))
        raise InputError(f"no variant runs on any backend: {label}: {reason}")


def _conditions(inputs: Inputs, place: Placement, devices: list[torch.device], precision: str) -> dict[str, str]:
    """What was measured, in words."""
    found = {"inputs": ", ".join("x".join(map(str, tensor.shape)) for tensor in inputs.tensors())}
    found["dtype"] = place.dtype or "as given"
    if any(device.type == "cuda" for device in devices):
        found["float32 on the GPU"] = precision
    if place.channels_last:
        found["layout"] = "channels last"
    if place.cuda_graphs:
        found["CUDA graphs"] = "on"
    return found


def _ratios(runners: list[Runner], measured: Measured, seed: int) -> dict[str, Ratio]:
    ratios = {}
    for runner in runners:
        samples = measured.samples[runner.label]
        if runner.label == runner.baseline or not samples:
            continue
        value, low, high = statistics.ratio_interval(measured.samples[runner.baseline], samples, seed)
        ratios[runner.label] = Ratio(runner.baseline, value, low, high, len(samples))
    return ratios
