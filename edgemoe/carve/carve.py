"""The whole of `edgemoe carve`: dense checkpoint in, MoE checkpoint out."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.carve.activations import feed_forward_inputs, neuron_activations
from edgemoe.carve.build import (
    CarvedLayer,
    build_moe,
    carved_types,
    check_dense,
    check_shape,
    neuron_shares,
)
from edgemoe.carve.channels import active_neurons, assign_neurons
from edgemoe.carve.dense import load_dense, save_tokenizer
from edgemoe.carve.learned import LearnedCarve
from edgemoe.carve.options import WINDOW, CarveOptions
from edgemoe.carve.router import expert_energy, fit_router
from edgemoe.errors import CarveError
from edgemoe.models.saving import save_plain
from edgemoe.plans.layer_plan import WIDTH_MULTIPLE
from edgemoe.progress import track
from edgemoe.staging import refuse_existing, refuse_inputs_inside, staged_directory

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from edgemoe.carve.dense import DenseModel


@dataclass(frozen=True, kw_only=True)
class CarveReport:
    """Report of a carving.

    Attributes:
        layers: Decoder layers.
        experts: Routed experts per layer.
        expert_size: Intermediate channels per routed expert.
        shared_size: Intermediate channels that every token uses.
        top_k: Routed experts per token.
        active_fraction: Share of the FFN channels that a token uses.
        calibration_tokens: Tokens that were read.
        parameters: Parameters of the carved model.
        router_recall: Share of the experts with the most energy that the router also chooses,
            mean over layers, on the calibration tokens; none where nothing was calibrated.
    """

    layers: int
    experts: int
    expert_size: int
    shared_size: int
    top_k: int
    active_fraction: float
    calibration_tokens: int
    parameters: int
    router_recall: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def carve_checkpoint(
    source: Path,
    output: Path,
    *,
    texts: Sequence[str],
    options: CarveOptions | None = None,
    force: bool = False,
) -> CarveReport:
    """Carve a dense checkpoint into a Mixture-of-Experts checkpoint.

    CMoE (https://arxiv.org/abs/2502.04416), with gates that are one whatever the number of
    experts: see `edgemoe.carve.build`. Nothing is trained, and the same arguments give
    the same bytes.

    Args:
        source: Hugging Face directory or GGUF file.
        output: Directory to write.
        texts: Calibration texts.
        options: Shape, tokens and seed.
        force: Whether `output` may be replaced.

    Returns:
        What was carved.

    Raises:
        CheckpointError: The source cannot be read.
        CarveError: It cannot be carved as asked, or the texts are too short.
        OutputError: The output exists or cannot be written.
    """
    chosen = options or CarveOptions()
    refuse_existing(output, force=force, directory=True)
    refuse_inputs_inside(output, source)
    dense = load_dense(source)
    check_dense(dense.model.config)
    shared_size, expert_size = neuron_shares(
        dense.model.config.intermediate_size,
        experts=chosen.experts,
        shared_fraction=chosen.shared_fraction,
    )
    check_shape(
        experts=chosen.experts,
        expert_size=expert_size,
        shared_size=shared_size,
        top_k=chosen.top_k,
    )
    windows = calibration_windows(dense, texts, max_tokens=chosen.max_tokens, seed=chosen.seed)
    layers, recall = carve_layers(dense, windows, chosen, shared_size)
    model = build_moe(dense.model, layers, top_k=chosen.top_k)
    # In other types than float32 transformers' grouped products want rows of 16 bytes.
    types = {} if expert_size % WIDTH_MULTIPLE else carved_types(dense.stored_types)
    with staged_directory(output, force=force) as staged:
        save_plain(model, staged, types)
        save_tokenizer(dense, staged)
    return _report(model, tokens=sum(len(window) for window in windows), recall=recall)


def rebuild_checkpoint(
    source: Path, output: Path, *, learned: Path, force: bool = False
) -> CarveReport:
    """Rebuild a distilled MoE from its dense checkpoint and what was learned.

    Args:
        source: Hugging Face directory or GGUF file of the dense model.
        output: Directory to write.
        learned: File of a `edgemoe.carve.learned.LearnedCarve`.
        force: Whether `output` may be replaced.

    Returns:
        What was rebuilt; nothing was calibrated, so there are no calibration tokens and no
        recall.

    Raises:
        CheckpointError: The source cannot be read.
        CarveError: `learned` cannot be read, or belongs to another checkpoint.
        OutputError: The output exists or cannot be written.
    """
    refuse_existing(output, force=force, directory=True)
    refuse_inputs_inside(output, source, learned)
    carve = LearnedCarve.load(learned)
    dense = load_dense(source)
    model = carve.apply(dense.model)
    with staged_directory(output, force=force) as staged:
        # What was learned changed all of them.
        save_plain(model, staged, {})
        save_tokenizer(dense, staged)
    return _report(model, tokens=0, recall=None)


def carve_layers(
    dense: DenseModel, windows: Sequence[Sequence[int]], options: CarveOptions, shared_size: int
) -> tuple[list[CarvedLayer], float]:
    """Assign channels and fit routers, layer by layer.

    Args:
        dense: The dense model.
        windows: Calibration token ids.
        options: Shape and seed.
        shared_size: Intermediate channels that every token uses.

    Returns:
        The layers, and the mean recall of their routers.
    """
    inputs = feed_forward_inputs(dense.model, windows)
    decoder: Any = dense.model.model
    layers, recalls = [], []
    for index, layer in enumerate(track(decoder.layers, "carving layers")):
        activations = neuron_activations(layer.mlp, inputs[index]).numpy()
        down = layer.mlp.down_proj.weight.detach().numpy()
        active = active_neurons(activations, np.linalg.norm(down, axis=0))
        assignment = assign_neurons(
            active, experts=options.experts, shared_size=shared_size, seed=options.seed
        )
        energy = expert_energy(activations, down, assignment.experts)
        hidden = inputs[index].numpy()
        router = fit_router(hidden, energy)
        layers.append(CarvedLayer(assignment=assignment, router=router))
        scores = hidden @ router.weight.T + router.bias
        recalls.append(_recall(scores, energy, options.top_k))
    return layers, float(np.mean(recalls))


def calibration_windows(
    dense: DenseModel, texts: Sequence[str], *, max_tokens: int, seed: int
) -> list[list[int]]:
    """Cut calibration texts into windows and draw as many as the budget allows.

    Args:
        dense: Whose tokenizer to use.
        texts: Calibration texts.
        max_tokens: Budget.
        seed: Decides which windows are drawn.

    Returns:
        Windows of at most `WINDOW` token ids. What is left of texts, or short texts, are
        put together in windows; the last of these may be short.

    Raises:
        CarveError: The texts hold fewer than two windows of tokens.
    """
    windows: list[list[int]] = []
    rests: list[int] = []
    for text in texts:
        ids = dense.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = len(ids) // WINDOW * WINDOW
        windows += [ids[i : i + WINDOW] for i in range(0, whole, WINDOW)]
        rests += ids[whole:]
    windows += [rests[i : i + WINDOW] for i in range(0, len(rests), WINDOW)]
    random.Random(seed).shuffle(windows)
    drawn: list[list[int]] = []
    total = 0
    for window in windows:
        if total + len(window) > max_tokens:
            continue
        drawn.append(window)
        total += len(window)
    if total < 2 * WINDOW:
        raise CarveError(
            f"calibration text must hold at least {2 * WINDOW} tokens, got {total}. "
            "Give a longer --data file."
        )
    return drawn


def _report(model: PreTrainedModel, *, tokens: int, recall: float | None) -> CarveReport:
    config: Any = model.config
    size, experts = config.moe_intermediate_size, config.n_routed_experts
    shared = size * config.n_shared_experts
    return CarveReport(
        layers=config.num_hidden_layers,
        experts=experts,
        expert_size=size,
        shared_size=shared,
        top_k=config.num_experts_per_tok,
        active_fraction=(shared + config.num_experts_per_tok * size)
        / (shared + experts * size),
        calibration_tokens=tokens,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        router_recall=recall,
    )


def _recall(scores: Any, energy: Any, top_k: int) -> float:
    predicted = np.argsort(-scores, axis=1)[:, :top_k]
    oracle = np.argsort(-energy, axis=1)[:, :top_k]
    hits = (predicted[:, :, None] == oracle[:, None, :]).any(axis=1)
    return float(hits.mean())
