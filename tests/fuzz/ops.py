"""The fuzzer's vocabulary: each function draws one statement of a `forward`, as source text, or None if nothing fits.

A statement may be illegal for the shapes at hand; the generator runs it and drops what raises. So the drawing here need
not know shapes exactly, and reaches odd corners because it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch


@dataclass(frozen=True)
class Statement:
    """One line of `forward`.

    Attributes:
        template: source with `{t}` for the target and `{0}`, `{1}` ... for what is read.
        reads: the names read, in order.
        layers: names of the attributes of `self` that it uses.
        target: the name it assigns; empty for an in-place statement, which changes `reads[0]`.
    """

    template: str
    reads: tuple[str, ...]
    layers: tuple[str, ...] = ()
    target: str = ""

    def source(self) -> str:
        """The line as Python."""
        return self.template.format(*self.reads, t=self.target)


class Scope:
    """What a statement can use: values by name, and layers (source lines that set attributes of `self`)."""

    def __init__(self, rng: Random, values: dict[str, torch.Tensor], layers: dict[str, str]) -> None:
        self.rng, self.values, self.layers = rng, values, layers
        self.made: dict[str, str] = {}

    def value(self, *ndims: int) -> tuple[str, torch.Tensor] | None:
        """A name and its tensor, recent ones more often, of one of these numbers of axes."""
        names = [name for name, tensor in self.values.items() if not ndims or tensor.ndim in ndims]
        if not names:
            return None
        recent = self.rng.choices([1, 3, len(names)], [5, 3, 2])[0]
        name = self.rng.choice(names[-recent:])
        return name, self.values[name]

    def like(self, name: str) -> str | None:
        """Another name whose tensor has the same shape."""
        shape = self.values[name].shape
        names = [other for other, tensor in self.values.items() if tensor.shape == shape and other != name]
        return self.rng.choice(names) if names else None

    def layer(self, kind: str, text: str) -> str:
        """Declares an attribute of `self` and returns its name; `text` is the right-hand side."""
        index = len(self.layers) + len(self.made)
        while f"{kind}{index}" in self.layers:
            index += 1
        name = f"{kind}{index}"
        buffer = text.startswith("buffer:")
        line = f'self.register_buffer("{name}", {text[7:]})' if buffer else f"self.{name} = {text}"
        self.made[name] = line
        return name

    def existing(self, kind: str) -> str | None:
        """A layer of that kind that is already there, to be shared."""
        names = [name for name in self.layers if name.rstrip("0123456789") == kind]
        return self.rng.choice(names) if names and self.rng.random() < 0.4 else None


Op = Callable[[Scope], "Statement | None"]


def divisor(rng: Random, *numbers: int) -> int:
    """A random common divisor."""
    return rng.choice([g for g in range(1, min(numbers) + 1) if all(n % g == 0 for n in numbers)])


def _call(scope: Scope, kind: str, name: str, make: Callable[[], str], suffix: str = "") -> Statement:
    layer = scope.existing(kind) or scope.layer(kind, make())
    return Statement(f"{{t}} = self.{layer}({{0}}{suffix})", (name,), (layer,))


def conv(scope: Scope) -> Statement | None:
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c_in = scope.rng, x.ndim - 2, x.shape[1]
    c_out = rng.choice([c_in, c_in, 1, 2, 3, 4, 6, 8])
    groups = rng.choice([1, 1, divisor(rng, c_in, c_out)])
    k = rng.choice([1, 1, 2, 3, 3, 3, 5])
    dilation = rng.choice([1, 1, 1, 2])
    stride = rng.choice([1, 1, 1, 1, 2])
    padding: object = rng.choice([dilation * (k - 1) // 2] * 4 + [0, 1])
    if stride == 1 and rng.random() < 0.1:
        padding = "same"
    elif rank == 2 and rng.random() < 0.15:
        padding = (rng.choice([0, 1]), rng.choice([0, 1, 2]))
    bias = rng.random() < 0.6
    if rng.random() < 0.25:
        weight = scope.layer("w", f"nn.Parameter(torch.randn({c_out}, {c_in // groups}{f', {k}' * rank}) / {k})")
        shift = scope.layer("p", f"nn.Parameter(torch.randn({c_out}))") if bias else ""
        given = f"bias=self.{shift}, " if shift else ""
        options = f"{given}stride={stride}, padding={padding!r}, dilation={dilation}, groups={groups}"
        template = f"{{t}} = F.conv{rank}d({{0}}, self.{weight}, {options})"
        return Statement(template, (name,), (weight, shift) if shift else (weight,))
    mode = rng.choice(["zeros"] * 6 + ["reflect", "replicate", "circular"])
    options = f"{stride}, {padding!r}, {dilation}, {groups}, {bias}, padding_mode={mode!r}"
    return _call(scope, f"conv{rank}d_", name, lambda: f"nn.Conv{rank}d({c_in}, {c_out}, {k}, {options})")


def parallel(scope: Scope) -> Statement | None:
    """A branch beside an existing tensor of the same shape: the sum is likely to merge."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c = scope.rng, x.ndim - 2, x.shape[1]
    groups, k = divisor(rng, c), rng.choice([1, 3, 5])
    layer = scope.layer(f"conv{rank}d_", f"nn.Conv{rank}d({c}, {c}, {k}, padding={k // 2}, groups={groups})")
    small = scope.layer(f"conv{rank}d_", f"nn.Conv{rank}d({c}, {c}, 1, groups={divisor(rng, c)}, bias=False)")
    norm = scope.layer(f"norm{rank}d_", f"nn.BatchNorm{rank}d({c})")
    body = rng.choice(
        [
            f"self.{layer}({{0}}) + self.{norm}({{0}})",
            f"self.{norm}(self.{layer}({{0}})) + {{0}}",
            f"self.{norm}(self.{layer}({{0}}) - self.{small}({{0}}))",
            f"{{0}} + 0.5 * (self.{norm}(self.{layer}({{0}})) - self.{small}({{0}}))",
            f"sum([self.{small}({{0}}), self.{layer}({{0}}), {{0}}])",
            f"self.{small}(self.{layer}({{0}})) + self.{layer}({{0}})",
        ]
    )
    return Statement(f"{{t}} = {body}", (name,), tuple(n for n in (layer, small, norm) if n in body))


def conv_transpose(scope: Scope) -> Statement | None:
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c_in = scope.rng, x.ndim - 2, x.shape[1]
    c_out = rng.choice([c_in, 2, 4, 6])
    groups, k, stride = divisor(rng, c_in, c_out), rng.choice([1, 2, 3, 4]), rng.choice([1, 1, 2])
    padding, extra, dilation = rng.choice([0, 0, 1]), rng.choice([0, stride - 1]), rng.choice([1, 1, 2])
    if rng.random() < 0.3:
        weight = scope.layer("w", f"nn.Parameter(torch.randn({c_in}, {c_out // groups}{f', {k}' * rank}) / {k})")
        options = f"stride={stride}, padding={padding}, output_padding={extra}, groups={groups}, dilation={dilation}"
        return Statement(f"{{t}} = F.conv_transpose{rank}d({{0}}, self.{weight}, {options})", (name,), (weight,))
    options = f"{k}, {stride}, {padding}, {extra}, {groups}, {rng.random() < 0.5}, {dilation}"
    text = f"nn.ConvTranspose{rank}d({c_in}, {c_out}, {options})"
    return _call(scope, f"up{rank}d_", name, lambda: text)


def norm(scope: Scope) -> Statement | None:
    found = scope.value(2, 3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, c = scope.rng, x.shape[1]
    rank = max(x.ndim - 2, 1)
    if rng.random() < 0.3:
        mean, var = scope.layer("m", f"buffer:torch.randn({c})"), scope.layer("v", f"buffer:torch.rand({c}) + 0.5")
        gamma = scope.layer("p", f"nn.Parameter(torch.randn({c}))")
        rest = rng.choice([f", self.{gamma}", f", weight=self.{gamma}, training=False", ", eps=0.01"])
        layers = (mean, var, gamma) if "self" in rest else (mean, var)
        return Statement(f"{{t}} = F.batch_norm({{0}}, self.{mean}, self.{var}{rest})", (name,), layers)
    options = rng.choice(["", "", ", eps=0.1", ", affine=False"])
    return _call(scope, f"norm{rank}d_", name, lambda: f"nn.BatchNorm{rank}d({c}{options})")


def linear(scope: Scope) -> Statement | None:
    found = scope.value()
    if found is None:
        return None
    name, x = found
    rng, c = scope.rng, x.shape[-1]
    out, bias = rng.choice([c, c, 3, 5, 6]), rng.random() < 0.6
    if rng.random() < 0.25:
        weight = scope.layer("w", f"nn.Parameter(torch.randn({out}, {c}) / 2)")
        product = rng.choice([f"F.linear({{0}}, self.{weight})", f"{{0}} @ self.{weight}.t()"])
        return Statement(f"{{t}} = {product}", (name,), (weight,))
    return _call(scope, "fc", name, lambda: f"nn.Linear({c}, {out}, bias={bias})")


def scale(scope: Scope) -> Statement | None:
    """A constant of any broadcastable shape, on either side; per channel most of the time."""
    found = scope.value()
    if found is None:
        return None
    name, x = found
    rng = scope.rng
    channels = (x.shape[1], *(1,) * (x.ndim - 2))
    shape = rng.choice([channels] * 4 + [(1, *channels), (1,), (), (x.shape[-1],), (1,) * (x.ndim - 1)])
    text = f"torch.randn({shape}).abs() + 0.5"
    layer = scope.layer("g", f"nn.Parameter({text})" if rng.random() < 0.5 else f"buffer:{text}")
    forms = ["{{0}} * {g}", "{g} * {{0}}", "{{0}} + {g}", "{g} - {{0}}", "{{0}} - {g}", "{{0}} / {g}"]
    forms += ["torch.mul({{0}}, {g})", "torch.add({{0}}, {g}, alpha=2)", "{{0}}.mul({g})", "torch.sub({g}, {{0}})"]
    return Statement("{t} = " + rng.choice(forms).format(g=f"self.{layer}"), (name,), (layer,))


def scalar(scope: Scope) -> Statement | None:
    found = scope.value()
    if found is None:
        return None
    forms = [
        "-{0}",
        "2 * {0}",
        "{0} / 3",
        "1 - {0}",
        "{0} - 0.3",
        "torch.neg({0})",
        "{0}.div(2).add(1)",
        "torch.rsub({0}, 2)",
    ]
    return Statement("{t} = " + scope.rng.choice(forms), (found[0],))


def add(scope: Scope) -> Statement | None:
    found = scope.value()
    if found is None:
        return None
    name = found[0]
    other = scope.like(name) or name
    forms = [
        "{0} + {1}",
        "{0} + {1}",
        "{0} - {1}",
        "torch.add({0}, {1}, alpha=-2)",
        "{0}.sub({1})",
        "sum([{0}, {1}, {0}])",
    ]
    forms += ["{0} * {1}"] if scope.rng.random() < 0.2 else []
    return Statement("{t} = " + scope.rng.choice(forms), (name, other))


def broadcast_add(scope: Scope) -> Statement | None:
    """Adds two tensors whose shapes need not agree; most draws are illegal and dropped."""
    first, second = scope.value(), scope.value()
    if first is None or second is None or first[1].shape == second[1].shape:
        return None
    return Statement("{t} = {0} + {1}", (first[0], second[0]))


def channels(scope: Scope) -> Statement | None:
    """Concatenation, splitting, slicing and shuffling of channels."""
    found = scope.value(2, 3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, c = scope.rng, x.shape[1]
    if rng.random() < 0.4:
        other = scope.like(name) or name
        return Statement("{t} = torch.cat([{0}, {1}], " + rng.choice(["1", "dim=1"]) + ")", (name, other))
    if c < 2:
        return None
    part, at = rng.randrange(2), rng.randrange(1, c)
    forms = [
        f"{{0}}.chunk(2, 1)[{part}]",
        f"{{0}}[:, :{at}]",
        f"{{0}}[:, {at}:]",
        f"torch.split({{0}}, {at}, dim=1)[0]",
    ]
    forms += [f"{{0}}[:, {list(reversed(range(c)))}]", "{0}.flip(1)", f"{{0}}.narrow(1, {at}, 1)"]
    if c % 2 == 0:
        forms.append(f"{{0}}.unflatten(1, (2, {c // 2})).transpose(1, 2).flatten(1, 2)")
    return Statement("{t} = " + rng.choice(forms), (name,))


def window(scope: Scope) -> Statement | None:
    """Pooling, padding and cropping."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank = scope.rng, x.ndim - 2
    k = rng.choice([2, 3])
    pads = tuple(rng.choice([0, 1, 2]) for _ in range(2 * rank))
    forms = [
        f"F.avg_pool{rank}d({{0}}, 3, 1, 1)",
        f"F.avg_pool{rank}d({{0}}, 3, 1, 1, count_include_pad=False)",
        f"F.avg_pool{rank}d({{0}}, {k}, ceil_mode={rng.random() < 0.3})",
        f"F.max_pool{rank}d({{0}}, 3, 1, 1)",
        f"F.pad({{0}}, {pads})",
        f"F.pad({{0}}, {pads}, value=0.7)",
        f"F.pad({{0}}, {pads}, mode='reflect')",
        f"F.adaptive_avg_pool{rank}d({{0}}, 1)",
        "{0}[:, :, 1:]",
    ]
    return Statement("{t} = " + rng.choice(forms), (name,))


def move(scope: Scope) -> Statement | None:
    """Axes moved, joined or averaged away."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    forms = [
        "{0}.transpose(1, 2)",
        "{0}.transpose(1, -1)",
        "{0}.flatten(2)",
        "{0}.flatten(1)",
        "{0}.mean(-1)",
        "{0}.mean(1, True)",
    ]
    if x.ndim == 4:
        forms += [
            "{0}.permute(0, 2, 3, 1)",
            "{0}.permute(0, 3, 1, 2)",
            "{0}.mean((2, 3))",
            "{0}.flatten(2).transpose(1, 2)",
        ]
    return Statement("{t} = " + scope.rng.choice(forms), (name,))


def nonlinear(scope: Scope) -> Statement | None:
    found = scope.value()
    if found is None:
        return None
    forms = ["F.relu({0})", "torch.sigmoid({0})", "F.leaky_relu({0}, 0.2)", "{0}.tanh()", "F.gelu({0})", "{0}.abs()"]
    if scope.rng.random() < 0.3:
        return _call(
            scope, "act", found[0], lambda: scope.rng.choice(["nn.ReLU()", "nn.SiLU()", "nn.ReLU(inplace=True)"])
        )
    return Statement("{t} = " + scope.rng.choice(forms), (found[0],))


def idle(scope: Scope) -> Statement | None:
    """What does nothing in eval mode."""
    found = scope.value()
    if found is None:
        return None
    if scope.rng.random() < 0.5:
        forms = [
            "F.dropout({0}, 0.3, self.training)",
            "F.dropout({0}, training=False)",
            "{0}.contiguous()",
            "{0} * 1",
            "{0} + 0",
        ]
        return Statement("{t} = " + scope.rng.choice(forms), (found[0],))
    kinds = ["nn.Dropout(0.4)", "nn.Identity()", "nn.AlphaDropout(0.2)", "nn.Dropout2d(0.3)"]
    return _call(scope, "drop", found[0], lambda: scope.rng.choice(kinds))


def in_place(scope: Scope) -> Statement | None:
    """Writes into a tensor that others may read, or that may be a view of another."""
    found = scope.value()
    if found is None or found[0] == "x":
        return None
    name = found[0]
    other = scope.like(name)
    if other is not None and scope.rng.random() < 0.6:
        forms = ["{0} += {1}", "{0}.add_({1})", "{0}.add_({1}, alpha=0.5)", "{0} -= {1}", "{0}.sub_({1})"]
        return Statement(scope.rng.choice(forms), (name, other))
    forms = ["F.relu_({0})", "F.relu({0}, inplace=True)", "{0} *= 2", "{0}.mul_(0.5).add_(1)", "{0}.neg_()", "{0} /= 4"]
    return Statement(scope.rng.choice(forms), (name,))


OPS: list[tuple[int, Op]] = [
    (9, conv),
    (6, parallel),
    (3, conv_transpose),
    (8, norm),
    (3, linear),
    (5, scale),
    (2, scalar),
    (6, add),
    (1, broadcast_add),
    (3, channels),
    (3, window),
    (2, move),
    (4, nonlinear),
    (2, idle),
    (3, in_place),
]
