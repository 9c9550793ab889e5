"""Concatenations of outputs: grouped blocks written by hand, BatchNorms and scales behind a concat, parallel layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import AVG_POOL, BlockCase, bn, channel_parameter, conv, conv_bn, shape
from tests.zoo.chains import pad_with, shift_of
from tests.zoo.trap import Lambda


class CatOfChunks(nn.Module):
    """A grouped convolution written as chunk, one convolution and BatchNorm for each part, concat; plus a 1x1.

    `iterate` loops over the chunks instead of indexing them.
    """

    def __init__(
        self, rank: int, c_in: int, c_out: int, k: int, stride: int, groups: int, point: bool, iterate: bool = False
    ) -> None:
        super().__init__()
        self.iterate = iterate
        parts = (conv_bn(rank, c_in // groups, c_out // groups, k, stride) for _ in range(groups))
        self.parts = nn.ModuleList(parts)
        self.point = conv_bn(rank, c_in, c_out, 1, stride, groups) if point else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(len(self.parts), dim=1)
        if self.iterate:
            y = torch.cat([part(chunk) for part, chunk in zip(self.parts, chunks, strict=True)], dim=1)
        else:
            y = torch.cat([part(chunks[i]) for i, part in enumerate(self.parts)], dim=1)
        return F.relu(y if self.point is None else y + self.point(x))


class GroupedDBB(nn.Module):
    """`BN(kxk x) + cat_i(BN(kxk pad(BN(1x1 x_i)))) + cat_i(BN(pool pad(BN(1x1 x_i))))`, x_i the chunks of x."""

    def __init__(self, rank: int, channels: int, k: int, stride: int, groups: int) -> None:
        super().__init__()
        c = channels // groups
        self.rank, self.by = rank, k // 2
        self.dense = conv_bn(rank, channels, channels, k, stride, groups)
        self.first = nn.ModuleList(conv_bn(rank, c, 2 * c, 1) for _ in range(groups))
        self.second = nn.ModuleList(conv_bn(rank, 2 * c, c, k, stride, padding=0) for _ in range(groups))
        self.before_pool = nn.ModuleList(conv_bn(rank, c, c, 1) for _ in range(groups))
        self.pool = nn.ModuleList(nn.Sequential(AVG_POOL[rank](k, stride), bn(rank, c)) for _ in range(groups))

    def padded(self, branch: Any, x: torch.Tensor) -> torch.Tensor:
        return pad_with(branch(x), shift_of(branch[1]), self.rank, self.by)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = torch.chunk(x, len(self.first), 1)
        convs, pools = [], []
        for i in range(len(self.first)):
            convs.append(self.second[i](self.padded(self.first[i], chunks[i])))
            pools.append(self.pool[i](self.padded(self.before_pool[i], chunks[i])))
        return F.relu(self.dense(x) + torch.cat(convs, 1) + torch.cat(pools, 1))


class Ghost(nn.Module):
    """GhostNet's module: `y = act(BN(1x1 x)); cat(y, act(BN(depthwise y)))`; the second of a bottleneck has no act."""

    def __init__(self, rank: int, c_in: int, c_out: int, act: bool) -> None:
        super().__init__()
        self.primary = conv_bn(rank, c_in, c_out // 2, 1)
        self.cheap = conv_bn(rank, c_out // 2, c_out // 2, 3, groups=c_out // 2)
        self.act = nn.ReLU() if act else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.act(self.primary(x))
        return torch.cat([y, self.act(self.cheap(y))], dim=1)


class DenseLayers(nn.Module):
    """DenseNet-BC: each layer `conv3x3(relu(BN(1x1 relu(BN(cat)))))`; the first BN stays, the second folds."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = [channels + growth * i for i in range(layers)]
        self.before = nn.ModuleList(bn(2, c) for c in widths)
        self.inner = nn.ModuleList(conv_bn(2, c, 4 * growth, 1) for c in widths)
        self.last = nn.ModuleList(conv(2, 4 * growth, growth, 3) for _ in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for before, inner, last in zip(self.before, self.inner, self.last, strict=True):
            y = F.relu(before(torch.cat(features, 1)))
            features.append(last(F.relu(inner(y))))
        return torch.cat(features, 1)


def behind(rank: int, last: str, first: str = "relu") -> nn.Module:
    """`last(BN(cat(relu(3x3 x), first)))`, `first` being relu(1x1 x), the 1x1 alone, or x; `last` names the reader."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        other = x if first == "input" else m.b(x)
        other = F.relu(other) if first == "relu" else other
        return F.relu(m.last(m.norm(torch.cat((F.relu(m.a(x)), other), dim=1))))

    k, padding = (3, 0) if last == "unpadded" else (1, 0) if last == "pointwise" else (3, 1)
    readers = {"a": conv(rank, 4, 4, 3, bias=True), "norm": bn(rank, 8), "last": conv(rank, 8, 9, k, padding=padding)}
    if first != "input":
        readers["b"] = conv(rank, 4, 4, 1, bias=True)
    return Lambda(forward, **readers)


def joined(rank: int, k: int, layers: int, norm: str) -> nn.Module:
    """Parallel convolutions of one kernel and source, concatenated, with a BatchNorm `inside`, `behind` or none."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        outputs = [part(x) for part in m.parts]
        return F.relu(m.norm(torch.cat(outputs, dim=1)))

    make = conv_bn if norm == "inside" else conv
    parts = nn.ModuleList(make(rank, 4, 2 + i, k) for i in range(layers))
    width = sum(2 + i for i in range(layers))
    return Lambda(forward, parts=parts, norm=bn(rank, width) if norm == "behind" else nn.Identity())


def nested(rank: int) -> nn.Module:
    """`BN(cat(3x3 x, cat(g * 3x3 x, -3x3 x))) + 1x1 x`: one convolution, whatever the nesting."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        inner = torch.cat([m.g * m.b(x), -m.c(x)], dim=1)
        return F.relu(m.norm(torch.cat((m.a(x), inner), 1)) + m.point(x))

    layers = {name: conv(rank, 4, 2, 3, bias=name == "b") for name in "abc"}
    return Lambda(forward, **layers, g=channel_parameter(2, rank), norm=bn(rank, 6), point=conv(rank, 4, 6, 1))


def concat_then_pointwise(rank: int) -> nn.Module:
    """`1x1(cat(3x3 x, 3x3 x))` without nonlinearity: one convolution of fewer outputs computes less."""
    return Lambda(
        lambda m, x: F.relu(m.last(torch.cat([m.a(x), m.b(x)], 1))),
        a=conv(rank, 4, 5, 3, bias=True),
        b=conv(rank, 4, 5, 3),
        last=conv_bn(rank, 10, 4, 1),
    )


def inception(rank: int) -> nn.Module:
    """Four branches: 1x1; 1x1 then 3x3; 1x1 then 5x5; max-pool then 1x1; BatchNorm and ReLU behind each."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
        outputs = [m.a(x), m.c(F.relu(m.b(x))), m.e(F.relu(m.d(x))), m.f(pool(x, 3, 1, 1))]
        return torch.cat([F.relu(y) for y in outputs], 1)

    ends = {"a": conv_bn(rank, 4, 3, 1), "b": conv_bn(rank, 4, 2, 1), "d": conv_bn(rank, 4, 2, 1)}
    rest = {"c": conv_bn(rank, 2, 4, 3), "e": conv_bn(rank, 2, 3, 5), "f": conv_bn(rank, 4, 2, 1)}
    return Lambda(forward, **ends, **rest)


def concat_linear(kind: str) -> nn.Module:
    """Linear layers side by side: concatenated, or a concat in front of one."""

    def outputs(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.norm(torch.cat([m.a(x), m.b(x)], -1)))

    def inputs(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.last(m.norm(torch.cat([F.relu(m.a(x)), torch.sigmoid(m.b(x))], 1))))

    width = 4 if kind == "tokens" else 6
    norm = nn.Identity() if kind == "tokens" else nn.BatchNorm1d(10)
    layers: dict[str, nn.Module] = {"a": nn.Linear(width, 4), "b": nn.Linear(width, 6, bias=False), "norm": norm}
    if kind == "inputs":
        return Lambda(inputs, **layers, last=nn.Linear(10, 12))
    return Lambda(outputs, **layers)


_ONE = {"conv": 1, "bn": 0, "linear": 0, "add": 0, "mul": 0}
_LINEAR = {"conv": 0, "bn": 0, "linear": 1}

CASES = [
    *(
        BlockCase(
            f"cat_of_chunks{r}d_{i}_{o}_k{k}_s{s}_g{g}{'_point' * p}",
            partial(CatOfChunks, r, i, o, k, s, g, p),
            shape(r, i, 6),
            # Of parts that are grouped themselves, two layers may cost less than one with more groups.
            {"bn": 0} if (r, i, g, p) == (2, 4, 2, False) else _ONE,
            "3",
        )
        for r, i, o, k, s, g, p in (
            (2, 4, 4, 3, 1, 2, False),
            (2, 6, 9, 3, 2, 3, True),
            (2, 4, 8, 1, 1, 4, True),
            (1, 6, 6, 5, 1, 2, True),
            (3, 4, 4, 3, 1, 2, True),
        )
    ),
    BlockCase(
        "cat_of_chunks_iterated",
        partial(CatOfChunks, 2, 4, 4, 3, 1, 2, True, True),
        shape(2, 4),
        _ONE,
        "3",
        may_refuse=True,
    ),
    *(
        BlockCase(f"grouped_dbb{r}d_k{k}_s{s}_g{g}", partial(GroupedDBB, r, c, k, s, g), shape(r, c, 7), _ONE, "3")
        for r, c, k, s, g in ((2, 4, 3, 1, 2), (2, 6, 3, 2, 3), (2, 4, 5, 1, 4), (1, 4, 3, 1, 2), (3, 4, 3, 1, 2))
    ),
    # The identity half of the concat as a 3x3 kernel would cost nine times as much as copying it: two layers stay.
    *(
        BlockCase(
            f"ghost{r}d{'_act' * act}", partial(Ghost, r, 4, 8, act), shape(r, 4, 6), {"conv": 2, "bn": 0, "add": 0}
        )
        for r, act in ((2, True), (2, False), (1, False), (3, True))
    ),
    BlockCase("dense_layers", partial(DenseLayers, 4, 3, 3), shape(2, 4), {"conv": 6, "bn": 3}),
    *(
        BlockCase(f"norm_behind_concat{r}d_{last}", partial(behind, r, last), shape(r, 4, 6), expected)
        for r, last, expected in (
            (2, "pointwise", {"conv": 3, "bn": 0, "add": 0}),
            (2, "unpadded", {"conv": 3, "bn": 0, "add": 0}),
            (1, "unpadded", {"conv": 3, "bn": 0, "add": 0}),
            (3, "pointwise", {"conv": 3, "bn": 0, "add": 0}),
        )
    ),
    # Only the scale may cross the zero padding; whether that pays for the shift that stays is a question of cost.
    BlockCase("norm_behind_concat_padded", partial(behind, 2, "padded"), shape(2, 4), {"conv": 3}),
    # Without an activation the 1x1 could also be merged into the last layer, for an addition: it computes more.
    BlockCase(
        "norm_behind_concat_one_activation",
        partial(behind, 2, "pointwise", "conv"),
        shape(2, 4),
        {"conv": 3, "bn": 0},  # an addition or a concat of the two
    ),
    BlockCase(
        "norm_behind_concat_with_input", partial(behind, 2, "unpadded", "input"), shape(2, 4), {"conv": 2, "bn": 0}
    ),
    *(
        BlockCase(f"joined{r}d_k{k}_n{n}_norm_{norm}", partial(joined, r, k, n, norm), shape(r, 4, 6), _ONE, "3")
        for r, k, n, norm in (
            (2, 3, 2, "behind"),
            (2, 3, 3, "inside"),
            (2, 1, 2, "behind"),
            (1, 3, 2, "behind"),
            (3, 1, 2, "inside"),
        )
    ),
    *(BlockCase(f"nested_concat{r}d", partial(nested, r), shape(r, 4, 6), _ONE, "3") for r in (1, 2, 3)),
    *(
        BlockCase(f"concat_then_pointwise{r}d", partial(concat_then_pointwise, r), shape(r, 4, 6), _ONE, "3")
        for r in (1, 2)
    ),
    # Its 1x1 layers of one source could be one: exact, but a loss in a runtime that copies what it splits.
    BlockCase("inception", partial(inception, 2), shape(2, 4), {"conv": 6, "bn": 0, "add": 0}, "3"),
    BlockCase("concat_of_linears", partial(concat_linear, "outputs"), (3, 6), _LINEAR, "3", False),
    BlockCase("concat_of_linears_on_tokens", partial(concat_linear, "tokens"), (2, 5, 4), _LINEAR, "3", False),
    # The two linear layers read one source, so they are one layer whose output is split between the activations.
    BlockCase(
        "norm_behind_concat_linear", partial(concat_linear, "inputs"), (3, 6), {"linear": 2, "bn": 0}, "3", False
    ),
]
