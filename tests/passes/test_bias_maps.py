"""Shifts in front of zero padding, as constants for a fixed image size."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import reparam
from reparam.errors import InputError, OtherInputError
from tests.support import EXACT, assert_unchanged, relative_error, run, snapshot, static_counts
from tests.zoo.case import bn, conv, randomise
from tests.zoo.heads import bias_map
from tests.zoo.trap import Lambda

ROOM = {1: (15,), 2: (11, 14), 3: (5, 6, 7)}


def pair(rank: int, **options: int) -> nn.Module:
    """`3x3(1x1(x) + b)`, padded with zeros: one layer, but for the shift at the border."""
    return nn.Sequential(conv(rank, 4, 8, 1, bias=True), conv(rank, 8, 6, 3, bias=True, **options))


def branches(rank: int) -> nn.Module:
    """`relu(3x3(1x1(x) + b) + 3x3(BN(x)) + x)`."""
    layers = {
        "a": conv(rank, 4, 8, 1, bias=True),
        "b": conv(rank, 8, 4, 3, bias=True),
        "c": conv(rank, 4, 4, 3),
    }
    return Lambda(lambda m, x: F.relu(m.b(m.a(x)) + m.c(m.norm(x)) + x), **layers, norm=bn(rank, 4))


def concatenated() -> nn.Module:
    """Two 1x1 layers side by side, in front of a grouped 3x3."""
    layers = {
        "a": conv(2, 4, 4, 1, bias=True),
        "b": conv(2, 4, 4, 1, bias=True),
        "c": conv(2, 8, 4, 3, bias=True, groups=2),
    }
    return Lambda(lambda m, x: F.relu(m.c(torch.cat([m.a(x), m.b(x)], 1))), **layers)


def twice() -> nn.Module:
    """Two regions, the second of which reads the first."""
    return nn.Sequential(pair(2), nn.ReLU(), conv(2, 6, 9, 1, bias=True), conv(2, 9, 6, 3, bias=True))


CASES = {
    **{f"pair{rank}d": (lambda rank=rank: pair(rank), rank, {"conv": 1, "linear": 0}) for rank in ROOM},
    "stride": (lambda: pair(2, stride=2), 2, {"conv": 1, "linear": 0}),
    "dilation": (lambda: pair(2, dilation=2), 2, {"conv": 1, "linear": 0}),
    **{f"branches{rank}d": (lambda rank=rank: branches(rank), rank, {"conv": 1, "bn": 0}) for rank in ROOM},
    "concatenated": (concatenated, 2, {"conv": 1}),
    "twice": (twice, 2, {"conv": 2}),
}


def made(build: object, rank: int, batch: int = 2) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    model = randomise(build()).double().eval()  # type: ignore[operator]
    return model, torch.randn(batch, 4, *ROOM[rank], dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_layers_merge_across_the_shift(name: str) -> None:
    build, rank, expected = CASES[name]
    model, x = made(build, rank)
    before = snapshot(model)
    result = reparam.fuse(model, x, fixed_sizes=True)
    counts = static_counts(result.module)
    assert {kind: counts[kind] for kind in expected} == expected
    assert relative_error(run(result.module, x), run(model, x)) < EXACT
    more = torch.randn(3, *x.shape[1:], dtype=torch.float64)
    assert relative_error(run(result.module, more), run(model, more)) < EXACT
    assert any(rewrite.pass_name == "bias maps" for rewrite in result.report.rewrites)
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", ["pair2d", "branches2d", "concatenated"])
def test_without_fixed_sizes_every_size_runs(name: str) -> None:
    build, rank, expected = CASES[name]
    model, x = made(build, rank)
    result = reparam.fuse(model, x)
    assert static_counts(result.module)["conv"] > expected["conv"]
    wider = F.pad(x, (0, 3))
    assert relative_error(run(result.module, wider), run(model, wider)) < EXACT


@pytest.mark.parametrize("size", [(12, 14), (1, 1), (14, 11)])
def test_another_size_is_an_error(size: tuple[int, int]) -> None:
    model, x = made(lambda: pair(2), 2)
    fused = reparam.fuse(model, x, fixed_sizes=True).module
    with pytest.raises(OtherInputError, match=r"fixed sizes, \[4, 11, 14\] there, and cannot take"):
        fused(torch.randn(2, 4, *size, dtype=torch.float64))


def test_zoo_block_on_the_size_its_head_fixes() -> None:
    model, x = made(bias_map, 2)
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    usual, fixed = reparam.fuse(model, x), reparam.fuse(model, x, fixed_sizes=True)
    assert static_counts(usual.module)["conv"] == 2
    assert static_counts(fixed.module)["conv"] == 1
    assert relative_error(run(fixed.module, x), run(model, x)) < EXACT


def test_nothing_is_done_where_it_does_not_pay() -> None:
    """A BatchNorm in front of one padded layer: the map would cost what its shift costs."""
    model, x = made(lambda: nn.Sequential(nn.BatchNorm2d(4), conv(2, 4, 6, 3), nn.ReLU()), 2)
    usual, fixed = reparam.fuse(model, x), reparam.fuse(model, x, fixed_sizes=True)
    assert static_counts(usual.module) == static_counts(fixed.module)
    assert relative_error(run(fixed.module, x), run(model, x)) < EXACT


def test_no_shift_no_map() -> None:
    layers = nn.Sequential(conv(2, 4, 8, 1), conv(2, 8, 6, 3), nn.ReLU())
    model, x = made(lambda: layers, 2)
    fixed = reparam.fuse(model, x, fixed_sizes=True)
    assert static_counts(fixed.module)["conv"] == 1
    assert not any(rewrite.pass_name == "bias maps" for rewrite in fixed.report.rewrites)


def test_a_tensor_that_others_read_keeps_its_shift() -> None:
    layers = {"a": conv(2, 4, 8, 1, bias=True), "b": conv(2, 8, 6, 3, bias=True)}

    def forward(m: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = m.a(x)  # type: ignore[operator]
        return m.b(wide), torch.sigmoid(wide)  # type: ignore[operator]

    model, x = made(lambda: Lambda(forward, **layers), 2)
    fixed = reparam.fuse(model, x, fixed_sizes=True).module
    for ours, theirs in zip(fixed(x), model(x), strict=True):
        assert relative_error(ours, theirs) < EXACT


def test_the_fused_model_can_be_saved_and_fused_again() -> None:
    model, x = made(lambda: pair(2), 2)
    fused = reparam.fuse(model, x, fixed_sizes=True).module
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert relative_error(run(loaded, x), run(model, x)) < EXACT
    with pytest.raises(OtherInputError):
        loaded(x[..., :-1])
    again = reparam.fuse(fused, x, fixed_sizes=True)
    assert static_counts(again.module) == static_counts(fused)
    assert relative_error(run(again.module, x), run(model, x)) < EXACT
    with pytest.raises(OtherInputError):
        again.module(x[..., :-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_the_models_dtype(dtype: torch.dtype) -> None:
    model, x = made(lambda: pair(2), 2)
    model, x = model.to(dtype), x.to(dtype)
    fixed = reparam.fuse(model, x, fixed_sizes=True)
    assert fixed.report.comparison is not None
    assert fixed.report.comparison.passed
    assert all(tensor.dtype == dtype for tensor in fixed.module.state_dict().values())


def test_with_passes_of_ones_own() -> None:
    model, x = made(lambda: pair(2), 2)
    with pytest.raises(InputError, match="fixed_sizes goes with the usual passes"):
        reparam.fuse(model, x, fixed_sizes=True, passes=[])


def test_a_region_whose_end_has_the_name_of_a_method() -> None:
    """A map is kept under the name of the node, here `register_buffer`."""
    parts = {"a": conv(2, 4, 8, 1, bias=True), "register": nn.ModuleDict({"buffer": conv(2, 8, 6, 3, bias=True)})}
    model, x = made(lambda: Lambda(lambda m, x: F.relu(m.register["buffer"](m.a(x))), **parts), 2)
    fixed = reparam.fuse(model, x, fixed_sizes=True)
    assert any(rewrite.pass_name == "bias maps" for rewrite in fixed.report.rewrites)
    assert relative_error(run(fixed.module, x), run(model, x)) < EXACT


# What stands in front of a region's end, or at its beginning, and moves positions: the map is made between.


def shifted(*behind: nn.Module, ahead: tuple[nn.Module, ...] = (), channels: int = 6) -> nn.Module:
    """`3x3(1x1(BN(x)))` padded with zeros, and what is around it."""
    layers = (bn(2, 4), conv(2, 4, 8, 1, bias=True), conv(2, 8, channels, 3, bias=True))
    return nn.Sequential(*ahead, *layers, *behind)


class Unflattened(nn.Module):
    """Channels last, as a transformer's tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(2).transpose(1, 2)


AROUND: dict[str, Callable[[], nn.Module]] = {
    "average_pool": lambda: shifted(nn.AvgPool2d(2), nn.ReLU()),
    "global_pool": lambda: shifted(nn.AdaptiveAvgPool2d(1), nn.ReLU()),
    "global_pool_and_head": lambda: shifted(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    "flatten": lambda: shifted(nn.Flatten(), nn.ReLU()),
    "flatten_and_head": lambda: shifted(nn.Flatten(), nn.Linear(6 * 11 * 14, 3)),
    "tokens": lambda: shifted(Unflattened(), nn.Linear(6, 5), nn.ReLU()),
    "nearest": lambda: shifted(nn.Upsample(scale_factor=2), nn.ReLU()),
    "bilinear": lambda: shifted(nn.Upsample(scale_factor=2, mode="bilinear"), nn.ReLU()),
    "shuffle": lambda: shifted(nn.PixelShuffle(2), nn.ReLU(), channels=8),
    "max_pool": lambda: shifted(nn.MaxPool2d(2), nn.ReLU()),
    "returned": lambda: shifted(nn.AvgPool2d(2)),
    "pooled_before": lambda: shifted(nn.ReLU(), ahead=(nn.AvgPool2d(2),)),
}
# The collapse merges the pooling into a layer, or moves the 1x1 layer in front of the resizing, where it is cheaper.
OTHERWISE: dict[str, Callable[[], nn.Module]] = {
    "overlapping_pool": lambda: shifted(nn.AvgPool2d(3, 2, 1), nn.ReLU()),
    "upsampled_before": lambda: shifted(nn.ReLU(), ahead=(nn.Upsample(scale_factor=2),)),
    "resized_before": lambda: shifted(nn.ReLU(), ahead=(nn.Upsample(scale_factor=2, mode="bilinear"),)),
    "both": lambda: shifted(nn.AvgPool2d(2), nn.ReLU(), ahead=(nn.Upsample(scale_factor=2),)),
}


@pytest.mark.parametrize("name", AROUND)
def test_maps_beside_what_moves_positions(name: str) -> None:
    model, x = made(AROUND[name], 2)
    before = snapshot(model)
    usual, fixed = reparam.fuse(model, x, verify=False), reparam.fuse(model, x, fixed_sizes=True)
    assert any(rewrite.pass_name == "bias maps" for rewrite in fixed.report.rewrites)
    assert static_counts(fixed.module)["conv"] < static_counts(usual.module)["conv"]
    assert static_counts(fixed.module)["bn"] == 0
    for batch in (1, 2, 3):
        more = torch.randn(batch, *x.shape[1:], dtype=torch.float64)
        assert relative_error(run(model, more), run(fixed.module, more)) < EXACT
    with pytest.raises(OtherInputError):
        fixed.module(F.pad(x, (0, 2, 0, 2)))
    assert_unchanged(before, model)


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_merges_beside_what_moves_positions_stay_exact(name: str) -> None:
    model, x = made(OTHERWISE[name], 2)
    usual, fixed = reparam.fuse(model, x, verify=False), reparam.fuse(model, x, fixed_sizes=True)
    assert static_counts(fixed.module)["conv"] <= static_counts(usual.module)["conv"]
    for batch in (1, 2, 3):
        more = torch.randn(batch, *x.shape[1:], dtype=torch.float64)
        assert relative_error(run(model, more), run(fixed.module, more)) < EXACT


def test_branches_with_a_part_each() -> None:
    """Two parts in one region: each is pooled, and the sum of both is read."""
    parts = {"one": shifted(), "other": shifted()}
    pooled = Lambda(
        lambda m, x: F.relu(F.adaptive_avg_pool2d(m.one(x), (4, 4)) + F.adaptive_avg_pool2d(m.other(x.abs()), (4, 4))),
        **parts,
    )
    model, x = made(lambda: pooled, 2)
    fixed = reparam.fuse(model, x, fixed_sizes=True)
    assert static_counts(fixed.module)["conv"] == 2
    assert relative_error(run(model, x), run(fixed.module, x)) < EXACT


def test_a_part_that_is_also_read_before_it_is_pooled() -> None:
    parts = {"body": shifted()}
    both = Lambda(lambda m, x: (lambda y: (F.avg_pool2d(y, 2), torch.sigmoid(y)))(m.body(x)), **parts)
    model, x = made(lambda: both, 2)
    fixed = reparam.fuse(model, x, fixed_sizes=True)
    assert relative_error(run(model, x), run(fixed.module, x)) < EXACT


def test_maps_are_the_same_when_fused_again() -> None:
    model, x = made(AROUND["average_pool"], 2)
    once = reparam.fuse(model, x, fixed_sizes=True).module
    again = reparam.fuse(once, x, fixed_sizes=True)
    assert static_counts(again.module) == static_counts(once)
    assert relative_error(run(model, x), run(again.module, x)) < EXACT
