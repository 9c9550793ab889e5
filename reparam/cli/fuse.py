"""`reparam fuse`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from reparam.cli.options import data_options, output_options, source_options
from reparam.cli.terminal import Show, guarded, print_report

if TYPE_CHECKING:
    from reparam.report import Report
    from reparam.stages import Progress


@click.command("fuse")
@click.argument("model", metavar="MODEL")
@source_options
@click.option("--out", metavar="PATH", help="Folder to write to, or path without ending. Default: beside MODEL.")
@click.option(
    "--capture", type=click.Choice(["auto", "symbolic", "export", "modules"]), default="auto", show_default=True,
    help="How the graph is captured; modules: only inside the model's children.",
)  # fmt: skip
@click.option(
    "--objective", type=click.Choice(["latency", "macs", "parameters"]), default="latency", show_default=True,
    help="What the fused model should have least of.",
)  # fmt: skip
@click.option(
    "--machine", type=click.Choice(["eager-cpu", "onnxruntime-cpu", "cuda"]),
    help="Whose prices count. Default: cuda for a model on CUDA, else eager-cpu.",
)  # fmt: skip
@click.option(
    "--inference-form", "inference_form", metavar="NAME=FORM", multiple=True,
    help="What modules of a class or name are at inference: identity, or a number that scales. May be repeated.",
)  # fmt: skip
@click.option(
    "--fixed-sizes", is_flag=True,
    help="Let the fused model run at the example's sizes only, the batch apart; sometimes it gets smaller for that.",
)  # fmt: skip
@click.option(
    "--verify", "verify", type=click.Choice(["quick", "standard", "thorough", "off"]), default="standard",
    show_default=True, help="How thoroughly the result is checked against MODEL.",
)  # fmt: skip
@data_options
@click.option("--strict", is_flag=True, help="Fail if a rewrite had to be undone.")
@click.option("--explain", is_flag=True, help="Show for each region what was compared, and why one form won.")
@click.option("--no-onnx", is_flag=True, help="Write no ONNX file.")
@click.option("--no-archive", is_flag=True, help="Write no torch.export archive.")
@click.option("--no-certificate", is_flag=True, help="Write no certificate of what was done and found.")
@click.option("--no-bench", is_flag=True, help="Measure no latency.")
@click.option(
    "--bench-seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Time for measuring."
)
@click.option("--report", metavar="PATH", help="Write the report too, as .html, .md or .json by the ending of PATH.")
@output_options
def fuse_command(form: str, verbose: bool, debug: bool, **flags: Any) -> None:
    """Fuses MODEL and writes MODEL.fused.onnx, MODEL.fused.pt2 and the certificate MODEL.fused.json.

    MODEL is a file of torch.save (a model, a state dict, a checkpoint), safetensors, or an archive of torch.export or
    TorchScript. The fused model is compared with the original, and so are both files, the ONNX file in onnxruntime;
    nothing is written unless all agree. The certificate holds hashes, versions, inputs, changes and figures:
    `reparam verify --certificate` does it all again.

    Exit status: 0 good, 1 not equivalent (no model is written), 2 bad input or usage, 70 a fault in reparam, 130
    interrupted (while latency was measured: everything but the rest of the measurement is there).
    """

    def work(progress: Progress) -> Show:
        report = _fuse(flags, progress)
        return lambda: print_report(report, form=form, verbose=verbose)

    sys.exit(guarded(work, form=form, verbose=verbose, debug=debug))


def _fuse(flags: dict[str, Any], progress: Progress) -> Report:
    from reparam.capture.arch import parse_arch_args
    from reparam.capture.inference import parse_inference_forms
    from reparam.workflow import Request, run

    flags["arch_args"] = parse_arch_args(flags["arch_args"])
    flags["inference_form"] = parse_inference_forms(flags["inference_form"])
    for name in ("onnx", "archive", "certificate", "bench"):
        flags[name] = not flags.pop(f"no_{name}")
    return run(Request(path=flags.pop("model"), **flags), progress)
