"""Finding the weights in what a file held, and putting them into the model that was built for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam.capture.imports import first_line
from reparam.errors import InputError

StateDict = dict[str, torch.Tensor]
_LISTED = 6  # names that an error lists before it only counts


def find_models(content: Mapping[Any, Any], prefix: str = "", depth: int = 3) -> dict[str, nn.Module]:
    """Whole models inside a checkpoint: dotted key -> model."""
    found: dict[str, nn.Module] = {}
    for key, value in content.items():
        if isinstance(value, nn.Module):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, Mapping) and depth > 1:
            found.update(find_models(value, f"{prefix}{key}.", depth - 1))
    return found


def find_state_dicts(content: Mapping[Any, Any], prefix: str = "", depth: int = 4) -> dict[str, StateDict]:
    """State dicts inside a checkpoint: dotted key -> weights; the key is empty where the whole is one."""
    if is_state_dict(content):
        return {prefix.rstrip("."): {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}}
    found: dict[str, StateDict] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and depth > 1:
            found.update(find_state_dicts(value, f"{prefix}{key}.", depth - 1))
    return found


def is_state_dict(content: Any) -> bool:
    """A mapping of names to tensors, most of it at least: `_extra_state` and counters may stand between them."""
    if not isinstance(content, Mapping) or not content or not all(isinstance(key, str) for key in content):
        return False
    tensors = sum(isinstance(value, torch.Tensor) for value in content.values())
    nested = any(isinstance(value, Mapping) and find_state_dicts(value) for value in content.values())
    return tensors > 0 and tensors * 2 > len(content) and not nested


def select_key(content: Any, key: str, path: Path) -> Any:
    """What stands in `content` under `key`: a key as it is, or a dotted path of keys.

    Raises:
        InputError: there is no such key; the sentence lists those that there are.
    """
    here, rest = content, key
    while rest:
        if not isinstance(here, Mapping):
            break
        # The longest key that fits, so that keys which hold dots themselves are found too.
        names = sorted((str(name) for name in here), key=len, reverse=True)
        name = next((name for name in names if rest == name or rest.startswith(name + ".")), None)
        if name is None:
            break
        here = next(value for candidate, value in here.items() if str(candidate) == name)
        rest = rest[len(name) + 1 :]
    else:
        return here
    top = [str(name) for name in content] if isinstance(content, Mapping) else []
    raise InputError(f"{path} has nothing under --key {key}; it holds {_listing(top) or f'a {type(content).__name__}'}")


def load_state_dict(model: nn.Module, candidates: Mapping[str, StateDict], path: Path) -> nn.Module:
    """Puts the one of `candidates` that fits into `model`, every weight or none, and returns the model.

    Prefixes that wrappers leave on all names (`module.`, `model.`, `_orig_mod.`) are taken off if the names fit then.

    Raises:
        InputError: none fits (the nearest one's missing and unexpected keys, or shapes, are listed and counted), or
            several do (choose with `--key`).
    """
    expected = model.state_dict()
    named = {key: _best_names(state, expected) for key, state in candidates.items()}
    fitting = [key for key, state in named.items() if _misfits(state, expected) == 0]
    if len(fitting) > 1:
        raise InputError(
            f"{path} holds {len(fitting)} sets of weights that fit; choose one with --key: {_listing(fitting)}"
        )
    key = fitting[0] if fitting else min(named, key=lambda name: _misfits(named[name], expected))
    where = f"{path}{f' (under {key})' if key else ''}"
    _check_shapes(named[key], expected, model, where)
    try:
        result = model.load_state_dict(named[key], strict=False)
    except Exception as error:  # models may hook their own code into loading
        detail = " ".join(str(error).split())[:300]
        raise InputError(f"the weights in {where} do not fit {type(model).__name__}: {detail}") from None
    _check_keys(
        [name for name in result.missing_keys if not _is_counter(name)], list(result.unexpected_keys), model, where
    )
    return model


def _is_counter(name: str) -> bool:
    """Files of long ago lack this one, and inference does not read it."""
    return name.endswith("num_batches_tracked")


def _misfits(state: StateDict, expected: Mapping[str, Any]) -> int:
    names = {name for name in state if not _is_counter(name)}
    wanted = {name for name in expected if not _is_counter(name)}
    shapes = sum(_shape(state[name]) != _shape(expected[name]) for name in names & wanted)
    return len(names ^ wanted) + shapes


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _best_names(state: StateDict, expected: Mapping[str, Any]) -> StateDict:
    """`state` with wrappers' prefixes taken off, as far as that makes its names fit better."""
    best = renamed = state
    while True:
        renamed = _unwrapped(renamed)
        if not renamed or list(renamed) == list(best):
            return best
        if _misfits(renamed, expected) < _misfits(best, expected):
            best = renamed
        elif all("." not in name for name in renamed):
            return best


def _unwrapped(state: StateDict) -> StateDict:
    """One wrapper less: compiled modules' marks anywhere, else a first component that all names share; {} if none."""
    if any("_orig_mod." in name for name in state):
        return {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    names = [name for name in state if name != "n_averaged"]  # the counter beside an averaged model's `module.`
    first = {name.partition(".")[0] for name in names}
    if len(first) != 1 or not all("." in name for name in names):
        return {}
    return {name.partition(".")[2]: state[name] for name in names}


def _check_shapes(state: StateDict, expected: Mapping[str, Any], model: nn.Module, where: str) -> None:
    wrong = [
        f"{name} is {list(state[name].shape)} in the file and {list(expected[name].shape)} in the model"
        for name in state
        if isinstance(expected.get(name), torch.Tensor) and state[name].shape != expected[name].shape
    ]
    if wrong:
        count = f"{len(wrong)} weight{'s' if len(wrong) > 1 else ''}"
        raise InputError(
            f"{count} in {where} {'have' if len(wrong) > 1 else 'has'} another shape than in {type(model).__name__}: "
            f"{_listing(wrong, '; ')}; build it with the sizes it was trained with (--arch-args)"
        )


def _check_keys(missing: list[str], unexpected: list[str], model: nn.Module, where: str) -> None:
    if not missing and not unexpected:
        return
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_listing(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_listing(unexpected)})")
    raise InputError(
        f"the keys in {where} do not match {type(model).__name__}: {' and '.join(parts)}; "
        "check --arch and --arch-args, or choose other weights with --key"
    )


def _listing(names: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return separator.join(names[:_LISTED]) + more


def check_finite(model: nn.Module, path: Path) -> None:
    """Refuses weights with NaN or infinity in them: nothing could be verified.

    Infinities in buffers are let pass (attention masks hold them), except in running statistics.

    Raises:
        InputError: names the first such tensor, its place in it, and how many more there are.
    """
    tensors: list[tuple[str, torch.Tensor, bool]] = [(name, value, True) for name, value in model.named_parameters()]
    tensors += [(name, value, "running_" in name) for name, value in model.named_buffers()]
    bad: list[tuple[str, int, torch.Tensor]] = []
    for name, value, infinity_too in tensors:
        if value.is_meta or not (value.is_floating_point() or value.is_complex()) or value.layout is not torch.strided:
            continue
        wide = value.detach().float() if value.element_size() == 1 else value.detach()
        if bool(torch.isfinite(wide.sum())):
            continue  # a finite sum proves it in one pass, without a mask as large as the weight
        broken = ~torch.isfinite(wide) if infinity_too else torch.isnan(wide)
        count = int(broken.sum())
        if count:
            bad.append((name, count, wide[broken].flatten()[0]))
    if bad:
        name, count, value = bad[0]
        kind = "NaN" if bool(torch.isnan(value)) else "infinity"
        more = f", and {len(bad) - 1} more tensor{'s' if len(bad) > 2 else ''} like it" if len(bad) > 1 else ""
        raise InputError(
            f"{path}: the weight {name} holds {kind} ({count} element{'s' if count > 1 else ''}{more}); "
            "take a checkpoint from before training diverged"
        )


def read_safetensors(path: Path, device: Any = "cpu") -> StateDict:
    """The tensors in a safetensors file, memory-mapped.

    Raises:
        InputError: the file is damaged.
    """
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except Exception as error:  # safetensors has its own error, and raises OSError and TypeError besides
        raise InputError(
            f"{path} cannot be read as safetensors ({first_line(error)}); copy or download it again"
        ) from None
