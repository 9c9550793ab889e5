"""What commands share on a terminal: progress, exit statuses, errors in a sentence, reports in the form asked for."""

from __future__ import annotations

import contextlib
import json
import os
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from reparam import __version__
from reparam.errors import NotEquivalentError, ReparamError

if TYPE_CHECKING:
    from rich.console import Console

    from reparam.report import Report
    from reparam.stages import Progress

Show: TypeAlias = Callable[[], int]
"""Prints what came of the work, when the line of progress is gone, and returns the exit status."""

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130


def guarded(work: Callable[[Progress], Show], *, form: str, verbose: bool, debug: bool) -> int:
    """Does `work` with progress on standard error, prints what came of it or the error, and returns the exit status."""
    try:
        with _progress() as progress:
            show = work(progress)
    except ReparamError as error:
        print_error(error, form=form, verbose=verbose)
        if debug:
            traceback.print_exc()
        return error.exit_status
    except KeyboardInterrupt as stop:
        click.echo(f"reparam: interrupted; {str(stop) or 'nothing was written'}", err=True)
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
        _print_failure(f"{type(error).__name__}: {error}", INTERNAL_ERROR, form)
        return INTERNAL_ERROR
    return show()


def print_as(
    form: str, plain: Callable[[], dict[str, Any]], markdown: Callable[[], str], text: Callable[[Console], None]
) -> None:
    """Prints a result in the form asked for; each is made only if it is."""
    if form == "json":
        click.echo(json.dumps(plain(), indent=2, allow_nan=False))
    elif form == "markdown":
        click.echo(markdown(), nl=False)
    else:
        text(console_for(stderr=False))


def print_report(report: Report, *, form: str, verbose: bool, **more: Any) -> int:
    from reparam.report.text import render_text

    print_as(
        form,
        lambda: {**report.to_dict(), **more},
        report.to_markdown,
        lambda console: render_text(report, console, verbose=verbose),
    )
    return INTERRUPTED if report.partial else 0


def print_error(error: ReparamError, *, form: str, verbose: bool) -> None:
    report = error.report if isinstance(error, NotEquivalentError) else None
    if report is not None:
        print_report(report, form=form, verbose=verbose, error=str(error), exit_status=error.exit_status)
    else:
        compared = getattr(error, "comparison", None)
        more = {} if compared is None else {"comparison": compared.to_dict()}
        _print_failure(str(error), error.exit_status, form, **more)
    click.echo(f"reparam: error: {error}", err=True)


def _print_failure(message: str, exit_status: int, form: str, **more: Any) -> None:
    """A failure as the document that was asked for; text is left to standard error."""
    if form == "json":
        click.echo(json.dumps({"error": message, "exit_status": exit_status, **more}, indent=2))
    elif form == "markdown":
        from reparam.report.markdown import escaped

        click.echo(f"## ❌ reparam failed\n\n{escaped(message)}")


def console_for(*, stderr: bool) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120  # a log or a file has no width of its own, and 80 columns break most places in two
    return console


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """A line with a spinner that names the running stage; one line for each stage where nobody watches."""
    console = console_for(stderr=True)
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
