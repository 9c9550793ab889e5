"""Nine faults of a rewrite in six real models: is each found, is the rewrite named, is it undone?

    python tools/sabotage.py                 # all 54; writes tools/results/sabotage.md
    python tools/sabotage.py --only lcnet    # the models whose name contains that; prints the rows

Each fault is put into one rewrite while the engine writes it (tools/faults.py). First the faulty model is made without
verification and handed to `reparam.verify`, which must find it at its default level; then the model is fused with the
same fault as a user would, and the report must name exactly that rewrite, the model must be right without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import reparam
from tools.faults import FAULTS, once, rewrites_sabotaged
from tools.record import ROOT, engine_revision, write
from tools.timm_zoo import create_small

MODELS = {
    "resnet10t": "convolutions and BatchNorms",
    "repvgg_a0": "parallel branches",
    "lcnet_035": "depthwise convolutions",
    "mobilevit_xxs": "transformer blocks",
    "nf_resnet26": "weight standardisation",
    "ese_vovnet19b_slim": "concatenations",
}
START = 3
"""The first rewrite that may be made wrong."""
RESULT = ROOT / "tools/results/sabotage.md"


class Both(nn.Module):
    """A timm model that returns its feature map, too: an output that can be dropped."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.forward_features(x)
        return features, self.model.forward_head(features)


@dataclass(frozen=True)
class Outcome:
    """What came of one fault in one model.

    Attributes:
        place: where it was put; empty if it exists for no rewrite of the model.
        found: whether verification says no to the faulty model.
        named: whether exactly that rewrite is reported as undone.
        right: whether the model without it passes, and does so on inputs of its own.
    """

    place: str
    found: bool = False
    named: bool = False
    right: bool = False

    def __str__(self) -> str:
        if not self.place:
            return "-"
        parts = (("found", self.found), ("named", self.named), ("undone", self.right))
        wrong = [f"**not {word}**" for word, good in parts if not good]
        return ", ".join(wrong) if wrong else "yes"


def model_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The model, and one image."""
    model, x = create_small(name, seed=0, lively=True)
    return Both(model).eval(), x[:1]


def outcome(model: nn.Module, x: torch.Tensor, fault: str) -> Outcome:
    """Puts one fault into one rewrite."""
    with rewrites_sabotaged(once([FAULTS[fault]], START)) as injected:
        broken = reparam.fuse(model, x, verify="off").module
    if not injected.places:
        return Outcome("")
    found = not reparam.verify(model, broken, x).passed
    with rewrites_sabotaged(once([FAULTS[fault]], START)) as injected:
        result = reparam.fuse(model, x)
    named = [one.rewrite.place.module for one in result.report.undone]
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    right = reparam.verify(model, result.module, other, level="quick").passed
    return Outcome(injected.places[0], found, named == injected.places, right)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", default="", help="models whose name contains this")
    only = parser.parse_args(arguments).only
    torch.set_num_threads(1)
    rows, good, start = [], True, time.monotonic()
    for name in (name for name in MODELS if only in name):
        model, x = model_of(name)
        outcomes = [outcome(model, x, fault) for fault in FAULTS]
        good &= all(str(one) in ("yes", "-") for one in outcomes)
        rows.append(f"| {name} | {MODELS[name]} | {' | '.join(map(str, outcomes))} |")
        print(rows[-1], flush=True)
    if not only:
        write(RESULT, _page(rows, time.monotonic() - start))
    return 0 if good else 1


def _page(rows: list[str], seconds: float) -> str:
    head = f"| model | what it has | {' | '.join(FAULTS)} |\n|---|---|{'--|' * len(FAULTS)}"
    return (
        "# Sabotage\n\nA fault is put into one rewrite of a real model while the engine writes it. `yes`: "
        "`reparam.verify` finds the faulty model at its default level, `reparam.fuse` names exactly that rewrite and "
        "undoes it, and the model is right without it. `-`: the model has no rewrite that can have the fault.\n\n"
        + head
        + "\n"
        + "\n".join(rows)
        + "\n\none weight: the largest of a layer times 1.001. two channels: swapped. no bias: dropped. border: padded "
        "by repeating instead of zeros. eps: a hundred times the BatchNorm's. constant: all weights 0. no output: the "
        "first of two is lost.\n\n"
        f"Written by `python tools/sabotage.py` in {seconds / 60:.0f} minutes with torch {torch.__version__} at "
        f"{engine_revision()}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
