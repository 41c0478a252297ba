#!/usr/bin/env bash
# optimum 2.3.0: where optimum-cli looks for the commands of other packages.
#
# Guess:  in the folder `register` beside its own optimum_cli.py, so that only a wheel that is
#         unpacked into the same site-packages can add a command; an editable install cannot.
# Actual: optimum, optimum.commands and optimum.commands.register are namespace packages (PEP 420)
#         without any __init__.py. Every folder optimum/commands/register on sys.path is read,
#         in an editable install too, and the wheel of optimum itself brings none.
#
# Exit status 0: still so. Needs Python 3.10 or later and a package index; about 20 seconds.
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH

"${PYTHON:-python3}" -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet huggingface_hub==2.4.0 packaging==26.4
# Its command line needs neither torch nor transformers, which --no-deps leaves out.
"$scratch/venv/bin/pip" install --quiet --no-deps optimum==2.3.0
cli=$scratch/venv/bin/optimum-cli

# A project's source tree, beside and not inside the environment.
plugin=$scratch/project/src
mkdir -p "$plugin/optimum/commands/register"
cat >"$plugin/optimum/commands/register/register_hello.py" <<'PYTHON'
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class Hello(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="hello", help="Greets.")

    def run(self):
        print("hello from another project")


REGISTER_COMMANDS = [(Hello, ExportCommand)]
PYTHON

before=$("$cli" export --help)
# The line that an editable install writes.
echo "$plugin" >"$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
after=$("$cli" export hello)
files=$("$scratch/venv/bin/python" - <<'PYTHON'
from importlib.metadata import files

names = [str(name) for name in files("optimum")]
inits = [f"optimum/{folder}__init__.py" for folder in ("", "commands/", "commands/register/")]
print(sum(name in inits for name in names), sum("commands/register" in name for name in names))
PYTHON
)

echo "optimum 2.3.0 without the project: ${before%%$'\n'*}"
echo "with it in a .pth line:            $after"
echo "__init__.py in the namespace, files in its register folder: $files"
[ "${before%%$'\n'*}" = "usage: optimum-cli export [-h]" ]
[ "$after" = "hello from another project" ]
[ "$files" = "0 0" ]
