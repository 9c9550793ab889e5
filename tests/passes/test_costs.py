"""What an operation is priced by: which constants of a machine count for it, and how often; and what that decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import reparam
from reparam.passes.machines import EAGER_CPU, NEAR_PADDING, Machine
from tests.support import EXACT, relative_error, run, static_counts
from tools.cost_probes import Mixed, Scale, conv, pool
from tools.measure_costs import Priced, unit

C, H, W = 4, 20, 24
OUT = C * H * W
IMAGE = (1, C, H, W)
SIGNAL = (1, C, W)
RATES = ("macs", "depthwise", "wide", "windows", "taps")


class Padded(nn.Module):
    """Zeros around an image, as an operation of their own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x, [1, 1, 1, 1])


def depthwise(kernel: int | tuple[int, int], padding: int | tuple[int, int], mode: str = "zeros") -> nn.Module:
    return nn.Conv2d(C, C, kernel, padding=padding, groups=C, padding_mode=mode)  # type: ignore[arg-type]


# Name, layer, input, and for each rate how many multiply-adds, windows or elements it prices.
RATED: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], Mapping[str, float]]] = [
    ("dense 3x3", lambda: conv(C, 3), IMAGE, {"macs": OUT * 9 * C}),
    ("dense 11x11", lambda: conv(C, 11), IMAGE, {"macs": OUT * 121 * C}),
    ("depthwise 3x3", lambda: conv(C, 3, C), IMAGE, {"depthwise": OUT * 9}),
    ("depthwise 9x9, padded by 4", lambda: conv(C, 9, C), IMAGE, {"depthwise": OUT * 81}),
    ("depthwise 11x11, padded by 5", lambda: conv(C, 11, C), IMAGE, {"wide": OUT * 121}),
    ("depthwise 3x3, padded by 5", lambda: depthwise(3, 5), IMAGE, {"wide": C * (H + 8) * (W + 8) * 9}),
    ("depthwise 11x11, not padded", lambda: depthwise(11, 0), IMAGE, {"depthwise": C * (H - 10) * (W - 10) * 121}),
    ("depthwise, rows padded", lambda: depthwise((1, 11), (0, 5)), IMAGE, {"wide": OUT * 11}),
    ("depthwise, columns padded", lambda: depthwise((11, 1), (5, 0)), IMAGE, {"depthwise": OUT * 11}),
    # another operation pads, the layer sees an image that is larger
    ("depthwise 11x11, wrapped", lambda: depthwise(11, 5, "circular"), IMAGE, {"depthwise": OUT * 121}),
    ("depthwise of signals", lambda: nn.Conv1d(C, C, 11, padding=5, groups=C), SIGNAL, {"wide": C * W * 11}),
    ("average 3x3", lambda: pool(3), IMAGE, {"windows": OUT, "taps": OUT * 9}),
    ("average 11x11", lambda: pool(11), IMAGE, {"windows": OUT, "taps": OUT * 121}),
    ("average 2x2, stride 2", lambda: nn.AvgPool2d(2), IMAGE, {"windows": OUT / 4, "taps": OUT}),
    # a mean, priced by its bytes
    ("average of all", lambda: nn.AdaptiveAvgPool2d(1), IMAGE, {}),
    ("average of signals", lambda: nn.AvgPool1d(4), SIGNAL, {"windows": C * W / 4, "taps": C * W}),
    ("zeros around", Padded, IMAGE, {}),
    ("scale", lambda: Scale(C), IMAGE, {}),
]


@pytest.mark.parametrize(("name", "make", "shape", "counts"), RATED, ids=[row[0] for row in RATED])
def test_what_the_rates_price(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], counts: Mapping[str, float]
) -> None:
    priced = Priced(make(), shape)
    assert {rate: priced.seconds(unit(rate, 1)) for rate in RATES} == {rate: counts.get(rate, 0) for rate in RATES}


def test_the_prices_add_up() -> None:
    """No constant is left out, and none counts twice: the price is the sum of what each constant prices."""
    machine = Machine(1e-6, 2e-6, 4e-6, 1e10, 2e10, 3e9, 1e8, 2e9, 3e10, 4e10)
    for name, make, shape, _ in RATED:
        priced = Priced(make(), shape)
        parts = 0.0
        for field in fields(Machine):
            if field.name in ("block", "pads_apart"):
                continue
            amount = priced.seconds(unit(field.name, 1))
            value = getattr(machine, field.name)
            parts += amount * value if field.name in ("launch", "layer", "grouped") else amount / value
        assert priced.seconds(machine) == pytest.approx(parts, rel=1e-12), name


def test_windows_that_are_free() -> None:
    machine = replace(EAGER_CPU, windows=math.inf)
    assert machine.pooling(100, 9, 800) == pytest.approx(machine.elementwise(800) + 900 / machine.taps)
    assert machine.pooling(100, 9, 800) < EAGER_CPU.pooling(100, 9, 800)


def test_padding_is_near_or_wide() -> None:
    near, wide = (EAGER_CPU.separable(1e9, 0, padding) for padding in (NEAR_PADDING, NEAR_PADDING + 1))
    assert near == EAGER_CPU.separable(1e9, 0)
    assert wide - near == pytest.approx(1e9 / EAGER_CPU.wide - 1e9 / EAGER_CPU.depthwise)
    assert wide > near


SMALL, MEDIUM = (1, 16, 8, 8), (1, 64, 28, 28)

# Input, window of the pooling, machine, and the convolutions that are left of `x + gamma * (pool(x) - x)`: the faster
# form of each, by 10% or more of measured time.
DECIDED: list[tuple[tuple[int, ...], int, str, int]] = [
    (SMALL, 3, "eager-cpu", 0),
    (SMALL, 7, "eager-cpu", 0),
    (MEDIUM, 3, "eager-cpu", 1),
    (MEDIUM, 7, "eager-cpu", 1),
    (MEDIUM, 11, "eager-cpu", 0),  # a depthwise layer this wide is slower even than the pooling
    (SMALL, 3, "onnxruntime-cpu", 1),
    (SMALL, 7, "onnxruntime-cpu", 1),
    (MEDIUM, 3, "onnxruntime-cpu", 1),
    (MEDIUM, 7, "onnxruntime-cpu", 1),
    (MEDIUM, 11, "onnxruntime-cpu", 0),
]


@pytest.mark.parametrize(("shape", "kernel", "machine", "left"), DECIDED)
def test_poolings_become_layers_where_it_pays(shape: tuple[int, ...], kernel: int, machine: str, left: int) -> None:
    torch.manual_seed(0)
    model, x = Mixed(shape[1], kernel).double().eval(), torch.randn(shape, dtype=torch.float64)
    module = reparam.fuse(model, x, machine=machine).module
    assert static_counts(module)["conv"] == left
    assert any(isinstance(part, nn.AvgPool2d) for part in module.modules()) == (left == 0)
    assert relative_error(run(model, x), run(module, x)) < EXACT
