"""The model that a student is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import RecoveryError
from edgemoe.evaluate.subject import load_dense
from edgemoe.models.checkpoint import Checkpoint, load_model, load_tokenizer
from edgemoe.models.safety import read_json_object

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer
    from transformers import PreTrainedModel


def check_teacher(teacher: Path, student: Path, tokenizer: Tokenizer) -> None:
    """Refuse a teacher whose distributions cannot be compared with the student's.

    Args:
        teacher: Its checkpoint.
        student: The student's.
        tokenizer: The student's.

    Raises:
        RecoveryError: They are the same checkpoint, or have different vocabularies.
        CheckpointError: The teacher is missing or malformed.
    """
    if teacher.resolve() == student.resolve():
        raise RecoveryError(
            f"the teacher must be another checkpoint than the model, got {teacher} for both. "
            "Give the one that the model was compressed from."
        )
    theirs, ours = load_tokenizer(teacher).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        other = sorted(theirs.items() ^ ours.items())[0][0]
        raise RecoveryError(
            f"the teacher must have the model's vocabulary, got {len(theirs)} tokens in "
            f"{teacher} and {len(ours)} in {student}, which differ in {other!r}. Give the "
            "checkpoint that the model was compressed from."
        )
    sizes = [_vocabulary_size(path) for path in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise RecoveryError(
            f"the teacher must have as many logits as the model, got {sizes[0]} in {teacher} "
            f"and {sizes[1]} in {student}. Give the checkpoint that the model was compressed "
            "from."
        )


def load_teacher(path: Path) -> PreTrainedModel:
    """Open a teacher, Mixture of Experts or dense.

    Args:
        path: Its checkpoint.

    Returns:
        The model in float32, in eval mode, without gradients.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or malformed.
    """
    checkpoint = Checkpoint(path)
    return load_model(checkpoint).model if checkpoint.has_experts else load_dense(path)


def _vocabulary_size(path: Path) -> int | None:
    config = read_json_object(path / "config.json")
    inner = config.get("text_config")
    found = config.get("vocab_size", inner.get("vocab_size") if inner else None)
    return None if found is None else int(found)
