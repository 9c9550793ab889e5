"""The command: flags -> `reparam.workflow` -> report. torch is imported only when there is work to do.

One file for each command; `options.py` and `terminal.py` hold what they share.
"""

from __future__ import annotations

import click

from reparam import __version__
from reparam.cli.bench import bench_command
from reparam.cli.export import export_command
from reparam.cli.fuse import fuse_command
from reparam.cli.verify import verify_command

__all__ = ["fuse_command", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="reparam")
def main() -> None:
    """Turns trained PyTorch models into their inference form, and proves by measurement that nothing changed."""


for command in (fuse_command, verify_command, bench_command, export_command):
    main.add_command(command)
