"""A file becomes a model: told by content, checked, and without running code from it unless the user allows that."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reparam.capture.arch import FORMS, Arch, build_arch
from reparam.capture.archives import load_archive
from reparam.capture.checkpoint import (
    check_finite,
    find_models,
    find_state_dicts,
    load_state_dict,
    read_safetensors,
    select_key,
)
from reparam.capture.formats import Format, identify
from reparam.capture.imports import printable
from reparam.capture.pickles import read_pickle
from reparam.capture.scripts import load_script
from reparam.capture.shards import read_shards
from reparam.errors import InputError

_WHOLE = {Format.EXPORT_ARCHIVE: "torch.export archive", Format.TORCHSCRIPT: "TorchScript archive"}
"""Formats in which the model stands complete: there is nothing to choose or to build."""


def load(
    path: str | PathLike[str],
    arch: Arch | None = None,
    *,
    arch_args: Mapping[str, Any] | None = None,
    key: str | None = None,
    allow_classes: Iterable[str | type] = (),
    allow_pickle: bool = False,
    map_location: Any = "cpu",
) -> nn.Module:
    """Loads a trained model in eval mode. The format is told from the file's content.

    Taken are files of `torch.save` (a whole model, a state dict, or a training checkpoint with either in it),
    safetensors, the index of a checkpoint in several of these, archives of `torch.export.save` (a graph module is made
    of them, which has its example inputs with it) and TorchScript archives (which stay a `ScriptModule`; `fuse`
    converts it). No file runs code: a pickle may name torch's own layers and what `allow_classes` adds, nothing else,
    and archives hold what is known to be harmless.

    Args:
        path: the file.
        arch: who builds the model, where the file holds weights only: `timm:NAME`, `torchvision:NAME`,
            `package.module:callable`, a callable, or a built model (which is then filled and returned).
        arch_args: keyword arguments for the builder.
        key: where in a checkpoint the model or the weights stand, if there are several: `ema`, `state.generator`.
        allow_classes: classes the file may make, as objects or by name: `pkg.mod.Class`, `OLD.NAME=NEW.NAME`, `pkg.*`.
        allow_pickle: let the file run any code it likes.
        map_location: device of the weights, as in `torch.load`; archives are loaded to the CPU.

    Raises:
        InputError: one sentence that says what is wrong with the file and what to do.
    """
    file = Path(fspath(path)).expanduser()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # a damaged file can hold one
            model = _load(file, arch, arch_args, key, allow_classes, allow_pickle, map_location)
        check_finite(model, file)
        return model.eval()
    except InputError as error:
        raise InputError(printable(str(error))) from error.__cause__
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError, RecursionError) as error:
        # A pickle can hold a layer whose insides are not what a layer's are.
        raise InputError(
            f"{file} holds a model that is damaged or of another torch "
            f"({printable(f'{type(error).__name__}: {error}', 200)}); save it again"
        ) from error


def _load(
    file: Path,
    arch: Arch | None,
    arch_args: Mapping[str, Any] | None,
    key: str | None,
    allow_classes: Iterable[str | type],
    allow_pickle: bool,
    map_location: Any,
) -> nn.Module:
    file_format = identify(file)
    if file_format is Format.ONNX:
        raise InputError(
            f"{file} is an ONNX file; reparam needs the PyTorch model: pass the file that torch.save or "
            "torch.export.save wrote, or a state dict and --arch"
        )
    if file_format in _WHOLE:
        for option, given in (("--arch", arch), ("--key", key)):
            if given is not None:
                raise InputError(f"{file} is a {_WHOLE[file_format]}, which holds the whole model; leave out {option}")
        if file_format is Format.EXPORT_ARCHIVE:
            return load_archive(file, trusted=allow_pickle)
        return load_script(file, trusted=allow_pickle)

    def read(part: Path, its: Format) -> Any:
        if its is Format.SAFETENSORS:
            return read_safetensors(part, map_location)
        return read_pickle(part, its, allow_classes=allow_classes, allow_pickle=allow_pickle, map_location=map_location)

    content = read_shards(file, read) if file_format is Format.SHARDS else read(file, file_format)
    if key:
        content = select_key(content, key, file)
    model = _model_from(content, arch, arch_args, file)
    if isinstance(map_location, (str, torch.device)) and arch is not None:
        model = model.to(map_location)
    return model


def _model_from(content: Any, arch: Arch | None, arch_args: Mapping[str, Any] | None, file: Path) -> nn.Module:
    if isinstance(content, nn.Module):
        model = _unwrap(content)
        if arch is None:
            return model
        return load_state_dict(build_arch(arch, arch_args), {"": model.state_dict()}, file)
    if not isinstance(content, Mapping):
        what = (
            f"a tensor of shape {list(content.shape)}"
            if isinstance(content, torch.Tensor)
            else f"a {type(content).__name__}"
        )
        raise InputError(f"{file} holds {what} and no model; save the model or its state_dict() with torch.save")
    models = find_models(content)
    if arch is None and models:
        if len(models) > 1:
            raise InputError(f"{file} holds {len(models)} models; choose one with --key: {', '.join(models)}")
        return _unwrap(next(iter(models.values())))
    candidates = find_state_dicts(content)
    candidates.update({name: _unwrap(model).state_dict() for name, model in models.items()})
    if not candidates:
        keys = ", ".join(str(name) for name in list(content)[:8])
        raise InputError(
            f"{file} holds a dict without weights (keys: {keys or 'none'}); pass a file with a model in it"
        )
    if arch is None:
        count = sum(len(state) for state in candidates.values())
        raise InputError(
            f"{file} holds weights only ({count} tensors) and not the model they belong to; say who builds it with "
            f"--arch ({FORMS})"
        )
    return load_state_dict(build_arch(arch, arch_args), candidates, file)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside of torch's parallel and averaging wrappers."""
    while type(model).__module__.startswith(("torch.nn.parallel", "torch.optim.swa_utils")) and isinstance(
        inner := model.__dict__.get("_modules", {}).get("module"), nn.Module
    ):
        model = inner
    return model


def default_input_size(model: nn.Module) -> tuple[int, ...] | None:
    """The shape of one example input, where the model tells it: (1, C, H, W) or (1, features); None where it does not.

    Taken from the `input_size` of a `pretrained_cfg` or `default_cfg` attribute; else from the first layer with
    weights: a `Conv2d` gives (1, C, 224, 224), a `Linear` (1, in_features).
    """
    for name in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, name, None)
        size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
        if isinstance(size, (tuple, list)) and size and all(isinstance(side, int) and side > 0 for side in size):
            return (1, *size)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return (1, module.in_channels, 224, 224)
        if isinstance(module, nn.Linear):
            return (1, module.in_features)
        if next(module.parameters(recurse=False), None) is not None:
            return None
    return None
