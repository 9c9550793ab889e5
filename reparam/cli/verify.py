"""`reparam verify`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from reparam.cli.options import data_options, output_options, source_of, source_options
from reparam.cli.terminal import Show, guarded, print_as
from reparam.errors import NotEquivalentError

if TYPE_CHECKING:
    from reparam.stages import Progress


@click.command("verify")
@click.argument("original", metavar="ORIGINAL")
@click.argument("candidate", metavar="CANDIDATE")
@source_options
@click.option(
    "--level", type=click.Choice(["quick", "standard", "thorough"]), default="standard", show_default=True,
    help="How many inputs are tried.",
)  # fmt: skip
@data_options
@output_options
def verify_command(
    candidate: str,
    level: str,
    data: str | None,
    data_limit: int,
    form: str,
    verbose: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Tells whether CANDIDATE computes what ORIGINAL computes, up to the original's own rounding noise.

    Each is whatever `reparam fuse` takes, or an ONNX file, in any combination. ONNX files run in onnxruntime; as
    ORIGINAL, one is also run in float64 where something can, else its rounding noise is estimated, and the result says
    so. Inputs are drawn from --input, from what ORIGINAL tells of itself, or from the sizes in an ONNX file.

    Exit status: 0 they agree, 1 they do not, 2 bad input or usage, 70 a fault in reparam.
    """

    def work(progress: Progress) -> Show:
        from reparam.compare import verify_files
        from reparam.report.markdown import render_comparison_markdown
        from reparam.report.text import render_comparison

        source = source_of(flags, "original")
        comparison = verify_files(source, candidate, level=level, data=data, data_limit=data_limit, progress=progress)

        def show() -> int:
            print_as(
                form,
                comparison.to_dict,
                lambda: render_comparison_markdown(candidate, comparison),
                lambda console: render_comparison(candidate, comparison, console, verbose=verbose),
            )
            return 0 if comparison.passed else NotEquivalentError.exit_status

        return show

    sys.exit(guarded(work, form=form, verbose=verbose, debug=debug))
