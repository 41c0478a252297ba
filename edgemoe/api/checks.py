"""What verbs refuse before anything heavy is imported: paths, kinds of files, fractions.

None of these imports torch or transformers, so a mistake is told in a fraction of a second.
Whatever opens a file later checks it again, and more of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import CheckpointError, EdgemoeError, PlanError
from edgemoe.file_kinds import describe_mistake, identify
from edgemoe.staging import refuse_existing, refuse_inputs_inside, refuse_missing_parent

if TYPE_CHECKING:
    from pathlib import Path


def check_checkpoint(path: Path) -> None:
    """Refuse what cannot be a checkpoint, by its names and headers.

    Args:
        path: What was given.

    Raises:
        CheckpointError: It is missing, of another kind, or has no safetensors weights that are
            whole, or its config.json is no JSON object.
    """
    from edgemoe.models.gguf.paths import find_gguf
    from edgemoe.models.safety import check_directory, check_weights, read_json_object

    check_directory(path)
    if identify(path).name in ("adapter", "report"):
        raise CheckpointError(
            f"a checkpoint must have config.json, got {describe_mistake(path)}."
        )
    if find_gguf(path) is None:
        read_json_object(path / "config.json")
    check_weights(path)


def check_bundle(path: Path) -> None:
    """Refuse what cannot be a bundle.

    Args:
        path: What was given.

    Raises:
        CheckpointError: Another kind of file or directory that edgemoe knows was given.
    """
    kind = identify(path).name
    if kind not in ("bundle", "missing", "directory"):
        raise CheckpointError(
            f"a bundle must be the directory that `edgemoe export` wrote, got "
            f"{describe_mistake(path)}."
        )


def check_output(output: Path | None, *inputs: Path, force: bool, directory: bool) -> None:
    """Refuse an output that could not be written in the end.

    Args:
        output: File or directory to write; None where none is.
        inputs: What is read.
        force: Whether an existing output may be replaced.
        directory: Whether a directory is to be written.

    Raises:
        OutputError: It exists, is of the other kind, contains what is read, or the folder that
            it would lie in does not exist.
    """
    if output is None:
        return
    # Who goes on with interrupted work may find more than is allowed at the beginning.
    refuse_existing(output, force=force, directory=directory, resumes=True)
    refuse_inputs_inside(output, *inputs)
    refuse_missing_parent(output)


def check_fraction(
    option: str, rule: str, value: float | None, error: type[EdgemoeError] = PlanError
) -> None:
    """Refuse what is no fraction.

    Args:
        option: The option, for the message.
        rule: What it must be, such as `a fraction of the experts`.
        value: Its value; None was not given.
        error: What to raise.

    Raises:
        EdgemoeError: It is not in (0, 1].
    """
    if value is not None and not 0 < value <= 1:
        counted = rule.endswith("the experts")
        remedy = " For a number of experts use --keep-experts." if counted else ""
        raise error(f"{option} must be {rule} in (0, 1], got {value:g}.{remedy}")


def check_seed(
    seed: int, limit: int | None = None, error: type[EdgemoeError] = PlanError
) -> None:
    """Refuse what is no seed.

    Args:
        seed: What was given.
        limit: It must be less; None where there is no limit.
        error: What to raise.

    Raises:
        EdgemoeError: It is not in [0, `limit`).
    """
    if seed < 0 or (limit is not None and seed >= limit):
        raise error(f"the seed must be in [0, {limit or 'inf'}), got {seed}.")
