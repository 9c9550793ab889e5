"""An image's normalisation, however it is written, enters the stem; channels scaled one by one are scaled together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import reparam
from tests.support import relative_error
from tests.zoo.case import randomise
from tests.zoo.trap import Lambda

IMAGE = torch.randn(2, 3, 9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
Normalise = Callable[[Any, torch.Tensor], torch.Tensor]


def as_tensors(m: Any, x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.as_tensor(value, dtype=x.dtype, device=x.device) for value in (MEAN, STD))
    return (x - mean[:, None, None]) / std[:, None, None]


def in_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x.clone().sub_(m.mean.view(1, -1, 1, 1)).div_(m.std.view(1, -1, 1, 1))


def transformed(m: Any, x: torch.Tensor) -> torch.Tensor:
    """From one normalisation to another, as in torchvision's `transform_input`."""
    channels = [torch.unsqueeze(x[:, i], 1) * (STD[i] / 0.5) + (MEAN[i] - 0.5) / 0.5 for i in range(3)]
    return torch.cat(channels, 1)


WAYS: dict[str, Normalise] = {
    "buffers": lambda m, x: (x - m.mean[None, :, None, None]) / m.std[None, :, None, None],
    "converted": lambda m, x: x.sub(m.mean.to(x)[:, None, None]).div(m.std.to(x.dtype)[:, None, None]),
    "as_tensors": as_tensors,
    "in_place": in_place,
    "cat": transformed,
    "stack": lambda m, x: torch.stack([(x[:, i] - MEAN[i]) / STD[i] for i in range(3)], 1),
    "stack_at_the_end": lambda m, x: torch.stack([(x[:, i] - 0.5) / STD[i] for i in range(3)], -1).permute(0, 3, 1, 2),
    "slices": lambda m, x: torch.cat([(x[:, i : i + 1] - MEAN[i]) / STD[i] for i in range(3)], dim=1),
    "split": lambda m, x: torch.cat([STD[i] * y + MEAN[i] for i, y in enumerate(x.split(1, 1))], dim=1),
    "unbind": lambda m, x: torch.stack([-y / STD[i] for i, y in enumerate(x.unbind(1))], dim=1),
    "narrow": lambda m, x: torch.cat([x.narrow(1, 0, 2) * 2 - 1, x.select(1, 2)[:, None] * 3], 1),
}


def network(way: Normalise, padding: int = 0, mode: str = "zeros") -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 6, 3, stride=2, padding=padding, padding_mode=mode)
    parts = {"mean": torch.tensor(MEAN), "std": torch.tensor(STD), "stem": stem, "norm": nn.BatchNorm2d(6)}
    return randomise(Lambda(lambda m, x: F.relu(m.norm(m.stem(way(m, x)))), **parts)).double().eval()


def kinds(module: Any) -> list[str]:
    """The operations on tensors, in order; `narrow` apart, which is a view."""
    assert isinstance(module, fx.GraphModule)
    nodes = [node for node in module.graph.nodes if node.op.startswith("call") and "tensor" in node.meta]
    names = [type(module.get_submodule(n.target)).__name__ if n.op == "call_module" else n for n in nodes]
    return [
        name
        for n in names
        if (name := n if isinstance(n, str) else getattr(n.target, "__name__", n.target)) != "narrow"
    ]


@pytest.mark.parametrize("name", WAYS)
def test_it_enters_the_stem(name: str) -> None:
    model = network(WAYS[name])
    fused = reparam.fuse(model, IMAGE).module
    if name != "stack_at_the_end":  # the axis that is put together is not the one that was taken apart
        assert kinds(fused) == ["Conv2d", "relu"]
        assert reparam.fuse(fused, IMAGE).report.rewrites == ()
    for x in (IMAGE, IMAGE[:1], torch.randn(3, 3, 12, 7, dtype=torch.float64)):
        assert relative_error(model(x), fused(x)) < 1e-14


@pytest.mark.parametrize("name", ["buffers", "cat", "stack"])
def test_in_front_of_zero_padding_the_shift_stays(name: str) -> None:
    model = network(WAYS[name], padding=1)
    result = reparam.fuse(model, IMAGE)
    assert kinds(result.module) == ["add", "Conv2d", "relu"]
    assert any("zero padding" in refusal.reason for refusal in result.report.refusals)
    assert relative_error(model(IMAGE), result.module(IMAGE)) < 1e-14
    for mode in ("reflect", "replicate", "circular"):
        model = network(WAYS[name], 1, mode)
        fused = reparam.fuse(model, IMAGE).module
        assert kinds(fused) == ["Conv2d", "relu"]
        assert relative_error(model(IMAGE), fused(IMAGE)) < 1e-14
    model = network(WAYS[name], padding=1)
    fixed = reparam.fuse(model, IMAGE, fixed_sizes=True).module
    assert kinds(fixed)[0] == "Conv2d"
    assert relative_error(model(IMAGE), fixed(IMAGE)) < 1e-14


def test_too_few_channels_fail_as_before_and_too_many_are_taken() -> None:
    model = network(WAYS["cat"], padding=1)
    fused = reparam.fuse(model, IMAGE).module
    wide = torch.randn(2, 5, 9, 10, dtype=torch.float64)
    assert relative_error(model(wide), fused(wide)) < 1e-14
    for channels in (1, 2):
        for one in (model, fused):
            with pytest.raises((IndexError, RuntimeError)):
                one(IMAGE[:, :channels])


SLICED: dict[str, tuple[Normalise, tuple[int, ...]]] = {
    "rows_of_the_batch": (lambda m, x: torch.cat([x[0:1] * 2 + 1, x[1:2] * 3], 0), (1, 3, 9, 10)),
    "columns": (lambda m, x: torch.cat([x[:, :, :, 0:2] * 2, x[:, :, :, 2:10] * 3], 3), (2, 3, 9, 4)),
    "channels_that_nobody_counts": (lambda m, x: torch.cat([x[:, 0:1] * 2, x[:, 1:3] * 3], 1), (2, 2, 9, 10)),
}


@pytest.mark.parametrize("name", SLICED)
def test_slices_may_be_shorter_on_another_input(name: str) -> None:
    way, shape = SLICED[name]
    model = Lambda(lambda m, x: torch.sin(way(m, x))).double().eval()
    result = reparam.fuse(model, IMAGE)
    assert result.report.undone == ()
    for x in (IMAGE, torch.randn(shape, dtype=torch.float64)):
        assert relative_error(model(x), result.module(x)) < 1e-14


STAYS: dict[str, Normalise] = {
    "another_order": lambda m, x: torch.cat([x[:, 1:2] * 2, x[:, 0:1], x[:, 2:3]], 1),
    "twice_the_same": lambda m, x: torch.cat([x[:, 0:1] * 2, x[:, 0:1], x[:, 2:3]], 1),
    "a_gap": lambda m, x: torch.cat([x[:, 0:1] * 2, x[:, 2:3]], 1),
    "from_behind": lambda m, x: torch.cat([x[:, 0:2] * 2, x[:, -1:]], 1),
    "another_axis": lambda m, x: torch.cat([x[:, :, 0:1] * 2, x[:, :, 1:2]], 1),
    "two_tensors": lambda m, x: torch.cat([x[:, 0:1] * 2, x.cos()[:, 1:2], x[:, 2:3]], 1),
    "a_number_of_each_row": lambda m, x: torch.cat([x[:, 0:1] * m.rows, x[:, 1:2], x[:, 2:3]], 1),
    "not_affine": lambda m, x: torch.cat([x[:, 0:1].cos(), x[:, 1:2], x[:, 2:3]], 1),
    "by_a_product": lambda m, x: torch.cat([x[:, 0:1] * x.mean(), x[:, 1:2], x[:, 2:3]], 1),
    "read_besides": lambda m, x: (lambda y: torch.cat([y, x[:, 1:2], x[:, 2:3]], 1) * y.mean())(x[:, 0:1] * 2),
    "split_in_two": lambda m, x: torch.cat([y * i for i, y in enumerate(x.split(2, 1))], 1),
    "split_elsewhere": lambda m, x: torch.cat([y * i for i, y in enumerate(x.split(1, dim=2))], 1),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_looks_like_it_is_not_put_together(name: str) -> None:
    model = Lambda(lambda m, x: torch.sin(STAYS[name](m, x)), rows=torch.randn(9, 1)).double().eval()
    result = reparam.fuse(model, IMAGE)
    assert not any(rewrite.pass_name == "channels apart" for rewrite in result.report.rewrites)
    assert relative_error(model(IMAGE), result.module(IMAGE)) < 1e-14


def test_what_is_only_taken_apart_and_put_together_again_is_itself_but_not_for_the_caller() -> None:
    model = Lambda(lambda m, x: torch.sin(torch.cat(m.c(x).split(1, 1), 1)), c=nn.Conv2d(3, 4, 1)).double().eval()
    assert kinds(reparam.fuse(model, IMAGE).module) == ["Conv2d", "sin"]
    model = Lambda(lambda m, x: torch.stack(x.unbind(1), 1)).double().eval()
    given = IMAGE.clone()
    reparam.fuse(model, IMAGE).module(given).zero_()
    assert torch.equal(given, IMAGE)


def test_integers_are_no_input_of_a_layer() -> None:
    """`bytes - mean` makes floating-point numbers; a convolution takes no integers."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.norm(m.stem((x.permute(0, 3, 1, 2) - m.mean[:, None, None]) / m.std[:, None, None])))

    torch.manual_seed(0)
    parts = {"mean": torch.rand(3) * 255, "std": torch.rand(3) * 50 + 9, "norm": nn.BatchNorm2d(6)}
    model = randomise(Lambda(forward, stem=nn.Conv2d(3, 6, 3), **parts)).eval()
    x = torch.randint(0, 256, (2, 9, 10, 3), dtype=torch.uint8)
    result = reparam.fuse(model, x)
    assert result.report.undone == ()
    assert kinds(result.module) == ["permute", "sub", "Conv2d", "relu"]
    assert any("convert them first" in refusal.remedy for refusal in result.report.refusals)
    assert relative_error(model(x), result.module(x)) < 1e-5
