"""Linear layers with BatchNorm on either side, layer scales behind permutes, low-rank branches."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.case import BlockCase, bn, conv, conv_bn, shape


class TokenLinearBN(nn.Module):
    """LeViT: linear on `(B, N, C)`, then BatchNorm over the flattened tokens."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(c_in, c_out, bias=False), nn.BatchNorm1d(c_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc(x)
        return F.hardswish(self.norm(x.flatten(0, 1)).reshape_as(x))


class NormHead(nn.Module):
    """LeViT's head: BatchNorm in front of linear."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.BatchNorm1d(features), nn.Linear(features, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.norm(x))


class AveragedHeads(nn.Module):
    """RepViT, EfficientFormer: two linear heads on one feature, averaged; BatchNorm in front of each in RepViT."""

    def __init__(self, features: int, classes: int, norm: bool) -> None:
        super().__init__()
        heads = [NormHead(features, classes) if norm else nn.Linear(features, classes) for _ in range(2)]
        self.first, self.second = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x)
        return (self.first(x) + self.second(x)) / 2


class PooledAttention(nn.Module):
    """NextViT: BN in front of attention; keys and values from a 1-D average pool followed by a BN."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.before = bn(2, channels)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        self.pool, self.norm = nn.AvgPool1d(ratio, ratio), nn.BatchNorm1d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.before(x).flatten(2).transpose(1, 2)
        q = self.q(tokens)
        fewer = self.norm(self.pool(tokens.transpose(1, 2))).transpose(1, 2)
        k, v = self.k(fewer), self.v(fewer)
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1)
        return self.out(torch.bmm(weights, v))


class MetaPool(nn.Module):
    """EfficientFormer: `x + gamma * (pool(x) - x)`; the pool does not count its padding, so it is no convolution."""

    def __init__(self, channels: int, count_include_pad: bool) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=count_include_pad)
        self.gamma = nn.Parameter(torch.randn(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.gamma.unsqueeze(-1).unsqueeze(-1) * (self.pool(x) - x)


class ConvNeXt(nn.Module):
    """`x + permute(gamma * fc2(gelu(fc1(LN(permute(depthwise x))))))`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv(2, channels, channels, 7, groups=channels, bias=True)
        self.norm = nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, 3 * channels), nn.Linear(3 * channels, channels)
        self.gamma, self.drop = nn.Parameter(torch.randn(channels)), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.fc2(F.gelu(self.fc1(y))) * self.gamma
        return x + self.drop(y.permute(0, 3, 1, 2))


class CaiT(nn.Module):
    """`x + drop(gamma * mlp(LN(x)))` on tokens."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.fc1, self.fc2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.gamma, self.drop = nn.Parameter(torch.randn(channels)), nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.gamma * self.drop(self.fc2(F.gelu(self.fc1(self.norm(x))))))


class LoRA(nn.Module):
    """`Wx + s * B(A(x))`, dropout in front of the low-rank branch."""

    def __init__(self, c_in: int, c_out: int, r: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale, self.drop = nn.Linear(c_in, c_out), scale, nn.Dropout(0.1)
        self.a, self.b = nn.Linear(c_in, r, bias=False), nn.Linear(r, c_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.base(x) + self.scale * self.b(self.a(self.drop(x))))


class ConvLoRA(nn.Module):
    """The same with convolutions: `kxk x + s * 1x1(kxk x)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.base = conv(2, channels, channels, 3, bias=True)
        self.a, self.b = conv(2, channels, 2, 3), conv(2, 2, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.base(x) + 0.5 * self.b(self.a(x)))


class LowRank(nn.Module):
    """SVD-compressed layer: wide, narrow, wide; merging it would undo the compression."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(wide, narrow, bias=False), nn.Linear(narrow, wide)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.up(self.down(x)))


class LinearPair(nn.Module):
    """narrow, wide, narrow without nonlinearity: merging it is a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 40), nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.down(self.up(x)))


class ConcatNorm(nn.Module):
    """BatchNorm behind a concat of convolutions (splits to the branches)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(2, 4, 3, 3), conv(2, 4, 5, 1, bias=True)
        self.norm = bn(2, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(torch.cat([self.left(x), self.right(x)], dim=1)))


class Head(nn.Module):
    """conv, ReLU, BatchNorm, global average pool, flatten, linear: the BatchNorm crosses pool and flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = conv_bn(2, 4, 6, 3), bn(2, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.norm(F.relu(self.conv(x))), 1).flatten(1))


_ONE = {"conv": 0, "bn": 0, "linear": 1}
_TWO = {"conv": 0, "bn": 0, "linear": 2}
_TOKENS = (2, 6, 8)
_KEYS_TRANSPOSED = {"bn": 0}  # k becomes a convolution, since the product with q wants it as [N, C, L]

CASES = [
    BlockCase("levit_linear_bn", partial(TokenLinearBN, 8, 12), _TOKENS, _ONE, "3", False),
    BlockCase("levit_linear_bn_tokens_equal_channels", partial(TokenLinearBN, 8, 6), _TOKENS, _ONE, "3", False),
    BlockCase("norm_head", partial(NormHead, 8, 5), (3, 8), _ONE, "3", False),
    BlockCase("averaged_norm_heads", partial(AveragedHeads, 8, 5, True), (3, 8), _ONE, "3", False),
    BlockCase("averaged_heads", partial(AveragedHeads, 8, 5, False), (3, 8), _ONE, "3", False),
    BlockCase("nextvit_attention", partial(PooledAttention, 8, 4), (2, 8, 4, 6), _KEYS_TRANSPOSED, "3", False),
    BlockCase("efficientformer_pool", partial(MetaPool, 6, False), shape(2, 6), {"conv": 0}),
    # large enough that a depthwise layer is priced below an average pooling
    BlockCase(
        "metaformer_pool_counting",
        partial(MetaPool, 64, True),
        (1, 64, 28, 28),
        {"conv": 1, "add": 0, "mul": 0},
        "3",
    ),
    BlockCase("convnext", partial(ConvNeXt, 6), shape(2, 6), {"conv": 1, "linear": 2, "mul": 0}, "3"),
    BlockCase("cait", partial(CaiT, 8), _TOKENS, {"linear": 2, "mul": 0}, "3", False),
    BlockCase("lora", partial(LoRA, 24, 20, 4, 2.0), (3, 24), _ONE, "3", False),
    BlockCase("lora_tokens", partial(LoRA, 8, 8, 2, -0.25), _TOKENS, _ONE, "3", False),
    BlockCase("conv_lora", partial(ConvLoRA, 6), shape(2, 6), {"conv": 1}, "3"),
    BlockCase("svd_pair_stays", partial(LowRank, 64, 8), (3, 64), _TWO, "2", False),
    BlockCase("linear_pair", LinearPair, (3, 6), _ONE, "3", False),
    BlockCase("concat_norm", ConcatNorm, shape(2, 4), {"bn": 0}, "3"),
    BlockCase("norm_through_pool_and_flatten", Head, shape(2, 4), {"conv": 1, "bn": 0, "linear": 1}, "3"),
]
