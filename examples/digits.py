"""A small three-branch network for scikit-learn's handwritten digits, and the images it is trained and judged on.

Each block is BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x), the last where the shape permits, followed by a ReLU: three
branches to train, one 3x3 convolution to deploy. `tools/train_digits.py` trained the weights in `digits.safetensors`:

    reparam fuse examples/digits.safetensors --arch examples.digits:build --input 1x1x8x8
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

CLASSES = 10
SPLIT_SEED = 0
HELD_OUT_SHARE = 0.25


class ThreeBranchBlock(nn.Module):
    """ReLU(BN(conv3x3(x)) + BN(conv1x1(x)) [+ BN(x)]); [N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3x3 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm3x3 = nn.BatchNorm2d(channels_out)
        self.conv1x1 = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
        self.norm1x1 = nn.BatchNorm2d(channels_out)
        self.norm_identity = nn.BatchNorm2d(channels_in) if channels_in == channels_out and stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.norm3x3(self.conv3x3(x)) + self.norm1x1(self.conv1x1(x))
        if self.norm_identity is not None:
            out = out + self.norm_identity(x)
        return torch.relu(out)


class DigitsNet(nn.Module):
    """[N, 1, 8, 8] float grey images in [0, 1] -> [N, 10] logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ThreeBranchBlock(1, 16)
        self.stage1 = nn.Sequential(ThreeBranchBlock(16, 16), ThreeBranchBlock(16, 16))
        self.stage2 = nn.Sequential(ThreeBranchBlock(16, 32, stride=2), ThreeBranchBlock(32, 32))
        self.stage3 = nn.Sequential(ThreeBranchBlock(32, 64, stride=2), ThreeBranchBlock(64, 64))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(self.dropout(self.pool(x).flatten(1)))


def build() -> nn.Module:
    """The network with untrained weights; what `--arch examples.digits:build` calls."""
    return DigitsNet()


class Digits(NamedTuple):
    """Images float32 [N, 1, 8, 8] in [0, 1] and labels int64 [N], to train on and held out."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor


def load_digits() -> Digits:
    """scikit-learn's 1,797 digits, split once and for all by `SPLIT_SEED`, each class in the same share."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    pixels, labels = load(return_X_y=True)
    images = (pixels / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    train_x, held_x, train_y, held_y = train_test_split(
        images, labels, test_size=HELD_OUT_SHARE, random_state=SPLIT_SEED, stratify=labels
    )
    return Digits(*(torch.from_numpy(np.ascontiguousarray(array)) for array in (train_x, train_y, held_x, held_y)))


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the rows of `logits` [N, 10] whose largest entry is the label."""
    return (logits.argmax(1) == labels).double().mean().item()
