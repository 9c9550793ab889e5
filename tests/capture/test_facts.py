"""What Python may ask of an argument, and what the fused model does where the answer is another one.

Each forward takes one of two ways by a fact of its arguments: a size, a dtype, what a container holds, whether an
argument is given. The fused model answers other inputs as the original does, or stops; it never takes the wrong way.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reparam import OtherInputError, fuse
from tests.capture.test_odd_forwards import Forward, call, image, odd
from tests.support import EXACT, relative_error

torch.set_num_threads(1)

X, WIDE, MASK = image(), image(1, 16, 16), torch.rand(4, 1, 1, dtype=torch.float64)
MARK = torch.ones(2)
"""An argument that is only asked what it is."""


# Sizes that Python turns into keys and text.


def size_as_key(s, x):
    return s.a(x) * {16: 0.5, 8: 2.0}.get(x.shape[-1], 1.0)


def size_as_subscript(s, x):
    return s.a(x) * {16: 0.5, 8: 2.0}[x.shape[-1]]


def size_in_a_set(s, x):
    return s.a(x) * (2 if x.shape[-1] in {16, 32} else 1)


def sizes_as_key(s, x):
    return s.a(x) * (2 if (x.shape[2], x.shape[3]) in {(16, 16): 1} else 1)


def shape_as_key(s, x):
    return s.a(x) * (2 if x.shape[1:] in {torch.Size((4, 16, 16)): 1} else 1)


def hash_of_a_size(s, x):
    return s.a(x) * (2 if hash(x.shape[-1]) == hash(8) else 1)


def size_formatted(s, x):
    return s.a(x) * (2 if f"{x.shape[-1]:03d}" == "008" else 1)


def size_as_text(s, x):
    return s.a(x) * (2 if str(x.shape[-1]) == "8" else 1)


def shape_as_text(s, x):
    return s.a(x) * (2 if str(tuple(x.shape)) == "(1, 4, 8, 8)" else 1)


def size_in_percent_format(s, x):
    return s.a(x) * (2 if "%d" % x.shape[-1] == "8" else 1)  # noqa: UP031


def size_as_repr(s, x):
    return s.a(x) * (2 if repr(x.shape[-1]) == "8" else 1)


# What a tensor is: `mark` is asked, and nothing is computed with it.


def dtype_equals(s, x, mark):
    return s.a(x) * (2 if mark.dtype == torch.float32 else 1)


def dtype_differs(s, x, mark):
    return s.a(x) * (2 if mark.dtype != torch.float32 else 1)


def dtype_is(s, x, mark):
    return s.a(x) * (2 if mark.dtype is torch.float32 else 1)


def dtype_is_not(s, x, mark):
    return s.a(x) * (2 if mark.dtype is not torch.float32 else 1)


def dtype_in_a_variable_is(s, x, mark):
    kind, wanted = mark.dtype, torch.float32
    return s.a(x) * (2 if kind is wanted else 1)


def dtype_in_a_set(s, x, mark):
    return s.a(x) * (2 if mark.dtype in {torch.float32} else 1)


def dtype_in_a_tuple(s, x, mark):
    return s.a(x) * (2 if mark.dtype in (torch.float16, torch.float32) else 1)


def dtype_as_key(s, x, mark):
    return s.a(x) * {torch.float32: 2}.get(mark.dtype, 1)


def dtype_as_text(s, x, mark):
    return s.a(x) * (2 if "float32" in str(mark.dtype) else 1)


def dtype_formatted(s, x, mark):
    return s.a(x) * (2 if f"{mark.dtype}" == "torch.float32" else 1)


def dtype_attribute(s, x, mark):
    return s.a(x) * (2 if mark.dtype.is_floating_point else 1)


def dtype_limits(s, x, mark):
    return s.a(x) * torch.finfo(mark.dtype).bits


def helper_is_float(tensor: torch.Tensor) -> bool:
    return tensor.dtype is torch.float32


def dtype_is_in_a_helper(s, x, mark):
    return s.a(x) * (2 if helper_is_float(mark) else 1)


def dtype_handed_to_a_helper(s, x, mark):
    return s.a(x) * (2 if _same_object(mark.dtype, torch.float32) else 1)


def _same_object(a: Any, b: Any) -> bool:
    return a is b


def is_floating_point(s, x, mark):
    return s.a(x) * (2 if mark.is_floating_point() else 1)


def torch_is_floating_point(s, x, mark):
    return s.a(x) * (2 if torch.is_floating_point(mark) else 1)


def type_as_text(s, x, mark):
    return s.a(x) * (2 if mark.type() == "torch.FloatTensor" else 1)


def element_size(s, x, mark):
    return s.a(x) * mark.element_size()


def dtype_and_size(s, x, mark):
    return s.a(x) * (2 if mark.dtype == torch.float32 and x.shape[2] > 4 else 1)


def dtype_and_device(s, x, mark):
    return s.a(x) * (2 if mark.dtype == torch.float32 and mark.device.type == "cpu" else 1)


def device_type(s, x, mark):
    return s.a(x) * (2 if mark.device.type == "cpu" else 1)


def device_equals(s, x, mark):
    return s.a(x) * (2 if mark.device == torch.device("cpu") else 1)


def device_as_text(s, x, mark):
    return s.a(x) * (2 if str(mark.device) == "cpu" else 1)


def device_in_a_set(s, x, mark):
    return s.a(x) * (2 if mark.device in {torch.device("cpu")} else 1)


def is_meta(s, x, mark):
    return s.a(x) * (1 if mark.is_meta else 2)


def layout_is(s, x, mark):
    return s.a(x) * (2 if mark.layout is torch.strided else 1)


def layout_equals(s, x, mark):
    return s.a(x) * (2 if mark.layout == torch.strided else 1)


def is_sparse(s, x, mark):
    return s.a(x) * (1 if mark.is_sparse else 2)


# Arguments: given or not, of another kind, of another rank.


def optional(s, x, mask=None):
    x = s.a(x)
    return x if mask is None else x * mask


def optional_for_torch(s, x, mask=None):
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask) + s.a(x)


def keyword_is_true(s, x, k=1):
    return s.a(x) * (2 if k is True else 1)


def flipped(s, x):
    return s.a(x.flip(1))


def mean_of_axis_one(s, x):
    return s.linear(x.mean(1))


def bytes_are_scaled(s, x):
    return s.a(x.double() / 255 if x.dtype == torch.uint8 else x)


# Containers.


def probed_key(s, d):
    x = d["x"]
    with contextlib.suppress(KeyError):
        x = x * d["mask"]
    return s.a(x)


def probed_index(s, xs):
    x = xs[0]
    try:
        x = x * xs[1]
    except IndexError:
        x = x * 3
    return s.a(x)


def probed_index_from_the_end(s, xs):
    try:
        return s.a(xs[-2] * 2)
    except IndexError:
        return s.a(xs[0])


def last_of_a_list(s, xs):
    return s.a(xs[-1])


def length_of_a_list(s, xs):
    return s.a(xs[0]) * len(xs)


def ordered(s, x):
    return OrderedDict(b=s.a(x), a=s.b(x))


def ordered_inside(s, x):
    return [OrderedDict(b=s.a(x)), {"c": s.b(x)}, (s.a(x),)]


def appended(s, xs):
    xs.append(s.a(xs[0]))
    return xs.pop() + xs[0]


def item_added(s, d):
    d["y"] = s.a(d["x"])
    return d["y"] + d["x"]


def item_replaced(s, xs):
    xs[0] = s.a(xs[0])
    return s.b(xs[0])


def any_number(s, *xs):
    return s.a(xs[0]) * len(xs)


def any_number_and_a_keyword(s, *xs, k=2):
    return s.a(xs[0]) * k


# How many there are depends on values.


def distinct_values(s, x):
    return s.a(x) * len(torch.unique((x * 2).round()))


def selected_values(s, x):
    y = s.a(x)
    return y * len(y[y > 0])


STOPS = (OtherInputError,)
SIZES: list[Forward] = [
    *(size_as_key, size_as_subscript, size_in_a_set, sizes_as_key, shape_as_key, hash_of_a_size, size_formatted),
    *(size_as_text, shape_as_text, size_in_percent_format, size_as_repr),
]
DTYPES: list[Forward] = [
    *(dtype_equals, dtype_differs, dtype_is, dtype_is_not, dtype_in_a_variable_is, dtype_in_a_set, dtype_in_a_tuple),
    *(dtype_as_key, dtype_as_text, dtype_formatted, dtype_attribute, dtype_limits, dtype_is_in_a_helper),
    *(dtype_handed_to_a_helper, is_floating_point, torch_is_floating_point, type_as_text, element_size),
]
DEVICES: list[Forward] = [device_type, device_equals, device_as_text, device_in_a_set, is_meta]
LAYOUTS: list[Forward] = [layout_is, layout_equals, is_sparse]
CASES: list[tuple[Forward, Any, list[Any]]] = [
    *((forward, (X,), [(WIDE,), (image(2),)]) for forward in SIZES),
    *((forward, (X, MARK), [(X, MARK.long()), (image(2), MARK), (X, MARK.half())]) for forward in DTYPES),
    *((forward, (X, MARK), [(X, MARK.to("meta")), (image(2), MARK)]) for forward in DEVICES),
    *((forward, (X, MARK), [(X, MARK.to_sparse()), (image(2), MARK)]) for forward in LAYOUTS),
    (optional, (X, MASK), [(X,), (image(2), MASK), (X, None)]),
    (optional, (X,), [(X, MASK), (WIDE,)]),
    (optional_for_torch, (X, torch.rand(8, 8, dtype=torch.float64)), [(X,)]),
    (keyword_is_true, (X, 1), [(X, True), (X, torch.tensor(1)), (X, 1.0), (X, 2)]),
    (keyword_is_true, (X, True), [(X, 1), (image(2), True)]),
    (flipped, (X,), [(X[0],), (image(2),)]),
    (mean_of_axis_one, (torch.randn(2, 5, 4).double(),), [(torch.randn(2, 3, 5, 4).double(),)]),
    (bytes_are_scaled, (X,), [((X.abs() * 50).to(torch.uint8),), (WIDE,)]),
    (probed_key, ({"x": X},), [({"x": X, "mask": MASK},), ({"x": WIDE},)]),
    (probed_key, ({"x": X, "mask": MASK},), [({"x": X},), ({"x": WIDE, "mask": MASK},)]),
    (probed_index, ([X],), [([X, MASK],), ([WIDE],)]),
    (probed_index, ([X, MASK],), [([X],), ([WIDE, MASK],)]),
    (probed_index_from_the_end, ([X],), [([X, image(2)],), ([WIDE],)]),
    (last_of_a_list, ([X, MASK, X * 2],), [([X, X * 3],), ([X, X, X, X * 5],)]),
    (length_of_a_list, ([X, X],), [([X],), ([WIDE, X],)]),
    (ordered, (X,), [(image(2),)]),
    (ordered_inside, (X,), [(image(2),)]),
    (appended, ([X],), [([image(2)],), ([X, WIDE],)]),
    (item_added, ({"x": X},), [({"x": image(2)},), ({"x": X, "y": WIDE},)]),
    (item_replaced, ([X],), [([image(2)],)]),
    (any_number, (X,), [(X, X), (WIDE,)]),
    (any_number_and_a_keyword, (X,), [(image(2),)]),
    (distinct_values, (X,), [(X * 3,), (WIDE,)]),
    (selected_values, (X,), [(WIDE,)]),
]


def _outcome(module: nn.Module, arguments: Any) -> Any:
    try:
        return call(module, arguments)
    except Exception as error:
        return error


@pytest.mark.parametrize(
    ("forward", "example", "others"), CASES, ids=[f"{i}-{forward.__name__}" for i, (forward, _, _) in enumerate(CASES)]
)
def test_the_fused_model_agrees_or_stops(forward: Forward, example: Any, others: list[Any]) -> None:
    original = odd(forward)
    fused = fuse(odd(forward), copy.deepcopy(example), verify=False).module
    expected, actual = call(original, example), call(fused, example)
    assert type(actual) is type(expected)
    assert relative_error(expected, actual) < EXACT
    for arguments in others:
        expected, actual = _outcome(original, arguments), _outcome(fused, arguments)
        if isinstance(actual, STOPS):
            continue
        if isinstance(expected, Exception):
            assert isinstance(actual, Exception)
            continue
        assert not isinstance(actual, Exception), actual
        assert relative_error(expected, actual) < EXACT


def test_an_exported_program_says_for_what_it_is() -> None:
    notes = fuse(odd(dtype_and_device), (X, MARK), verify=False, capture="export").report.notes
    assert any("for the dtypes and devices of the example" in note and "test_facts.py:" in note for note in notes)
    silent = fuse(odd(flipped), (X,), verify=False, capture="export").report.notes
    assert not any("as the forward asks" in note for note in silent)


@pytest.mark.parametrize("capture", ["symbolic", "export"])
@pytest.mark.parametrize(
    "forward", [dtype_is, dtype_in_a_set, dtype_equals, dtype_is_in_a_helper], ids=lambda f: f.__name__
)
def test_a_decision_by_dtype_is_verified_in_float64(forward: Forward, capture: str) -> None:
    """In float64 both models go the way that they go in their own dtype."""
    result = fuse(odd(forward).float(), (X.float(), MARK), capture=capture)
    comparison = result.report.comparison
    assert comparison is not None
    assert comparison.passed
    assert comparison.outputs[0].algebra_ratio is not None
    with pytest.raises(OtherInputError, match="dtype"):
        call(result.module, (X.float(), MARK.half()))


NOTES: list[tuple[Forward, Any, str]] = [
    (size_in_a_set, (X,), "sizes of the example"),
    (dtype_is, (X, MARK), "dtypes of the example"),
    (dtype_as_key, (X, MARK), "dtypes of the example"),
    (is_floating_point, (X, MARK), "dtypes of the example"),
    (device_type, (X, MARK), "devices of the example"),
    (layout_equals, (X, MARK), "layouts of the example"),
    (dtype_and_size, (X, MARK), "sizes and dtypes of the example"),
]


@pytest.mark.parametrize(("forward", "example", "phrase"), NOTES, ids=[f.__name__ for f, _, _ in NOTES])
def test_the_note_names_what_decided(forward: Forward, example: Any, phrase: str) -> None:
    notes = fuse(odd(forward), example, verify=False).report.notes
    assert any(note.startswith(f"{phrase} decided") and "test_facts.py:" in note for note in notes), notes
