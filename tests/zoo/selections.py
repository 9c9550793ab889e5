"""Channels selected and reordered: slices, chunks and splits of one layer's output, channel shuffles, index lists."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BlockCase, bn, channel_parameter, conv, conv_bn, shape
from tests.zoo.trap import Lambda


def shuffled(x: torch.Tensor, groups: int, spelling: str) -> torch.Tensor:
    """Channel shuffle of ShuffleNet: channel `i*n + j` goes to `j*g + i`."""
    if spelling == "function":
        return F.channel_shuffle(x, groups)
    if spelling == "unflatten":
        return x.unflatten(1, (groups, x.shape[1] // groups)).transpose(1, 2).flatten(1, 2)
    n, c, *space = x.shape
    if spelling == "reshape":
        return x.reshape(n, groups, c // groups, *space).permute(0, 2, 1, *range(3, len(space) + 3)).reshape(x.shape)
    y = x.view(n, groups, c // groups, *space).transpose(1, 2).contiguous()
    return y.view(n, -1, *space)


SELECTIONS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "slices": lambda y: (y[:, :3], y[:, 3:]),
    "negative": lambda y: (y[:, :-5], y[:, -5:]),
    "chunk": lambda y: torch.chunk(y, 2, dim=1),  # type: ignore[dict-item,return-value]
    "split": lambda y: torch.split(y, (2, 6), 1),  # type: ignore[dict-item,return-value]
    "tensor_split": lambda y: y.tensor_split(2, dim=1),  # type: ignore[dict-item,return-value]
    "narrow": lambda y: (y.narrow(1, 0, 5), torch.narrow(y, 1, 5, 3)),
    "overlapping": lambda y: (y[:, :5], y[:, 2:]),
    "steps": lambda y: (y[:, ::2], y[:, 1::2]),
    "lists": lambda y: (y[:, [0, 7, 3]], y[:, [1, 2, 4, 5, 6]]),
}
_WIDTHS = {"chunk": (4, 4), "tensor_split": (4, 4), "split": (2, 6), "narrow": (5, 3), "overlapping": (5, 6)}


def selected(rank: int, how: str, reader: str) -> nn.Module:
    """Two parts of one convolution's output, each with a `reader`: norm, scale, pointwise, depthwise."""
    widths = _WIDTHS.get(how, (4, 4) if how == "steps" else (3, 5))
    readers: dict[str, Callable[[int], nn.Module]] = {
        "norm": lambda c: bn(rank, c),
        "pointwise": lambda c: conv_bn(rank, c, 4, 1),
        "depthwise": lambda c: conv_bn(rank, c, c, 3, groups=c),
    }

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = SELECTIONS[how](m.conv(x))
        return torch.cat([F.relu(m.p(first)), torch.tanh(m.q(second))], 1)

    make = readers[reader]
    return Lambda(forward, conv=conv(rank, 4, 8, 3, bias=True), p=make(widths[0]), q=make(widths[1]))


def split_norm_cat(rank: int) -> nn.Module:
    """`relu(cat(BN(y1), BN(y2), g * y3))`, y split in three: one convolution without any cut."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b, c = m.conv(x).split([2, 3, 3], dim=1)
        return F.relu(torch.cat([m.p(a), m.q(b), m.g * c], dim=1))

    return Lambda(forward, conv=conv(rank, 4, 8, 3), p=bn(rank, 2), q=bn(rank, 3), g=channel_parameter(3, rank))


def partial_conv(rank: int) -> nn.Module:
    """FasterNet: the first quarter of the channels through a 3x3, the others as they are; then 1x1 and BatchNorm.

    As one 3x3 on all channels it computes four times as much: two layers and the concat stay.
    """

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        first, rest = torch.split(x, [2, 6], dim=1)
        return F.relu(m.last(torch.cat((m.conv(first), rest), 1)))

    return Lambda(forward, conv=conv(rank, 2, 2, 3), last=conv_bn(rank, 8, 16, 1))


def split_attention(rank: int) -> nn.Module:
    """`BN(q) * sigmoid(BN(k))` with q and k the halves of one 1x1."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k = m.qk(x).chunk(2, 1)
        return m.nq(q) * torch.sigmoid(m.nk(k))

    return Lambda(forward, qk=conv(rank, 4, 12, 1), nq=bn(rank, 6), nk=bn(rank, 6))


def shuffle(rank: int, c: int, groups: int, spelling: str, then: str) -> nn.Module:
    """A grouped 1x1, channel shuffle, and `then`: norm, dense (3x3), grouped (1x1), depthwise, act (ReLU, 3x3)."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.first(x)
        y = shuffled(F.relu(y) if then == "act" else y, groups, spelling)
        return F.relu(m.last(y))

    last = {
        "norm": lambda: bn(rank, c),
        "dense": lambda: conv(rank, c, 4, 3, padding=0, bias=True),
        "act": lambda: conv_bn(rank, c, 4, 3),
        "grouped": lambda: conv_bn(rank, c, c, 1, groups=groups),
        "depthwise": lambda: conv_bn(rank, c, c, 3, groups=c, padding=0),
    }[then]()
    return Lambda(forward, first=conv_bn(rank, c, c, 1, groups=groups), last=last)


class ShuffleUnit(nn.Module):
    """ShuffleNet v2: `shuffle(cat(x1, relu(BN(1x1 BN(depthwise relu(BN(1x1 x2)))))))`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels // 2
        self.enter, self.middle = conv_bn(2, c, c, 1), conv_bn(2, c, c, 3, groups=c)
        self.leave = conv_bn(2, c, c, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=1)
        y = F.relu(self.leave(self.middle(F.relu(self.enter(second)))))
        return shuffled(torch.cat((first, y), dim=1), 2, "view")


PICKS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "list": lambda m, y: y[:, [5, 2, 0, 1, 4, 3]],
    "flip": lambda m, y: y.flip(1),
    "flip_negative": lambda m, y: torch.flip(y, dims=(1 - y.ndim,)),
    "roll": lambda m, y: torch.roll(y, 2, 1),
    "index_select": lambda m, y: torch.index_select(y, 1, m.order),
    "index_buffer": lambda m, y: y[:, m.order],
    "swap": lambda m, y: torch.cat([y[:, 3:], y[:, :3]], dim=1),
    "stacked": lambda m, y: torch.stack((y[:, :3], y[:, 3:]), 2).flatten(1, 2),
}


def picked(rank: int, how: str, then: str = "norm") -> nn.Module:
    """The channels of a convolution in another, constant order, then a BatchNorm or a dense layer."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        y = PICKS[how](m, F.relu(y) if then == "act" else y)
        return F.relu(m.norm(y))

    norm = bn(rank, 6) if then == "norm" else conv_bn(rank, 6, 4, 3)
    return Lambda(forward, conv=conv(rank, 4, 6, 3, bias=True), norm=norm, order=torch.tensor([4, 0, 5, 2, 1, 3]))


def there_and_back(rank: int) -> nn.Module:
    """A shuffle and its inverse around a BatchNorm: nothing but the convolution is left."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.norm(shuffled(m.conv(x), 2, "unflatten"))
        return F.relu(shuffled(y, 3, "unflatten") + x)

    return Lambda(forward, conv=conv(rank, 6, 6, 3), norm=bn(rank, 6))


_ONE = {"conv": 1, "bn": 0, "linear": 0, "add": 0, "mul": 0}

CASES = [
    # Overlapping parts need some outputs twice, each with a scale of its own: more arithmetic, so no count. Parts that
    # are no windows are made by a layer each or by one layer and two scales, whichever costs less.
    *(
        BlockCase(
            f"norm_of_{how}",
            partial(selected, 2, how, "norm"),
            shape(2, 4),
            {} if how in ("overlapping", "steps", "lists") else _ONE,
            "3",
        )
        for how in SELECTIONS
    ),
    *(
        BlockCase(f"norm_of_split{r}d", partial(selected, r, "split", "norm"), shape(r, 4, 5), _ONE, "3")
        for r in (1, 3)
    ),
    # The two halves of the 3x3 merge with the layers that read them; at this size two layers cost what three do.
    BlockCase("pointwise_of_slices", partial(selected, 2, "slices", "pointwise"), shape(2, 4), {"bn": 0}, "3"),
    BlockCase("pointwise_of_chunks1d", partial(selected, 1, "chunk", "pointwise"), shape(1, 4), {"bn": 0}, "3"),
    # Padded depthwise layers behind a bias cannot merge with it; joined or apart, they cost the same.
    BlockCase("depthwise_of_chunks", partial(selected, 2, "chunk", "depthwise"), shape(2, 4), {"bn": 0}),
    *(BlockCase(f"split_norm_cat{r}d", partial(split_norm_cat, r), shape(r, 4, 5), _ONE, "3") for r in (1, 2, 3)),
    *(BlockCase(f"partial_conv{r}d", partial(partial_conv, r), shape(r, 8, 6), {"conv": 2, "bn": 0}) for r in (1, 2)),
    *(
        BlockCase(f"split_attention{r}d", partial(split_attention, r), shape(r, 4), {"conv": 1, "bn": 0}, "3")
        for r in (1, 2)
    ),
    *(
        BlockCase(f"shuffle{r}d_{c}_g{g}_{s}_then_{t}", partial(shuffle, r, c, g, s, t), shape(r, c, 6), e, since)
        for r, c, g, s, t, e, since in (
            (2, 6, 2, "view", "norm", _ONE, "3"),
            (2, 6, 3, "function", "norm", _ONE, "3"),
            (2, 6, 2, "reshape", "norm", _ONE, "3"),
            (1, 6, 2, "unflatten", "norm", _ONE, "3"),
            (3, 6, 3, "view", "norm", _ONE, "3"),
            (2, 6, 2, "view", "dense", _ONE, "3"),
            (1, 6, 3, "reshape", "dense", _ONE, "3"),
            (2, 6, 2, "unflatten", "act", {"conv": 2, "bn": 0}, "2"),
            # Two groups of 4: 32 + 32 multiply-adds apart, 64 as one dense layer, which saves a launch and the shuffle.
            (2, 8, 2, "view", "grouped", _ONE, "3"),
            # Four groups of 4: 64 + 64 apart, 256 merged: apart.
            (2, 16, 4, "function", "grouped", {"bn": 0}, "2"),  # two grouped ones, or one dense one
            # A depthwise layer commutes with the shuffle; together with the 1x1 it computes more, so two stay.
            (2, 16, 2, "view", "depthwise", {"conv": 2, "bn": 0}, "2"),
        )
    ),
    BlockCase("shuffle_unit", partial(ShuffleUnit, 8), shape(2, 8), {"conv": 3, "bn": 0}),
    # `roll` and `stack` are rare spellings: exact, whatever is left of them.
    *(
        BlockCase(f"pick_{how}", partial(picked, 2, how), shape(2, 4), {} if how in ("roll", "stacked") else _ONE, "3")
        for how in PICKS
    ),
    *(
        BlockCase(f"pick_{h}_{r}d", partial(picked, r, h), shape(r, 4, 5), _ONE, "3")
        for r, h in ((1, "list"), (3, "flip"))
    ),
    BlockCase("pick_in_front_of_conv", partial(picked, 2, "index_select", "act"), shape(2, 4), {"conv": 2, "bn": 0}),
    BlockCase("shuffle_there_and_back", partial(there_and_back, 2), shape(2, 6), _ONE, "3"),
]
