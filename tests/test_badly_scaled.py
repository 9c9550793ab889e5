"""Deep networks with badly scaled layers: a right model passes, a wrong rewrite is found and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import reparam
from reparam.equivalence import verify
from tests.support import sampled
from tools.faults import in_place, rewrites_sabotaged, swap_two_channels

WIDTH, DEPTH = 6, 100


class Deep(nn.Module):
    """Conv-BatchNorm-ReLU, a hundred times; with `residual`, added to what went in."""

    def __init__(self, residual: bool = False, depth: int = DEPTH) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(depth))
        self.bns = nn.ModuleList(nn.BatchNorm2d(WIDTH) for _ in range(depth))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, bn in zip(self.convs, self.bns, strict=True):
            y = torch.relu(bn(conv(x)))
            x = x + 0.1 * y if self.residual else y
        return x


Scale = Callable[[nn.BatchNorm2d, nn.Conv2d, int], None]


def grows(bn: nn.BatchNorm2d, conv: nn.Conv2d, index: int) -> None:
    bn.weight.mul_(1.2)
    bn.bias.mul_(1.2**index)


def nearly_constant_channels(bn: nn.BatchNorm2d, conv: nn.Conv2d, index: int) -> None:
    """Variances far below eps: a BatchNorm multiplies by 300 what hardly varies."""
    assert bn.running_mean is not None
    conv.weight[:2] *= 1e-8
    bn.running_var[:2] = 1e-16  # type: ignore[index]
    bn.running_mean[:2] = conv.bias[:2]  # type: ignore[index]
    bn.bias[:2] = torch.tensor([0.2, 0.5])  # or relu makes nothing of either, and one may stand for the other


def gamma_zero(bn: nn.BatchNorm2d, conv: nn.Conv2d, index: int) -> None:
    bn.weight[index % WIDTH] = 0.0


def gamma_negative(bn: nn.BatchNorm2d, conv: nn.Conv2d, index: int) -> None:
    bn.weight.neg_()


def large_means(bn: nn.BatchNorm2d, conv: nn.Conv2d, index: int) -> None:
    """What the convolution adds the BatchNorm takes away again, and the few digits that are left are all."""
    assert bn.running_mean is not None
    conv.bias += 1e3  # type: ignore[operator]
    bn.running_mean += 1e3


def shrinks(bn: nn.BatchNorm2d, conv: nn.Conv2d, index: int) -> None:
    bn.weight.mul_(0.8)
    bn.bias.mul_(0.8**index)


CASES: list[tuple[Scale, bool, int]] = [
    (grows, False, DEPTH),
    (grows, True, 16),
    *((scale, False, 16) for scale in (shrinks, nearly_constant_channels, gamma_zero, gamma_negative, large_means)),
]
SETTING = ("scale", "residual", "depth")


def named(value: object) -> str:
    return getattr(value, "__name__", "")


@torch.no_grad()
def network(scale: Scale, residual: bool, depth: int) -> nn.Module:
    """With statistics that keep the activations at their size, and then what `scale` does to each layer."""
    generator = torch.Generator().manual_seed(3)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    net = Deep(residual, depth)
    for index, (conv, bn) in enumerate(zip(net.convs, net.bns, strict=True)):
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(bn, nn.BatchNorm2d)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        conv.weight.copy_(normal(conv.weight) * (2.0 / conv.weight[0].numel()) ** 0.5)
        conv.bias.copy_(normal(conv.bias) * 0.1)  # type: ignore[union-attr, arg-type]
        bn.running_mean.copy_(normal(bn.running_mean) * 0.1)
        bn.running_var.copy_(1 + 0.3 * normal(bn.running_var).tanh())
        bn.bias.copy_(normal(bn.bias) * 0.2 + 0.1)
        scale(bn, conv, index)
    return net.eval()


def image() -> torch.Tensor:
    return torch.randn(2, WIDTH, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_activations_do_grow_to_a_hundred_million() -> None:
    with torch.no_grad():
        assert network(grows, False, DEPTH)(image()).abs().max() > 1e8


@pytest.mark.parametrize(SETTING, CASES, ids=named)
def test_a_right_one_passes_with_nothing_undone(scale: Scale, residual: bool, depth: int) -> None:
    result = reparam.fuse(network(scale, residual, depth), image())
    assert result.report.comparison is not None
    assert result.report.comparison.passed
    assert result.report.undone == ()
    assert not any("does not show" in note for note in result.report.notes)
    assert result.report.after.batch_norms == 0


@in_place
def a_little_larger(module: nn.Module) -> None:
    """All weights, since in so small a network one of them may multiply zeros only."""
    module.weight.mul_(1.0001)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(SETTING, sampled(CASES[1:] + CASES[:1], 4), ids=named)
def test_a_rewrite_at_fault_is_found_and_named(scale: Scale, residual: bool, depth: int) -> None:
    model = network(scale, residual, depth)
    with rewrites_sabotaged({4: swap_two_channels, depth - 4: a_little_larger}) as injected:
        result = reparam.fuse(model, image(), verify="quick")
    assert [one.rewrite.place.module for one in result.report.undone] == injected.places
    assert len(injected.places) == 2
    assert result.report.comparison is not None
    assert result.report.comparison.passed


def test_verify_finds_a_fault_in_a_hundred_layers_and_says_where_it_begins() -> None:
    model = network(grows, False, DEPTH)
    with rewrites_sabotaged({4: swap_two_channels}):
        broken = reparam.fuse(model, image(), verify="off").module
    comparison = verify(model, broken, image(), level="quick")
    assert not comparison.passed
    assert comparison.parting is not None
    assert comparison.parting.place == "convs.4"
