"""Dtypes, layouts, backends, grids and footprints on the CPU; nothing of the caller's is changed."""

from __future__ import annotations

import importlib
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import reparam
from reparam import runtimes
from reparam.bench import Footprint, Timing, benchmark
from reparam.bench.backends import BACKENDS, Backend, chosen
from reparam.bench.doubts import doubts
from reparam.bench.footprint import peak_of, weights_of
from reparam.bench.grid import Setting, resized, settings
from reparam.bench.machine import Pace, pace
from reparam.bench.measure import Measured
from reparam.bench.speeds import speeds
from reparam.errors import InputError
from reparam.inputs import Inputs

CPU = torch.device("cpu")


class Notes(nn.Module):
    """Notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.seen: set[tuple[Any, ...]] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Notes:
        made = Notes()
        made.load_state_dict(self.state_dict())
        made.seen = self.seen  # shared, so that the test sees what copies note
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x.is_contiguous(memory_format=torch.channels_last)
        self.seen.add((x.dtype, self.conv.weight.dtype, last))
        return self.conv(x)  # type: ignore[no-any-return]


X = torch.randn(2, 3, 5, 4)
PLACES: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
    ({}, (torch.float32, torch.float32, False)),
    ({"dtype": "float32"}, (torch.float32, torch.float32, False)),
    ({"dtype": "bfloat16"}, (torch.bfloat16, torch.bfloat16, False)),
    ({"dtype": "float64"}, (torch.float64, torch.float64, False)),
    ({"channels_last": True}, (torch.float32, torch.float32, True)),
    ({"channels_last": True, "dtype": "float16"}, (torch.float16, torch.float16, True)),
]


@pytest.mark.parametrize(("options", "seen"), PLACES, ids=str)
def test_variants_run_as_asked(options: dict[str, Any], seen: tuple[Any, ...]) -> None:
    module = Notes()
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    timing = benchmark({"a": module}, X, max_seconds=0.0, min_runs=2, **options)
    assert module.seen == {seen}
    assert timing.conditions["dtype"] == options.get("dtype", "as given")
    assert timing.conditions.get("layout") == ("channels last" if options.get("channels_last") else None)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert module.conv.weight.dtype == torch.float32


IMPOSSIBLE = [
    ({"dtype": "int8"}, "dtype 'int8' is not known"),
    ({"dtype": "tf32"}, "TF32 is a format of NVIDIA's GPUs"),
    ({"cuda_graphs": True}, "CUDA graphs need a CUDA device"),
]


@pytest.mark.parametrize(("options", "sentence"), IMPOSSIBLE)
def test_what_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        benchmark({"a": Notes()}, X, **options)


def test_backends_that_are_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not an item of the mapping itself: putting it back would change the order that messages have.
    monkeypatch.setattr(importlib.import_module("reparam.bench.benchmark"), "BACKENDS", {"eager": BACKENDS["eager"]})
    known = {"eager": BACKENDS["eager"], "gone": Backend(lambda job: job.module, lambda device: f"none on {device}")}
    assert chosen("all", known, CPU) == (("eager",), {"gone": "none on cpu"})
    with pytest.raises(InputError, match="backend 'gone' is not here: none on cpu"):
        chosen(("eager", "gone"), known, CPU)
    timing = benchmark({"a": Notes()}, X, backends="all", more={"gone": known["gone"]}, max_seconds=0.0, min_runs=1)
    assert timing.left_out["gone"] == "none on cpu"


def test_what_a_backend_cannot_build_is_left_out_or_raises() -> None:
    class Fails(Notes):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no\nway")

    variants = {"good": Notes(), "bad": Fails(), "worse": lambda x: x.nonsense}
    with pytest.raises(InputError, match=r"variant 'bad' fails on the example inputs: no$"):
        benchmark(variants, X)
    timing = benchmark(variants, X, strict=False, max_seconds=0.0, min_runs=1)
    assert list(timing.samples) == ["good"]
    assert set(timing.left_out) == {"bad", "worse"}
    with pytest.raises(InputError, match="no variant runs on any backend: bad: "):
        benchmark({"bad": Fails()}, X, strict=False)


def branches() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), torch.randn(1, 3, 8, 8)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
def test_compiled() -> None:
    model, x = branches()
    timing = benchmark({"a": model, "b": model}, x, backends=("compile",), max_seconds=0.0, min_runs=2)
    assert timing.backends == {"a": "compile", "b": "compile"}
    assert all(footprint.build_seconds for footprint in timing.footprints.values())


@pytest.mark.slow
def test_a_module_is_fused_and_runs_in_runtimes() -> None:
    model, x = branches()
    timing = reparam.benchmark(model, x, backends=("export", "onnxruntime"), max_seconds=0.0, threads=1)
    assert list(timing.samples) == [
        "original [export]", "original [onnxruntime]", "fused [export]", "fused [onnxruntime]"
    ]  # fmt: skip
    assert {ratio.baseline for ratio in timing.ratios.values()} == {"original [export]", "original [onnxruntime]"}
    assert timing.footprints["fused [onnxruntime]"].peak_bytes is None, "torch does not see its memory"
    assert timing.footprints["fused [export]"].peak_bytes is not None
    again = Timing.from_dict(timing.to_dict())
    assert again == timing


@pytest.mark.slow
def test_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that answers with the file's outputs by onnxruntime: it shows that feeds and settings arrive."""
    asked: dict[str, Any] = {}

    class Compiled:
        def __init__(self, session: Any) -> None:
            self.session = session
            self.inputs = [types.SimpleNamespace(any_name=name) for name in session.inputs]
            self.outputs = list(session.outputs)

        def __call__(self, feeds: dict[str, Any]) -> dict[int, Any]:
            answers = self.session.run_flat([torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in feeds])
            return {number: answer.numpy() for number, answer in enumerate(answers)}

    class Core:
        def read_model(self, path: str) -> Any:
            return runtimes.OnnxSession(Path(path))

        def compile_model(self, session: Any, device: str, settings: dict[str, Any]) -> Compiled:
            asked.update(settings, device=device)
            return Compiled(session)

    monkeypatch.setitem(sys.modules, "openvino", types.SimpleNamespace(Core=Core, __spec__=types.SimpleNamespace()))
    model, x = branches()
    timing = reparam.benchmark({"a": model}, x, backends="openvino", threads=1, max_seconds=0.0, min_runs=2)
    assert timing.backends == {"a": "openvino"}
    assert asked == {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "device": "CPU"}


def test_grid() -> None:
    found = settings((1, 8, 1), ((4, 5),), (), (2,))
    assert [str(setting) for setting in found] == ["batch 1, 4x5, 2 threads", "batch 8, 4x5, 2 threads"]
    assert settings() == (Setting(),)
    assert str(Setting()) == "as given"
    assert all(Setting.from_dict(setting.to_dict()) == setting for setting in found)


def test_inputs_of_another_size() -> None:
    images, tokens, scale = (
        torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4),
        torch.tensor([[1, 2], [3, 4]]),
        torch.ones(5),
    )
    inputs = Inputs((images,), {"tokens": tokens, "scale": scale})
    made = resized(inputs, Setting(batch=3, size=(2, 6)))
    assert [tuple(tensor.shape) for tensor in made.tensors()] == [(3, 3, 2, 6), (3, 2), (5,)]
    assert torch.equal(made.args[0][2], made.args[0][0]), "values are repeated"
    assert made.kwargs["tokens"].tolist() == [[1, 2], [3, 4], [1, 2]]
    assert torch.equal(made.args[0][..., 4:], made.args[0][..., :2])


def test_memory() -> None:
    shared = nn.Linear(8, 8, bias=False)
    both = nn.Sequential(shared, shared, nn.Linear(8, 2))
    assert weights_of(both) == 4 * (64 + 16 + 2)
    size = 4 * 1024 * 1024

    def peaks() -> torch.Tensor:
        large = torch.ones(size // 4) * 2
        return large.sum()

    peak = peak_of(peaks, CPU)
    assert peak is not None
    assert 2 * size <= peak < 2 * size + 10_000


def test_speeds_and_pace_are_there() -> None:
    found = speeds(CPU)
    assert min(found.launch, found.macs, found.bandwidth) > 0
    assert pace(CPU).loop > 0
    assert pace(CPU).gpu_mhz is None


PACES = [
    (Pace(1.0), Pace(1.05), ""),
    (Pace(1.0), Pace(1.2), "a fixed loop took 20% longer"),
    (Pace(1.0), Pace(0.8), "a fixed loop took 20% less"),
    (Pace(1.0, cpu_mhz=3000), Pace(1.0, cpu_mhz=2000), "the processor's clock went from 3000 to 2000 MHz"),
    (Pace(1.0, gpu_mhz=1000), Pace(1.0, gpu_mhz=1900), "the GPU's clock went from 1000 to 1900 MHz"),
    (Pace(1.0, gpu_mhz=None), Pace(1.0, gpu_mhz=1900), ""),
]


@pytest.mark.parametrize(("before", "after", "phrase"), PACES)
def test_frequency_changes_are_noticed(before: Pace, after: Pace, phrase: str) -> None:
    measured = Measured({"a": (1.0,) * 40}, {"a": ()}, partial=False, stable=True)
    found = doubts(measured, 1, None, before, after)
    assert [phrase in warning for warning in found] == [True] if phrase else not found


def test_footprints_are_plain() -> None:
    assert Footprint(1, 2, 0.5).to_dict() == {
        "weights_bytes": 1, "peak_bytes": 2, "build_seconds": 0.5, "first_seconds": None, "disk_bytes": None,
        "load_seconds": None,
    }  # fmt: skip
