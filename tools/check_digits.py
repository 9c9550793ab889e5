"""Holds the fused digits network against the trained one, image by image: python tools/check_digits.py FOLDER.

FOLDER is where `reparam fuse examples/digits.safetensors --out FOLDER/` wrote `digits.fused.pt2` and
`digits.fused.onnx`. Exit status 1 when any held-out image gets another top-1 answer than before.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnxruntime
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import reparam  # noqa: E402
from examples.digits import accuracy, load_digits  # noqa: E402

WEIGHTS = ROOT / "examples" / "digits.safetensors"


def logits_of_archive(path: Path, images: torch.Tensor) -> torch.Tensor:
    """What the `torch.export` archive answers; it needs none of the network's classes."""
    module = torch.export.load(path).module()
    logits: torch.Tensor = module(images)
    return logits


def logits_of_onnx(path: Path, images: torch.Tensor) -> torch.Tensor:
    """What onnxruntime answers for the ONNX file."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


def check(folder: Path) -> bool:
    """Prints one line per file and returns whether every answer is the original's."""
    digits = load_digits()
    images, labels = digits.held_out_images, digits.held_out_labels
    with torch.no_grad():
        before = reparam.load(WEIGHTS, arch="examples.digits:build").eval()(images)
        after = {
            "digits.fused.pt2": logits_of_archive(folder / "digits.fused.pt2", images),
            "digits.fused.onnx": logits_of_onnx(folder / "digits.fused.onnx", images),
        }
    print(f"{'':20} {'accuracy':>9}   same top-1 answer as the original")
    print(f"{'original':20} {accuracy(before, labels):9.2%}")
    good = True
    for name, logits in after.items():
        if logits.shape != before.shape:
            print(f"{name:20} answers with shape {tuple(logits.shape)}, not {tuple(before.shape)}")
            good = False
            continue
        same = int((logits.argmax(1) == before.argmax(1)).sum())
        largest = (logits - before).abs().max().item()
        share = accuracy(logits, labels)
        print(f"{name:20} {share:9.2%}   {same} of {len(labels)} (largest difference of a logit: {largest:.1e})")
        good = good and same == len(labels)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    missing = [name for name in ("digits.fused.pt2", "digits.fused.onnx") if not (folder / name).is_file()]
    if missing:
        print(f"{folder} has no {' and no '.join(missing)}: run bash tools/demo.sh, which makes both.", file=sys.stderr)
        sys.exit(2)
    if not check(folder):
        print("NOT the same: the fused network answers differently.", file=sys.stderr)
        sys.exit(1)
    print("Every held-out image gets the answer it got before.")


if __name__ == "__main__":
    main()
