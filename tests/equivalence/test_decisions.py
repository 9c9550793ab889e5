"""Ill-conditioned originals that decide: what jumps when roundings are varied is no noise, and excuses nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from reparam.equivalence import verify
from tests.support import sampled


class Removing(nn.Module):
    """Its norm removes a large mean, so it is ill-conditioned."""

    lost: int = 0

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 10)
        self.conv.bias.data += 400.0  # type: ignore[union-attr]
        self.norm.running_mean += 400.0  # type: ignore[operator]
        self.register_buffer("gate", torch.ones(4))
        self.register_buffer("places", torch.arange(10.0))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        values = self.norm(self.conv(x)).relu()
        offset = float(2**self.lost) * values.detach().abs().max() if self.lost else 0.0
        return (values + offset) - offset

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))

    def forward(self, x: torch.Tensor) -> Any:
        return self.logits(x)


class Gated(Removing):
    """A weight is compared, with a tolerance that float64 alone keeps."""

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.logits(x)
        return torch.where((self.gate - 1.0).abs().amax() < 1e-8, logits, 1.01 * logits)


class GatedByAProduct(Removing):
    def forward(self, x: torch.Tensor) -> Any:
        logits = self.logits(x)
        return torch.where(self.gate @ self.gate == 4.0, logits, 1.01 * logits)


class Selecting(Removing):
    """Makes an index of a product."""

    def forward(self, x: torch.Tensor) -> Any:
        return torch.roll(self.logits(x), int(torch.eye(10)[3].to(self.places) @ self.places), 1)


class Eroding(Removing):
    """Counts pixels by a convolution."""

    def forward(self, x: torch.Tensor) -> Any:
        mask = (x[:, :1] > -1.5).to(x.dtype)
        inner = (nn.functional.conv2d(mask, torch.ones(1, 1, 3, 3, dtype=x.dtype), padding=1) == 9.0).to(x.dtype)
        return self.head((self.features(x) * inner).sum((2, 3)) / inner.sum((2, 3)).clamp_min(1.0))


class Changing(Removing):
    """Looks where two images of the same background differ."""

    def forward(self, x: torch.Tensor) -> Any:
        other = x.clone()
        other[:, :, :2, :2] += 1.0
        before, after = self.features(x), self.features(other)
        return self.head((before * (1.0 + 0.1 * (before != after))).mean((2, 3)))


class Doubling(Removing):
    """Adds what is nothing in every deployment: a layer of the doubled image, halved, less that of the image itself."""

    def forward(self, x: torch.Tensor) -> Any:
        def of(image: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(image, self.conv.weight).relu().mean((2, 3))

        return self.head(self.features(x).mean((2, 3)) + 1e5 * (of(x) - 0.5 * of(2.0 * x)))


class Blurring(Removing):
    """Adds what is nothing for pixels of eight bits: how far a blur of flat rows differs from them."""

    def forward(self, x: torch.Tensor) -> Any:
        flat = (x[..., :1] * 64.0).round().expand_as(x) / 256.0
        kernel = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype).reshape(1, 1, 1, 3).repeat(3, 1, 1, 1)
        padded = nn.functional.pad(flat, (1, 1, 0, 0), mode="replicate")
        rest = (flat - nn.functional.conv2d(padded, kernel, groups=3)).abs().mean()
        return self.head(self.features(x).mean((2, 3)) + 1e4 * rest)


class Masking(Removing):
    """Compares a product of halves, and by it changes the answer by little."""

    def forward(self, x: torch.Tensor) -> Any:
        mask = (x[:, :1] > -1.5).to(x.dtype) * 0.5
        inner = nn.functional.conv2d(mask, torch.full((1, 1, 3, 3), 1.25, dtype=x.dtype), padding=1)
        return self.logits(x) * (1.0 + 2e-5 * (inner == 5.625).to(x.dtype).mean())


class TremblingBeside(Removing):
    """The first number of its answer is noise in float32; the others hang on a comparison that roundings decide."""

    def forward(self, x: torch.Tensor) -> Any:
        value = self.features(x).mean((1, 2, 3))[:, None]
        for _ in range(8):
            value = torch.sin(5.5 * value)
        values = x.flatten(1)
        weights = torch.linspace(0.1, 1.7, values.shape[1], dtype=x.dtype)
        same = (values * weights).sum(1, keepdim=True) == (values.flip(1) * weights.flip(0)).sum(1, keepdim=True)
        logits = torch.where(same, 1.01 * self.logits(x), self.logits(x))
        return torch.cat([2.0 * torch.sin(3e3 * value), logits[:, 1:]], 1)


class Remembering(Removing):
    """Answers otherwise at every call."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        self.calls += 1.0
        return self.logits(x) * (1.0 + 0.01 * self.calls)


class Flipping(Removing):
    """Any rounding decides which of two ways it goes: equal sums in another order."""

    def forward(self, x: torch.Tensor) -> Any:
        values = x.flatten(1)
        weights = torch.linspace(0.1, 1.7, values.shape[1], dtype=x.dtype)
        same = (values * weights).sum(1, keepdim=True) == (values.flip(1) * weights.flip(0)).sum(1, keepdim=True)
        return torch.where(same, 1.01 * self.logits(x), self.logits(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    sampled(
        [GatedByAProduct, Gated, Selecting, Changing, Eroding, Flipping, Remembering, Doubling, Blurring, Masking], 3
    ),
)
def test_decisions_excuse_nothing(kind: type[Removing]) -> None:
    """A jump is no noise: neither a scaled answer, nor a wrong weight, nor lost bits pass for its sake."""
    for seed in range(4):
        original, x = kind(seed).eval(), torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        wrong, poor, other = (copy.deepcopy(original) for _ in range(3))
        wrong.conv.weight.data[0, 0, 1, 1] *= 1.0 + 1e-6
        poor.lost = 18

        def scaled(x: torch.Tensor, original: nn.Module = other) -> Any:
            return 1.01 * original(x)

        for candidate in (scaled, wrong, poor):
            assert not verify(original, candidate, x, seed=seed, level="quick").passed


def test_a_jump_beside_noise_excuses_nothing() -> None:
    for seed in range(4):
        original = TremblingBeside(seed).eval()
        x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
        wrong = copy.deepcopy(original).double()
        wrong.head.weight.data[1:] *= 1.0 + 3e-4
        wrong.head.bias.data[1:] *= 1.0 + 3e-4
        for exact in (wrong, None):
            rounded = copy.deepcopy(wrong).float()
            assert not verify(original, rounded, x, candidate_float64=exact, seed=seed, level="quick").passed


def test_without_a_decision_that_original_is_ill_conditioned() -> None:
    """So the tests above ask what they say."""
    original = Removing(0).eval()
    candidate = copy.deepcopy(original)
    candidate.lost = 18
    comparison = verify(original, candidate, torch.randn(1, 3, 12, 12), level="quick")
    assert any("ill-conditioned" in note for case in comparison.cases for note in case.notes)
