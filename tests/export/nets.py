"""Small networks for the export tests."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """Conv-BN-ReLU, global pooling, linear: any batch, any size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(image))).mean((2, 3)))


class Flattened(nn.Module):
    """Flatten in front of a linear layer: the size is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


class TwoInputs(nn.Module):
    """Two inputs that must agree in size, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        y = self.left(left)
        return {"sum": y + self.right(right), "left_only": y}


class Keywords(nn.Module):
    """Keyword-only arguments, a flag, and outputs in nested containers: one twice, one an input, one None."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(
        self, x: Tensor, double: bool = False, *, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Any:
        y = self.conv(x)
        y = y * 2 if double else y
        y = y if scale is None else y * scale
        y = y if shift is None else y + shift
        return y, [y, x, None]


class OneImage(nn.Module):
    """The batch length 1 is written into the code."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 3, 16, 16).mean((2, 3))


class Pooled(nn.Module):
    """Adaptive pooling to 4x4: the exporter bakes the size in, and the probe must notice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.conv(x), 4)


class Padded(nn.Module):
    """Pads to a multiple of eight by a branch on the size: only one branch is in a traced graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 8:
            x = F.pad(x, (0, 0, 0, 8 - x.shape[2] % 8))
        return self.conv(x)


class Decomposition(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[1]


class QR(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.qr(x)[0]


class Eigenvalues(nn.Module):
    """An operator that ONNX does not have, and its result is complex."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x).real


class Pyramid(nn.Module):
    """Adaptive pooling to sizes that do not divide the input's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_max_pool2d(x, (3, 5))


class Bessel(nn.Module):
    """A function that torch traces to an operator of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Histogram(nn.Module):
    """An operator that the exporter knows, but not with these arguments."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.histc(x, 10)


class Unsupported(nn.Module):
    def __init__(self, last: nn.Module | None = None) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 3, 1), Decomposition() if last is None else last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


class Counted(nn.Module):
    """Returns a number beside the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x), x.shape[0]


class Listed(nn.Module):
    """`forward(*args)`."""

    def forward(self, *images: Tensor) -> Tensor:
        return images[0] - 2 * images[1]


class Noisy(nn.Module):
    """A branch on values, which no tracer can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.sum() > 0) else x - 1


def lively(module: nn.Module) -> nn.Module:
    """Random BatchNorm statistics, eval mode."""
    generator = torch.Generator().manual_seed(7)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean = torch.randn(part.num_features, generator=generator)
            part.running_var = torch.rand(part.num_features, generator=generator) + 0.5
            nn.init.uniform_(part.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(part.bias, -1, 1, generator=generator)
    return module.eval()
