"""The contract of `verify`: what it leaves alone, what it counts, what it says."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from reparam import fuse
from reparam.equivalence import Comparison, compare_outputs, runner, verify
from reparam.errors import CaptureError, InputError, NotEquivalentError
from tests.equivalence.nets import Plain, TwoOutputs, example, folded, randomise


class Function(nn.Module):
    """A module around a function of the input."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def net(seed: int = 0) -> Plain:
    made = randomise(Plain(), seed)
    assert isinstance(made, Plain)
    return made


def test_the_caller_s_modules_inputs_and_random_state_are_left_alone() -> None:
    original, candidate, x = net().train(), folded(net()).train(), example()
    original.head.eval()
    before = copy.deepcopy([original.state_dict(), candidate.state_dict()])
    modes = [part.training for part in original.modules()]
    images, state, python = x.clone(), torch.get_rng_state(), random.getstate()
    dtype = torch.get_default_dtype()
    assert verify(original, candidate, x).passed
    for model, saved in zip((original, candidate), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), saved.values(), strict=True))
    assert [part.training for part in original.modules()] == modes
    assert all(part.training for part in candidate.modules())
    assert torch.equal(x, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert torch.get_default_dtype() == dtype


def test_a_model_that_writes_into_its_input_does_not_spoil_the_comparison() -> None:
    assert verify(Function(lambda x: x.mul_(2) + 1), Function(lambda x: 2 * x + 1), example()).passed
    assert not verify(Function(lambda x: x.mul_(2) + 1), Function(lambda x: 3 * x + 1), example()).passed


def test_both_models_see_the_same_random_numbers() -> None:
    noisy = Function(lambda x: x + torch.rand(x.shape[1:], dtype=torch.float64).to(x.dtype))
    assert verify(noisy, copy.deepcopy(noisy), example()).passed


def test_the_same_seed_gives_the_same_comparison() -> None:
    first, second = (verify(net(), folded(net()), example(), seed=3).to_dict() for _ in range(2))
    assert first == second
    assert first["seed"] == 3
    assert verify(net(), folded(net()), example(), seed=4).to_dict() != first


CALLS: list[tuple[int, int]] = []


class Counted(Plain):
    """Records every forward pass, also of copies."""

    def forward(self, x: torch.Tensor) -> Any:
        CALLS.append((x.numel(), x.itemsize))  # what its dtype is a model is not told in float64
        return super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "size"), [(1, 12), (4, 12), (1, 150)])
def test_standard_costs_at_most_ten_forward_passes(batch: int, size: int, dtype: torch.dtype) -> None:
    original = randomise(Counted(width=4), 0).to(dtype)
    assert isinstance(original, Plain)
    x = example(dtype, batch=batch, size=size)
    CALLS.clear()
    comparison = verify(original, folded(original), x)
    spent = sum(numel / x.numel() * (1.0 if itemsize == 8 else 0.5) for numel, itemsize in CALLS)
    assert spent == pytest.approx(comparison.cost)
    assert 2.0 <= spent <= 10.0
    assert comparison.passed
    if size == 150:
        assert [case.status for case in comparison.cases] == ["passed"] * 6


def test_a_fixed_size_is_found_out_and_noted() -> None:
    fixed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 100, 5))
    comparison = verify(fixed, copy.deepcopy(fixed), example())
    assert comparison.passed
    notes = [note for case in comparison.cases for note in case.notes]
    assert any("the original itself cannot run it" in note for note in notes)
    assert any(case.shapes == ((1, 3, 12, 12),) and case.status == "passed" for case in comparison.cases)


def test_levels() -> None:
    quick, standard, thorough = (verify(net(), folded(net()), example(), level=level) for level in LEVELS)
    assert [case.name for case in quick.cases] == ["example"]
    assert len(quick.cases) < len(standard.cases) < len(thorough.cases)
    assert all(case.passed for case in (*quick.cases, *standard.cases, *thorough.cases))
    batches = {case.shapes[0][0] for case in thorough.cases if case.status == "passed"}
    assert {1, 2, 3, 5} <= batches
    with pytest.raises(InputError, match="quick, standard, thorough"):
        verify(net(), net(), example(), level="exhaustive")


LEVELS = ("quick", "standard", "thorough")


@pytest.mark.parametrize("level", LEVELS)
def test_integers_stay_within_the_example_s_values(level: str) -> None:
    table = nn.Embedding(5, 3)
    tokens = torch.tensor([[0, 4, 2, 4], [0, 2, 2, 4]])
    seen: set[int] = set()

    def embed(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.update(ids.flatten().tolist())
        return table.weight.to(torch.get_default_dtype())[ids] * mask[..., None]

    comparison = verify(Function(embed), Function(embed), (tokens, tokens > 0), level=level)
    assert comparison.passed
    assert seen == {0, 2, 4}


def test_shapes_can_be_kept() -> None:
    comparison = verify(net(), folded(net()), example(), vary_shapes=False, level="thorough")
    assert {case.shapes for case in comparison.cases} == {((2, 3, 12, 12),)}
    assert comparison.passed


def test_keyword_inputs_and_plain_arguments() -> None:
    model = Function(lambda *, x, scale, factor: x * scale * factor)
    inputs = {"x": example(), "scale": torch.tensor(2.0), "factor": 3}
    assert verify(model, copy.deepcopy(model), inputs).passed
    assert not verify(model, Function(lambda *, x, scale, factor: x * scale), inputs).passed


def test_casts_inside_the_model_do_not_cost_the_truth_its_precision() -> None:
    def first(x: torch.Tensor) -> torch.Tensor:
        return x.float().softmax(1).to(torch.float32) + torch.full((1,), 0.1, dtype=torch.float32)

    def second(x: torch.Tensor) -> torch.Tensor:
        e = (x.float() - x.float().amax(1, keepdim=True)).exp()
        return e / e.sum(1, keepdim=True) + torch.full((1,), 0.1, dtype=torch.float32)

    comparison = verify(Function(first), Function(second), example())
    assert comparison.passed
    assert comparison.algebra_error is not None
    assert comparison.algebra_error < 1e-14


Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    more: tuple[Any, ...]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x, ["output"]),
        (lambda x: (x, [x, x]), ["output[0]", "output[1][0]", "output[1][1]"]),
        (lambda x: {"a": x, "b": {"c": x}}, ["output['a']", "output['b']['c']"]),
        (lambda x: Pair(x, x), ["output.left", "output.right"]),
        (lambda x: Result(x, (x, None, "text", 3)), ["output.logits", "output.more[0]"]),
        (lambda x: (x, float(x.double().sum())), ["output[0]", "output[1]"]),
    ],
)
def test_outputs_are_named_as_a_user_would(function: Any, names: list[str]) -> None:
    comparison = verify(Function(function), Function(function), example())
    assert comparison.passed, comparison.failures
    assert [output.name for output in comparison.outputs] == names


@pytest.mark.parametrize(
    ("original", "candidate", "sentence"),
    [
        (lambda x: (x, x), lambda x: [x, x], "output is a list and should be a tuple"),
        (lambda x: (x, x), lambda x: (x,), "output[1] is missing"),
        (lambda x: (x,), lambda x: (x, x), "output[1] is an extra output"),
        (lambda x: x, lambda x: (x,), "output is a tuple and should be a single tensor"),
        (lambda x: {"a": x}, lambda x: {"b": x}, "output['a'] is missing"),
        (lambda x: (x, 3), lambda x: (x, 4), "output[1] is 4 and should be 3"),
        (lambda x: (x, None), lambda x: (x, "no"), "should be None"),
        (lambda x: (x, 1), lambda x: (x, True), "should be 1"),
        (lambda x: x, lambda x: x[..., :1], "should have [2, 3, 12, 12]"),
        (lambda x: x, lambda x: x.half(), "is float16 and should be float32"),
        (lambda x: x.argmax(1), lambda x: x.argmin(1), "values differ"),
        (lambda x: x > 0, lambda x: x > 0.5, "values differ"),
        (lambda x: x, lambda x: x / 0, "where the original is finite"),
        (lambda x: x / (x > 0), lambda x: -(x / (x > 0)), "not the same"),
        (lambda x: 3, lambda x: 3, "no tensor"),
        (lambda x: x[:0], lambda x: x[:0], "no tensor with any element"),
        (lambda x: x * float("nan"), lambda x: x * float("nan"), "nothing finite was compared"),
        (lambda x: (x, x.log() * float("nan")), lambda x: (x, x.log() * float("nan")), "no finite element"),
    ],
)
def test_failures_are_sentences(original: Any, candidate: Any, sentence: str) -> None:
    comparison = verify(Function(original), Function(candidate), example())
    assert not comparison.passed
    assert any(sentence in failure for failure in comparison.failures), comparison.failures


def test_shared_infinities_are_no_evidence_and_do_not_hide_the_rest() -> None:
    masked = Function(lambda x: torch.where(x > 0, x, float("-inf")))
    comparison = verify(masked, copy.deepcopy(masked), example())
    assert comparison.passed
    first = comparison.cases[0]
    assert first.status == "no evidence"
    assert any("not finite in both" in note for note in first.notes)
    assert not verify(masked, Function(lambda x: torch.where(x > 0, 1.001 * x, float("-inf"))), example()).passed


def test_a_candidate_that_raises_fails_and_an_original_that_raises_is_the_user_s_error() -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 12:
            raise ValueError("twelve, please\nand more lines")
        return x

    comparison = verify(Function(lambda x: x), Function(picky), example())
    assert any("ValueError: twelve, please)" in failure for failure in comparison.failures)
    assert verify(Function(picky), Function(picky), example()).passed
    with pytest.raises(InputError, match="the original cannot run on the example inputs"):
        verify(net(), net(), torch.zeros(1, 4, 12, 12))
    with pytest.raises(InputError, match="holds no tensor"):
        verify(net(), net(), ())


def test_a_constant_original_is_noted() -> None:
    constant = Function(lambda x: torch.ones(len(x), 4))
    comparison = verify(constant, copy.deepcopy(constant), example())
    assert any("same constants for every input" in note for note in comparison.notes)
    assert not verify(net(), net(), example()).notes


def test_noise_that_drowns_the_output_vouches_for_nothing() -> None:
    drowned = Function(lambda x: (x + 1e9) - 1e9)
    comparison = verify(drowned, lambda x: (x + 1e9) - 1e9, example())
    assert not comparison.passed
    assert "nothing can be told" in comparison.failures[0]


def test_the_dict_is_json_and_the_summary_a_sentence() -> None:
    for comparison in (verify(net(), folded(net()), example()), verify(net(), Function(lambda x: x), example())):
        plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
        assert plain["passed"] is comparison.passed
        assert plain["cases"][0]["shapes"] == [[2, 3, 12, 12]]
        assert comparison.summary().endswith(".")
        assert "\n" not in comparison.summary()
    copied = verify(net(), net(), example())
    assert copied.to_dict()["outputs"][0]["numeric_ratio"] is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        copied.passed = False  # type: ignore[misc]


def test_an_exact_result_in_float64_is_written_without_a_number_json_lacks() -> None:
    same = Function(lambda x: x + 1)
    comparison = verify(same, copy.deepcopy(same), example(torch.float64))
    assert comparison.to_dict()["outputs"][0]["snr_db"] == "Infinity"


def test_compare_outputs_judges_what_was_computed_elsewhere() -> None:
    model = TwoOutputs()
    randomise(model, 0)
    x = example()
    with torch.no_grad():
        original, candidate = model(x), folded(model)(x)
        truth = copy.deepcopy(model).double()(x.double())
    outputs = compare_outputs(truth, original, candidate)
    assert [output.name for output in outputs] == ["output['logits']", "output['map']"]
    assert all(output.passed for output in outputs)
    assert outputs[0].top1_agreement == 1.0
    listed = list(candidate.values())
    assert all(output.passed for output in compare_outputs(truth, original, listed, check_structure=False))
    assert not all(output.passed for output in compare_outputs(truth, original, listed))
    listed[1] = listed[1] * 1.001
    assert not all(output.passed for output in compare_outputs(truth, original, listed, check_structure=False))
    assert not all(output.passed for output in compare_outputs(truth, original, listed[:1], check_structure=False))


def test_exported_and_traced_candidates() -> None:
    original, x = net(), example()
    exported = torch.export.export(original, (x,)).module()
    assert verify(original, exported, x, vary_shapes=False).passed
    assert verify(original, torch.fx.symbolic_trace(original), x).passed
    comparison: Comparison = verify(net(1), exported, x, vary_shapes=False)
    assert not comparison.passed


def test_an_output_that_is_always_empty_is_no_lack_of_evidence() -> None:
    original = Function(lambda x: (x * 2.0, x[:, :0]))
    assert verify(original, copy.deepcopy(original), example()).passed
    other = Function(lambda x: (x * 2.0, x[:, :1]))
    assert not verify(original, other, example()).passed
    nothing = Function(lambda x: x[:, :0])
    assert not verify(nothing, copy.deepcopy(nothing), example()).passed


def test_a_detector_that_finds_nothing_on_some_inputs_is_compared_on_the_others() -> None:
    def boxes(x: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
        found = x.flatten(1).unflatten(1, (-1, 4)).flatten(0, 1)
        return torch.softmax(found, dim=1)[found[:, 0] > 0.5 + bias]

    original = Function(boxes)
    comparison = verify(original, copy.deepcopy(original), example(), level="thorough")
    assert comparison.passed
    empty = [case for case in comparison.cases if any("only shapes were compared" in note for note in case.notes)]
    assert {"zeros"} <= {case.name for case in empty}
    assert all(case.status == "no evidence" for case in empty)
    assert not verify(original, Function(lambda x: boxes(x, -1.0)), example(), level="thorough").passed
    for_blank = Function(lambda x: boxes(x, -1.0) if not bool(x.any()) else boxes(x))
    wrong = verify(original, for_blank, example(), level="thorough")
    assert [case.name for case in wrong.cases if case.failures] == ["zeros"]


def test_a_model_that_returns_nothing_is_not_asked_to_be_reported() -> None:
    with pytest.raises(NotEquivalentError, match=r"was not shown to agree.*no tensor with any element") as caught:
        fuse(Function(lambda x: x[:0]), example())
    assert "report this" not in str(caught.value)


def test_noise_that_tells_nothing_is_seen_behind_an_empty_example() -> None:
    original = Function(lambda x: (x[x > 0.5] * 0.05 + 1e6) - 1e6)
    low, high = example() * 0.01, example()
    assert original(low).numel() == 0
    for data in ([high], [low, high]):
        comparison = verify(original, lambda x: 1.3 * original(x), low, level="quick", data=data)
        assert not comparison.passed
        assert any("so large that nothing can be told" in failure for failure in comparison.failures)


@pytest.mark.parametrize(
    ("kind", "made"),
    [("sparse_coo", lambda x: x.to_sparse()), ("nested", lambda x: torch.nested.as_nested_tensor(list(x)))],
    ids=["sparse", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_results_that_are_not_dense_are_refused_in_a_sentence(kind: str, made: Any) -> None:
    model = Function(made)
    with pytest.raises(InputError, match=f"output is a {kind} tensor, which cannot be compared"):
        verify(model, copy.deepcopy(model), example())
    with pytest.raises(CaptureError, match=f"returns a {kind} tensor, which cannot be compared"):
        fuse(model, example())
    dense = verify(Function(lambda x: x), model, example())
    assert not dense.passed
    assert any(kind in failure for failure in dense.failures)


def test_a_candidate_that_cannot_run_says_nothing_of_what_the_original_returns() -> None:
    comparison = verify(Function(lambda x: x * 2.0), Function(lambda x: x.no_such_thing()), example(), level="quick")
    assert not comparison.passed
    assert not any("no tensor with any element" in note for case in comparison.cases for note in case.notes)


def test_an_error_without_any_bar_is_no_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = runner.measure

    def without_bars(*args: Any) -> Any:
        measured, failures = whole(*args)
        return tuple(dataclasses.replace(one, numeric=None, algebra=None) for one in measured), failures

    monkeypatch.setattr(runner, "measure", without_bars)
    model = nn.Linear(4, 4)
    comparison = verify(model, copy.deepcopy(model), torch.randn(2, 4))
    assert not comparison.passed
    assert comparison.lacks_evidence
    assert comparison.failures == ("output: its error was held against no bar on any input",)
