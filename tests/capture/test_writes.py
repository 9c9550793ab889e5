"""Items assigned to activations, views and buffers: the fused model writes what and when the original writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from reparam import fuse
from tests.capture.test_odd_forwards import call, image, odd
from tests.support import relative_error

Forward = Callable[..., Any]


def one_channel(s, x):
    y = s.a(x)
    y[:, 0] = 1
    return s.b(y)


def through_a_view(s, x):
    y = s.a(x)
    z = y[:, :2]
    z[...] = 0
    return y + s.b(y)


def from_another(s, x):
    y = s.a(x)
    w = y.clone()
    w[:, 1] = y[:, 0]
    return s.b(w) - y


def by_a_mask(s, x):
    y = s.a(x)
    y[y > 0] = 0
    return s.b(y)


def added_in_place(s, x):
    y = s.a(x)
    y[:, 0] += 1
    return s.b(y)


def behind_a_product(s, x):
    y = x * 1
    y[:, 0] = 0
    return s.a(y) + s.a(x)


def into_a_buffer(s, x):
    s.state[0] = 2
    return s.a(x) * s.state


def into_a_buffer_after_its_use(s, x):
    y = s.a(x) * s.state
    s.state[0] = s.state[0] + x.mean()
    return y


def channel_by_channel(s, x):
    y, out = s.a(x), x.new_zeros(x.shape)
    for i in range(4):
        out[:, i] = y[:, i] * i
    return s.b(out)


def through_a_transpose(s, x):
    y = s.a(x)
    z = y.transpose(1, 2)
    z[:, 0] = 3
    return s.b(y)


def between_two_layers(s, x):
    y = s.a(x)
    z = s.b(y)
    y[:, :, 0] = z[:, :, 0]
    return s.a(y) + z


def behind_the_norm_that_reads_it(s, x):
    y = s.a.conv(x)
    z = s.a.norm(y)
    y[:, 1] = 7
    return z + y


def in_front_of_the_norm(s, x):
    y = s.a.conv(x)
    y[:, 1] = 7
    return s.a.norm(y)


def half_into_half(s, x):
    y = s.a(x)
    p, q = y.chunk(2, 1)
    p[:] = q
    return s.b(y)


def behind_a_flatten(s, x):
    y = s.a(x).flatten(2)
    y[..., 0] = 0
    return y.view(x.shape) * s.scale.view(-1, 1, 1)


def into_a_mask_made_of_sizes(s, x):
    mask = torch.zeros(x.shape[2], x.shape[3], dtype=x.dtype)
    mask[2:, 2:] = 1
    mask[:, 0] = 5
    return s.b(s.a(x) * mask) + mask


def behind_a_slice_that_is_kept(s, x):
    y = s.a(x)
    v = y[:, 0]
    y[:, 0] = 2
    return s.b(y) + v.unsqueeze(1)


def by_a_list(s, x):
    y = s.a(x)
    y[:, torch.tensor([0, 2])] = 0
    return s.b(y)


WRITES: list[Forward] = [
    one_channel,
    through_a_view,
    from_another,
    by_a_mask,
    added_in_place,
    behind_a_product,
    into_a_buffer,
    into_a_buffer_after_its_use,
    channel_by_channel,
    through_a_transpose,
    between_two_layers,
    behind_the_norm_that_reads_it,
    in_front_of_the_norm,
    half_into_half,
    behind_a_flatten,
    into_a_mask_made_of_sizes,
    behind_a_slice_that_is_kept,
    by_a_list,
]


@pytest.mark.parametrize("forward", WRITES)
def test_every_call_writes_as_the_original(forward: Forward) -> None:
    original, result = odd(forward), fuse(odd(forward), image(), verify=False)
    assert result.report.capture == "symbolic"
    for x in (image(), image(2), image(2, 11, 13), image()):
        assert relative_error(call(original, (x,)), call(result.module, (x,))) < 1e-12
