"""Distil the carved model from its dense teacher, and write what was learned.

This made `examples/reference_moe/smollm2-135m.safetensors`: the neuron assignment, the
routers and low-rank deltas of every projection. `make demo` only applies the result.

    python -m benchmarks.reference_moe.distil demo/dense learned.safetensors --steps 1000

Student: the dense model whose feed-forward layers are masked to the shared neurons and the
top-k experts. Loss: KL(teacher || student) over the whole vocabulary, plus the relative
squared error of the hidden state after each layer. Trained: rank-r deltas of all projections,
norms, and the routers. A router's choice is a step function; its gradient is that of a
sigmoid around the boundary between the k-th and the next score (straight-through), so
experts that were *not* chosen also learn whether they should have been.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as functional
from safetensors.torch import load_file, save_file

from benchmarks.reference_moe.corpus import DOMAINS, HELD_OUT, documents
from edgemoe.carve.build import GATE_SLOPE
from edgemoe.carve.carve import carve_layers
from edgemoe.carve.dense import DenseModel, load_dense
from edgemoe.carve.learned import (
    ATTENTION,
    FEED_FORWARD,
    LearnedCarve,
    pack_delta,
    weights_sha256,
)
from edgemoe.carve.options import CarveOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("distil")

EXPERTS, SHARED, TOP_K = 16, 512, 6
RANK, ATTENTION_RANK, DELTA_SCALE = 24, 8, 2.0
SEQUENCE, SEQUENCES_PER_STEP = 256, 2
LEARNING_RATE, ROUTER_LEARNING_RATE, WARMUP_STEPS = 1.0e-3, 1.0e-4, 20
BOUNDARY_WIDTH = 0.3


class LowRank(torch.nn.Module):
    """A frozen linear layer plus `scale * B A`."""

    def __init__(self, base: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.a = torch.nn.Parameter(torch.empty(rank, base.in_features))
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank))
        torch.nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The base layer plus the delta."""
        low = functional.linear(functional.linear(x, self.a), self.b)
        return cast("torch.Tensor", self.base(x)) + DELTA_SCALE * low


class MaskedExperts(torch.nn.Module):
    """A dense feed-forward layer, neurons reordered, masked to shared and chosen experts."""

    gate_proj: LowRank
    up_proj: LowRank

    def __init__(
        self,
        mlp: torch.nn.Module,
        order: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj"):
            linear: torch.nn.Linear = getattr(mlp, name)
            linear.weight.data = linear.weight.data[order].contiguous()
            setattr(self, name, LowRank(linear, RANK))
        last = cast("torch.nn.Linear", mlp.get_submodule("down_proj"))
        last.weight.data = last.weight.data[:, order].contiguous()
        self.down_proj = LowRank(last, RANK)
        self.router_weight = torch.nn.Parameter(weight)
        self.router_bias = torch.nn.Parameter(bias)
        self.top_k = TOP_K

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shared neurons, and those of the chosen experts times their gates."""
        hidden = functional.silu(self.gate_proj(x)) * self.up_proj(x)
        logits = functional.linear(x, self.router_weight)
        scores = logits + self.router_bias
        top = scores.detach().topk(self.top_k + 1, dim=-1).values
        boundary = (top[..., -1:] + top[..., -2:-1]) / 2
        soft = torch.sigmoid((scores - boundary) / BOUNDARY_WIDTH)
        mask = (scores.detach() > boundary).float() + soft - soft.detach()
        gates = mask * 2 * torch.sigmoid(GATE_SLOPE * logits)
        size = (hidden.shape[-1] - SHARED) // EXPERTS
        routed = hidden[..., SHARED:].unflatten(-1, (EXPERTS, size)) * gates.unsqueeze(-1)
        every = torch.cat([hidden[..., :SHARED], routed.flatten(-2)], dim=-1)
        return cast("torch.Tensor", self.down_proj(every))


def carve(dense: DenseModel, windows: list[list[int]], seed: int) -> dict[str, torch.Tensor]:
    """Assignment and router of every layer, as tensors."""
    options = CarveOptions(experts=EXPERTS, top_k=TOP_K, seed=seed)
    layers, recall = carve_layers(dense, windows, options, SHARED)
    logger.info("carved; routers agree with the energy oracle on %.3f of the experts", recall)
    carved: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        carved[f"{index}.order"] = torch.from_numpy(layer.assignment.order.copy())
        carved[f"{index}.router.weight"] = torch.from_numpy(layer.router.weight.copy())
        carved[f"{index}.router.bias"] = torch.from_numpy(layer.router.bias.copy())
    return carved


def make_student(dense: PreTrainedModel, carved: dict[str, torch.Tensor]) -> PreTrainedModel:
    """Copy the dense model, mask its feed-forward layers, and free what is to be trained."""
    student = copy.deepcopy(dense)
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    for index, layer in enumerate(student.model.layers):
        layer.mlp = MaskedExperts(
            layer.mlp,
            carved[f"{index}.order"],
            carved[f"{index}.router.weight"].clone(),
            carved[f"{index}.router.bias"].clone(),
        )
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(
                layer.self_attn, name, LowRank(getattr(layer.self_attn, name), ATTENTION_RANK)
            )
        layer.input_layernorm.weight.requires_grad_(True)
        layer.post_attention_layernorm.weight.requires_grad_(True)
    student.model.norm.weight.requires_grad_(True)
    return student


def resume(student: PreTrainedModel, learned: LearnedCarve) -> None:
    """Start from what an earlier run learned; its deltas come back as rounded to int8."""
    tensors = {name: torch.from_numpy(np.array(v)) for name, v in learned.tensors.items()}
    with torch.no_grad():
        for index, layer in enumerate(student.model.layers):
            for group, names in ((layer.mlp, FEED_FORWARD), (layer.self_attn, ATTENTION)):
                for name in names:
                    low, key = getattr(group, name), f"{index}.{name}"
                    # Half of the scale on each side keeps both factors in Adam's range.
                    root = (tensors[f"{key}.scale"] / DELTA_SCALE).sqrt()
                    low.a.copy_(tensors[f"{key}.a"] * root[:, None])
                    low.b.copy_(tensors[f"{key}.b"] * root)
            layer.mlp.router_weight.copy_(tensors[f"{index}.router.weight"])
            layer.mlp.router_bias.copy_(tensors[f"{index}.router.bias"])
            layer.input_layernorm.weight.copy_(tensors[f"{index}.input_layernorm"])
            layer.post_attention_layernorm.weight.copy_(
                tensors[f"{index}.post_attention_layernorm"]
            )
        student.model.norm.weight.copy_(tensors["norm"])


def learned_tensors(student: PreTrainedModel) -> dict[str, np.ndarray]:
    """What `LearnedCarve` keeps, but for the order of the neurons."""
    out: dict[str, np.ndarray] = {}
    for index, layer in enumerate(student.model.layers):
        for group, names in ((layer.mlp, FEED_FORWARD), (layer.self_attn, ATTENTION)):
            for name in names:
                low = getattr(group, name)
                a, b = low.a.detach().numpy(), low.b.detach().numpy() * DELTA_SCALE
                key = f"{index}.{name}"
                out[f"{key}.a"], out[f"{key}.b"], out[f"{key}.scale"] = pack_delta(a, b)
        for name, parameter in (
            ("router.weight", layer.mlp.router_weight),
            ("router.bias", layer.mlp.router_bias),
            ("input_layernorm", layer.input_layernorm.weight),
            ("post_attention_layernorm", layer.post_attention_layernorm.weight),
        ):
            out[f"{index}.{name}"] = parameter.detach().numpy().astype(np.float16)
    out["norm"] = student.model.norm.weight.detach().numpy().astype(np.float16)
    return out


def perplexity(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Perplexity of ids [windows, tokens], the first token of each window not scored."""
    model.eval()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return float(loss.exp())


def main() -> None:
    """Carve, distil, and write what was learned every so often."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end sooner if need be")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=int, default=150, metavar="STEPS")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--carved", type=Path, help="keeps the carve between runs")
    parser.add_argument("--resume", type=Path, help="what an earlier run wrote: go on from it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    generator = random.Random(arguments.seed)

    dense = load_dense(arguments.dense)
    teacher = dense.model
    tokens: dict[str, list[list[int]]] = {
        domain: [
            ids
            for ids in dense.tokenizer(documents(domain, "train"), add_special_tokens=False)[
                "input_ids"
            ]
            if len(ids) > SEQUENCE
        ]
        for domain in DOMAINS
        if domain not in HELD_OUT
    }
    probes = {}
    for domain in ("bible", "code", "man-fr", *HELD_OUT):
        texts = documents(domain, "test")
        texts = texts[:: max(1, len(texts) // 60)][:8]
        ids = [
            i
            for t in texts
            for i in dense.tokenizer(t, add_special_tokens=False)["input_ids"][:512]
        ]
        probes[domain] = torch.tensor(ids[: len(ids) // 512 * 512][:1024]).reshape(-1, 512)

    def draw() -> list[int]:
        document = generator.choice(tokens[generator.choice(sorted(tokens))])
        start = generator.randrange(len(document) - SEQUENCE)
        return document[start : start + SEQUENCE]

    windows = [draw() for _ in range(34)]
    earlier = LearnedCarve.load(arguments.resume) if arguments.resume else None
    if earlier:
        # Other windows than those that the earlier run drew from the same seed.
        generator.seed(f"{arguments.seed}-{earlier.provenance['tokens']}")
        carved = {
            f"{index}.{name}": torch.from_numpy(earlier.tensors[f"{index}.{name}"].astype(kind))
            for index in range(teacher.config.num_hidden_layers)
            for name, kind in (
                ("order", np.int64),
                ("router.weight", np.float32),
                ("router.bias", np.float32),
            )
        }
    elif arguments.carved and arguments.carved.exists():
        carved = load_file(arguments.carved)
    else:
        carved = carve(dense, windows, arguments.seed)
        if arguments.carved:
            save_file(carved, arguments.carved)
    order = {k: v.numpy().astype(np.int16) for k, v in carved.items() if k.endswith("order")}
    dense_sha256 = weights_sha256(teacher)
    student = make_student(teacher, carved)
    if earlier:
        resume(student, earlier)
    tokens_before = earlier.provenance["tokens"] if earlier else 0
    routers = [p for n, p in student.named_parameters() if "router_" in n]
    others = [
        p for n, p in student.named_parameters() if p.requires_grad and "router_" not in n
    ]
    optimizer = torch.optim.AdamW(
        [
            {"params": others, "lr": LEARNING_RATE},
            {"params": routers, "lr": ROUTER_LEARNING_RATE},
        ],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    base_rates = [group["lr"] for group in optimizer.param_groups]

    def report(step: int) -> None:
        scores = {name: perplexity(student, ids) for name, ids in probes.items()}
        mean = math.exp(sum(math.log(s) for s in scores.values()) / len(scores))
        logger.info(
            "step %d perplexity %s geomean %.2f",
            step,
            {k: round(v, 2) for k, v in scores.items()},
            mean,
        )
        LearnedCarve(
            experts=EXPERTS,
            shared_size=SHARED,
            top_k=TOP_K,
            dense_sha256=dense_sha256,
            tensors={**learned_tensors(student), **order},
            provenance={
                "script": "benchmarks/reference_moe/distil.py",
                "tokens": tokens_before + step * SEQUENCES_PER_STEP * SEQUENCE,
                "seed": arguments.seed,
                "held_out": list(HELD_OUT),
            },
        ).save(arguments.output)

    logger.info(
        "dense %s", {name: round(perplexity(teacher, ids), 2) for name, ids in probes.items()}
    )
    report(0)
    started, step = time.monotonic(), 0
    while True:
        elapsed = (time.monotonic() - started) / 60
        done = max(step / arguments.steps, elapsed / arguments.minutes)
        if done >= 1:
            break
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * (
            0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
        )
        for group, base in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = base * rate
        batch = torch.tensor([draw() for _ in range(SEQUENCES_PER_STEP)])
        with torch.no_grad():
            target = teacher(batch, output_hidden_states=True, use_cache=False)
            target_log = functional.log_softmax(target.logits[:, 1:], dim=-1)
        student.train()
        output = student(batch, output_hidden_states=True, use_cache=False)
        student_log = functional.log_softmax(output.logits[:, 1:], dim=-1)
        divergence = (target_log.exp() * (target_log - student_log)).sum(-1).mean()
        pairs = zip(output.hidden_states[1:], target.hidden_states[1:], strict=True)
        drift = torch.stack(
            [((s - t)[:, 1:].pow(2).sum(-1) / t[:, 1:].pow(2).sum(-1)).mean() for s, t in pairs]
        ).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(divergence + drift)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        torch.nn.utils.clip_grad_norm_(routers, 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            speed = step * batch.numel() / (time.monotonic() - started)
            logger.info(
                "step %d kl %.4f drift %.4f %.0f tokens/s", step, divergence, drift, speed
            )
        if step % arguments.evaluate_every == 0:
            report(step)
    report(step)


if __name__ == "__main__":
    main()
