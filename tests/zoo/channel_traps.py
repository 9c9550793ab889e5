"""Traps of concatenation, slicing and permutation: not along the channels, or not of a tensor that one may change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.aliases import IMAGE, c
from tests.zoo.case import bn
from tests.zoo.trap import Lambda, Trap, Two

Forward = Callable[[Any, torch.Tensor], Any]
SQUARE = (4, 4, 4, 4)


def on(forward: Forward, **more: nn.Module | torch.Tensor) -> Callable[[], nn.Module]:
    """A padded 3x3 `a`, a 1x1 `b`, BatchNorms `n` on 4 and `w` on 8 channels, a 1x1 `k` from 8, a scale `g`."""

    def build() -> nn.Module:
        layers: dict[str, Any] = {"a": c(padding=1), "b": c(k=1), "n": bn(2, 4), "w": bn(2, 8), "k": c(8, 4, 1)}
        return Lambda(forward, **layers, g=torch.randn(4, 1, 1) + 3, **more)

    return build


def both(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two affine outputs of one source."""
    return m.a(x), m.b(x)


def operand_read_again(m: Any, x: torch.Tensor) -> Any:
    y, z = both(m, x)
    return F.relu(m.w(torch.cat([y, z], 1))), torch.sigmoid(y)


def operand_scaled_and_read(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    return F.relu(m.k(torch.cat([y, m.n(y)], 1))) + y


def cat_read_twice(m: Any, x: torch.Tensor) -> Any:
    y = torch.cat(both(m, x), 1)
    return F.relu(m.w(y)), torch.tanh(m.k(y)), y[:, 3:5]


def cat_of_itself(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    return F.relu(m.w(torch.cat([y, y], 1)))


def cat_kept_and_written(m: Any, x: torch.Tensor) -> Any:
    y, z = both(m, x)
    both_of_them = torch.cat([y, z], 1)
    y.mul_(2)
    return F.relu(m.w(both_of_them)), m.n(y)


def cat_into(m: Any, x: torch.Tensor) -> Any:
    out = torch.empty(x.shape[0], 8, *x.shape[2:], dtype=x.dtype)
    out[:, :4] = m.a(x)
    out[:, 4:] = m.b(x)
    return m.w(out)


CATS: dict[str, Forward] = {
    "cat_along_the_batch": lambda m, x: m.n(torch.cat(both(m, x))),
    "cat_along_the_batch_equal_sizes": lambda m, x: m.n(torch.cat([m.a(x), m.b(x)], dim=0)),
    "cat_along_the_height": lambda m, x: m.n(torch.cat(both(m, x), dim=2)),
    "cat_along_the_width": lambda m, x: F.relu(m.n(torch.cat(both(m, x), -1)) * m.g),
    "cat_along_minus_three": lambda m, x: F.relu(m.w(torch.cat(both(m, x), -3))),
    "cat_of_equal_tensors": cat_of_itself,
    "cat_of_one": lambda m, x: F.relu(m.n(torch.cat([m.a(x)], 1))),
    "cat_with_a_constant": lambda m, x: F.relu(m.w(torch.cat([m.a(x), m.map.expand(x.shape[0], -1, -1, -1)], 1))),
    "cat_with_the_source": lambda m, x: F.relu(m.w(torch.cat([x, m.a(x)], dim=1))),
    "cat_operand_read_again": operand_read_again,
    "cat_operand_scaled_and_read": operand_scaled_and_read,
    "cat_read_twice": cat_read_twice,
    "stack_along_the_channels": lambda m, x: m.w(torch.stack(both(m, x), 1).flatten(1, 2)),
    "stack_between_the_channels": lambda m, x: m.w(torch.stack(both(m, x), 2).flatten(1, 2)),
    "stack_of_rank_five": lambda m, x: torch.stack(both(m, x), 1).mul(m.g).sum(1),
    "stack_then_sum": lambda m, x: F.relu(m.n(torch.stack(both(m, x)).sum(0))),
    "cat_then_view_as_space": lambda m, x: m.n(torch.cat(both(m, x), 1).view(x.shape[0], 4, -1, x.shape[3])),
    "channels_padded_with_zeros": lambda m, x: m.w(F.pad(m.a(x), (0, 0, 0, 0, 1, 3))),
    "channels_cropped": lambda m, x: m.n(F.pad(torch.cat(both(m, x), 1), (0, 0, 0, 0, -1, -3))),
}


def unequal_chunk(m: Any, x: torch.Tensor) -> Any:
    """Six channels in chunks of four: 2, 2 and 2, not four chunks."""
    parts = m.six(x).chunk(4, 1)
    return F.relu(m.two(parts[0])), torch.tanh(parts[2] * 3), parts[1]


def read_in_part(m: Any, x: torch.Tensor) -> Any:
    first, _, last = torch.split(m.six(x), [1, 3, 2], dim=1)
    return F.relu(m.two(last)) + torch.sigmoid(first)


def slice_returned(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    part = y[:, 1:3]
    return part, F.relu(m.n(y)), m.two(part)


def write_into_slice(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    y[:, 1:3].mul_(2)
    return m.n(y)


def write_into_chunk(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    first, second = y.chunk(2, 1)
    first.add_(second)
    return F.relu(m.n(y)), second * 2


def write_before_the_slice_is_read(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    part = y[:, :2]
    y += 1
    return m.two(part), F.relu(m.n(y))


def relu_in_place_on_a_part(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    first, second = y[:, :2], y[:, 2:]
    F.relu_(first)
    return torch.cat([m.two(second), first], 1) * m.g + y


def computed_order(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    return F.relu(m.n(y[:, x.mean((0, 2, 3)).argsort()]))


def gathered(m: Any, x: torch.Tensor) -> Any:
    y = m.a(x)
    order = y.mean((2, 3), keepdim=True).argsort(1).expand_as(y)
    return F.relu(m.n(torch.gather(y, 1, order)))


SLICES: dict[str, Forward] = {
    "slice_with_step": lambda m, x: F.relu(m.two(m.a(x)[:, ::2])),
    "slice_with_step_and_start": lambda m, x: F.relu(m.two(m.a(x)[:, 1::2])),
    "slice_negative": lambda m, x: F.relu(m.two(m.a(x)[:, -3:-1])),
    "slice_beyond_the_end": lambda m, x: F.relu(m.two(m.a(x)[:, 2:99])),
    "slice_with_ellipsis": lambda m, x: F.relu(m.n(m.a(x)[..., 1:])),
    "slice_with_ellipsis_in_front": lambda m, x: F.relu(m.two(m.a(x)[..., 1:3, :, :])),
    "slice_of_the_batch": lambda m, x: F.relu(m.n(m.a(x)[:2])),
    "slice_of_one_channel": lambda m, x: F.relu(m.a(x)[:, 2]) * 3,
    "slice_of_one_channel_kept": lambda m, x: F.relu(m.a(x)[:, 2:3] * m.g),
    "slice_with_none": lambda m, x: F.relu(m.a(x)[:, None] * m.g),
    "slice_of_space": lambda m, x: F.relu(m.n(m.a(x)[:, :, 1:, :-1])),
    "slice_of_space_with_step": lambda m, x: F.relu(m.n(m.a(x)[:, :, ::2, 1::2])),
    "slice_by_mask": lambda m, x: F.relu(m.two(m.a(x)[:, m.mask])),
    "slice_by_repeated_index": lambda m, x: F.relu(m.n(m.a(x)[:, [0, 0, 3, 1]])),
    "slice_by_two_lists": lambda m, x: m.a(x)[:, [0, 1], [2, 3]] * 3 + 1,
    "slice_all": lambda m, x: F.relu(m.n(m.a(x)[:])),
    "slice_empty": lambda m, x: F.relu(m.n(torch.cat([m.a(x), m.b(x)[:, 4:]], 1))),
    "chunk_uneven": unequal_chunk,
    "chunk_of_the_batch": lambda m, x: m.n(m.a(x).chunk(2)[0]),
    "chunk_of_space": lambda m, x: F.relu(m.n(m.a(x).chunk(2, 2)[1])),
    "split_read_in_part": read_in_part,
    "split_of_the_last_axis": lambda m, x: F.relu(m.n(m.a(x).split(3, -1)[0])),
    "slice_returned_and_used": slice_returned,
    "unbind_channels": lambda m, x: torch.stack(m.a(x).unbind(1)[::-1], 1) * m.g,
    "order_computed_from_the_input": computed_order,
    "order_gathered": gathered,
    "order_of_the_batch": lambda m, x: m.n(m.a(x)[[1, 0]]),
    "flip_of_the_height": lambda m, x: F.relu(m.n(m.a(x).flip(2))),
    "flip_of_channels_and_width": lambda m, x: F.relu(m.n(m.a(x).flip(1, 3))),
    "flip_of_the_batch": lambda m, x: F.relu(m.n(m.a(x).flip(0))),
    "roll_of_the_width": lambda m, x: F.relu(m.n(m.a(x).roll(1, 3))),
    "roll_of_everything": lambda m, x: F.relu(m.n(m.a(x).roll(1))),
    "shuffle_of_space": lambda m, x: F.relu(m.n(F.pixel_shuffle(m.wide(x), 2))),
    "unshuffle_of_space": lambda m, x: F.relu(m.sixteen(F.pixel_unshuffle(m.a(x), 2))),
}
WRITES: dict[str, Forward] = {
    "write_into_a_slice": write_into_slice,
    "write_into_a_chunk": write_into_chunk,
    "write_before_the_slice_is_read": write_before_the_slice_is_read,
    "write_into_one_part": relu_in_place_on_a_part,
    "write_behind_a_cat": cat_kept_and_written,
    "write_a_cat_by_hand": cat_into,
}


def more() -> dict[str, Any]:
    """Layers that only slices need."""
    mask = torch.tensor([True, False, False, True])
    wide = {"six": c(4, 6, 1), "two": bn(2, 2), "wide": c(4, 16, 1), "sixteen": bn(2, 16)}
    return {**wide, "mask": mask}


def parts_read_again() -> nn.Module:
    """Branches of both parts of one layer; their concatenation is flipped, filtered and normalised, for two outputs."""

    def forward(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p, q = m.a(x).split([2, 4], 1)
        both = torch.cat([m.b(p), m.c(q)], 1)
        y = F.relu(m.e(m.d(both) + m.n(both)))
        return both.flip(1), m.after(F.channel_shuffle(y, 2)) + y

    layers: dict[str, Any] = {"a": c(4, 6, padding=1), "b": c(2, 4, 1), "c": c(4, 4, 1, bias=False), "d": c(8, 8, 1, 4)}
    return Lambda(forward, **layers, n=bn(2, 8), e=c(8, 6, 1), after=bn(2, 6))


def cat_of_two_inputs() -> nn.Module:
    return Two(lambda m, x, y: F.relu(m.w(torch.cat([m.a(x), m.b(y)], 1))), a=c(padding=1), b=c(padding=1), w=bn(2, 8))


CHANNELS = [
    *(
        Trap(
            name,
            lambda f=forward: on(f, map=torch.randn(1, 4, 8, 8))(),
            (4, 4, 8, 8),
            batches=(1, 5),
            flexible="constant" not in name and "view" not in name,
        )
        for name, forward in CATS.items()
    ),
    *(
        Trap(name, lambda f=forward: on(f, **more())(), (2, 4, 6, 8), batches=() if "batch" in name else (1, 5))
        for name, forward in SLICES.items()
    ),
    *(Trap(name, lambda f=forward: on(f, **more())(), SQUARE, may_refuse=True) for name, forward in WRITES.items()),
    Trap("parts_read_again", parts_read_again, IMAGE, {"bn": 1}, ("nothing linear",), batches=(1, 5), flexible=True),
    Trap("cat_of_two_inputs", cat_of_two_inputs, (IMAGE, IMAGE), {"conv": 2}),
]
