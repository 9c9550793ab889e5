"""What `fuse` says at once: no forward, options that are none, forwards that write to what is not theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reparam import CaptureError, InputError, OtherInputError, fuse
from tests.capture.test_odd_forwards import Forward, Odd, call, clamped_weight, constrained_weight, image, odd
from tests.support import EXACT, relative_error

torch.set_num_threads(1)
WAYS = ("auto", "symbolic", "export", "modules")
INDICES = torch.arange(5)[None]

NO_FORWARD: list[Callable[[], nn.Module]] = [
    nn.Module,
    lambda: nn.ModuleList([nn.Conv2d(4, 4, 1)]),
    lambda: nn.ModuleDict({"a": nn.Conv2d(4, 4, 1)}),
    lambda: nn.ParameterList([nn.Parameter(torch.ones(1))]),
    lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(1))}),
]


@pytest.mark.parametrize("make", NO_FORWARD)
def test_a_module_without_forward(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(InputError, match="has no forward; pass the module that calls what is in it"):
        fuse(make(), image())


def test_a_forward_of_the_instance_is_one() -> None:
    model: Any = nn.Module()
    model.conv = nn.Conv2d(4, 4, 1).double()
    model.forward = model.conv.forward
    result = fuse(model, image())
    assert relative_error(model(image(2)), result.module(image(2))) < EXACT


@pytest.mark.parametrize("value", ["no", 0, 1, None, (8, 8)])
def test_fixed_sizes_is_true_or_false(value: Any) -> None:
    with pytest.raises(InputError, match=r"fixed_sizes=.* is neither True nor False"):
        fuse(nn.ReLU(), image(), fixed_sizes=value)


def trained_a_little(s, x):
    with torch.no_grad():
        for parameter in s.b.parameters():
            parameter.add_(x.mean() * 0)
    return s.a(x)


# An embedding with a largest norm writes to its weight, which is the caller's own.


class Table(nn.Module):
    """A weight, and a function that looks it up."""

    def __init__(self, look_up: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.look_up = nn.Parameter(torch.randn(5, 4) * 3), look_up

    def forward(self, i: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.look_up(i, self.weight))


RENORMALISED: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=0.5), nn.ReLU()),
    "bag": lambda: nn.Sequential(nn.EmbeddingBag(5, 4, max_norm=0.5), nn.ReLU()),
    "function": lambda: Table(lambda i, w: F.embedding(i, w, max_norm=0.5)),
    "by_position": lambda: Table(lambda i, w: F.embedding(i, w, None, 0.5)),
    "all_by_name": lambda: Table(lambda i, w: F.embedding(input=i, weight=w, max_norm=0.5)),
    "norm_zero": lambda: Table(lambda i, w: F.embedding(i, w, max_norm=0.0)),
    "a_view": lambda: Table(lambda i, w: F.embedding(i.clamp(max=1), w[:2], max_norm=0.5)),
    "function_of_bags": lambda: Table(lambda i, w: F.embedding_bag(i, w, max_norm=0.5)),
    "bags_by_position": lambda: Table(lambda i, w: F.embedding_bag(i, w, None, 0.5)),
    "the_operator": lambda: Table(lambda i, w: F.embedding(i, torch.embedding_renorm_(w.detach(), i, 0.5, 2.0))),
}


@pytest.mark.parametrize("capture", WAYS)
@pytest.mark.parametrize("name", RENORMALISED)
def test_embeddings_that_write_to_their_weight_are_refused(name: str, capture: str) -> None:
    _refused_and_unchanged(RENORMALISED[name]().eval(), INDICES, capture, "writes to (the|a) parameter")


@pytest.mark.parametrize("capture", WAYS)
@pytest.mark.parametrize("forward", [clamped_weight, constrained_weight, trained_a_little], ids=lambda f: f.__name__)
def test_whatever_the_way_no_parameter_is_written_to(forward: Forward, capture: str) -> None:
    _refused_and_unchanged(odd(forward), image(), capture, "writes to|assigns|assignment")


def _refused_and_unchanged(model: nn.Module, x: torch.Tensor, capture: str, phrase: str) -> None:
    before = {key: (value.clone(), value.data_ptr()) for key, value in model.state_dict().items()}
    with pytest.raises(CaptureError, match=phrase):
        fuse(model, x, capture=capture, verify=False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key][0])
        assert value.data_ptr() == before[key][1]


def test_an_embedding_without_a_largest_norm_is_looked_up() -> None:
    model = Table(lambda i, w: F.embedding(i, w, None, None)).eval()
    assert torch.equal(fuse(model, INDICES).module(INDICES), model(INDICES))


# A forward that writes to the tensors it is given.


def scaled(s, x):
    x.mul_(2)
    return s.a(x)


def added(s, x):
    x += 1
    return s.a(x) + x


def item_set(s, x):
    x[:, 0] = 0
    return s.a(x)


def through_a_view(s, x):
    x[:, 1:3].relu_()
    return s.a(x)


def by_an_option(s, x):
    return s.a(F.relu(x, inplace=True))


def data_written(s, x):
    x.detach().clamp_(min=0)
    return s.a(x)


def in_a_dict(s, d):
    d["x"].mul_(2)
    return s.a(d["x"])


WRITES: list[tuple[Forward, Callable[[int], Any], str]] = [
    *((f, image, "x") for f in (scaled, added, item_set, through_a_view, by_an_option, data_written)),
    (in_a_dict, lambda batch: {"x": image(batch)}, "d"),
]


@pytest.mark.parametrize("capture", ["auto", "export"])
@pytest.mark.parametrize(("forward", "make", "name"), WRITES, ids=[f.__name__ for f, _, _ in WRITES])
def test_a_write_to_an_argument_is_noted(forward: Forward, make: Callable[[int], Any], name: str, capture: str) -> None:
    original = odd(forward)
    result = fuse(odd(forward), (make(1),), verify=False, capture=capture)
    assert any(f"writes to its argument {name}, " in note for note in result.report.notes), result.report.notes
    expected = call(original, (make(2),))
    try:
        assert relative_error(expected, call(result.module, (make(2),))) < EXACT
    except OtherInputError:
        assert result.report.capture == "export"


def test_what_the_caller_passes_to_fuse_is_not_written_to() -> None:
    x = image()
    fuse(odd(scaled), x)
    assert torch.equal(x, image())


def test_no_note_where_only_own_tensors_are_written() -> None:
    def own(s: Any, x: torch.Tensor) -> Any:
        y = s.a(x)
        y.relu_()
        return s.b(y + x.clone().mul_(2))

    assert not any("writes to" in note for note in fuse(odd(own), image(), verify=False).report.notes)


class Outer(Odd):
    """Reads what its child has written to; decides by a value, so that it is fused in parts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(lambda s, x: s.b(s.inner(x) + x) if x.mean() < 9 else x)
        self.inner = inner


def test_a_part_that_writes_to_its_argument_is_left_alone() -> None:
    model = Outer(odd(scaled)).double().eval()
    result = fuse(model, image(), verify=False)
    assert result.report.capture == "partial"
    for batch in (1, 2):
        assert relative_error(call(model, (image(batch),)), call(result.module, (image(batch),))) < EXACT
    assert any("writes to its arguments" in refusal.reason for refusal in result.report.refusals) or any(
        "writes to its arguments" in note for note in result.report.notes
    )


# A generator that is seeded anew in every call gives the same numbers in every call; no graph holds it.


def seeds_a_new_one(s, x):
    generator = torch.Generator().manual_seed(0)
    return s.a(x) + torch.randn(4, 1, 1, generator=generator, dtype=torch.float64)


def seeds_its_own(s, x):
    s.generator.manual_seed(0)
    return s.a(x) + torch.randn(x.shape, generator=s.generator, dtype=torch.float64)


def seeds_and_fills(s, x):
    s.generator.manual_seed(0)
    return s.a(x) + torch.empty(4, 1, 1, dtype=torch.float64).normal_(generator=s.generator)


def seeds_and_permutes(s, x):
    s.generator.manual_seed(0)
    return s.a(x)[:, torch.randperm(4, generator=s.generator)]


def seeds_that_of_torch(s, x):
    torch.manual_seed(0)
    return s.a(x) + torch.randn(4, 1, 1, dtype=torch.float64)


SEEDED: list[Forward] = [seeds_a_new_one, seeds_its_own, seeds_and_fills, seeds_and_permutes, seeds_that_of_torch]


@pytest.mark.parametrize("capture", WAYS)
@pytest.mark.parametrize("forward", SEEDED, ids=lambda f: f.__name__)
def test_a_generator_that_is_seeded_in_every_call_is_refused(forward: Forward, capture: str) -> None:
    model: Any = odd(forward)
    model.generator = torch.Generator()
    before = torch.get_rng_state()
    with pytest.raises(CaptureError, match=r"draws random numbers in eval mode.* in Odd"):
        fuse(model, image(), capture=capture, verify=False)
    assert torch.equal(torch.get_rng_state(), before)
