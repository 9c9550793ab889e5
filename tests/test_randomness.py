"""Models that draw random numbers in eval mode: found, named with the line, refused. And what only looks like it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch import pow as pow_by_name
from torch import rand as rand_by_name

import reparam
from reparam import CaptureError, InputError, fuse, verify
from reparam.capture.draws import find_draws
from reparam.chance import Draw, Generators, refusal
from reparam.inputs import Inputs
from tests.support import assert_unchanged, relative_error, run, snapshot, static_counts
from tests.zoo.case import bn, conv_bn, randomise
from tests.zoo.trap import Lambda

torch.set_num_threads(1)

HERE = Path(__file__).name
GENERATOR = numpy.random.default_rng(0)


class Culprit(Lambda):
    """Stands between two layers of the models here."""


def image() -> torch.Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def model_with(culprit: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(conv_bn(2, 4, 4, 3), culprit, conv_bn(2, 4, 4, 3), nn.ReLU())
        return randomise(model).eval()


class DropBlockAlways(nn.Module):
    """DropBlock whose author forgot to ask whether it trains."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seeds = (torch.rand(x.shape[0], 1, *x.shape[2:], device=x.device) < 0.1).to(x.dtype)
        mask = 1 - F.max_pool2d(seeds, 3, 1, 1)
        return x * mask * mask.numel() / mask.sum()


class CutoutAlways(nn.Module):
    """Cutout, the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(x)
        row = random.randrange(x.shape[2] - 2)
        mask[:, :, row : row + 2] = 0
        return x * mask


class LayerSkipped(nn.Module):
    """Stochastic depth by a decision, the same."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.rand(1) < 0.5:
            return x
        return x * 2


class StaysInTrainMode(nn.Module):
    """Monte-Carlo dropout by way of a module that `eval()` does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def train(self, mode: bool = True) -> StaysInTrainMode:
        return super().train(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(x)


class Kept:
    """Something that is no generator and has one."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def random(self) -> float:
        return float(self.generator.random())


class OwnGenerator(nn.Module):
    """Draws from a generator that it keeps."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(self.generator, torch.Generator):
            return x * torch.rand(x.shape, generator=self.generator)
        if isinstance(self.generator, list):
            return x * float(self.generator[0].random())
        return x * float(self.generator.random())


class GlobalGenerator(nn.Module):
    """Draws from a generator of its file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float(GENERATOR.random())


def of(function: Callable[..., Any], **layers: Any) -> Callable[[], nn.Module]:
    return partial(Culprit, function, **layers)


# name -> (module, what the sentence says was called); an empty text where it depends on the way of capture
RANDOM: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "noise": (of(lambda m, x: x + 0.1 * torch.randn_like(x)), "randn_like"),
    "noise_of_shape": (of(lambda m, x: x + torch.randn(x.shape)), "randn"),
    "noise_of_fixed_shape": (of(lambda m, x: x * torch.rand(4, 1, 1)), "rand"),
    "randint": (of(lambda m, x: x * torch.randint(0, 2, (4, 1, 1))), "randint"),
    "randperm": (of(lambda m, x: x[:, torch.randperm(4)]), "randperm"),
    "normal": (of(lambda m, x: torch.normal(x, 0.1)), "normal"),
    "poisson": (of(lambda m, x: torch.poisson(x.abs())), "poisson"),
    "bernoulli": (of(lambda m, x: x * torch.bernoulli(torch.full_like(x, 0.5))), "bernoulli"),
    "bernoulli_": (of(lambda m, x: x * x.new_empty(x.shape).bernoulli_(0.5)), "bernoulli"),
    "bernoulli_of_a_weight": (of(lambda m, x: x * torch.bernoulli(m.p), p=torch.full((4, 1, 1), 0.5)), "bernoulli"),
    "multinomial": (of(lambda m, x: x * torch.multinomial(x[:, 0, 0].softmax(-1), 1)[..., None, None]), "multinomial"),
    **{
        name: (of(lambda m, x, name=name, a=a: x + 0.1 * getattr(torch.empty_like(x), name)(*a)), name.rstrip("_"))
        for name, a in {
            "normal_": (0, 1),
            "uniform_": (),
            "exponential_": (),
            "cauchy_": (),
            "geometric_": (0.5,),
            "log_normal_": (),
            "random_": (0, 2),
        }.items()
    },
    "rrelu": (of(lambda m, x: F.rrelu(x, training=True)), "rrelu"),
    "gumbel_softmax": (of(lambda m, x: F.gumbel_softmax(x, dim=1)), ""),
    "attention": (of(lambda m, x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)), "attention"),
    "fractional_pool": (lambda: nn.FractionalMaxPool2d(2, output_size=4), ""),
    "distribution": (of(lambda m, x: x + torch.distributions.Normal(torch.zeros(()), 1.0).sample()), ""),
    "native_dropout": (of(lambda m, x: torch.native_dropout(x, 0.3, True)[0]), "native_dropout"),
    "drop_block_always": (DropBlockAlways, "rand"),
    "cutout_always": (CutoutAlways, "random"),
    "layer_skipped": (LayerSkipped, "rand"),
    "python": (of(lambda m, x: x * random.random()), "random"),
    "python_decides": (of(lambda m, x: x if random.random() < 0.5 else 2 * x), "random"),
    "numpy": (of(lambda m, x: x * float(numpy.random.rand())), "numpy.random"),
    "numpy_as_tensor": (of(lambda m, x: x * torch.from_numpy(numpy.random.rand(4, 1, 1)).float()), "numpy.random"),
    "global_generator": (GlobalGenerator, "GENERATOR"),
    "own_generator_of_torch": (lambda: OwnGenerator(torch.Generator().manual_seed(0)), "rand"),
    "own_generator_of_numpy": (lambda: OwnGenerator(numpy.random.default_rng(0)), "1.generator"),
    "own_generators_in_a_list": (lambda: OwnGenerator([numpy.random.default_rng(0)]), "1.generator"),
    "own_generator_in_an_object": (lambda: OwnGenerator(Kept(numpy.random.default_rng(0))), ""),
    "own_generator_of_python": (lambda: OwnGenerator(random.Random(0)), "1.generator"),
    "rare": (of(lambda m, x: 2 * x if random.random() < 1e-9 else x), "random"),
}
WAYS = ("auto", "symbolic", "export", "modules")


def refused(model: nn.Module, **options: Any) -> str:
    with pytest.raises(CaptureError) as caught:
        fuse(model, image(), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", RANDOM)
def test_is_refused_with_its_place(name: str) -> None:
    build, what = RANDOM[name]
    model, state = model_with(build()), torch.get_rng_state()
    before, python, of_numpy = snapshot(model), random.getstate(), numpy.random.get_state()[1].tolist()
    sentence = refused(model, verify=False)
    assert_unchanged(before, model)
    assert torch.equal(state, torch.get_rng_state())
    assert python == random.getstate()
    assert of_numpy == numpy.random.get_state()[1].tolist()
    if name == "own_generator_in_an_object":  # found by its answers alone
        assert "answers the same input otherwise" in sentence
        return
    assert what in sentence
    assert re.search(rf"in \w+ 1 \({HERE}:\d+\)", sentence) or (name == "fractional_pool" and "1" in sentence)
    assert f"inference_form={{{type(model[1]).__name__!r}: 'identity'}}" in sentence


@pytest.mark.parametrize("way", ["export", "modules"])
@pytest.mark.parametrize("name", ["noise", "bernoulli_", "attention", "cutout_always", "layer_skipped", "numpy"])
def test_is_refused_however_it_is_captured(name: str, way: str) -> None:
    build, what = RANDOM[name]
    sentence = refused(model_with(build()), capture=way, verify=False)
    assert what in sentence or (name, way) == ("attention", "modules")  # called there is what it is made of
    assert HERE in sentence or "trap.py" in sentence  # torch.export keeps the lines of `forward` only


@pytest.mark.parametrize("name", RANDOM)
def test_identity_resolves_it(name: str) -> None:
    if name == "fractional_pool":
        pytest.skip("it changes the size")
    model = model_with(RANDOM[name][0]())
    result = fuse(model, image(), inference_form={"1": "identity"}, verify="quick")
    assert static_counts(result.module)["bn"] == 0
    assert result.report.comparison.passed
    assert relative_error(run(nn.Sequential(model[0], *model[2:]), image()), run(result.module, image())) < 1e-5


LINE = {
    "noise": "x + 0.1 * torch.randn_like(x)",
    "cutout_always": "row = random.randrange",
    "layer_skipped": "if torch.rand(1)",
    "numpy": "x * float(numpy.random.rand())",
}


@pytest.mark.parametrize("name", LINE)
def test_the_line_is_the_right_one(name: str) -> None:
    number = int(re.search(rf"{HERE}:(\d+)", refused(model_with(RANDOM[name][0]())))[1])  # type: ignore[index]
    assert LINE[name] in Path(__file__).read_text().splitlines()[number - 1]


DROPPING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "function": (of(lambda m, x: F.dropout(x, 0.5, training=True)), "as Monte-Carlo dropout does (training=True)"),
    "default": (of(lambda m, x: F.dropout(x, 0.5)), "as Monte-Carlo dropout does (training=True)"),
    "alpha": (of(lambda m, x: F.alpha_dropout(x, 0.5, True)), "as Monte-Carlo dropout does (training=True)"),
    "module": (StaysInTrainMode, "keeps dropout in train mode"),
}


@pytest.mark.parametrize("way", ["auto", "export"])
@pytest.mark.parametrize("name", DROPPING)
def test_monte_carlo_dropout_has_a_sentence_of_its_own(name: str, way: str) -> None:
    build, words = DROPPING[name]
    sentence = refused(model_with(build()), capture=way)
    assert words in sentence
    assert "its answers are samples, which no fixed model gives" in sentence


# Numbers that nobody reads, and what is called like dropout and draws nothing.
NOT_RANDOM: dict[str, Callable[[], nn.Module]] = {
    "dead_like": of(lambda m, x: (torch.rand_like(x), x)[1]),
    "dead_of_shape": of(lambda m, x: (torch.randn(x.shape[0], 3) + 1, x)[1]),
    "dead_fixed": of(lambda m, x: (torch.rand(3), x)[1]),
    "dead_dropout": of(lambda m, x: (F.dropout(x, 0.5, True), x)[1]),
    "p_zero": of(lambda m, x: F.dropout(x, 0.0, True)),
    "module_p_zero": lambda: nn.Dropout(0.0),
    "attention_without_dropout": of(lambda m, x: x + F.scaled_dot_product_attention(x, x, x)),
    "rrelu_at_rest": nn.RReLU,
    "everything_dropped": of(lambda m, x: x + F.dropout(x, 1.0, True)),
}


@pytest.mark.parametrize("name", NOT_RANDOM)
def test_what_draws_nothing_that_is_read_is_fused(name: str) -> None:
    model = model_with(NOT_RANDOM[name]())
    result = fuse(model, image())
    assert static_counts(result.module)["bn"] == 0
    assert not Generators().moved()
    state = torch.get_rng_state()
    result.module(image())
    assert torch.equal(state, torch.get_rng_state())


def test_layers_of_torch_that_draw_in_train_mode_only() -> None:
    """Attention and recurrent layers with dropout are functions in eval mode, and in no other."""
    for layer in (
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True),
        nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True),
        nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True),
        nn.GRU(8, 8, num_layers=2, dropout=0.3, batch_first=True),
    ):
        once = isinstance(layer, nn.TransformerEncoderLayer)

        def forward(m: Any, x: torch.Tensor, once: bool = once) -> torch.Tensor:
            if once:
                return m.layer(x)  # type: ignore[no-any-return]
            return (m.layer(x, x, x) if isinstance(m.layer, nn.MultiheadAttention) else m.layer(x))[0]  # type: ignore[no-any-return]

        x = torch.randn(2, 5, 8)
        assert fuse(Lambda(forward, layer=layer).eval(), x).report.comparison.passed
        layer.train = lambda mode=True, layer=layer: layer  # type: ignore[method-assign, misc]
        for part in layer.modules():
            part.training = True
        model = Lambda(forward, layer=layer)
        model.training = False
        with pytest.raises(CaptureError, match=r"random|cannot be"):
            fuse(model, x, verify=False)


def test_modes_and_missing_statistics_are_noted() -> None:
    model = nn.Sequential(conv_bn(2, 4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval()
    (note,) = fuse(model, image()).report.notes
    assert note == (
        "without running statistics, 1 normalises by the batch at inference, too: what an input gives depends on the "
        "others in its batch"
    )
    assert any("running statistics" in refusal.reason for refusal in fuse(model, image()).report.refusals)
    model = model_with(nn.Dropout()).train()
    assert fuse(model, image()).report.notes == (
        "the model was in train mode; its inference form was taken (eval mode)",
    )
    model.eval()
    model[1].train()
    for way in ("symbolic", "export"):
        (note,) = (n for n in fuse(model, image(), capture=way).report.notes if "mode" in n)
        assert note == "1 in the model stood in train mode; the inference form was taken there, too (eval mode)"


def test_verify_does_not_take_chance_for_evidence() -> None:
    """With other seeds than torch's it cannot give both models the same numbers, and a large noise excuses anything."""
    model = model_with(RANDOM["numpy"][0]())
    with pytest.raises(InputError, match=r"draws random numbers in eval mode \(from numpy.random\)"):
        verify(model, model, image())
    noisy = model_with(RANDOM["noise"][0]())
    assert any("draws random numbers" in note for note in verify(noisy, noisy, image()).notes)
    assert not any(
        "random" in note for note in verify(model_with(nn.Dropout()), model_with(nn.Identity()), image()).notes
    )


def test_looking_for_draws_does_not_write_to_parameters() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.w.data.mul_(2)
        m.v.data = m.v.data * 2
        return x * m.w * m.v * torch.rand(())

    model = Lambda(forward, w=nn.Parameter(torch.ones(1)), v=nn.Parameter(torch.ones(1))).eval()
    find_draws(model, Inputs.of(image()))
    assert (model.w.item(), model.v.item()) == (1.0, 1.0)


def test_a_model_that_fails_draws_as_far_as_it_runs() -> None:
    model = Lambda(lambda m, x: (torch.rand(3), x.no_such_method())).eval()
    assert [draw.what for draw in find_draws(model, Inputs.of(image()))] == ["rand"]


def test_generators_notice_every_source() -> None:
    model = OwnGenerator(torch.Generator())
    for draw, name in (
        (lambda: torch.rand(1), "torch"),
        (random.random, "random"),
        (numpy.random.rand, "numpy.random"),
        (lambda: torch.rand(1, generator=model.generator), "generator"),
    ):
        before = Generators(model)
        draw()
        assert before.moved() == [name]
        before.restore()
        assert before.moved() == []


def test_the_sentence_lists_a_few_places_once() -> None:
    draws = [Draw("rand", f"b{index}", "Noise", "n.py:3") for index in range(6)]
    sentence = refusal("Net", [*draws, draws[0]])
    assert sentence.count("rand in Noise") == 4
    assert "and 2 more" in sentence
    assert "rand in Net (n.py:3); let it check self.training, or give" in refusal(
        "Net", [Draw("rand", "", "Net", "n.py:3")]
    )


def test_a_block_is_not_named_as_what_may_be_off() -> None:
    """Who took that advice would lose its layers."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.a(x) + torch.randn_like(x)

    sentence = refused(model_with(Culprit(forward, a=conv_bn(2, 4, 4, 3))))
    assert "identity" not in sentence
    assert sentence.endswith("or give what draws a module of its own and say with inference_form what that is")


def test_the_model_itself_may_be_the_culprit() -> None:
    model = Lambda(lambda m, x: F.relu(m.a(x) + torch.randn_like(x)), a=conv_bn(2, 4, 4, 3)).eval()
    sentence = refused(model)
    assert "randn_like in Lambda (test_randomness.py" in sentence
    assert "identity" not in sentence


class RandByName(nn.Module):
    """Calls a function of torch by a name of its file."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rand_by_name(x.shape[0], 4, 1, 1) * x


class PowByName(nn.Module):
    """The same, of one that draws nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pow_by_name(x, 2)


def test_functions_of_torch_imported_by_name_spoil_nothing_for_later_models() -> None:
    """fx keeps a list of them for the whole process, in which a graph of such a model must not be entered."""
    assert fuse(model_with(PowByName()), image()).report.comparison.passed
    assert "rand in RandByName 1" in refused(model_with(RandByName()))
    assert fuse(model_with(nn.Dropout()), image()).report.capture == "symbolic"


def test_bn_is_still_there_for_the_audit() -> None:
    """A check that can fail: without the draw the same model is fused."""
    model = model_with(Culprit(lambda m, x: m.n(x), n=bn(2, 4)))
    assert reparam.fuse(model, image()).report.after.batch_norms == 0


def test_statistics_of_the_batch_beside_running_ones_are_noted() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).train()
    program = torch.export.export(model, (image(),)).module()
    notes = fuse(program, image()).report.notes
    assert notes[0] == (
        "with training=True, 1 normalises by the batch at inference, too, and not by the running statistics; a program "
        "that was exported in train mode does so: export it after eval()"
    )

    def by_the_batch(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(self.layer(x), self.norm.running_mean, self.norm.running_var, training=True)

    written = Lambda(by_the_batch, layer=nn.Conv2d(4, 4, 1), norm=nn.BatchNorm2d(4)).eval()
    assert re.match(rf"with training=True, {HERE}:\d+ normalises by the batch", fuse(written, image()).report.notes[0])


def test_a_program_exported_in_eval_mode_has_no_such_note() -> None:
    def standardised(self: Any, x: torch.Tensor) -> torch.Tensor:  # by statistics of a weight, which no batch changes
        weight = F.batch_norm(self.layer.weight.reshape(1, 4, 4), None, None, training=True).reshape(4, 4, 1, 1)
        return F.conv2d(x, weight)

    written = Lambda(standardised, layer=nn.Conv2d(4, 4, 1)).eval()
    program = torch.export.export(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval(), (image(),)).module()
    for model in (written, program):
        assert not any("normalises" in note for note in fuse(model, image()).report.notes)
