from __future__ import annotations

import click
import pytest

import edgemoe_runtime
from edgemoe.cli import main
from edgemoe_exporters import targets
from edgemoe_runtime.bundle.names import PRECISIONS, TARGETS

# The arguments and options of each command, as others call them.
COMMANDS = {
    "carve": "dense --output --experts --shared-fraction --top-k --data",
    "calibrate": "model --task --output --max-tokens --shard --workers --ray --device",
    "merge-stats": "first others --output",
    "prune": "model --stats --task --method --keep --keep-experts --seed --output",
    "decompose": "model --stats --task --method --param-ratio --plan --output",
    "allocate": "model --task --policy --plan --mean-k --output",
    "apply": "model --plan --output",
    "recover": "model --teacher --task --method --output",
    "evaluate": "model --task --k-cap",
    "sweep": "model --task --method --keep --seeds --max-drop --output --workers --ray",
    "export": "model --output --target --precision --task --plan --keep --max-drop",
    "compile": "bundle --target --task",
    "run": "bundle --task --prompt --max-new-tokens --k-cap --stream",
    "bench": "bundle --task --prompt-tokens --new-tokens --repeat",
    "inspect": "path",
    "verify": "bundle",
    "families": "names --check --markdown",
    "doctor": "",
}


def names(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def test_the_commands_are_these_in_the_order_of_the_road() -> None:
    assert main.list_commands(click.Context(main)) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_what_is_promised(name: str) -> None:
    command = main.commands[name]

    assert names(command) >= {*COMMANDS[name].split(), "--json", "--debug"}
    assert ("--force" in names(command)) == ("--output" in names(command) or name == "compile")
    assert ("-o" in names(command)) == ("--output" in names(command))
    assert command.help
    undocumented = [
        option.name
        for option in command.params
        if isinstance(option, click.Option)
        and not option.help
        and not (option.show_default or isinstance(option.type, click.Choice))
        and option.name not in {"task", "stats", "plan_path", "temperature", "top_p"}
    ]
    assert undocumented == []


def test_targets_and_precisions_are_those_of_the_exporters() -> None:
    assert tuple(targets.TARGETS) == TARGETS
    assert {name for t in targets.TARGETS.values() for name in t.precisions} == {*PRECISIONS}


def test_the_runtime_exports_what_applications_import() -> None:
    assert "Session" in edgemoe_runtime.__all__
    for name in edgemoe_runtime.__all__:
        assert getattr(edgemoe_runtime, name) is not None
        assert not name.startswith("_")
