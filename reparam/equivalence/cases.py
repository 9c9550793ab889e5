"""Input cases: which inputs two models are compared on.

A plan is a list of slots in order of importance; a slot is a list of alternatives, of which the first that the original
itself can run is used. Batch is dim 0, where all tensors with dims agree on its size; image sizes are dims 2 and on of
floating-point tensors with at least three dims, and whether the model accepts another is found out by trying. Integers
are drawn from the values that stand in the example, booleans put in another order once; else these, and tensors without
dims, stay as they are. Other sizes of dim 1, channels or the length of a text, are not tried: exported files fix them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from reparam.data import Batch
from reparam.errors import InputError
from reparam.inputs import Inputs

LEVELS = ("quick", "standard", "thorough")
Fill = Callable[[torch.Tensor, tuple[int, ...], torch.Generator], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        name: what it is.
        seed: of the generator that drew it; None if nothing was drawn: it was given.
        inputs: the arguments.
        relative_size: elements of its tensors over those of the example's, the measure of what a forward pass costs.
        is_example: whether it is the example.
    """

    name: str
    seed: int | None
    inputs: Inputs
    relative_size: float = 1.0
    is_example: bool = False

    @property
    def is_given(self) -> bool:
        """Whether the user gave it, so that it is run whatever it costs and both models have to run it."""
        return self.seed is None

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors, in order."""
        return tuple(tuple(tensor.shape) for tensor in self.inputs.tensors())


Slot = tuple[Case, ...]


def plan(
    inputs: Inputs, level: str, seed: int, vary_shapes: bool | str = True, data: Sequence[Batch] = ()
) -> Iterator[Slot]:
    """The slots of a level, most important first; all with the example's shapes if these must not vary.

    Args:
        vary_shapes: "batch" varies the batch alone.
        data: what the user gave besides; it comes last.

    Raises:
        InputError: there is no such level.
    """
    if level not in LEVELS:
        raise InputError(f"there is no verification level {level!r}; choose one of {', '.join(LEVELS)}")
    yield (Case("example", None, inputs, is_example=True),)
    maker = _Maker(inputs, seed, vary_shapes)
    if level == "standard":
        yield from _standard(maker)
    elif level == "thorough":
        yield from _thorough(maker)
    for batch in data:
        elements = sum(tensor.numel() for tensor in batch.inputs.tensors() if tensor.dim())
        yield (Case(batch.name, None, batch.inputs, elements / maker.elements),)


def _standard(make: _Maker) -> Iterator[Slot]:
    batch = make.other_batch()
    sizes = make.odd_sizes()
    resized = [make("random normal, other image size", _normal, 1, sizes, batch)] if sizes else []
    rebatched = [make("random normal, other batch size", _normal, 2, None, batch)] if batch else []
    one = 1 if make.batch else None
    if resized or rebatched:
        yield (*resized, *rebatched)
    if make.drawable:
        yield make.one_of("random normal", _normal, 3, [(None, one)])
    if not make.floating:
        return
    for number, (name, fill) in enumerate((("borders and impulse", _borders), ("zeros", _zeros), ("ones", _ones))):
        if fill is _borders and not make.spatial:
            continue
        small = [(sizes, one)] if sizes else []
        yield make.one_of(name, fill, 4 + number, [*small, (None, one)])


def _thorough(make: _Maker) -> Iterator[Slot]:
    batches = [batch for batch in (1, 2, 3, 5) if make.batch and batch != make.batch]
    for number in range(3):
        if make.drawable:
            yield (make(f"random normal {number}", _normal, 10 + number),)
    for batch in batches:
        yield (make(f"random normal, batch of {batch}", _normal, 20 + batch, None, batch),)
    odd, near = make.odd_sizes(), make.near_sizes()
    for number, sizes in enumerate((odd, near)):
        if sizes:
            yield (make(f"random normal, other image size {number}", _normal, 30 + number, sizes),)
            if make.batch:
                batch = make.batch + 1
                yield (make(f"random normal, other image size {number} and batch", _normal, 32 + number, sizes, batch),)
    if make.masked:
        yield (make("booleans in another order", _shuffled, 39),)
    if not make.floating:
        return
    for number, (name, fill) in enumerate(_CONTENTS.items()):
        if fill in (_borders, _impulses) and not make.spatial:
            continue
        yield (make(name, fill, 40 + number),)


class _Maker:
    """Makes cases from the example; the facts about it that decide which cases there can be."""

    def __init__(self, inputs: Inputs, seed: int, vary_shapes: bool | str) -> None:
        self.inputs, self.seed, self.vary_shapes = inputs, seed, vary_shapes
        tensors = [tensor for tensor in inputs.tensors() if tensor.dim()]
        sizes = {tensor.shape[0] for tensor in tensors}
        self.batch = sizes.pop() if vary_shapes and len(sizes) == 1 and all(t.numel() for t in tensors) else None
        self.floating = any(t.is_floating_point() for t in tensors)
        self.drawable = any(t.dtype != torch.bool and t.numel() for t in tensors)
        self.masked = any(t.dtype == torch.bool and t.numel() > 1 for t in tensors)
        self.spatial = any(t.is_floating_point() and t.dim() >= 3 for t in tensors)
        self.elements = max(1, sum(t.numel() for t in tensors))

    def __call__(
        self,
        name: str,
        fill: Fill,
        number: int,
        sizes: dict[int, int] | None = None,
        batch: int | None = None,
    ) -> Case:
        """A case with the contents of `fill`, and with other image sizes and another batch size if given."""
        seed = self.seed + number
        generator = torch.Generator().manual_seed(seed)

        def make(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 0:
                return tensor
            if batch is not None:
                tensor = tensor[torch.arange(batch, device=tensor.device) % tensor.shape[0]]
            if fill is _shuffled:
                return fill(tensor, tuple(tensor.shape), generator)
            if not tensor.is_floating_point():
                return tensor if tensor.dtype == torch.bool or fill is not _normal else _redrawn(tensor, generator)
            shape = tuple(tensor.shape)
            if sizes is not None and tensor.dim() >= 3:
                shape = shape[:2] + tuple(_resized(size, sizes, axis) for axis, size in enumerate(shape[2:]))
            return fill(tensor, shape, generator).to(tensor.device, tensor.dtype)

        inputs = self.inputs.map(make)
        elements = sum(tensor.numel() for tensor in inputs.tensors() if tensor.dim())
        return Case(name, seed, inputs, elements / self.elements)

    def one_of(
        self, name: str, fill: Fill, number: int, shapes: Sequence[tuple[dict[int, int] | None, int | None]]
    ) -> Slot:
        """A case in each of the shapes, and last in the example's own: all that an archive of fixed shapes can run."""
        own = [] if shapes[-1][1] in (None, self.batch) else [(None, None)]
        return tuple(self(name, fill, number, sizes, batch) for sizes, batch in [*shapes, *own])

    def other_batch(self) -> int | None:
        """A batch size that is not the example's: the cheapest, 1, unless that is the example's."""
        return None if self.batch is None else (2 if self.batch == 1 else 1)

    def odd_sizes(self) -> dict[int, int] | None:
        """For each size of an image an odd one, a quarter but at least 33 if that saves half; None without images."""
        return {size: _odd(max(33, size // 4) if size >= 66 else size - 1) for size in self._sizes()} or None

    def near_sizes(self) -> dict[int, int] | None:
        """For each size of an image an odd one a little larger; None without images."""
        return {size: _odd(size + 2) for size in self._sizes()} or None

    def _sizes(self) -> set[int]:
        if self.vary_shapes is not True:
            return set()
        images = [t for t in self.inputs.tensors() if t.is_floating_point() and t.dim() >= 3]
        return {size for image in images for size in image.shape[2:]}


def _odd(size: int) -> int:
    """The smallest odd number >= size and >= 1."""
    return max(1, size) | 1


def _resized(size: int, sizes: dict[int, int], axis: int) -> int:
    """The new size; each further axis is longer by two, so that no image stays square."""
    return sizes[size] + 2 * axis if sizes[size] + 2 * axis != size else size + 2 * axis + 2


def _redrawn(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Integers drawn from those that stand in the tensor."""
    values = tensor.flatten().cpu()
    if values.numel() == 0:
        return tensor
    return values[torch.randint(values.numel(), tensor.shape, generator=generator, device="cpu")].to(tensor.device)


def _normal(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu")


def _uniform(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Uniform over the range of the example's values."""
    low, high = (float(tensor.min()), float(tensor.max())) if tensor.numel() else (0.0, 1.0)
    return torch.rand(shape, generator=generator, device="cpu") * (high - low) + low


def _zeros(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape, device="cpu")


def _ones(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.ones(shape, device="cpu")


def _large(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 100.0 * torch.randn(shape, generator=generator, device="cpu")


def _tiny(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 0.01 * torch.randn(shape, generator=generator, device="cpu")


def _borders(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A constant per channel at the borders, an impulse in the middle, zero elsewhere; noise without borders."""
    if len(shape) < 3:
        return torch.randn(shape, generator=generator, device="cpu")
    image = torch.zeros(shape, device="cpu")
    constant = torch.randn(shape[:2], generator=generator, device="cpu")
    for axis in range(2, len(shape)):
        for end in (0, shape[axis] - 1):
            image.movedim(axis, 0)[end] = constant.reshape(constant.shape + (1,) * (len(shape) - 3))
    middle = image
    for _ in shape[2:]:
        middle = middle.select(2, middle.shape[2] // 2)
    middle.copy_(torch.randn(shape[:2], generator=generator, device="cpu"))
    return image


def _impulses(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One impulse for each channel, at a random place of the border; zero elsewhere; noise without borders."""
    if len(shape) < 3:
        return torch.randn(shape, generator=generator, device="cpu")
    image = torch.zeros(shape, device="cpu")
    flat = image.view(shape[0] * shape[1], *shape[2:])
    for plane in flat:
        place = [int(torch.randint(size, (), generator=generator, device="cpu")) for size in plane.shape]
        axis = int(torch.randint(plane.dim(), (), generator=generator, device="cpu"))
        place[axis] = (0, plane.shape[axis] - 1)[int(torch.randint(2, (), generator=generator, device="cpu"))]
        plane[tuple(place)] = torch.randn((), generator=generator, device="cpu")
    return image


def _constants(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A constant per channel, which all but padding leaves constant."""
    return torch.randn(shape[:2] + (1,) * (len(shape) - 2), generator=generator, device="cpu").expand(shape).clone()


def _shuffled(tensor: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The booleans of a mask in another order; other tensors as they are."""
    if tensor.dtype != torch.bool:
        return tensor
    order = torch.randperm(tensor.numel(), generator=generator, device="cpu").to(tensor.device)
    return tensor.flatten()[order].reshape(shape)


_CONTENTS: dict[str, Fill] = {
    "uniform": _uniform,
    "borders and impulse": _borders,
    "impulses at the border": _impulses,
    "constants": _constants,
    "zeros": _zeros,
    "ones": _ones,
    "random normal times 100": _large,
    "random normal times 0.01": _tiny,
}
