"""Registers `optimum-cli export edgemoe`.

optimum-cli 2.0 to 2.3 imports each file of the namespace package `optimum.commands.register`,
whichever distribution brought it, and reads `REGISTER_COMMANDS`. There must be no
`__init__.py` in this folder or above it: it would hide optimum.
"""

from __future__ import annotations

from optimum.commands.export.base import ExportCommand

from edgemoe.cli.optimum_command import EdgemoeExportCommand

REGISTER_COMMANDS = [(EdgemoeExportCommand, ExportCommand)]
