"""Options that several commands share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import click

if TYPE_CHECKING:
    from reparam.source import Source


def options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


file_options = options(
    click.option(
        "--arch", metavar="ARCH", help="Who builds the model: timm:NAME, torchvision:NAME or package.module:callable."
    ),
    click.option("--arch-args", metavar="KEY=VALUE", multiple=True, help="Argument for the builder; may be repeated."),
    click.option("--key", metavar="KEY", help="Where in the checkpoint the weights stand: model, ema, net.0."),
    click.option(
        "--input", "inputs", metavar="SPEC", multiple=True,
        help="Example input: 1x3x224x224, 1x77:int64, name=1x77:int64.",
    ),
    click.option(
        "--allow-class", "allow_classes", metavar="NAME", multiple=True,
        help="Class the file may use: pkg.mod.Class, OLD.NAME=NEW.NAME, or 'pkg.*' for all layers of a package.",
    ),
    click.option(
        "--allow-pickle", is_flag=True, help="Let the file run any code. Only for files whose source you trust."
    ),
    click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Of all random inputs."
    ),
)  # fmt: skip
source_options = options(
    file_options,
    click.option(
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]), help="Convert the model first."
    ),
)
data_options = options(
    click.option(
        "--data", metavar="DATA",
        help="Your own inputs, compared besides: a folder of images, .npy, .npz (an array for each input, under its "
        "name), or package.module:function, which yields batches.",
    ),
    click.option(
        "--data-limit", type=click.IntRange(min=1), default=32, show_default=True,
        help="The most images, rows or batches of DATA.",
    ),
)  # fmt: skip
_output_options = options(
    click.option(
        "--format", "form", type=click.Choice(["text", "json", "markdown"]), default="text", show_default=True,
        help="What to print: text for a terminal, one JSON document, or Markdown for a job summary.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Short for --format json."),
    click.option("-v", "--verbose", is_flag=True, help="Show every detail."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)  # fmt: skip


def output_options(command: Callable[..., Any]) -> Callable[[Any], Any]:
    """What to print and how much of it: `form` is the form, whichever way it was asked for."""

    @functools.wraps(command)
    def with_form(*args: Any, form: str, as_json: bool, **flags: Any) -> Any:
        if as_json and form == "markdown":
            raise click.UsageError("--json and --format markdown exclude each other")
        return command(*args, form="json" if as_json else form, **flags)

    return cast("Callable[[Any], Any]", _output_options(with_form))


def source_of(flags: dict[str, Any], path: str) -> Source:
    from reparam.capture.arch import parse_arch_args
    from reparam.source import Source

    return Source(flags.pop(path), **{**flags, "arch_args": parse_arch_args(flags["arch_args"])})
