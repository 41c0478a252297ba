"""`python -m edgemoe.cli`: the command where its script is not on PATH."""

from edgemoe.cli import main

main(prog_name="edgemoe")
