"""`reparam export`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from reparam.cli.options import data_options, output_options, source_options
from reparam.cli.terminal import Show, guarded, print_as

if TYPE_CHECKING:
    from reparam.report.exported import Exported
    from reparam.stages import Progress


def _names(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(","))


@click.command("export")
@click.argument("model", metavar="MODEL")
@source_options
@click.option("--out", metavar="PATH", help="File or folder to write to. Default: MODEL with the ending .onnx.")
@click.option("--fuse/--no-fuse", default=True, show_default=True, help="Fuse the model first, or export it as it is.")
@click.option(
    "--inference-form", "inference_form", metavar="NAME=FORM", multiple=True,
    help="What modules of a class or name are at inference: identity, or a number that scales. May be repeated.",
)  # fmt: skip
@click.option("--opset", type=click.IntRange(min=1), help="Version of the operator set. Default: the exporter's own.")
@click.option(
    "--dynamic-batch/--no-dynamic-batch", default=True, show_default=True,
    help="Leave the batch open where the model allows it.",
)  # fmt: skip
@click.option(
    "--dynamic-size/--no-dynamic-size", default=False, show_default=True,
    help="Leave height and width (or length, or depth) open where the model allows it.",
)  # fmt: skip
@click.option("--input-names", callback=_names, metavar="A,B", help="Default: the parameters of the model's forward.")
@click.option("--output-names", callback=_names, metavar="A,B", help="Default: the keys of its result, or output.")
@click.option(
    "--float16", is_flag=True, help="Weights and activations in float16; inputs and outputs stay as they are."
)
@click.option("--float16-io", is_flag=True, help="The same with inputs and outputs in float16 too.")
@click.option(
    "--simplify/--no-simplify", default=True, show_default=True,
    help="Try onnxsim; its result is kept if it is smaller and agrees.",
)  # fmt: skip
@click.option(
    "--external-data-bytes", type=click.IntRange(min=0),
    help="Bytes of weights beyond which they go to PATH.data. Default: 2 GB, which is the format's limit.",
)  # fmt: skip
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Text for the file's metadata; may be repeated.")
@click.option(
    "--verify", type=click.Choice(["quick", "standard", "thorough", "off"]), default="standard", show_default=True,
    help="How thoroughly the file is checked against MODEL.",
)  # fmt: skip
@data_options
@output_options
def export_command(form: str, verbose: bool, debug: bool, **flags: Any) -> None:
    """Writes MODEL as an ONNX file, fused and checked.

    MODEL is whatever `reparam fuse` takes. The file runs in onnxruntime at several batch sizes (and image sizes, where
    these are open) and is compared with MODEL; it is written only if the two agree.

    Exit status: 0 written, 1 not equivalent (nothing is written), 2 bad input or usage, 70 a fault in reparam.
    """

    def work(progress: Progress) -> Show:
        from reparam.report.onnx import render_export, render_export_markdown

        exported = _export(flags, progress)

        def show() -> int:
            print_as(
                form,
                exported.to_dict,
                lambda: render_export_markdown(exported),
                lambda console: render_export(exported, console, verbose=verbose),
            )
            return 0

        return show

    sys.exit(guarded(work, form=form, verbose=verbose, debug=debug))


def _export(flags: dict[str, Any], progress: Progress) -> Exported:
    from reparam.capture.arch import parse_arch_args
    from reparam.capture.inference import parse_inference_forms
    from reparam.errors import InputError
    from reparam.exporting import ExportRequest, export

    flags["arch_args"] = parse_arch_args(flags["arch_args"])
    flags["inference_form"] = parse_inference_forms(flags["inference_form"])
    pairs = [entry.partition("=") for entry in flags["metadata"]]
    for key, equals, _ in pairs:
        if not (key and equals):
            raise InputError(f"--metadata {key!r} is no KEY=VALUE")
    flags["metadata"] = {key: value for key, _, value in pairs}
    if flags["external_data_bytes"] is None:
        del flags["external_data_bytes"]
    return export(ExportRequest(path=flags.pop("model"), **flags), progress)
