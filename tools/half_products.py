"""Products of half precision on a CPU, computed in float32 and rounded once.

That is how hardware with instructions for halves computes them (GPUs, and CPUs through oneDNN): the product of two
halves is exact in float32, sums are kept there, and the result is rounded. On CPUs without such instructions torch has
its own kernels for convolutions and products of matrices, which do nearly the same many times more slowly; too slowly
for a sweep over models of hundreds of millions of weights.

    python tools/half_products.py

says what that costs here, and how far both kinds are from the exact product in float64.
"""

from __future__ import annotations

import contextlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

HALVES = (torch.float16, torch.bfloat16)
PRODUCTS = ("convolution", "mm", "addmm", "bmm", "baddbmm")
"""The operators of aten that linear layers, convolutions and attention written out end in."""
REPEATS = 3


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Inside, halves are multiplied in float32 on the CPU.

    Only torch's kernels for the CPU are replaced, below autograd and every mode: whoever watches the operators of a
    model sees those it has. Other dtypes go on to torch's own kernels. It holds for all threads.
    """
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of each kernel that is replaced
        for name in PRODUCTS:
            library.impl(name, _in_float32(torch.library.get_kernel(f"aten::{name}", "CPU")), "CPU", with_keyset=True)
        yield


def _in_float32(own: Any) -> Callable[..., torch.Tensor]:
    def product(keys: Any, first: torch.Tensor, *others: Any, **scales: Any) -> torch.Tensor:
        if first.dtype not in HALVES:
            return own.call_boxed(keys, first, *others, **scales)  # type: ignore[no-any-return]
        wide = (_widened(one) for one in (first, *others))
        return own.call_boxed(keys, *wide, **scales).to(first.dtype)  # type: ignore[no-any-return]

    return product


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in HALVES else value


def _cases() -> dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "linear, 128 rows, 768 to 3072": (functional.linear, (normal(128, 768), normal(3072, 768))),
        "3x3 convolution, 256 channels, 16 x 16": (
            lambda x, weight: functional.conv2d(x, weight, padding=1),
            (normal(2, 256, 16, 16), normal(256, 256, 3, 3)),
        ),
    }


def _line(name: str) -> str:
    """Seconds of one case in float32 and both halves, and the errors relative to the largest element."""
    function, given = _cases()[name]
    cells = []
    for dtype in (torch.float32, *HALVES):
        held = [one.to(dtype) for one in given]
        exact = function(*(one.double() for one in held))
        answer = function(*held)
        start = time.perf_counter()
        for _ in range(REPEATS):
            function(*held)
        seconds = (time.perf_counter() - start) / REPEATS
        error = float((answer.double() - exact).abs().max() / exact.abs().max())
        cells.append(f"{str(dtype).removeprefix('torch.')} {seconds * 1e3:.1f} ms, error {error:.1e}")
    return f"{name}: {'; '.join(cells)}"


def main() -> int:
    """Compares both kinds of kernel from the command line."""
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread")
    print("torch's own kernels")
    print(*map(_line, _cases()), sep="\n")
    print("halves in float32")
    with in_float32():
        print(*map(_line, _cases()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
