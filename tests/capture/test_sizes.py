"""Forwards in which Python works with sizes: computed with, they stay open; decided on, the fused model checks them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from reparam import CaptureError, OtherInputError, fuse
from tests.capture.test_odd_forwards import call, image, odd
from tests.support import relative_error

Forward = Callable[..., Any]
SIZES = (image(), image(2), image(2, 11, 13), image(3, 16, 16))


def positions(s, x):
    y = s.a(x)
    rows = torch.arange(y.shape[2], dtype=x.dtype).view(1, 1, -1, 1)
    return y + rows + torch.linspace(0, 1, y.shape[-1], dtype=x.dtype)


def made_from_sizes(s, x):
    batch, _, height, width = x.shape
    grid = torch.ones(batch, 4, height, width, dtype=x.dtype) + torch.full((height, 1), 2.0, dtype=x.dtype)
    return s.a(x) * grid + torch.eye(height, width, dtype=x.dtype)


def written_by_parts(s, x):
    mask = torch.zeros(x.shape[2], x.shape[3], dtype=x.dtype)
    mask[: x.shape[2] // 2] = 1
    mask[:, -1:] += 2
    return s.a(x) * mask


def arithmetic(s, x):
    height, width = x.shape[-2:]
    below, rest = divmod(height * 3, 2)
    pad = math.ceil(width / 4) * 4 - width
    return F.pad(s.a(x), (0, pad, 0, rest)) * below + round(width / 3, 1)


def constant_expanded(s, x):
    ones = torch.arange(4.0, dtype=torch.float64).view(1, 4, 1, 1)
    return torch.cat([s.a(x), ones.expand(x.shape[0], -1, x.shape[2], x.shape[3])], 1)


def padded_to_a_multiple(s, x):
    missing = (4 - x.shape[-1] % 4) % 4
    y = s.a(x)
    return F.pad(y, (0, missing))


def groups_from_the_batch(s, x):
    n, c, h, w = x.shape
    y = F.conv2d(x.reshape(1, n * c, h, w), s.b.conv.weight.repeat(n, 1, 1, 1), padding=1, groups=n)
    return s.a(y.view(n, c, h, w))


OPEN = [
    positions,
    made_from_sizes,
    written_by_parts,
    arithmetic,
    constant_expanded,
    padded_to_a_multiple,
    groups_from_the_batch,
]


@pytest.mark.parametrize("forward", OPEN)
def test_sizes_that_are_computed_with_stay_open(forward: Forward) -> None:
    result = fuse(odd(forward), SIZES[0], verify=False)
    original = odd(forward)
    for x in SIZES:
        assert relative_error(call(original, (x,)), call(result.module, (x,))) < 1e-12
    assert not any("sizes of the example" in note for note in result.report.notes)


def branch(s, x):
    return s.a(x) if x.shape[2] % 8 == 0 else s.b(x)


def branch_in_words(s, x):
    if x.size(2) > 8 or not x.shape[-1] > 4:
        return s.b(x)
    return s.a(x)


def larger_side(s, x):
    return s.a(x) * max(x.shape[2], 8)


def loop(s, x):
    for row in range(x.shape[2] // 4):
        x = x + row
    return s.a(x)


def repeated_list(s, x):
    scales = [0.5, 2.0] * (x.shape[2] // 4)
    return s.a(x) * sum(scales)


def taken_from_a_list(s, x):
    return s.a(x) * [1.0, 2.0, 3.0, 4.0, 5.0][x.shape[2] // 4]


def parts(s, x):
    y = s.a(x)
    return sum(part.mean(2, keepdim=True) for part in y.split(4, 2))


def rows(s, x):
    return torch.stack([row * 2 for row in s.a(x).unbind(2)], 2)


def images(s, x):
    return torch.stack([s.a(one.unsqueeze(0))[0] for one in x])


def square_root(s, x):
    y = s.a(x).flatten(2)
    side = int(y.shape[2] ** 0.5)
    return y.view(-1, 4, side, side)


def number_of_images(s, x):
    return s.a(x) / len(x)


def asserted(s, x):
    assert x.shape[2] == 8, f"height {x.shape[2]}"
    return s.a(x)


def shape_compared(s, x):
    return s.a(x) if x.shape == (1, 4, 8, 8) else s.b(x)


def shape_in_a_list(s, x):
    return s.a(x) if x.shape[2] in (4, 8) else s.b(x)


def buffer_and_size(s, x):
    return s.a(x) if x.shape[2] < 10 * s.state.item() else s.b(x)


TALL = image(1, 16, 16)
DECIDED: list[tuple[Forward, torch.Tensor, str]] = [
    (branch, image(1, 11, 11), "a condition True"),
    (branch_in_words, TALL, "a condition False"),
    (larger_side, image(1, 4, 4), "a condition False"),
    (loop, TALL, "a number 2"),
    (repeated_list, TALL, "for 4 elements"),
    (taken_from_a_list, TALL, "a number 2"),
    (parts, TALL, "for 2 elements"),
    (rows, TALL, "for 8 elements"),
    (images, image(2), "for 1 elements"),
    (square_root, TALL, "a number 8"),
    (number_of_images, image(2), "for 1 elements"),
    (asserted, TALL, "a condition True"),
    (shape_compared, TALL, "a condition True"),
    (shape_in_a_list, TALL, "a condition"),
    (buffer_and_size, TALL, "a condition True"),
]


@pytest.mark.parametrize(("forward", "other", "phrase"), DECIDED, ids=[f.__name__ for f, _, _ in DECIDED])
def test_sizes_that_decide_are_checked_and_noted(forward: Forward, other: torch.Tensor, phrase: str) -> None:
    original = odd(forward)
    result = fuse(odd(forward), SIZES[0], verify=False)
    assert relative_error(call(original, (SIZES[0],)), call(result.module, (SIZES[0],))) < 1e-12
    assert any("sizes of the example decided" in note and "test_sizes.py:" in note for note in result.report.notes)
    with pytest.raises(OtherInputError, match=f"{phrase}.* at test_sizes.py:"):
        call(result.module, (other,))


def test_checked_sizes_leave_the_others_open() -> None:
    original, result = odd(branch), fuse(odd(branch), SIZES[0], verify=False)
    for x in (image(3), image(2, 16, 11), image(1, 24, 9)):
        assert relative_error(call(original, (x,)), call(result.module, (x,))) < 1e-12


def test_a_decision_by_values_is_refused() -> None:
    for forward in (lambda s, x: s.a(x) if x.sum() > 0 else s.b(x), lambda s, x: s.a(x) * int(x.sum())):
        with pytest.raises(CaptureError, match="cannot be traced"):
            fuse(odd(forward), SIZES[0], capture="symbolic")


def test_torch_is_left_as_they_were() -> None:
    before = torch.arange, torch.Tensor.expand
    fuse(odd(loop), SIZES[0], verify=False)
    with pytest.raises(CaptureError):
        fuse(odd(lambda s, x: s.a(x) if x.sum() > 0 else s.b(x)), SIZES[0], capture="symbolic")
    assert (torch.arange, torch.Tensor.expand) == before
    assert "expand" not in vars(torch.Tensor)


def test_verification_passes_over_sizes_that_the_fused_model_refuses() -> None:
    comparison = fuse(odd(branch), SIZES[0]).report.comparison
    assert comparison is not None
    assert comparison.passed
