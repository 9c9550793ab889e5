"""`benchmark` as users call it: a model beside its fused form, or any variants, on every backend that is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from reparam.bench import Timing
from reparam.bench import benchmark as measure
from reparam.bench.backends import Variant
from reparam.bench.footprint import Footprint
from reparam.bench.reasons import Change, explained
from reparam.bench.speeds import speeds
from reparam.inputs import ExampleInputs, Inputs
from reparam.pipeline import FuseResult, fuse
from reparam.runtimes import RUNTIMES


@dataclass(frozen=True)
class Variants:
    """What is measured side by side.

    Attributes:
        models: name -> module or callable; the first is the baseline.
        changes: name -> what fusing changed, where that is known.
        files: name -> size on disk and time to load, where it came from a file.
    """

    models: Mapping[str, Variant]
    changes: Mapping[str, Change]
    files: Mapping[str, Footprint]


def benchmark(variants: nn.Module | Mapping[str, Variant], example_inputs: ExampleInputs, **options: Any) -> Timing:
    """Times a model beside its fused form, or variants of a model, in pairs: each runs once in every round.

    Args:
        variants: a module, which is fused (and verified) here, giving the variants `original` and `fused`; or modules
            and callables with the same signature by name, of which the first is the baseline.
        example_inputs: tensor, tuple of arguments or dict of keyword arguments; each call gets fresh copies.
        options: as for `reparam.bench.benchmark`: backends ("eager", "compile", "export", "onnxruntime",
            "onnxruntime-cuda", "onnxruntime-tensorrt", "openvino", several of them, or "all" that are here), device,
            dtype, channels_last, cuda_graphs, threads, max_seconds, min_runs, seed, progress, memory, strict.

    Returns:
        All samples, ratios with intervals, verdicts, footprints and warnings, and for what is not faster the reasons
        that follow from counts and measurements.

    Raises:
        InputError: nothing to time, an option that cannot be used, or a variant that fails on the inputs.
        CaptureError: a module's graph cannot be captured.
        NotEquivalentError: the fused module does not agree with the original.
    """
    if isinstance(variants, nn.Module):
        chosen = of_result(fuse(variants, example_inputs, seed=options.get("seed", 0)))
    else:
        chosen = Variants(variants, {}, {})
    return timed(chosen, Inputs.of(example_inputs), **options)


def of_result(result: FuseResult, scale: float = 1.0) -> Variants:
    """Original and fused model of a run of `fuse`; `scale` as for `Change`."""
    models: dict[str, Variant] = {"original": result.reference, "fused": result.module}
    return Variants(models, {"fused": change_of(result, scale)}, {})


def change_of(result: FuseResult, scale: float = 1.0) -> Change:
    """What fusing changed."""
    return Change(result.report.before.to_dict(), result.report.after.to_dict(), scale)


def timed(variants: Variants, inputs: Inputs, **options: Any) -> Timing:
    """The measurement, with what is known of files and the reasons for what is not faster."""
    timing = measure(variants.models, inputs, **{**options, "more": RUNTIMES})
    footprints = {label: _with_file(variants, timing, label) for label in timing.footprints}
    return with_reasons(replace(timing, footprints=footprints), variants.changes)


def with_reasons(timing: Timing, changes: Mapping[str, Change]) -> Timing:
    """The timing with reasons for what is not faster; the machine's speeds are measured only if they are needed."""
    slow = [label for label, ratio in timing.ratios.items() if not ratio.verdict.startswith("faster")]
    devices = timing.device.split(" and ")
    rates = None
    if slow and len(devices) == 1 and changes and not timing.partial:
        before = torch.get_num_threads()
        torch.set_num_threads(timing.threads)
        try:
            rates = speeds(torch.device(devices[0]))
        finally:
            torch.set_num_threads(before)
    return explained(timing, changes, rates, RUNTIMES)


def _with_file(variants: Variants, timing: Timing, label: str) -> Footprint:
    footprint, backend = timing.footprints[label], timing.backends.get(label, "")
    file = variants.files.get(label.removesuffix(f" [{backend}]"))
    if file is None:
        return footprint
    return replace(footprint, disk_bytes=file.disk_bytes, load_seconds=file.load_seconds)
