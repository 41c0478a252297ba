"""Task files of chats: each line rendered by the chat template of the model that reads it.

`{"messages": [..., {"role": "assistant", ...}]}` becomes a prompt and a completion: the chat
up to where the last answer begins, and that answer as the template writes it, with what ends
it. Both are what `tokenizer.apply_chat_template` of transformers gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.errors import TaskFileError
from edgemoe.tasks import TaskFile
from edgemoe_runtime.chat import ChatTemplate
from edgemoe_runtime.errors import EdgemoeRuntimeError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe_runtime.chat import Read

_REMEDY = "Write the lines as prompt and completion instead."


def load_task(
    name: str, path: Path | str, model: Path | str | None, read: Read | None = None
) -> TaskFile:
    """Read a task file for a model.

    Args:
        name: The task's name.
        path: The JSON Lines file.
        model: Checkpoint directory or bundle whose template renders chats; None where there is
            none.
        read: Returns a file of the model by name, where that is no directory.

    Returns:
        The task; lines of messages are completions in it.

    Raises:
        TaskFileError: The file breaks the format, or the model has no template, or it refuses
            a line.
    """
    return TaskFile.load(name, path, render=_Renderer(model, read))


class _Renderer:
    """Renders the messages of a line; the template is opened at the first."""

    def __init__(self, model: Path | str | None, read: Read | None) -> None:
        self._model = model
        self._read = read
        self._template: ChatTemplate | None = None

    def __call__(self, messages: Sequence[Mapping[str, Any]], where: str) -> tuple[str, str]:
        try:
            template = self._template = self._template or self._open()
            prompt = template.render(messages[:-1])
            whole = template.render(messages, add_generation_prompt=False)
            if not whole.startswith(prompt):
                # Some templates write something for an answer to come that is not in a chat
                # with the answer, such as an empty thought.
                prompt = template.render(messages[:-1], add_generation_prompt=False)
        except EdgemoeRuntimeError as error:
            raise TaskFileError(f"{where}: {error} {_REMEDY}") from error
        completion = whole[len(prompt) :]
        if not whole.startswith(prompt) or not prompt or not completion:
            raise TaskFileError(
                f"{where}: the chat template must write the last message behind the others, "
                f"got another beginning. {_REMEDY}"
            )
        return prompt, completion

    def _open(self) -> ChatTemplate:
        found = (
            None if self._model is None else ChatTemplate.load(Path(self._model), self._read)
        )
        if found is None:
            raise TaskFileError(
                f"lines of messages need a chat template, got none in {self._model}: neither "
                f"chat_template.jinja nor chat_template in tokenizer_config.json. {_REMEDY}"
            )
        return found
