"""The command: flags -> `reparam.workflow` -> report. torch is imported only when there is work to do."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from reparam import __version__
from reparam.errors import NotEquivalentError, ReparamError

if TYPE_CHECKING:
    from rich.console import Console

    from reparam.report import Report
    from reparam.source import Source
    from reparam.workflow import Progress

Show: TypeAlias = Callable[[], int]
"""Prints what came of the work, when the line of progress is gone, and returns the exit status."""

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="reparam")
def main() -> None:
    """Turns trained PyTorch models into their inference form, and proves by measurement that nothing changed."""


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda made, option: option(made), reversed(options), command)


_source_options = _options(
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
        "--dtype", type=click.Choice(["float32", "float16", "bfloat16", "float64"]), help="Convert the model first."
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of all random inputs."),
)  # fmt: skip
_output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output, nothing else."),
    click.option("-v", "--verbose", is_flag=True, help="Show every detail."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error."),
)


@main.command("fuse")
@click.argument("model", metavar="MODEL")
@_source_options
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
@click.option("--explain", is_flag=True, help="Show for each region what was compared, and why one form won.")
@click.option("--no-onnx", is_flag=True, help="Write no ONNX file.")
@click.option("--no-archive", is_flag=True, help="Write no torch.export archive.")
@click.option("--no-bench", is_flag=True, help="Measure no latency.")
@click.option(
    "--bench-seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Time for measuring."
)
@_output_options
def fuse_command(as_json: bool, verbose: bool, debug: bool, **flags: Any) -> None:
    """Fuses MODEL and writes MODEL.fused.onnx and MODEL.fused.pt2.

    MODEL is a file of torch.save (a model, a state dict, a checkpoint), safetensors, or an archive of torch.export or
    TorchScript. The fused model is compared with the original, and so is the ONNX file in onnxruntime; nothing is
    written unless both agree.

    Exit status: 0 good, 1 not equivalent (nothing is written), 2 bad input or usage, 70 a fault in reparam.
    """

    def work(progress: Progress) -> Show:
        report = _fuse(flags, progress)
        return lambda: _print_report(report, as_json=as_json, verbose=verbose)

    sys.exit(_guarded(work, as_json=as_json, verbose=verbose, debug=debug))


def _fuse(flags: dict[str, Any], progress: Progress) -> Report:
    from reparam.capture.arch import parse_arch_args
    from reparam.capture.inference import parse_inference_forms
    from reparam.workflow import Request, run

    flags["arch_args"] = parse_arch_args(flags["arch_args"])
    flags["inference_form"] = parse_inference_forms(flags["inference_form"])
    for name in ("onnx", "archive", "bench"):
        flags[name] = not flags.pop(f"no_{name}")
    return run(Request(path=flags.pop("model"), **flags), progress)


@main.command("verify")
@click.argument("original", metavar="ORIGINAL")
@click.argument("candidate", metavar="CANDIDATE")
@_source_options
@click.option(
    "--level", type=click.Choice(["quick", "standard", "thorough"]), default="standard", show_default=True,
    help="How many inputs are tried.",
)  # fmt: skip
@_output_options
def verify_command(candidate: str, level: str, as_json: bool, verbose: bool, debug: bool, **flags: Any) -> None:
    """Tells whether CANDIDATE computes what ORIGINAL computes, up to the original's own rounding noise.

    ORIGINAL is whatever `reparam fuse` takes; CANDIDATE may be an ONNX file too.

    Exit status: 0 they agree, 1 they do not, 2 bad input or usage, 70 a fault in reparam.
    """

    def work(progress: Progress) -> Show:
        from reparam.compare import verify_files
        from reparam.report.text import render_comparison

        comparison = verify_files(_source(flags, "original"), candidate, level=level, progress=progress)

        def show() -> int:
            if as_json:
                click.echo(json.dumps(comparison.to_dict(), indent=2, allow_nan=False))
            else:
                render_comparison(candidate, comparison, _console(stderr=False), verbose=verbose)
            return 0 if comparison.passed else NotEquivalentError.exit_status

        return show

    sys.exit(_guarded(work, as_json=as_json, verbose=verbose, debug=debug))


@main.command("bench")
@click.argument("model", metavar="MODEL")
@click.argument("others", metavar="[OTHER]...", nargs=-1)
@_source_options
@click.option("--seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Time for measuring.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads within an operator.")
@_output_options
def bench_command(
    others: tuple[str, ...],
    seconds: float,
    threads: int | None,
    as_json: bool,
    verbose: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Measures the latency of MODEL and of each OTHER against it, in pairs.

    Each is whatever `reparam fuse` takes, or an ONNX file, which runs in onnxruntime.

    Exit status: 0 measured, 2 bad input or usage, 70 a fault in reparam.
    """

    def work(progress: Progress) -> Show:
        from reparam.compare import bench_files
        from reparam.report.text import render_timing

        timing = bench_files(_source(flags, "model"), others, seconds=seconds, threads=threads, progress=progress)

        def show() -> int:
            if as_json:
                click.echo(json.dumps(timing.to_dict(), indent=2, allow_nan=False))
            else:
                render_timing(timing, _console(stderr=False))
            return 0

        return show

    sys.exit(_guarded(work, as_json=as_json, verbose=verbose, debug=debug))


def _source(flags: dict[str, Any], path: str) -> Source:
    from reparam.capture.arch import parse_arch_args
    from reparam.source import Source

    return Source(flags.pop(path), **{**flags, "arch_args": parse_arch_args(flags["arch_args"])})


def _guarded(work: Callable[[Progress], Show], *, as_json: bool, verbose: bool, debug: bool) -> int:
    """Does `work` with progress on standard error, prints what came of it or the error, and returns the exit status."""
    try:
        with _progress() as progress:
            show = work(progress)
    except ReparamError as error:
        _print_error(error, as_json=as_json, verbose=verbose)
        if debug:
            traceback.print_exc()
        return error.exit_status
    except KeyboardInterrupt:
        click.echo("reparam: interrupted; nothing was written", err=True)
        return INTERRUPTED
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        click.echo(
            f"reparam: internal error: {message} (this is a fault in reparam {__version__}: please report it, "
            "with what --debug prints)",
            err=True,
        )
        if debug:
            traceback.print_exc()
        if as_json:
            click.echo(json.dumps({"error": f"{type(error).__name__}: {error}", "exit_status": INTERNAL_ERROR}))
        return INTERNAL_ERROR
    return show()


def _print_report(report: Report, *, as_json: bool, verbose: bool, **more: Any) -> int:
    if as_json:
        click.echo(json.dumps({**report.to_dict(), **more}, indent=2, allow_nan=False))
        return 0
    from reparam.report.text import render_text

    render_text(report, _console(stderr=False), verbose=verbose)
    return 0


def _print_error(error: ReparamError, *, as_json: bool, verbose: bool) -> None:
    report = error.report if isinstance(error, NotEquivalentError) else None
    if report is not None:
        _print_report(report, as_json=as_json, verbose=verbose, error=str(error), exit_status=error.exit_status)
    elif as_json:
        click.echo(json.dumps({"error": str(error), "exit_status": error.exit_status}, indent=2))
    click.echo(f"reparam: error: {error}", err=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a log or a file has no width of its own, and 80 columns break most places in two
    return console


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A line with a spinner that names the running stage; one line for each stage where nobody watches."""
    console = _console(stderr=True)
    if not console.is_terminal:
        told: set[str] = set()

        def tell(text: str) -> None:
            stage = text.partition(":")[0]
            if stage not in told:
                told.add(stage)
                click.echo(f"reparam: {stage}", err=True)

        tell("starting")
        yield tell
        return
    with console.status("starting") as status:
        yield lambda text: status.update(text)
