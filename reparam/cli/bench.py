"""`reparam bench`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import click

from reparam.cli.options import file_options, output_options, source_of
from reparam.cli.terminal import INTERRUPTED, Show, guarded, print_as

if TYPE_CHECKING:
    from reparam.stages import Progress

T = TypeVar("T")
DTYPES = ("float32", "tf32", "float16", "bfloat16", "float64")


class Values(click.ParamType, Generic[T]):  # type: ignore[type-arg, unused-ignore]
    """Values with commas between them; the option may be repeated besides."""

    def __init__(self, name: str, parse: Callable[[str], T]) -> None:
        self.name, self.parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[T, ...]:
        """The values of one occurrence of the option."""
        try:
            return tuple(self.parse(part.strip()) for part in str(value).split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _natural(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise ValueError(f"{text!r} is no size; write 224, or 224x192 for height x width")
    return int(found[1]), int(found[2] or found[1])


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise ValueError(f"{text!r} is not known; choose from {', '.join(DTYPES)}")
    return text


NUMBERS = Values("N,...", _natural)


@click.command("bench")
@click.argument("model", metavar="MODEL")
@click.argument("others", metavar="[OTHER]...", nargs=-1)
@file_options
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="NAME",
    help="How to run the models: eager, compile, export, onnxruntime, onnxruntime-cuda, onnxruntime-tensorrt, "
    "openvino, or all that are here; may be repeated.  [default: eager]",
)
@click.option("--device", metavar="DEVICE", help="Where: cpu or cuda.  [default: cpu]")
@click.option("--batch", "batches", type=NUMBERS, multiple=True, help="Lengths of the batch: 1,8,64.")
@click.option("--size", "sizes", type=Values("N|HxW,...", _size), multiple=True, help="Image sizes: 192,224x160.")
@click.option("--dtype", "dtypes", type=Values("NAME,...", _dtype), multiple=True, help=f"Of {', '.join(DTYPES)}.")
@click.option("--threads", type=NUMBERS, multiple=True, help="Threads within an operator: 1,4.")
@click.option("--channels-last", is_flag=True, help="Store images and convolutions with the channels last.")
@click.option("--cuda-graphs", is_flag=True, help="Record each model as a CUDA graph and replay it.")
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Time for measuring, for each cell."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Write the results here after every cell; a run that was interrupted goes on from the file.",
)
@output_options
def bench_command(
    others: tuple[str, ...], form: str, verbose: bool, debug: bool, seconds: float, out: Path | None, **flags: Any
) -> None:
    """Measures the latency of MODEL and of its fused form, or of each OTHER file, against it, in pairs.

    With MODEL alone the model is fused in memory, verified, and both are measured. Each OTHER is whatever `reparam
    fuse` takes, or an ONNX file, which runs in onnxruntime. Several values of --batch, --size, --dtype and --threads
    make a grid: every combination is a cell, measured by itself.

    Exit status: 0 measured, 1 the fused model is not equivalent, 2 bad input or usage, 70 a fault in reparam, 130
    interrupted; what was measured until then is printed, and kept in --out.
    """  # fmt: skip
    grid: dict[str, Any] = {name: sum(flags.pop(name), ()) for name in ("batches", "sizes", "dtypes", "threads")}
    chosen: dict[str, Any] = {name: flags.pop(name) for name in ("backends", "device", "channels_last", "cuda_graphs")}
    chosen["backends"] = chosen["backends"] or ("eager",)

    def work(progress: Progress) -> Show:
        from reparam.bench_files import Request, bench_files
        from reparam.report.latency import render_series, render_series_markdown

        source = source_of(flags, "model")
        series = bench_files(Request(source, others, seconds=seconds, out=out, **grid, **chosen), progress)

        def show() -> int:
            print_as(
                form,
                series.to_dict,
                lambda: render_series_markdown(series),
                lambda console: render_series(series, console),
            )
            if out is not None:
                click.echo(f"reparam: the results are in {out}", err=True)
            if series.partial:
                click.echo("reparam: interrupted; what was measured is kept", err=True)
                return INTERRUPTED
            return 0 if any(cell.timing for cell in series.cells) else 2

        return show

    sys.exit(guarded(work, form=form, verbose=verbose, debug=debug))
