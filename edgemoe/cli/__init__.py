"""The `edgemoe` command: one file per subcommand, each parses, calls and prints.

What they call is :mod:`edgemoe.api`, whose functions import their packages when they are
called: `edgemoe --help` and the commands of the runtime work where torch is not installed.
"""

from __future__ import annotations

import click

from edgemoe.cli.allocate import allocate
from edgemoe.cli.apply import apply
from edgemoe.cli.bench import bench
from edgemoe.cli.calibrate import calibrate
from edgemoe.cli.carve import carve
from edgemoe.cli.compile import compile_
from edgemoe.cli.decompose import decompose
from edgemoe.cli.doctor import doctor
from edgemoe.cli.evaluate import evaluate
from edgemoe.cli.export import export
from edgemoe.cli.failures import FailureReportingGroup
from edgemoe.cli.families import families
from edgemoe.cli.inspect import inspect
from edgemoe.cli.merge_stats import merge_stats
from edgemoe.cli.options import debug_option
from edgemoe.cli.prune import prune
from edgemoe.cli.recover import recover
from edgemoe.cli.run import run
from edgemoe.cli.sweep import sweep
from edgemoe.cli.verify import verify
from edgemoe.versions import __version__


@click.group(
    cls=FailureReportingGroup, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(__version__, prog_name="edgemoe")
@debug_option
def main() -> None:
    """Fit Mixture-of-Experts language models to one task and one edge device."""


# In the order of the pipeline, which is the order that --help shows.
for command in (
    carve,
    calibrate,
    merge_stats,
    prune,
    decompose,
    allocate,
    apply,
    recover,
    evaluate,
    sweep,
    export,
    compile_,
    run,
    bench,
    inspect,
    verify,
    families,
    doctor,
):
    main.add_command(command)
