"""More of the fuzzer's vocabulary: concats, splits, shuffles, permutes, heads and tokens, each around affine layers.

A statement here is a small idiom, for a lone permute or slice seldom meets a layer that it could merge with.
"""

from __future__ import annotations

from tests.fuzz.ops import Op, Scope, Statement, divisor


def _conv(scope: Scope, rank: int, c_in: int, c_out: int, k: int = 1, groups: int = 1) -> str:
    bias = scope.rng.random() < 0.5
    options = f"{c_in}, {c_out}, {k}, padding={k // 2}, groups={groups}, bias={bias}"
    return scope.layer(f"conv{rank}d_", f"nn.Conv{rank}d({options})")


def _norm(scope: Scope, rank: int, c: int) -> str:
    return scope.layer(f"norm{rank}d_", f"nn.BatchNorm{rank}d({c})")


def _linear(scope: Scope, c_in: int, c_out: int) -> str:
    return scope.layer("fc", f"nn.Linear({c_in}, {c_out}, bias={scope.rng.random() < 0.6})")


def _statement(scope: Scope, forms: list[str], name: str, **layers: str) -> Statement:
    """One of `forms`, in which `[a]` stands for the layer `a`; only the layers that it uses are kept."""
    form = scope.rng.choice(forms)
    used = [layer for key, layer in layers.items() if f"[{key}]" in form]
    for key, layer in layers.items():
        form = form.replace(f"[{key}]", f"self.{layer}")
    return Statement(form if "{t}" in form else "{t} = " + form, (name,), tuple(used))


def concat(scope: Scope) -> Statement | None:
    """Layers of one source side by side, with a BatchNorm, a 1x1 or nothing behind."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c = scope.rng, x.ndim - 2, x.shape[1]
    k, width = rng.choice([1, 1, 3]), rng.choice([1, 2, 4])
    a, b = _conv(scope, rank, c, width, k), _conv(scope, rank, c, 4, rng.choice([k, 3]))
    norm, last = _norm(scope, rank, width + 4), _conv(scope, rank, width + 4, c, 1)
    wide = _norm(scope, rank, width + c)
    forms = [
        "[norm](torch.cat([[a]({0}), [b]({0})], 1))",
        "torch.cat(([b]({0}), [a]({0}) * 2), dim=1)",
        "[last]([norm](torch.cat([[a]({0}), F.relu([b]({0}))], 1)))",
        f"[last](torch.cat([F.relu([a]({{0}})), [b]({{0}})], -{rank + 1}))",
        "[wide](torch.cat([[a]({0}), {0}], 1))",
        "p = [a]({0}); {t} = torch.cat([p, [b]({0})], 1)[:, 1:] + p.mean(1, True)",
        "torch.cat([[b]({0}), -[b]({0})], 0).chunk(2, 0)[0]",
        "F.relu([norm](torch.cat([[a]({0}), [b]({0})], 1))) + [last](torch.cat([[a]({0}), [b]({0})], 1)).mean(1, True)",
    ]
    return _statement(scope, forms, name, a=a, b=b, norm=norm, last=last, wide=wide)


def parts(scope: Scope) -> Statement | None:
    """The output of one layer cut into parts, each read by something else."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c = scope.rng, x.ndim - 2, x.shape[1]
    at = rng.choice([1, 2, 3])
    whole, k = _conv(scope, rank, c, 6, rng.choice([1, 3])), rng.choice([1, 1, 3])
    first, second = _norm(scope, rank, at), _norm(scope, rank, 6 - at)
    left, right = _conv(scope, rank, at, 4, k), _conv(scope, rank, 6 - at, 4, k)
    cut = rng.choice([f"p.split([{at}, {6 - at}], 1)", f"p[:, :{at}], p[:, {at}:]", f"p[:, :{at}], p[:, {at - 6}:]"])
    front = "p = [whole]({0}); q, r = " + cut + "; {t} = "
    forms = [
        front + "torch.cat([[first](q), [second](r)], 1)",
        front + "torch.cat([[second](r), F.relu([first](q))], 1)",
        front + "[left](q) + [right](r)",
        front + "torch.cat([[left](q), [right](r)], 1)",
        front + "[right](r) * torch.sigmoid([left](q))",
        front + "[second](r)",
        f"[right]([whole]({{0}})[:, {at}::1])",
        "p = [whole]({0}); q, r, s = p.chunk(3, 1); {t} = torch.cat([s * 2, q, r + q], 1)",
        "p = [whole]({0}); {t} = torch.cat([p[:, ::2], p[:, 1::2] * 0.5], 1) + p",
    ]
    return _statement(scope, forms, name, whole=whole, first=first, second=second, left=left, right=right)


def order(scope: Scope) -> Statement | None:
    """A constant order of the channels between layers."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c = scope.rng, x.ndim - 2, x.shape[1]
    groups = rng.choice([1, 2, 3])
    before = _conv(scope, rank, c, 6, rng.choice([1, 3]), groups if c % groups == 0 else 1)
    norm, after = _norm(scope, rank, 6), _conv(scope, rank, 6, c, rng.choice([1, 3]), divisor(rng, 6, c))
    index = scope.layer("i", f"buffer:torch.tensor({rng.sample(range(6), 6)})")
    g = rng.choice([2, 3])
    picks = [
        f"F.channel_shuffle(p, {g})",
        f"p.reshape(p.shape[0], {g}, {6 // g}, *p.shape[2:]).transpose(1, 2).reshape(p.shape)",
        f"p.unflatten(1, ({g}, -1)).transpose(2, 1).flatten(1, 2)",
        "p.flip(1)",
        "p[:, [i]]",
        "torch.index_select(p, 1, [i])",
        f"p[:, {rng.sample(range(6), 6)}]",
    ]
    front = rng.choice(["p = [before]({0}); ", "p = F.relu([before]({0})); "])
    behind = rng.choice(["[norm](q)", "[after](q)", "[after]([norm](q))", "q + p", "[norm](q) + p", "q.flip(1) * 2"])
    form = f"{front}q = {rng.choice(picks)}; {{t}} = {behind}"
    return _statement(scope, [form], name, before=before, norm=norm, after=after, i=index)


def around(scope: Scope) -> Statement | None:
    """Layers on both sides of a permute, a transpose or a flatten."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c = scope.rng, x.ndim - 2, x.shape[1]
    conv, norm, one = _conv(scope, rank, c, 5, rng.choice([1, 3])), _norm(scope, rank, 5), _norm(scope, 1, 5)
    fc, back = _linear(scope, 5, 5), _linear(scope, 5, c)
    gamma = scope.layer("g", "nn.Parameter(torch.randn(5))")
    last = ", ".join(str(axis) for axis in (0, *range(2, rank + 2), 1))
    first = ", ".join(str(axis) for axis in (0, rank + 1, *range(1, rank + 1)))
    front = rng.choice(["p = [conv]({0}); ", "p = F.gelu([conv]({0})); ", "p = [norm]([conv]({0})); "])
    forms = [
        f"[fc](p.permute({last}))",
        f"[fc](p.permute({last})).permute({first})",
        f"[norm]([fc](p.permute({last})).permute({first}))",
        f"([gamma] * [fc](p.permute({last}))).permute({first}) + p",
        f"{{0}} + [back]([fc](p.permute({last}))).permute({first})",
        "[fc](p.flatten(2).transpose(1, 2))",
        "[one](p.flatten(2)).transpose(1, 2) * [gamma]",
        "[one]([fc](p.flatten(2).transpose(1, 2)).transpose(1, 2))",
        "q = [fc](p.flatten(2).mT); {t} = [one](q.flatten(0, 1)).reshape(q.shape)",
        "q = [fc](p.flatten(2).mT); {t} = [one](q.transpose(1, 2)).view_as(p)",
        f"[one](p.permute({last}).flatten(0, {rank}))",
    ]
    form = front + rng.choice([f if "{t}" in f else "{t} = " + f for f in forms])
    return _statement(scope, [form], name, conv=conv, norm=norm, one=one, fc=fc, back=back, gamma=gamma)


def head(scope: Scope) -> Statement | None:
    """BatchNorm or 1x1, a global or adaptive pool or a flatten, a linear layer."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c = scope.rng, x.ndim - 2, x.shape[1]
    norm, conv, after = _norm(scope, rank, c), _conv(scope, rank, c, c, rng.choice([1, 3])), _norm(scope, 1, 4)
    fc, four, flat = _linear(scope, c, 4), _linear(scope, c * 2**rank, 4), _linear(scope, x[0].numel(), 4)
    space = tuple(range(2, rank + 2))
    pool = f"F.adaptive_avg_pool{rank}d(p, "
    front = rng.choice(
        ["p = [norm]({0}); ", "p = [conv]({0}); ", "p = [norm](F.relu({0})); ", "p = [norm]([conv]({0})); "]
    )
    forms = [
        f"[fc]({pool}1).flatten(1))",
        f"[fc](p.mean({space}))",
        f"[after]([fc](p.mean({space})))",
        f"[fc](p.mean({space}, keepdim=True).flatten(1))",
        "[fc](p.flatten(2).mean(-1))",
        "[after]([fc](p.flatten(2).transpose(1, 2).mean(1)))",
        f"[four]({pool}2).flatten(1))",
        "[flat](p.flatten(1))",
        "[flat](p.reshape(p.shape[0], -1))",
        f"p - p.mean({space}, True)",
        f"p + [conv]({pool}1))",
        f"([fc](p.mean({space})) + [fc]({pool}1).flatten(1))) / 2",
    ]
    form = front + "{t} = " + rng.choice(forms)
    return _statement(scope, [form], name, norm=norm, conv=conv, after=after, fc=fc, four=four, flat=flat)


def behind(scope: Scope) -> Statement | None:
    """A scale, mostly positive, behind ReLU, leaky ReLU or max-pool."""
    found = scope.value(3, 4, 5)
    if found is None:
        return None
    name, x = found
    rng, rank, c = scope.rng, x.ndim - 2, x.shape[1]
    conv, after = _conv(scope, rank, c, 4, rng.choice([1, 3])), _conv(scope, rank, 4, c, rng.choice([1, 3]))
    sign = rng.choice(["abs().add(0.1)", "abs().add(0.1)", "sub(0.1)"])
    scale = scope.layer("g", f"buffer:torch.randn({(4, *(1,) * rank)}).{sign}")
    norm = scope.layer(f"norm{rank}d_", f"nn.BatchNorm{rank}d(4, affine={rng.random() < 0.4})")
    steps = [
        "F.relu(p)",
        "F.leaky_relu(p, 0.1)",
        f"F.max_pool{rank}d(p, 3, 1, 1)",
        f"F.max_pool{rank}d(F.relu(p), 2, 1)",
    ]
    behinds = [
        "q * [scale]",
        "[norm](q)",
        "[after](q * [scale])",
        "torch.sigmoid(q * [scale])",
        "q * 3",
        "q * [scale] + p.mean()",
    ]
    form = f"p = [conv]({{0}}); q = {rng.choice(steps)}; {{t}} = {rng.choice(behinds)}"
    return _statement(scope, [form], name, conv=conv, after=after, scale=scale, norm=norm)


def tokens(scope: Scope) -> Statement | None:
    """Linear layers on the last axis of two, three or four, joined, chained, scaled and normalised."""
    found = scope.value()
    if found is None:
        return None
    name, x = found
    c = x.shape[-1]
    a, b, d = _linear(scope, c, 4), _linear(scope, c, 4), _linear(scope, 4, c)
    norm, wide = _norm(scope, 1, 4), _linear(scope, c, 12)
    forms = [
        "torch.cat([[a]({0}), [b]({0})], -1)",
        "[d]([a]({0})) + {0}",
        "([a]({0}) + [b]({0})) / 2",
        "p = [a]({0}); {t} = [norm](p.reshape(-1, 4)).reshape(p.shape)",
        "p, q, r = [wide]({0}).chunk(3, -1); {t} = p * 2 + torch.sigmoid(q) * r",
        "p = [wide]({0}).split([4, 8], dim=-1)[0]; {t} = [d](p)",
        "[d](F.relu([a]({0})) * 0.5) - {0}",
        "torch.tanh([a]({0})) * [b]({0})",
    ]
    return _statement(scope, forms, name, a=a, b=b, d=d, norm=norm, wide=wide)


LAYOUT_OPS: list[tuple[int, Op]] = [
    (4, concat),
    (4, parts),
    (4, order),
    (4, around),
    (2, head),
    (3, behind),
    (2, tokens),
]
