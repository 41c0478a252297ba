"""The model that a student is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import RecoveryError
from edgemoe.evaluate.subject import load_dense
from edgemoe.models.checkpoint import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgemoe.models.checkpoint import Checkpoint


def check_teacher(teacher: Checkpoint, student: Checkpoint) -> None:
    """Refuse a teacher whose distributions cannot be compared with the student's.

    Args:
        teacher: Its checkpoint.
        student: The student's.

    Raises:
        RecoveryError: They are the same checkpoint, or have different vocabularies.
        CheckpointError: The teacher is missing or malformed.
    """
    if teacher.path.resolve() == student.path.resolve():
        raise RecoveryError(
            f"the teacher must be another checkpoint than the model, got {teacher.path} for "
            "both. Give the one that the model was compressed from."
        )
    theirs, ours = teacher.tokenizer.get_vocab(), student.tokenizer.get_vocab()
    if theirs != ours:
        other = sorted(theirs.items() ^ ours.items())[0][0]
        raise RecoveryError(
            f"the teacher must have the model's vocabulary, got {len(theirs)} tokens in "
            f"{teacher.path} and {len(ours)} in {student.path}, which differ in {other!r}. "
            "Give the checkpoint that the model was compressed from."
        )
    sizes = [getattr(one.config, "vocab_size", None) for one in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise RecoveryError(
            f"the teacher must have as many logits as the model, got {sizes[0]} in "
            f"{teacher.path} and {sizes[1]} in {student.path}. Give the checkpoint that the "
            "model was compressed from."
        )


def load_teacher(teacher: Checkpoint) -> PreTrainedModel:
    """Open a teacher, Mixture of Experts or dense.

    Args:
        teacher: Its checkpoint.

    Returns:
        The model in float32, in eval mode, without gradients.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or malformed.
    """
    return load_model(teacher).model if teacher.has_experts else load_dense(teacher)
