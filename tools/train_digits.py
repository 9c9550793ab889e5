"""Trains the network of `examples/digits.py` and writes its weights: python tools/train_digits.py [--out PATH].

The weights in the repository came from the defaults. Seeds are fixed; other versions of torch or other processors may
round differently and so end at slightly different weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.digits import accuracy, build, load_digits  # noqa: E402

BATCH = 64
PEAK_LEARNING_RATE = 1e-2


def shifted(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image of [N, 1, 8, 8] moved by -1, 0 or 1 pixels both ways, zeros coming in, plus a little noise."""
    count, _, height, width = images.shape
    padded = F.pad(images, (1, 1, 1, 1))
    offsets = torch.randint(0, 3, (count, 2), generator=generator)
    moved = torch.stack(
        [padded[i, :, y : y + height, x : x + width] for i, (y, x) in enumerate(offsets.tolist())],
    )
    return moved + 0.05 * torch.randn(moved.shape, generator=generator)


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, epochs: int, seed: int) -> None:
    """Trains `model` in place with AdamW and a one-cycle learning rate; leaves it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=5e-2)
    steps = epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LEARNING_RATE, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        batches = order[: len(images) // BATCH * BATCH].split(BATCH)
        for batch in batches:
            loss = F.cross_entropy(model(shifted(images[batch], generator)), labels[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3d} of {epochs}: loss {total / len(batches):.4f}", flush=True)
    model.eval()


def save_atomically(model: nn.Module, path: Path) -> None:
    """Writes the state dict as safetensors: the whole file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        draft = Path(folder) / path.name
        save_file(state, draft)
        draft.chmod(0o644)  # safetensors writes for the owner only
        os.replace(draft, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "digits.safetensors")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    digits = load_digits()
    model = build()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(digits.train_images):,} training images")
    train(model, digits.train_images, digits.train_labels, epochs=options.epochs, seed=options.seed)
    with torch.no_grad():
        share = accuracy(model(digits.held_out_images), digits.held_out_labels)
    print(f"accuracy on {len(digits.held_out_images)} held-out images: {share:.2%}")
    save_atomically(model, options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
