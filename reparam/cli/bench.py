"""`reparam bench`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from reparam.cli.options import output_options, source_of, source_options
from reparam.cli.terminal import INTERRUPTED, Show, guarded, print_as

if TYPE_CHECKING:
    from reparam.stages import Progress


@click.command("bench")
@click.argument("model", metavar="MODEL")
@click.argument("others", metavar="[OTHER]...", nargs=-1)
@source_options
@click.option("--seconds", type=click.FloatRange(min=0), default=5.0, show_default=True, help="Time for measuring.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads within an operator.")
@output_options
def bench_command(
    others: tuple[str, ...],
    seconds: float,
    threads: int | None,
    form: str,
    verbose: bool,
    debug: bool,
    **flags: Any,
) -> None:
    """Measures the latency of MODEL and of each OTHER against it, in pairs.

    Each is whatever `reparam fuse` takes, or an ONNX file, which runs in onnxruntime.

    Exit status: 0 measured, 2 bad input or usage, 70 a fault in reparam, 130 interrupted (what was measured is shown).
    """

    def work(progress: Progress) -> Show:
        from reparam.compare import bench_files
        from reparam.report.markdown import render_timing_markdown
        from reparam.report.text import render_timing

        timing = bench_files(source_of(flags, "model"), others, seconds=seconds, threads=threads, progress=progress)

        def show() -> int:
            print_as(
                form,
                timing.to_dict,
                lambda: render_timing_markdown(timing),
                lambda console: render_timing(timing, console),
            )
            return INTERRUPTED if timing.partial else 0

        return show

    sys.exit(guarded(work, form=form, verbose=verbose, debug=debug))
