"""Forwards that make kernels of parameters, or ask Python for their values: a tracer's stand-ins are in the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reparam import CaptureError, fuse
from tests.capture.test_odd_forwards import Forward, call, image, odd
from tests.support import relative_error


def assigned_into_zeros(s, x):
    kernel = torch.zeros(4, 1, 3, 3, dtype=x.dtype)
    kernel[:, 0, 1, :] = s.scale[:, None]
    kernel[:, 0, :, 1] += s.scale[:, None] * 0.5
    return s.b.norm(F.conv2d(x, kernel, padding=1, groups=4))


def assigned_in_a_loop(s, x):
    kernel = torch.zeros_like(s.a.conv.weight)
    for i in range(4):
        kernel[i] = s.a.conv.weight[i] / s.a.conv.weight[i].norm()
    return s.a.norm(F.conv2d(x, kernel, padding=1))


def through_numpy(s, x):
    kernel = torch.from_numpy(np.flip(s.a.conv.weight.detach().numpy(), -1).copy())
    return s.a.norm(F.conv2d(x, kernel, padding=1))


def through_a_list(s, x):
    return s.a(x) * torch.tensor([value * 2 for value in s.scale.tolist()], dtype=x.dtype).view(-1, 1, 1)


def repeated_as_a_parameter_says(s, x):
    for _ in range(int(s.scale.sum())):
        x = s.a(x)
    return s.b(x) if s.scale[0] > 0 else x


# A forward, and the convolutions and BatchNorms that are left.
KERNELS: list[tuple[Forward, tuple[int, int]]] = [
    (assigned_into_zeros, (1, 1)),
    (assigned_in_a_loop, (1, 1)),
    (through_numpy, (1, 0)),
    (through_a_list, (1, 0)),
    (repeated_as_a_parameter_says, (3, 0)),
]


@pytest.mark.parametrize(("forward", "left"), KERNELS, ids=[forward.__name__ for forward, _ in KERNELS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_made_of_parameters(forward: Forward, left: tuple[int, int], dtype: torch.dtype) -> None:
    original, x = odd(forward).to(dtype), image().to(dtype)
    result = fuse(original, x)
    report = result.report
    assert report.capture == "symbolic"
    assert report.comparison is not None
    assert report.comparison.passed
    assert report.comparison.algebra_error < 1e-11
    assert (report.after.convolutions, report.after.batch_norms) == left
    error = 1e-12 if dtype == torch.float64 else 1e-5
    for example in (x, image(2).to(dtype), image(1, 11, 9).to(dtype)):
        assert relative_error(call(original, (example,)), call(result.module, (example,))) < error


def decides_by_what_was_written(s, x):
    state = torch.zeros(2, dtype=x.dtype)
    state[0] = x.mean()
    return s.a(x) if state[0] > 0 else s.b(x)


def counts_what_was_written(s, x):
    state = torch.zeros(2, dtype=torch.long)
    state[0] = (x > 0).sum()
    return s.a(x) * int(state[0])


@pytest.mark.parametrize("forward", [decides_by_what_was_written, counts_what_was_written])
def test_what_is_written_to_a_new_tensor_is_no_constant(forward: Forward) -> None:
    result = fuse(odd(forward), image(), verify=False)
    assert result.report.capture == "partial"
    for x in (image(), -image(), image(2)):
        assert relative_error(call(odd(forward), (x,)), call(result.module, (x,))) < 1e-12


def clamps_and_goes_through_numpy(s, x):
    s.scale.data.clamp_(-0.5, 0.5)
    return through_numpy(s, x)


def test_parameters_are_not_written_to_for_all_that() -> None:
    model: Any = odd(clamps_and_goes_through_numpy)
    before = model.scale.detach().clone()
    with pytest.raises(CaptureError, match="writes to"):
        fuse(model, image(), verify=False)
    assert torch.equal(model.scale, before)
