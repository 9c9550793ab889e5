"""`reparam verify`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from reparam.cli.options import data_options, output_options, source_of, source_options
from reparam.cli.terminal import Show, guarded, print_as
from reparam.errors import InputError, NotEquivalentError

if TYPE_CHECKING:
    from reparam.stages import Progress

_SAID_BY_CERTIFICATE = ("level", "inputs", "key", "dtype", "seed", "data_limit")
_FOR_CERTIFICATE = ("archive", "onnx")


@click.command("verify")
@click.argument("original", metavar="ORIGINAL", required=False)
@click.argument("candidate", metavar="CANDIDATE", required=False)
@source_options
@click.option(
    "--level", type=click.Choice(["quick", "standard", "thorough"]), default="standard", show_default=True,
    help="How many inputs are tried.",
)  # fmt: skip
@data_options
@click.option("--certificate", metavar="FILE", help="Repeat what this certificate of `reparam fuse` says was done.")
@click.option("--archive", metavar="FILE", help="With --certificate: where the .pt2 is now, if it was moved.")
@click.option("--onnx", metavar="FILE", help="With --certificate: where the ONNX file is now, if it was moved.")
@output_options
@click.pass_context
def verify_command(context: click.Context, /, form: str, verbose: bool, debug: bool, **flags: Any) -> None:
    """Tells whether CANDIDATE computes what ORIGINAL computes, up to the original's own rounding noise.

    Each is whatever `reparam fuse` takes, or an ONNX file, in any combination. ONNX files run in onnxruntime; as
    ORIGINAL, one is also run in float64 where something can, else its rounding noise is estimated, and the result says
    so. Inputs are drawn from --input, from what ORIGINAL tells of itself, or from the sizes in an ONNX file.

    `reparam verify --certificate NAME.fused.json` hashes the files that `reparam fuse` read and wrote, compares them
    again on the same inputs, and says what has changed. They are looked for beside the certificate; ORIGINAL, --archive
    and --onnx say where they are if not. No code is taken from a certificate: --arch, --arch-args, --allow-class,
    --allow-pickle and a function as --data have to be given again.

    Exit status: 0 they agree, or the certificate holds; 1 they do not, or it does not; 2 bad input or usage, 70 a fault
    in reparam.
    """

    def work(progress: Progress) -> Show:
        given = {
            name for name in context.params
            if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        }  # fmt: skip
        if flags["certificate"] is not None:
            return _repeat(flags, given, form, verbose, progress)
        return _verify(flags, given, form, verbose, progress)

    sys.exit(guarded(work, form=form, verbose=verbose, debug=debug))


def _verify(flags: dict[str, Any], given: set[str], form: str, verbose: bool, progress: Progress) -> Show:
    from reparam.compare import verify_files
    from reparam.report.markdown import render_comparison_markdown
    from reparam.report.text import render_comparison

    only = next((name for name in _FOR_CERTIFICATE if name in given), None)
    if only is not None:
        raise InputError(f"--{only} goes with --certificate; give two files to compare without it")
    options = {name: flags.pop(name) for name in ("candidate", "level", "data", "data_limit")}
    if flags["original"] is None or options["candidate"] is None:
        raise InputError("give two files, ORIGINAL and CANDIDATE, or --certificate FILE")
    candidate = options.pop("candidate")
    comparison = verify_files(_source(flags), candidate, **options, progress=progress)

    def show() -> int:
        print_as(
            form,
            comparison.to_dict,
            lambda: render_comparison_markdown(candidate, comparison),
            lambda console: render_comparison(candidate, comparison, console, verbose=verbose),
        )
        return 0 if comparison.passed else NotEquivalentError.exit_status

    return show


def _repeat(flags: dict[str, Any], given: set[str], form: str, verbose: bool, progress: Progress) -> Show:
    from reparam.certificate import Moved
    from reparam.compare import repeat_certificate
    from reparam.report.repeated import render_repeated, render_repeated_markdown

    unfit = next((name for name in _SAID_BY_CERTIFICATE if name in given), None)
    if unfit is not None:
        option = "input" if unfit == "inputs" else unfit.replace("_", "-")
        raise InputError(f"--{option} is what the certificate says; leave it out, or compare two files without one")
    if flags["candidate"] is not None:
        raise InputError("with --certificate give ORIGINAL alone; --archive and --onnx say where the fused files are")
    moved = Moved(flags["original"], flags["archive"], flags["onnx"])
    path, data = flags["certificate"], flags["data"]
    flags["original"] = flags["original"] or path
    done = repeat_certificate(path, _source(flags), moved, data=data, progress=progress)

    def show() -> int:
        print_as(
            form,
            done.to_dict,
            lambda: render_repeated_markdown(done),
            lambda console: render_repeated(done, console, verbose=verbose),
        )
        return 0 if done.holds else NotEquivalentError.exit_status

    return show


def _source(flags: dict[str, Any]) -> Any:
    names = ("original", "arch", "arch_args", "key", "inputs", "allow_classes", "allow_pickle", "dtype", "seed")
    return source_of({name: flags[name] for name in names}, "original")
