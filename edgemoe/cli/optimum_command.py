"""`optimum-cli export edgemoe`: `edgemoe export` where users of optimum look for it.

`optimum/commands/register/register_edgemoe.py` names it to optimum's command line. No module
of edgemoe imports this one, so neither `edgemoe --help` nor the runtime loads optimum.
"""

from __future__ import annotations

from argparse import REMAINDER
from typing import TYPE_CHECKING

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from edgemoe.cli.export import export
from edgemoe.cli.failures import FailureReportingGroup

if TYPE_CHECKING:
    from argparse import ArgumentParser

_PROGRAM = "optimum-cli export"
_NAME = "edgemoe"


class EdgemoeExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum is untyped
    """Hands what follows `optimum-cli export edgemoe` to the click command of edgemoe.

    Parsing twice would give two sets of options and of messages: here there is one, of
    :data:`edgemoe.cli.export.export`, and so are the exit statuses.
    """

    COMMAND = CommandInfo(name=_NAME, help=export.get_short_help_str(limit=80))

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        """Declare that every argument is taken as it stands.

        Args:
            parser: The parser that optimum made for this command.
        """
        # Without prefixes no argument is an option, --help neither: click answers them all.
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs=REMAINDER)

    def run(self) -> None:
        """Run `edgemoe export`.

        Raises:
            SystemExit: Always, with status 0 done, 1 refused or failed, 2 wrongly called.
        """
        group = FailureReportingGroup(
            commands={_NAME: export},
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        group.main([_NAME, *self.args.arguments], prog_name=_PROGRAM)
