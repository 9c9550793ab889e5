"""Measuring and fusing on a GPU: right by construction, seen where there is one."""

from __future__ import annotations

import gc
import shutil
from typing import Any

import pytest
import torch
from torch import nn

import reparam
from reparam.bench import benchmark
from reparam.bench.graphs import GraphedCall
from reparam.bench.machine import CudaClock, clock_for, pace
from reparam.inputs import Inputs
from tools.timm_zoo import randomise_batch_norms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none")
needs_compiler = pytest.mark.skipif(not shutil.which("gcc") and not shutil.which("cc"), reason="needs a C compiler")


class Branches(nn.Module):
    """relu(BN(conv 3x3) + BN(conv 1x1) + BN), twice, and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.dense = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.point = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.dense(x) + self.point(x) + self.norm(x))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomise_batch_norms(Branches()).eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0)).cuda()


def test_fuse_on_the_gpu() -> None:
    model = network().cuda()
    result = reparam.fuse(model, images())
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert result.report.after.batch_norms == 0
    assert result.report.after.convolutions == 2
    assert {tensor.device.type for tensor in result.module.state_dict().values()} == {"cuda"}
    with torch.no_grad():
        torch.testing.assert_close(result.module(images(3)), model(images(3)), rtol=1e-2, atol=1e-2)
    double = reparam.fuse(network().double().cuda(), images().double(), machine="cuda")
    with torch.no_grad():
        exact = network().double().cuda()(images(3).double())
        torch.testing.assert_close(double.module(images(3).double()), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fuse_in_half_precision(dtype: torch.dtype) -> None:
    result = reparam.fuse(network().to("cuda", dtype), images().to(dtype))
    assert result.report.equivalent
    assert result.report.after.batch_norms == 0


CELLS: list[dict[str, Any]] = [
    {},
    {"dtype": "float32"},
    {"dtype": "tf32"},
    {"dtype": "float16"},
    {"dtype": "bfloat16"},
    {"dtype": "float16", "channels_last": True},
    {"cuda_graphs": True},
    {"cuda_graphs": True, "dtype": "float16", "channels_last": True},
    {"backends": ("export",)},
    {"backends": ("export",), "cuda_graphs": True},
]


@pytest.mark.parametrize("options", CELLS, ids=str)
def test_cells(options: dict[str, Any]) -> None:
    model = network()
    fused = reparam.fuse(model, images().cpu()).module
    settings = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    timing = benchmark({"original": model, "fused": fused}, images(), device="cuda", max_seconds=0.3, **options)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == settings
    assert timing.device == "cuda:0"
    assert timing.hardware == torch.cuda.get_device_name(0)
    assert timing.runs >= 5
    assert all(seconds > 0 for samples in timing.samples.values() for seconds in samples)
    assert set(timing.ratios) == {"fused"}
    for footprint in timing.footprints.values():
        assert footprint.peak_bytes is not None
        assert footprint.peak_bytes > 0
        assert footprint.weights_bytes is not None
        assert footprint.first_seconds is not None
    expected = {"tf32": "TF32", "float32": "no TF32"}.get(options.get("dtype", ""))
    assert expected in (None, timing.conditions["float32 on the GPU"])
    assert {p.device.type for p in model.parameters()} == {"cpu"}, "the caller's model was moved"
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@needs_compiler
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled(graphs: bool) -> None:
    variants = {"a": network(), "b": network()}
    timing = benchmark(
        variants, images(), backends=("eager", "compile"), device="cuda", cuda_graphs=graphs, max_seconds=1.0
    )
    assert set(timing.samples) == {"a [eager]", "a [compile]", "b [eager]", "b [compile]"}
    assert timing.ratios["b [compile]"].baseline == "a [compile]"


def test_a_graphed_call_answers_for_new_inputs() -> None:
    model, x = network().cuda(), images()
    with torch.inference_mode():
        call = GraphedCall(model, Inputs.of(x), x.device)
        for seed in range(3):
            other = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).cuda()
            torch.testing.assert_close(call(other), model(other), rtol=1e-2, atol=1e-2)


def test_what_cannot_be_recorded_is_one_sentence() -> None:
    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.sum().item())

    with pytest.raises(reparam.InputError, match="variant 'waits' fails"):
        benchmark({"waits": Waits()}, images(), device="cuda", cuda_graphs=True, max_seconds=0.1)
    # The device still works afterwards, its random numbers included.
    assert torch.ones(2, device="cuda").sum().item() == 2
    assert torch.randn(2, device="cuda").isfinite().all()


def test_a_graphed_call_keeps_the_weights_it_reads() -> None:
    x = images()
    with torch.inference_mode():
        expected = network().half().cuda()(x.half())
        call = GraphedCall(network().half().cuda(), Inputs.of(x.half()), x.device)
        gc.collect()
        torch.cuda.empty_cache()
        others = [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(64)]
        torch.testing.assert_close(call(x.half()), expected, rtol=1e-2, atol=1e-2)
    assert len(others) == 64


def test_the_clock_waits_for_the_work() -> None:
    clock = clock_for(torch.device("cuda:0"))
    assert isinstance(clock, CudaClock)
    a = torch.randn(4096, 4096, device="cuda")

    def queue() -> None:
        for _ in range(40):
            torch.mm(a, a)

    assert clock.time(queue) > 0
    assert torch.cuda.current_stream().query(), "the work was still going on"


def test_pace_of_the_gpu() -> None:
    found = pace(torch.device("cuda:0"))
    assert found.loop > 0
    assert found.gpu_mhz is None or found.gpu_mhz > 0


def test_memory_is_that_of_a_call() -> None:
    class Grows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.expand(1 << 20, -1).contiguous().sum(0)

    timing = benchmark({"grows": Grows()}, torch.ones(16, device="cuda"), max_seconds=0.1)
    peak = timing.footprints["grows"].peak_bytes
    assert peak is not None
    assert (1 << 20) * 16 * 4 <= peak < 2 * (1 << 20) * 16 * 4
