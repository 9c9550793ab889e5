"""What depends on parameters, buffers and literals only is computed once; what must not be stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrizations

import reparam
from reparam.passes import PIPELINE, ConstantFolding
from tests.support import relative_error
from tests.zoo.trap import Lambda

X = torch.randn(2, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def built(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    return Lambda(forward, **parts).double().eval()


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def standardised(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight = F.batch_norm(m.c.weight.reshape(1, 4, -1), None, None, m.g, training=True, eps=1e-6)
    return F.relu(F.conv2d(x, weight.reshape_as(m.c.weight), m.c.bias, padding=1))


def bias_table(m: Any, x: torch.Tensor) -> torch.Tensor:
    bias = m.table[m.index.view(-1)].view(9, 9, 2).permute(2, 0, 1).contiguous()
    return torch.softmax(x @ x.transpose(1, 2) + bias[0], -1) @ x


def small_network(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x @ x.transpose(1, 2) + m.b(F.relu(m.a(m.table))).view(9, 9), -1) @ x


INDEX = torch.arange(81).view(9, 9) % 25
FOLDED: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "weight_norm": (lambda: built(lambda m, x: F.relu(m.c(x)), c=parametrizations.weight_norm(conv())), X),
    "spectral_norm": (lambda: built(lambda m, x: F.relu(m.c(x)), c=parametrizations.spectral_norm(conv())), X),
    "weight_standardisation": (lambda: built(standardised, c=conv(), g=nn.Parameter(torch.rand(4))), X),
    "equalised_learning_rate": (
        lambda: built(lambda m, x: torch.tanh(F.conv2d(x, m.c.weight * (2 / 36) ** 0.5, m.c.bias)), c=conv()),
        X,
    ),
    "kernel_of_an_einsum": (
        lambda: built(
            lambda m, x: torch.tanh(F.conv2d(x, torch.einsum("or,rihw->oihw", m.u, m.v))),
            u=nn.Parameter(torch.randn(4, 2)),
            v=nn.Parameter(torch.randn(2, 4, 3, 3)),
        ),
        X,
    ),
    "gate": (
        lambda: built(lambda m, x: torch.tanh(x) * torch.sigmoid(m.g), g=nn.Parameter(torch.randn(4, 1, 1))),
        X,
    ),
    "bias_table": (lambda: built(bias_table, table=nn.Parameter(torch.randn(25, 2)), index=INDEX), TOKENS),
    "bias_table_by_columns": (
        lambda: built(
            lambda m, x: torch.softmax(x @ x.mT + m.table[:, m.index], -1) @ x,
            table=nn.Parameter(torch.randn(2, 25)),
            index=INDEX,
        ),
        TOKENS,
    ),
    "small_network": (
        lambda: built(small_network, table=torch.randn(81, 2), a=nn.Linear(2, 8), b=nn.Linear(8, 1)),
        TOKENS,
    ),
    "position_resized": (
        lambda: built(
            lambda m, x: torch.tanh(x) + F.interpolate(m.p, size=(6, 6), mode="bicubic"),
            p=nn.Parameter(torch.randn(1, 4, 3, 3)),
        ),
        X,
    ),
    "mask": (lambda: built(lambda m, x: torch.softmax(x @ x.mT + m.m.tril().log(), -1), m=torch.ones(9, 9)), TOKENS),
}


def constant_operations(module: nn.Module) -> list[str]:
    """Operations of a fused module that no input goes into."""
    assert isinstance(module, fx.GraphModule)
    depends: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
    return [str(node.target) for node in module.graph.nodes if node not in depends and node.op.startswith("call")]


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_computed_once(name: str) -> None:
    make, x = FOLDED[name]
    model = make()
    fused = reparam.fuse(model, x)
    assert fused.report.comparison is not None
    assert fused.report.comparison.passed
    for batch in (x, x[:1]):
        assert relative_error(model(batch), fused.module(batch)) < 1e-14
    assert constant_operations(fused.module) == []
    assert constant_operations(reparam.fuse(model, x, passes=PIPELINE[:-1], verify=False).module) or any(
        rewrite.pass_name == "collapse" for rewrite in fused.report.rewrites
    )


class Symmetric(nn.Module):
    """A parametrisation of somebody's own, which calls modules of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Softplus()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.act(weight + weight.transpose(-1, -2))


def under(parametrisation: nn.Module) -> nn.Module:
    layer = conv()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", parametrisation)
    return layer


def normalised_by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight = m.g[:, None, None, None] * F.normalize(m.c.weight.view(m.c.weight.size(0), -1), dim=1).view_as(m.c.weight)
    return F.relu(m.n(F.conv2d(x, weight, m.c.bias, padding=1)))


def spectral_by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight = m.c.weight.view(4, -1)
    v = F.normalize(weight.t() @ m.u, dim=0, eps=1e-12)
    u = F.normalize(weight @ v, dim=0)
    if m.training:
        m.u.copy_(u)
    return F.relu(m.n(F.conv2d(x, m.c.weight / u.dot(weight @ v), m.c.bias, padding=1)))


def in_steps(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight = m.c.weight
    weight = weight - weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
    std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
    return F.relu(m.n(F.conv2d(x, weight / std.expand_as(weight), m.c.bias, padding=1)))


def blurred(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Anti-aliased down-sampling: as many copies of the kernel as the tensor has channels."""
    y = m.n(m.c(x))
    kernel = m.f[None, None].repeat(y.size(1), 1, 1, 1)
    return F.relu(F.conv2d(y, kernel, stride=2, groups=y.shape[1]))


KERNELS: dict[str, Callable[[], nn.Module]] = {
    "normalised": lambda: built(normalised_by_hand, c=conv(), g=nn.Parameter(torch.rand(4)), n=nn.BatchNorm2d(4)),
    "spectral": lambda: built(spectral_by_hand, c=conv(), u=torch.ones(4), n=nn.BatchNorm2d(4)),
    "in_steps": lambda: built(in_steps, c=conv(), n=nn.BatchNorm2d(4)),
    "activation": lambda: built(lambda m, x: F.relu(m.n(m.c(x))), c=under(nn.Softplus()), n=nn.BatchNorm2d(4)),
    "own": lambda: built(lambda m, x: F.relu(m.n(m.c(x))), c=under(Symmetric()), n=nn.BatchNorm2d(4)),
    "copies": lambda: built(blurred, c=conv(), f=torch.rand(3, 3), n=nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_that_people_compute_are_one_layer_s(name: str) -> None:
    model = KERNELS[name]()
    result = reparam.fuse(model, X)
    kinds = [type(module).__name__ for module in result.module.children()]
    assert kinds.count("Conv2d") == 1
    assert "BatchNorm2d" not in kinds
    assert constant_operations(result.module) == []
    for x in (X, X[:1], torch.randn(3, 4, 5, 7, dtype=torch.float64)):
        assert relative_error(model(x), result.module(x)) < 1e-14


HOOKS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": torch.nn.utils.weight_norm,
    "weight_norm_of_all": lambda layer: torch.nn.utils.weight_norm(layer, dim=None),
    "spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", HOOKS)
def test_weights_that_hooks_compute_are_computed_once(name: str) -> None:
    torch.manual_seed(0)
    parts = {"c": HOOKS[name](conv()), "n": nn.BatchNorm2d(4), "d": HOOKS[name](nn.ConvTranspose2d(4, 4, 2))}
    model = built(lambda m, x: torch.tanh(m.d(F.relu(m.n(m.c(x))))), **parts)
    with torch.no_grad():
        for _ in range(20):  # spectral_norm looks for the largest singular value while the model trains
            model.train()(X)
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for dtype in (torch.float64, torch.float32):
        result = reparam.fuse(model.to(dtype), X.to(dtype))
        assert result.report.undone == ()
        assert result.report.after.batch_norms == 0
        assert not any(module._forward_pre_hooks for module in result.module.modules())
        held = {name: value.numel() for name, value in result.module.state_dict().items()}
        assert held == {"c.weight": 144, "c.bias": 4, "d.weight": 64, "d.bias": 4}
        assert relative_error(model(X.to(dtype)), result.module(X.to(dtype))) < (1e-14 if dtype.itemsize == 8 else 1e-5)
    assert all(torch.allclose(value, before[key].to(value.dtype)) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_what_a_hook_computes_a_weight_from_stays_if_the_forward_reads_it_too(name: str) -> None:
    torch.manual_seed(0)
    read = {"weight_norm": "weight_g", "spectral_norm": "weight_orig"}[name]
    parts = {"c": HOOKS[name](conv()), "d": HOOKS[name](conv()), "n": nn.BatchNorm2d(4)}
    model = built(lambda m, x: torch.tanh(m.n(m.c(x))) + m.d(x) * getattr(m.c, read).sum(), **parts)
    result = reparam.fuse(model, X)
    assert [bool(getattr(result.module, part)._forward_pre_hooks) for part in "cd"] == [True, False]
    assert relative_error(model(X), result.module(X)) < 1e-14


def test_sparse_tensors_are_no_constants() -> None:
    model = built(lambda m, x: torch.sparse.mm((m.a * 2).to_sparse(), m.c(x[0])), a=torch.eye(9), c=nn.Linear(4, 3))
    result = reparam.fuse(model, TOKENS)
    assert relative_error(model(TOKENS), result.module(TOKENS)) < 1e-14


def test_in_float32_a_constant_is_rounded_once() -> None:
    torch.manual_seed(0)
    model = built(bias_table, table=nn.Parameter(torch.randn(25, 2)), index=INDEX).float()
    result = reparam.fuse(model, TOKENS.float())
    (rewrite,) = [rewrite for rewrite in result.report.rewrites if rewrite.pass_name == "constants"]
    assert "indexing" in " ".join(rewrite.replaced)
    assert torch.equal(model(TOKENS.float()), result.module(TOKENS.float()))


def test_views_of_parameters_stay_shared() -> None:
    model = built(lambda m, x: (x @ m.w.t(), m.w[:, :1] * 1.0), w=nn.Parameter(torch.randn(4, 4)))
    result = reparam.fuse(model, TOKENS)
    assert sum(tensor.numel() for tensor in result.module.state_dict().values()) <= 16 + 4


LARGE = (ConstantFolding(most=1024, growth=2048),)


def expanded(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x) * (m.g * 2 + m.h)


def test_a_table_that_would_blow_up_the_file_stays_with_a_reason() -> None:
    model = built(expanded, g=nn.Parameter(torch.randn(4, 6, 1)), h=nn.Parameter(torch.randn(4, 1, 6)))
    result = reparam.fuse(model, X, passes=LARGE)
    (refusal,) = [refusal for refusal in result.report.refusals if refusal.pass_name == "constants"]
    assert "would add 0.0 MiB" in refusal.reason
    assert constant_operations(result.module)
    assert constant_operations(reparam.fuse(model, X).module) == []


def test_all_constants_together_have_a_limit_too() -> None:
    parts = {f"p{i}": nn.Parameter(torch.randn(8, 1)) for i in range(8)}
    model = built(lambda m, x: x @ sum(getattr(m, f"p{i}") @ getattr(m, f"p{i}").mT for i in range(8))[:4], **parts)
    model64 = built(
        lambda m, x: [x[:, :8, :1] * (getattr(m, f"p{i}") @ getattr(m, f"p{i}").mT) for i in range(8)], **parts
    )
    small = reparam.fuse(model64, TOKENS, passes=(ConstantFolding(most=1 << 20, growth=1000),), verify=False)
    kept = [refusal for refusal in small.report.refusals if refusal.pass_name == "constants"]
    assert 0 < len(kept) < 8
    assert constant_operations(reparam.fuse(model, TOKENS, verify=False).module) == []


@pytest.mark.parametrize("name", ["random", "written", "trained_norm"])
def test_what_is_no_constant_is_not_folded(name: str) -> None:
    def forward(m: Any, x: torch.Tensor) -> Any:
        if name == "random":
            return x * torch.bernoulli(torch.sigmoid(m.p))
        if name == "written":
            m.state.mul_(0.5)
            return x * (m.state * 2)
        return F.batch_norm(x, m.mean, m.var, training=True) * (m.mean * 2).view(-1, 1, 1)

    def make() -> nn.Module:
        buffers = {"state": torch.ones(1), "mean": torch.zeros(4), "var": torch.ones(4)}
        return built(forward, p=nn.Parameter(torch.zeros(4, 1, 1)), **buffers)

    if name == "random":  # refused as a whole
        with pytest.raises(reparam.CaptureError, match="bernoulli"):
            reparam.fuse(make(), X, verify=False)
        return
    fused, original = reparam.fuse(make(), X, verify=False).module, make()
    for _ in range(3):
        assert relative_error(original(X), fused(X)) < 1e-14


def test_fusing_again_changes_nothing() -> None:
    make, x = FOLDED["bias_table"]
    once = reparam.fuse(make(), x).module
    again = reparam.fuse(once, x)
    assert again.report.rewrites == ()


# Where the constants are kept, and what the model may have there already.


class Named(nn.Module):
    """`constants` is a name of the model's own; what it is, is said by the caller."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(4) + 0.5)
        if own is not None:
            self.constants = own

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        to = (self.scale * 2).exp()  # a node with the name of a method
        own: Any = getattr(self, "constants", 1.0)
        kept = own.exp if isinstance(own, nn.Module) else own
        kept = kept.value if isinstance(kept, nn.Module) else kept[0] if isinstance(kept, list) else kept
        return torch.maximum(x, to[:, None, None] * 1.5) * kept


def holder(type_of: type[nn.Module] = nn.Module) -> nn.Module:
    """`constants.exp.value`, which is also what the folding would call its own."""
    outer, inner = type_of(), nn.Module()
    inner.register_buffer("value", torch.tensor(3.0))
    outer.exp = inner
    return outer


class Own(nn.Module):
    """A module of the user's."""


@pytest.mark.parametrize(
    "own",
    [None, nn.Parameter(torch.tensor(3.0)), torch.tensor(3.0), [3.0], 3.0, holder(), holder(Own)],
    ids=["none", "parameter", "tensor", "list", "number", "module", "class"],
)
def test_what_the_model_calls_constants_stays_its_own(own: Any) -> None:
    model = Named(own).double().eval()
    result = reparam.fuse(model, X)
    assert any(rewrite.pass_name == "constants" for rewrite in result.report.rewrites)
    assert relative_error(model(X), result.module(X)) < 1e-14
    again = reparam.fuse(result.module, X)
    assert relative_error(model(X), again.module(X)) < 1e-14


METHODS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "to": lambda m, x: torch.tanh(x) * (m.g * 2).to(x.dtype),
    "double": lambda m, x: torch.tanh(x) * (m.g * 2).double(),
    "type": lambda m, x: torch.tanh(x) * (m.g * 2).type(torch.float64),
    "float": lambda m, x: torch.tanh(x) * (m.g * 2).float().to(x.dtype),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_constant_whose_node_has_the_name_of_a_method(name: str) -> None:
    model = built(METHODS[name], g=nn.Parameter(torch.rand(4, 1, 1)))
    result = reparam.fuse(model, X)
    assert relative_error(model(X), result.module(X)) < 1e-14
    assert callable(result.module.to)
    assert relative_error(model(X).float(), result.module.float()(X.float())) < 1e-6


# A cast to less precision than the model's is meant to round, whatever stands behind it.
CASTS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "half": lambda m, x: torch.tanh(x) * (m.g + 1).half().to(x.dtype),
    "bfloat16": lambda m, x: torch.tanh(x) * (m.g + 1).to(torch.bfloat16).to(x.dtype),
    "to_another": lambda m, x: torch.tanh(x) * (m.g + 1).to(m.narrow).to(x),
    "type_as": lambda m, x: torch.tanh(x) * (m.g + 1).type_as(m.narrow).type_as(x),
    "weight": lambda m, x: m.norm(F.conv2d(x, m.c.weight.half().to(x.dtype))),
    "twice": lambda m, x: torch.tanh(x) * ((m.g + 1).half().float().exp().to(x.dtype)),
    "own_dtype": lambda m, x: torch.tanh(x) * (m.g + 1).to(x.dtype),
    "wider": lambda m, x: torch.tanh(x) * (m.g + 1).double().exp().to(x.dtype),
    "integer": lambda m, x: torch.tanh(x) * (m.g * 9).long().to(x.dtype),
    "rounded": lambda m, x: torch.tanh(x) * ((m.g * 100).round() / 100),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASTS)
def test_casts_to_less_precision_stay(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    parts = {"c": nn.Conv2d(4, 4, 3), "norm": norm, "g": nn.Parameter(torch.rand(4, 1, 1))}
    model = Lambda(CASTS[name], narrow=torch.zeros(1), **parts).to(dtype).eval()
    model.narrow = torch.zeros(1, dtype=torch.float16)
    x = X.to(dtype)
    result = reparam.fuse(model, x, verify=False)
    assert relative_error(model(x), result.module(x)) < (1e-14 if dtype == torch.float64 else 1e-6)
