"""Writes `docs/modules.md`: modules of deep-learning notes, what of each is foldable, and what `reparam` prints for it.

    python tools/document_modules.py [--check]

The models are those of `tests/zoo/notes.py`; what is printed comes from fusing them. `--check` writes nothing, and ends
with status 1 if the page is not what would be written.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

from tests.zoo import branches, concats, dropouts, notes  # noqa: E402
from tests.zoo.case import BlockCase  # noqa: E402
from tools.record import write  # noqa: E402

PAGE = ROOT / "docs" / "modules.md"
WIDTH = 112


@dataclass(frozen=True)
class Section:
    """One module: its heading, its formula, what goes and what stays, the models that show it, and refused ones."""

    title: str
    formula: str
    text: str
    cases: tuple[str, ...]
    refused: tuple[str, ...] = ()


HEAD = """# The modules of deep-learning notes

What every collection of notes on convolutional networks explains, seen by a tool that merges what is affine. For each
module: its formula at inference, what of it is foldable and what is not, and what `reparam` prints. Every model here
is built from its formula in `tests/zoo`, mostly in `notes.py`; `python tools/document_modules.py` writes the page.

Two formulas stand wrong in many notes. **The identity branch as a 3x3 kernel** is 1 at the centre of its *own*
channel and 0 at all other places (`K[o, i, 1, 1] = 1` if `o = i`), not a kernel of nine ones; with groups, `i` counts
within the group. And **BatchNorm divides by `sqrt(var + eps)`**, not by `sqrt(var) + eps` or `var + eps`:

    BN(y) = g * (y - mean) / sqrt(var + eps) + b = s * y + t,   s = g / sqrt(var + eps),  t = b - s * mean
    BN(W x + c) = (s W) x + (s c + t)
"""

SECTIONS = (
    Section(
        "1x1 convolution, network in network",
        "`relu(BN(W x)) -> BN(V y)`, W and V of one pixel",
        "Each BatchNorm goes into the convolution in front of it. The two convolutions stay two: there is a ReLU "
        "between them.",
        ("network_in_network",),
    ),
    Section(
        "RepVGG",
        "`relu(BN(3x3 x) + BN(1x1 x) + BN(x))`",
        "All three branches are convolutions with a 3x3 kernel: the 1x1 stands at its centre, the identity is a 1 "
        "at the centre of its own channel. Their sum is one convolution.",
        ("repvgg2d_6_6_k3_s1_g1",),
    ),
    Section(
        "CBAM",
        "`y = x * sigmoid(mlp(mean x) + mlp(max x))`, then `y * sigmoid(BN(7x7 [mean y, max y]))`",
        "The BatchNorms behind convolutions go. The two products are of two tensors that both depend on the "
        "input: no affine map. The mean is affine and the maximum is not, so their perceptrons cannot be merged.",
        ("cbam",),
    ),
    Section(
        "Non-local block",
        "`x + BN(W softmax(theta(x)^T phi(x)) g(x))`",
        "BN goes into W. theta, phi and g read one input and could be one layer of three times the width; whether "
        "that pays is measured, and here it does not. The softmax ends everything else.",
        ("non_local",),
    ),
    Section(
        "Compact generalised non-local block (CGNL)",
        "`x + BN(W (theta * sum(phi * g) / sqrt(d)))`, in groups of channels",
        "The trilinear form without a softmax is still a product of three things that depend on the input. BN "
        "goes into the grouped W, which stays grouped.",
        ("cgnl_g2",),
    ),
    Section(
        "Cross-layer non-local block",
        "query from a deep layer, keys and values from an earlier one, each through 1x1 and BN",
        "Every BatchNorm goes into its 1x1. The query's and the deep layer's convolutions have a ReLU between them.",
        ("cross_layer",),
    ),
    Section(
        "Fusion by addition and by concatenation",
        "`BN(1x1 relu(a(x) + b(x)))` and `BN(1x1 [relu(a(x)), relu(b(x))])`",
        "`a` and `b` read different tensors here (`b` reads `relu(x)`), so each keeps a convolution; their "
        "BatchNorms go.",
        ("fusion_add", "fusion_cat"),
    ),
    Section(
        "DenseNet-BC",
        "each layer `3x3 relu(BN2(1x1 relu(BN1([x_0, x_1, ...]))))`, its output appended to what the next one reads",
        "BN1 stands behind a concatenation and in front of a ReLU, which is not linear, and other layers read the same "
        "tensors through BatchNorms of their own: it stays. BN2 goes into the 1x1 convolution.",
        ("dense_layers",),
    ),
    Section(
        "Dropout, inverted and classical; spatial dropout",
        "inverted: `x`; classical: `(1 - p) x`; spatial dropout: `x`",
        "At inference the inverted form does nothing. The classical form keeps its factor, which is a constant "
        "scale and goes into the convolution with the BatchNorm behind it. [inference.md](inference.md) has the "
        "rest of the family.",
        ("dropout_inverted", "dropout_classical", "dropout_spatial"),
    ),
    Section(
        "Cutout and DropBlock",
        "`x`",
        "At inference both do nothing, and leave nothing behind. Now and then their author forgot to ask whether the "
        "model trains. What they then give is random, and the model is refused, with the line and with the word that "
        "lifts it: `--inference-form Forgotten=identity`.",
        ("dropout_cutout", "drop_drop_block"),
        ("blocks",),
    ),
    Section(
        "DropConnect",
        "`(q W) x`, q the share of weights that were kept in training; inverted: `W x`",
        "q W is an expression of parameters only: it is computed once, in float64, and the BatchNorm behind goes into "
        "it, too.",
        ("drop_connect_classical",),
    ),
    Section(
        "Stochastic depth",
        "`relu(x + p f(x))`, p the probability that the branch survived training; inverted (drop path): "
        "`relu(x + f(x))`",
        "p is a constant scale at the end of the branch: it goes into its last convolution. The inverted form does "
        "nothing at inference.",
        ("survival_probability", "stochastic_depth_drop_path"),
    ),
    Section(
        "ResNet v1 and the four other orders",
        "`relu(x + BN(3x3 relu(BN(3x3 x))))` and where else the last BN and ReLU can stand",
        "Behind a convolution a BatchNorm goes. In front of a ReLU, with no convolution before it, it stays (pre- "
        "activation): the ReLU is not linear. Behind the addition it could be moved into both summands; the one "
        "without a convolution would need a scale of its own, so nothing would be saved.",
        tuple(f"residual_{order}" for order in notes.ORDERS),
    ),
    Section(
        "LayerNorm, InstanceNorm, GroupNorm",
        "`(y - mean(y)) / sqrt(var(y) + eps)`, statistics of the input itself",
        "They divide by what depends on the input, so they are not affine and stay. What is behind them, a "
        "BatchNorm behind the next convolution, goes.",
        ("normalised_layer", "normalised_instance", "normalised_group"),
    ),
    Section(
        "Softmax with a temperature",
        "`softmax(W x / T)`",
        "`1/T` goes into W and its bias.",
        ("temperature_divided",),
    ),
)


def models() -> dict[str, BlockCase]:
    """The models by name."""
    rooms = (notes, branches, concats, dropouts)
    return {case.name: case for room in rooms for case in room.CASES}


def printed(case: BlockCase) -> str:
    """What the command prints for a model, without figures that differ from machine to machine."""
    import reparam
    from reparam.report.text import render_text

    result = reparam.fuse(case.make(torch.float32), case.inputs(torch.float32), verify=False)
    with io.StringIO() as text:
        render_text(result.report, Console(file=text, width=WIDTH, highlight=False, color_system=None))
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(lines).strip()


def refusal(kind: str) -> str:
    """What the command says of a model that it refuses."""
    import reparam

    try:
        reparam.fuse(notes.forgotten(kind).eval(), torch.zeros(2, 4, 8, 9), verify=False)
    except reparam.CaptureError as error:
        lines = textwrap.wrap(f"reparam: error: {error}", WIDTH, break_long_words=False, break_on_hyphens=False)
        return "\n".join(lines)
    raise AssertionError(f"{kind} was not refused")


def page() -> str:
    """The whole page."""
    known = models()
    parts = [HEAD]
    for section in SECTIONS:
        parts.append(f"\n## {section.title}\n\n{section.formula}\n\n{section.text}\n")
        for name in section.cases:
            parts.append(f"\n`{name}`:\n\n```\n{printed(known[name])}\n```\n")
        for kind in section.refused:
            parts.append(f"\n`forgotten({kind!r})`:\n\n```\n{refusal(kind)}\n```\n")
    return "".join(parts)


def main() -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description="Write docs/modules.md.")
    parser.add_argument("--check", action="store_true", help="only tell whether the page is what would be written")
    options = parser.parse_args()
    text = page()
    if options.check:
        return 0 if PAGE.exists() and PAGE.read_text() == text else 1
    write(PAGE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
