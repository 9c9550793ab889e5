"""Which inputs are tried: what each level draws for images, texts, masks, several inputs; and that it is repeated."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reparam.equivalence import verify
from reparam.equivalence.cases import Case, plan
from reparam.inputs import Inputs


def cases(inputs: Inputs, level: str = "thorough", seed: int = 0) -> dict[str, Case]:
    return {case.name: case for slot in plan(inputs, level, seed) for case in slot}


IMAGE = Inputs((torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(0)),))
TEXT = Inputs((torch.tensor([[3, 9, 4], [4, 4, 3]]), torch.tensor([[True, True, False], [True, False, False]])))


def only(case: Case) -> torch.Tensor:
    (tensor,) = case.inputs.tensors()
    return tensor


def test_standard_names() -> None:
    assert list(cases(IMAGE, "standard")) == [
        "example", "random normal, other image size", "random normal, other batch size", "random normal",
        "borders and impulse", "zeros", "ones",
    ]  # fmt: skip


def test_thorough_has_every_kind_of_content() -> None:
    found = cases(IMAGE)
    assert {
        "random normal 0", "uniform", "borders and impulse", "impulses at the border", "constants", "zeros", "ones",
        "random normal times 100", "random normal times 0.01", "random normal, batch of 1", "random normal, batch of 5",
        "random normal, other image size 0", "random normal, other image size 1 and batch",
    } <= set(found)  # fmt: skip
    sizes = {tuple(only(case).shape[2:]) for case in found.values()}
    assert any(height % 2 and width % 2 for height, width in sizes)
    assert any(height != width for height, width in sizes)
    assert 30 < float(only(found["random normal times 100"]).std()) < 300
    assert 0.003 < float(only(found["random normal times 0.01"]).std()) < 0.03
    uniform = only(found["uniform"])
    assert float(uniform.min()) >= float(only(found["example"]).min())
    assert float(uniform.max()) <= float(only(found["example"]).max())


def border(image: torch.Tensor) -> torch.Tensor:
    """A mask of the border of [N, C, H, W]."""
    mask = torch.ones_like(image, dtype=torch.bool)
    mask[:, :, 1:-1, 1:-1] = False
    return mask


def test_impulses_lie_at_the_border_one_for_each_channel() -> None:
    image = only(cases(IMAGE)["impulses at the border"])
    assert torch.equal((image != 0).sum((2, 3)), torch.ones(2, 3, dtype=torch.int64))
    assert not bool((image[~border(image)] != 0).any())


def test_constants_fill_a_channel_and_borders_are_constant() -> None:
    image = only(cases(IMAGE)["constants"])
    assert torch.equal(image, image[:, :, :1, :1].expand_as(image))
    assert len(image[:, :, 0, 0].unique()) == 6
    image = only(cases(IMAGE)["borders and impulse"])
    for plane in image.flatten(0, 1):
        assert len(plane[border(image)[0, 0]].unique()) == 1
        assert int((plane[1:-1, 1:-1] != 0).sum()) == 1


@pytest.mark.parametrize("level", ["standard", "thorough"])
def test_integers_are_the_example_s_and_masks_stay_as_many(level: str) -> None:
    for name, case in cases(TEXT, level).items():
        ids, mask = case.inputs.tensors()
        assert set(ids.flatten().tolist()) <= {3, 4, 9}, name
        assert mask.dtype == torch.bool
        assert ids.shape == mask.shape
    if level == "thorough":
        shuffled = list(cases(TEXT)["booleans in another order"].inputs.tensors())
        assert torch.equal(shuffled[0], TEXT.args[0])
        assert int(shuffled[1].sum()) == 3
        assert not torch.equal(shuffled[1], TEXT.args[1])


def test_several_inputs_share_batch_and_size() -> None:
    four = (torch.randn(2, 3, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor(0.5), torch.randn(2, 4))
    pair = Inputs(four, {"flag": True})
    for name, case in cases(pair).items():
        a, b, scalar, vector = case.inputs.tensors()
        assert vector.shape == (a.shape[0], 4)
        assert (a.shape[0], a.shape[2:]) == (b.shape[0], b.shape[2:]), name
        assert float(scalar) == 0.5
        assert case.inputs.kwargs == {"flag": True}


@pytest.mark.parametrize("inputs", [IMAGE, TEXT], ids=["image", "text"])
def test_the_seed_decides(inputs: Inputs) -> None:
    first, again, other = (cases(inputs, seed=seed) for seed in (5, 5, 6))
    for name, case in first.items():
        pairs = list(zip(case.inputs.tensors(), again[name].inputs.tensors(), strict=True))
        assert all(torch.equal(a, b) for a, b in pairs), name
        assert case.seed == again[name].seed
    moved = [name for name, case in first.items() if name.startswith("random")]
    assert moved
    for name in moved:
        assert not torch.equal(next(first[name].inputs.tensors()), next(other[name].inputs.tensors())) or inputs is TEXT


class FixedShapes(nn.Module):
    """As an archive of torch.export is unless its axes were left open; `shift` moves every answer but the example's."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, padding=1)
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape != (2, 3, 12, 10):
            raise ValueError(f"made for 2x3x12x10 and not for {tuple(x.shape)}")
        return self.layer(x) + (0.0 if torch.equal(x.float(), IMAGE.args[0]) else self.shift)


@pytest.mark.parametrize(("shift", "status"), [(0.0, "passed"), (0.1, "failed")])
def test_a_model_of_fixed_shapes_is_tried_on_other_values_in_its_own_shapes(shift: float, status: str) -> None:
    torch.manual_seed(0)
    original, candidate = FixedShapes().eval(), FixedShapes(shift).eval()
    candidate.load_state_dict(original.state_dict())
    comparison = verify(original, candidate, *IMAGE.args)
    found = {case.name: (case.status, case.shapes) for case in comparison.cases}
    own = ((2, 3, 12, 10),)
    assert found["example"] == ("passed", own)
    assert found["random normal, other batch size"][0] == "skipped"
    assert found["random normal"] == (status, own)
    assert comparison.passed == (shift == 0.0)
