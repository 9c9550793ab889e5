"""A folder of images, made into inputs as the model wants them.

An image of W x H pixels for an input of [N, C, h, w]:

1. It is converted to RGB for C = 3, to grey for C = 1; a turn in its EXIF data is not applied.
2. It is resized, keeping its proportions, to the smallest size that covers h / p by w / p, with Pillow's filter of the
   model's `interpolation`; p is the model's `crop_pct`.
3. Its centre of h x w pixels is cut out.
4. Values are divided by 255, the model's `mean` is subtracted, and the result divided by its `std`, channel by channel.

All four are read from the attribute `pretrained_cfg` or `default_cfg` of the model. What it does not say is: bilinear,
p = 0.875, and mean and std those of ImageNet for C = 3, 0.5 for C = 1. Who needs another way yields batches from a
function of his own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reparam.data.batch import Batch
from reparam.data.fitting import with_tensors
from reparam.errors import InputError
from reparam.inputs import Inputs

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_FILTERS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming")
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Preparation:
    """How an image becomes an input.

    Attributes:
        mode: Pillow's, `RGB` or `L`.
        size: height and width of the input.
        crop: what share of the resized image's smaller side is kept.
        interpolation: name of Pillow's filter.
        mean, std: for each channel.
        told: whether the model said what mean and std are.
    """

    mode: str
    size: tuple[int, int]
    crop: float
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    told: bool

    def __str__(self) -> str:
        height, width = self.size
        origin = "the model says so" if self.told else "the model does not say: the usual ones"
        return (
            f"resized ({self.interpolation}) to cover {_covering(height, self.crop)}x{_covering(width, self.crop)}, "
            f"cut to {height}x{width}, minus mean {list(self.mean)}, over std {list(self.std)} ({origin})"
        )


def image_batches(folder: Path, model: Any, example: Inputs, limit: int) -> tuple[list[Batch], str]:
    """Batches of the example's length from the images of a folder and of all in it, by name; and a note on how.

    Raises:
        InputError: there is none, one cannot be read, or the model takes no images.
    """
    if folder.is_dir():
        found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    else:
        found = [folder]
    if not found:
        raise InputError(f"{folder} holds no image ({', '.join(ENDINGS)}); give a folder that does, .npy or .npz")
    how = preparation(model, example)
    size = next(example.tensors()).shape[0]
    like = next(example.tensors())
    base = folder if folder.is_dir() else folder.parent
    made = []
    for start in range(0, min(len(found), limit), size):
        names = [found[(start + number) % len(found)] for number in range(size)]
        tensor = torch.stack([_image(path, how) for path in names]).to(like.device, like.dtype)
        more = min(size, len(found) - start) - 1
        label = f"{names[0].relative_to(base)}{f' and {more} more' if more else ''}"
        made.append(Batch(label, with_tensors(example, [tensor])))
    some = f"the first {min(limit, len(found))} of {len(found)} images" if len(found) > limit else "images"
    return made, f"{some} of {folder}: {how}"


def preparation(model: Any, example: Inputs) -> Preparation:
    """What the model says of itself, completed.

    Raises:
        InputError: the model does not take one image tensor with one or three channels.
    """
    tensors = list(example.tensors())
    shape = tuple(tensors[0].shape)
    if len(tensors) != 1 or len(shape) != 4 or shape[1] not in (1, 3) or not tensors[0].is_floating_point():
        takes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
        raise InputError(
            f"images fit models with one floating-point input [N, 1 or 3, height, width], and this one takes {takes}; "
            "give .npy, .npz or a function that yields batches"
        )
    channels = shape[1]
    said = next((dict(found) for found in map(_config, _inner(model)) if found), {})
    default = _IMAGENET if channels == 3 else ((0.5,), (0.5,))
    mean, std = _numbers(said.get("mean"), channels), _numbers(said.get("std"), channels)
    told = mean is not None and std is not None and all(std)
    crop = said.get("crop_pct")
    return Preparation(
        "RGB" if channels == 3 else "L",
        (shape[2], shape[3]),
        float(crop) if isinstance(crop, (int, float)) and 0.1 <= crop <= 1.0 else 0.875,
        said["interpolation"] if said.get("interpolation") in _FILTERS else "bilinear",
        *((mean, std) if told else default),  # type: ignore[arg-type]
        told,
    )


def _inner(model: Any) -> list[Any]:
    return [getattr(model, name, None) for name in ("pretrained_cfg", "default_cfg")]


def _config(found: Any) -> Mapping[str, Any]:
    if isinstance(found, Mapping):
        return found
    return (
        {}
        if found is None
        else {key: getattr(found, key, None) for key in ("mean", "std", "crop_pct", "interpolation")}
    )


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    if isinstance(value, (tuple, list)) and len(value) == count and all(isinstance(v, (int, float)) for v in value):
        return tuple(float(v) for v in value)
    return None


def _covering(size: int, crop: float) -> int:
    return math.floor(size / crop)


def _image(path: Path, how: Preparation) -> torch.Tensor:
    """The image as a float32 tensor [C, height, width]."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ModuleNotFoundError:
        raise InputError("reading images needs Pillow; install it with `pip install 'reparam[images]'`") from None
    try:
        with Image.open(path) as opened:
            image = opened.convert(how.mode)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{path} cannot be read as an image ({reason}); take it out of the folder") from None
    height, width = (_covering(side, how.crop) for side in how.size)
    scale = max(height / image.height, width / image.width)
    new = (max(how.size[1], round(image.width * scale)), max(how.size[0], round(image.height * scale)))
    image = image.resize(new, getattr(Image.Resampling, how.interpolation.upper()))
    left, top = (new[0] - how.size[1]) // 2, (new[1] - how.size[0]) // 2
    image = image.crop((left, top, left + how.size[1], top + how.size[0]))
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255.0)
    pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
    mean, std = (torch.tensor(values, device="cpu").reshape(-1, 1, 1) for values in (how.mean, how.std))
    return (pixels - mean) / std
