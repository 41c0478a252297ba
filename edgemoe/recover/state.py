"""Where a training is, on disk, so that it goes on after any interruption.

Tensors go into files of their own, named by the step; `progress.json` names those that count.
A run that is killed between the two finds what the step before left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from torch.optim import Optimizer

    from edgemoe.resume import WorkDirectory

PROGRESS = "progress.json"
_NEW = "unfinished"
_TENSORS = "*-[0-9]*.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class TrainingState:
    """Progress of a training, in its work directory.

    Attributes:
        work: The directory.
        progress: JSON values: where the training is; empty before it has begun.
    """

    def __init__(self, work: WorkDirectory) -> None:
        """Read what an earlier run left.

        Args:
            work: The directory.
        """
        self.work = work
        self.progress: dict[str, Any] = work.read(PROGRESS) or {}

    def save(
        self,
        progress: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter] | None = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        """Keep where the training is; what was kept before goes.

        Args:
            progress: JSON values, with `step`, and `best_file` where one is to stay.
            parameters: What trains; None leaves it out.
            optimizer: The optimizer of these parameters.
        """
        content = dict(progress)
        if parameters is not None and optimizer is not None:
            content["state_file"] = f"state-{content['step']:08}.safetensors"
            self._write(content["state_file"], _collect(parameters, optimizer))
        self.work.write(PROGRESS, content)
        self.progress = content
        kept = {content.get("state_file"), content.get("best_file")}
        for file in self.work.path.glob(_TENSORS):
            if file.name not in kept:
                file.unlink()

    def save_best(self, step: int, parameters: Mapping[str, nn.Parameter]) -> str:
        """Keep the parameters of a step.

        Args:
            step: Which.
            parameters: What trains.

        Returns:
            The file's name, for `progress`.
        """
        name = f"best-{step:08}.safetensors"
        self._write(name, {key: value.detach() for key, value in parameters.items()})
        return name

    def load(self, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
        """Put back what `save` kept.

        Args:
            parameters: What trains.
            optimizer: The optimizer of these parameters, without a step yet.
        """
        name = self.progress.get("state_file")
        if name is None:
            return
        tensors = load_file(str(self.work.path / name))
        for key, parameter in parameters.items():
            parameter.data.copy_(tensors[f"value/{key}"])
            found = {m: tensors[f"{m}/{key}"] for m in _MOMENTS if f"{m}/{key}" in tensors}
            if found:
                # AdamW counts steps on the CPU. A copy is aligned, as the moments were before.
                optimizer.state[parameter] = {
                    m: tensor.clone() if m == "step" else tensor.clone().to(parameter.device)
                    for m, tensor in found.items()
                }

    def load_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put back the parameters of the best step, which must exist.

        Args:
            parameters: What trains.
        """
        tensors = load_file(str(self.work.path / self.progress["best_file"]))
        for key, parameter in parameters.items():
            parameter.data.copy_(tensors[key])

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        new = self.work.path / _NEW
        save_file({key: value.contiguous() for key, value in tensors.items()}, str(new))
        self.work.commit(new, name)


def _collect(
    parameters: Mapping[str, nn.Parameter], optimizer: Optimizer
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for key, parameter in parameters.items():
        tensors[f"value/{key}"] = parameter.detach()
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}/{key}"] = value
    return tensors
