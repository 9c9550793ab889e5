"""Masks, positions and resized tables under `fixed_sizes`, and what `x.dtype` and `x.device` have to do with it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import reparam
from reparam import fuse
from reparam.checks import CHECKS
from reparam.errors import OtherInputError
from tests.support import EXACT, relative_error, run
from tests.zoo.trap import Lambda

IMAGE = (2, 3, 24, 16)
TOKENS = (2, 5, 8)


def attention(mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = m.qkv(x).chunk(3, -1)
        return mask(x, q @ k.transpose(-1, -2)).softmax(-1) @ v

    return Lambda(forward, qkv=nn.Linear(8, 24))


def causal(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    return scores + torch.full((n, n), float("-inf"), device=x.device).triu(1)


def filled(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
    return scores.masked_fill(~mask, float("-inf"))


def distances(x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """As in ALiBi: minus the distance, in the dtype of the scores."""
    at = torch.arange(x.shape[1], device=x.device)
    return scores - 0.5 * (at[:, None] - at[None, :]).abs().to(scores.dtype)


def resized(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.stem(x)
    return m.head(y + F.interpolate(m.table, size=y.shape[-2:], mode="bicubic", align_corners=False)).relu()


def rescaled(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The same by a size that Python computes of the image's."""
    y = m.stem(x)
    return m.head(y + F.interpolate(m.table, size=(x.shape[2] // 4, (x.shape[3] + 3) // 4))).relu()


def sinusoids(m: Any, x: torch.Tensor) -> torch.Tensor:
    at = torch.arange(x.size(1), device=x.device, dtype=x.dtype)[:, None]
    angles = at / 100.0 ** (torch.arange(4, device=x.device) / 4)
    return m.head(x + torch.cat([angles.sin(), angles.cos()], -1)).relu()


def grid(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Coordinates of a map that is smaller than the image, as CoordConv has them."""
    y = F.max_pool2d(m.stem(x).relu(), 2)
    rows = torch.linspace(-1, 1, y.shape[2], device=y.device, dtype=y.dtype).view(1, 1, -1, 1)
    return m.head(y * rows).relu()


def images(forward: Callable[..., Any]) -> nn.Module:
    table = nn.Parameter(torch.randn(1, 8, 7, 7))
    return Lambda(forward, stem=nn.Conv2d(3, 8, 4, 4), head=nn.Conv2d(8, 8, 1), table=table)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "causal": (lambda: attention(causal), TOKENS),
    "filled": (lambda: attention(filled), TOKENS),
    "distances": (lambda: attention(distances), TOKENS),
    "resized": (lambda: images(resized), IMAGE),
    "rescaled": (lambda: images(rescaled), IMAGE),
    "sinusoids": (lambda: Lambda(sinusoids, head=nn.Linear(8, 8)), TOKENS),
    "grid": (lambda: images(grid), IMAGE),
}


def built(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, torch.Tensor]:
    make, shape = CASES[name]
    torch.manual_seed(3)
    return make().to(dtype).eval(), torch.randn(shape, dtype=dtype)


def made_anew(module: Any) -> list[fx.Node]:
    """Calls that no input goes into, but for its sizes, its dtype or its device."""
    told: set[fx.Node] = set()
    for node in module.graph.nodes:
        operands = node.all_input_nodes
        asks = node.target in (getattr, "size") or (operands and all(one in told for one in operands))
        makes = getattr(node.target, "__name__", "") in ("arange", "full", "ones", "linspace", "interpolate")
        if node.op.startswith("call") and (asks or makes) and not str(node.target).startswith("<function require"):
            told.add(node)
    return sorted(told)


@pytest.mark.parametrize("name", CASES)
def test_what_depends_on_sizes_alone_is_constant(name: str) -> None:
    model, x = built(name)
    result = fuse(model, x, fixed_sizes=True)
    assert made_anew(result.module) == []
    assert relative_error(run(model, x), run(result.module, x)) < EXACT
    assert any(rewrite.pass_name == "fixed sizes" for rewrite in result.report.rewrites)
    batch = torch.randn(3, *x.shape[1:], dtype=x.dtype)
    assert relative_error(run(model, batch), run(result.module, batch)) < EXACT


@pytest.mark.parametrize("name", CASES)
def test_other_sizes_stop_the_model(name: str) -> None:
    model, x = built(name)
    fused = fuse(model, x, fixed_sizes=True).module
    other = torch.randn(2, x.shape[1] + (x.dim() == 3), *(2 * size for size in x.shape[2:-1]), x.shape[-1]).to(x)
    run(model, other)
    with pytest.raises(OtherInputError, match="fused with fixed sizes"):
        run(fused, other)


@pytest.mark.parametrize("name", CASES)
def test_without_fixed_sizes_other_sizes_go_on_working(name: str) -> None:
    model, x = built(name)
    fused = fuse(model, x).module
    other = torch.randn(2, x.shape[1] + (x.dim() == 3), *(2 * size for size in x.shape[2:-1]), x.shape[-1]).to(x)
    assert relative_error(run(model, other), run(fused, other)) < EXACT


@pytest.mark.parametrize("name", CASES)
def test_in_float32_it_passes_verification_and_moves_to_half(name: str) -> None:
    model, x = built(name, torch.float32)
    result = fuse(model, x, fixed_sizes=True)
    assert result.report.comparison.passed
    kept = io.BytesIO()
    torch.save(result.module, kept)
    wide = result.module.double()(x.double())
    assert relative_error(run(model.double(), x.double()), wide) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions_in_float32_whatever_the_model_is_in(dtype: torch.dtype) -> None:
    """In a float64 model they keep their rounding; in one of float32 they are exact until the end."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        at = torch.arange(x.size(1), dtype=torch.float32)[:, None] / 7
        return m.head(x + at.sin() * m.scale.float()).relu()

    model = Lambda(forward, head=nn.Linear(8, 8), scale=nn.Parameter(torch.rand(8))).to(dtype).eval()
    x = torch.randn(2, 5, 8, dtype=dtype)
    result = fuse(model, x, fixed_sizes=True)
    assert result.report.comparison.passed
    assert relative_error(run(model, x), run(result.module, x)) < (EXACT if dtype == torch.float64 else 1e-6)


def test_what_depends_on_the_batch_is_left_to_run_time() -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.layer(x) * torch.linspace(0, 1, x.shape[0], device=x.device, dtype=x.dtype)[:, None, None]

    model = Lambda(forward, layer=nn.Linear(8, 8)).double().eval()
    fused = fuse(model, torch.randn(2, 5, 8).double(), fixed_sizes=True).module
    x = torch.randn(3, 5, 8).double()
    assert relative_error(run(model, x), run(fused, x)) < EXACT


def test_a_size_that_is_made_of_the_batch_s_is_no_literal() -> None:
    """Windows are folded into the batch: axis 0 of what is read is no size of the input."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        y = m.layer(x.reshape(b * 2, n // 2, c).transpose(0, 1))
        at = torch.arange(y.shape[1], device=y.device).to(y.dtype)  # of the windows: twice the batch
        return y * at[None, :, None]

    model = Lambda(forward, layer=nn.Linear(8, 8)).double().eval()
    fused = fuse(model, torch.randn(2, 6, 8).double(), fixed_sizes=True).module
    x = torch.randn(3, 6, 8).double()
    assert relative_error(run(model, x), run(fused, x)) < EXACT


def normalised(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.stem((x - m.mean.to(x.dtype)) / m.std.type_as(x)).relu()


def normalised_by_literals(m: Any, x: torch.Tensor) -> torch.Tensor:
    mean = x.new_tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)
    std = torch.tensor([0.2, 0.3, 0.25], dtype=x.dtype, device=x.device)[None, :, None, None]
    return m.stem((x - mean) / std).relu()


def normaliser(forward: Callable[..., Any]) -> nn.Module:
    return Lambda(
        forward,
        stem=nn.Conv2d(3, 8, 3),
        mean=nn.Parameter(torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1)),
        std=nn.Parameter(torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1)),
    )


@pytest.mark.parametrize("forward", [normalised, normalised_by_literals])
@pytest.mark.parametrize("capture", ["symbolic", "export"])
def test_a_normalisation_in_the_dtype_of_the_input_goes_into_the_stem(forward: Any, capture: str) -> None:
    model, x = normaliser(forward).double().eval(), torch.randn(2, 3, 12, 12).double()
    result = fuse(model, x, capture=capture)
    called = [node for node in result.module.graph.nodes if node.op == "call_function" and node.target not in CHECKS]
    assert [node.name for node in called if node.name != "relu"] == []
    assert relative_error(run(model, x), run(result.module, x)) < EXACT


def test_a_fused_normalisation_goes_to_half_with_the_model() -> None:
    model, x = normaliser(normalised).eval(), torch.randn(2, 3, 12, 12)
    fused = fuse(model, x).module.bfloat16()
    made = run(fused, x.bfloat16())
    assert made.dtype == torch.bfloat16
    assert relative_error(run(model, x), made.float()) < 0.05


def test_a_cast_to_the_dtype_of_an_input_that_no_layer_reads_is_kept() -> None:
    """A caller may give float16, and gets float16."""
    model = Lambda(lambda m, x: x * m.scale.to(x.dtype), scale=nn.Parameter(torch.rand(4) + 0.5)).eval()
    fused = fuse(model, torch.randn(2, 4)).module
    assert run(fused, torch.randn(2, 4).half()).dtype == torch.float16


def test_a_cast_to_an_integer_input_s_dtype_is_kept() -> None:
    def forward(m: Any, ids: torch.Tensor) -> torch.Tensor:
        return m.table(ids) * (m.scale * 3).to(ids.dtype)

    model = Lambda(forward, table=nn.Embedding(10, 4), scale=nn.Parameter(torch.rand(4) + 0.5)).double().eval()
    ids = torch.randint(0, 10, (2, 5))
    fused = fuse(model, ids).module
    assert relative_error(run(model, ids), run(fused, ids)) < EXACT
    assert relative_error(run(model, ids.int()), run(fused, ids.int())) < EXACT


def test_a_device_asked_of_an_input_is_the_model_s_own() -> None:
    model, x = built("causal", torch.float32)
    fused = fuse(model, x, fixed_sizes=True).module
    moved = fused.to("meta")(x.to("meta"))
    assert moved.device.type == "meta"


def test_fixed_sizes_leave_the_model_untouched() -> None:
    model, x = built("resized")
    before = reparam.fuse(model, x).report.before
    fuse(model, x, fixed_sizes=True)
    assert fuse(model, x).report.before == before


@pytest.mark.parametrize("fixed_sizes", [False, True])
@pytest.mark.parametrize("antialias", [False, True])
def test_a_table_resized_to_a_size_that_is_written_down_is_constant(antialias: bool, fixed_sizes: bool) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        table = F.interpolate(m.table, size=(12, 8), mode="bicubic", antialias=antialias)
        return (m.stem(x) + table).relu()  # type: ignore[no-any-return]

    model = Lambda(forward, stem=nn.Conv2d(3, 4, 3, stride=2, padding=1), table=torch.randn(1, 4, 5, 7)).double()
    x = torch.randn(IMAGE, dtype=torch.float64)
    fused = fuse(model, x, fixed_sizes=fixed_sizes).module
    assert not any(node.target is F.interpolate for node in fused.graph.nodes)
    assert relative_error(run(model, x), run(fused, x)) < EXACT
