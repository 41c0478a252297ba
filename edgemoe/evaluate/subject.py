"""Open what is to be judged: a Mixture-of-Experts or dense checkpoint, or a bundle."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edgemoe.errors import CheckpointError
from edgemoe_runtime.bundle.names import MANIFEST_FILE, TOKENIZER_FILE
from edgemoe_runtime.decoding.tokenizer import encode_once
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

    from edgemoe.evaluate.exact_match import Generate
    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.models.checkpoint import Checkpoint

_LOADING_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, OSError)


class Subject(NamedTuple):
    """What is judged.

    Attributes:
        scorer: Says how likely tokens are.
        tokenizer: The model's tokenizer.
        generate: Continues a prompt, the most likely token each time.
        experts_per_token: Returns what scored tokens used per MoE layer, averaged over both;
            None where that is not known.
    """

    scorer: Scorer
    tokenizer: Tokenizer
    generate: Generate
    experts_per_token: Callable[[], float | None] = lambda: None


@contextlib.contextmanager
def open_subject(
    path: Path | str, *, task: str | None = None, k_cap: int | Sequence[int] | None = None
) -> Iterator[Subject]:
    """Open a checkpoint or a bundle to be judged.

    A Mixture-of-Experts checkpoint that is larger than memory is read layer by layer.

    Args:
        path: A Hugging Face directory, Mixture-of-Experts or dense, or a bundle.
        task: The task; of a bundle its graph is judged, or the only graph that there is.
        k_cap: Most experts per token, one for all MoE layers or one for each.

    Yields:
        The subject; it serves until the block ends.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or malformed, or is dense and
            `k_cap` is given.
        FamilyError: It is a Mixture-of-Experts checkpoint of a family that is not supported.
        edgemoe_runtime.errors.BundleError: The bundle cannot be used, or has no such task.
    """
    path = Path(path)
    if (path / MANIFEST_FILE).is_file():
        with _open_bundle(path, task, k_cap) as opened:
            yield opened
        return
    from edgemoe.evaluate.torch_scorer import TorchScorer
    from edgemoe.layerwise.provider import open_layers
    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.resume import WorkDirectory

    checkpoint = Checkpoint(path)
    tokenizer = checkpoint.tokenizer
    layers = open_layers(checkpoint) if checkpoint.has_experts else None
    with contextlib.ExitStack() as stack:
        work = None
        if layers is not None and not layers.is_whole:
            folder = tempfile.TemporaryDirectory(prefix="edgemoe-evaluate-")
            work = WorkDirectory(Path(stack.enter_context(folder)))
        scorer = TorchScorer(layers or load_dense(checkpoint), k_cap=k_cap, work=work)

        def generate(prompt: str, max_new_tokens: int) -> str:
            made = scorer.generate(encode_once(tokenizer, prompt).ids, max_new_tokens)
            return str(tokenizer.decode(made))

        yield Subject(scorer, tokenizer, generate, lambda: scorer.experts_per_token)


def load_dense(path: Path | Checkpoint) -> PreTrainedModel:
    """Open a checkpoint of a language model without experts.

    Args:
        path: The checkpoint.

    Returns:
        The model in float32, in eval mode, without gradients.

    Raises:
        CheckpointError: The checkpoint is missing, a pickle, or not as its config.json says.
        FamilyError: It has experts, and its family is not supported.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.models.dense_gguf import load_dense_gguf
    from edgemoe.models.experts import is_experts_module
    from edgemoe.models.loading import check_fit, quiet_transformers, refuse_not_finite
    from edgemoe.models.registry import find_family

    checkpoint = Checkpoint.open(path)
    del path
    _ = checkpoint.weights
    config = copy.deepcopy(checkpoint.configuration.whole)
    if (checkpoint.gguf or checkpoint.quantised) and not checkpoint.has_experts:
        return load_dense_gguf(checkpoint)
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        has_experts = any(is_experts_module(module) for module in empty.modules())
        if not has_experts:
            checkpoint.check_left_out(model=empty)
            with quiet_transformers():
                model, report = AutoModelForCausalLM.from_pretrained(
                    str(checkpoint.path),
                    config=config,
                    dtype=torch.float32,
                    use_safetensors=True,
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                )
    except _LOADING_FAILURES as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{checkpoint.path} must be a causal language model that transformers opens, got: "
            f"{clip(str(error))}. Copy the checkpoint again."
        ) from error
    if has_experts:
        find_family(config.model_type)
        raise CheckpointError(
            f"{checkpoint.path} has experts, so it must be opened with load_model."
        )
    check_fit(report, checkpoint.path)
    for name, parameter in model.named_parameters():
        refuse_not_finite(name, parameter)
    opened: Any = model.eval().requires_grad_(False)
    dense: PreTrainedModel = opened
    return dense


@contextlib.contextmanager
def _open_bundle(
    path: Path, task: str | None, k_cap: int | Sequence[int] | None
) -> Iterator[Subject]:
    # Nothing here needs torch: a bundle can be judged where it runs.
    from tokenizers import Tokenizer

    from edgemoe.evaluate.requests import PROMPT_TOKENS
    from edgemoe.evaluate.session_scorer import SessionScorer
    from edgemoe_runtime import Session
    from edgemoe_runtime.bundle.manifest_file import load_manifest

    manifest = load_manifest(path)
    # A single graph answers for any task; of several, the task's own must exist.
    name, _ = manifest.task(None if len(manifest.tasks) == 1 else task)
    max_length = min(manifest.model.max_position_embeddings, PROMPT_TOKENS)
    with Session.open(path, task=name, k_cap=k_cap, max_length=max_length) as session:
        # Opening the session has checked that the file is there and is whole.
        tokenizer = Tokenizer.from_file(str(path / TOKENIZER_FILE))
        tokenizer.no_truncation()
        tokenizer.no_padding()

        def generate(prompt: str, max_new_tokens: int) -> str:
            return session.generate(prompt, max_new_tokens=max_new_tokens).text

        scorer = SessionScorer(session, max_length=max_length)
        yield Subject(scorer, tokenizer, generate, lambda: scorer.experts_per_token)
