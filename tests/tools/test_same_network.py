"""Which names of timm's are the same network: the same in all that decides what is computed, and nothing less."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from tools.same_network import _described, _weights_without_values, fingerprint, same_as


class Gate(nn.Module):
    """A module with a setting, a buffer, a function and an attribute that leads back to it."""

    def __init__(self, slope: float = 0.1, start: float = 0.0, act: Any = torch.relu, width: int = 4) -> None:
        super().__init__()
        self.slope, self.act = slope, functools.partial(act)
        self.layer = nn.Linear(width, 4)
        self.register_buffer("grid", torch.arange(4.0) + start)
        self.back = [self.layer]


@pytest.mark.parametrize(
    "other", [{"slope": 0.2}, {"start": 1.0}, {"act": torch.sigmoid}, {"width": 5}], ids=lambda one: next(iter(one))
)
def test_everything_that_decides_is_described(other: dict[str, Any]) -> None:
    def described(**settings: Any) -> str:
        with _weights_without_values():
            return _described(Gate(**settings), {})

    assert described() == described()
    assert described() != described(**other)


def test_a_network_under_two_names_and_others() -> None:
    names = ("deit_tiny_patch16_224", "vit_tiny_patch16_384", "vit_tiny_patch16_224", "eva02_tiny_patch14_224")
    digests = dict(map(fingerprint, names))
    assert all(digests.values())
    assert same_as(digests, {"vit_tiny_patch16_224", "eva02_tiny_patch14_224"}) == {
        "deit_tiny_patch16_224": "vit_tiny_patch16_224",
        "vit_tiny_patch16_384": "vit_tiny_patch16_224",
    }


def test_what_could_not_be_told_is_the_same_as_nothing() -> None:
    assert same_as({"a": None, "b": None, "c": "one"}, {"a"}) == {}
