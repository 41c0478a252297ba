"""Layers that keep a state: the ops against formulas, the graphs against eager models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.models import adapt_model, load_model
from edgemoe.models.tiny import VOCAB_SIZE, tiny_config, tiny_model, write_tiny_checkpoint
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.lowering import onnxruntime as lower_ort
from edgemoe_exporters.lowering import tensorrt as lower_tensorrt
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.tracing import ops
from edgemoe_exporters.tracing.trace import trace
from edgemoe_exporters.validation.graph_calls import cache_shape
from edgemoe_runtime import Session

if TYPE_CHECKING:
    from pathlib import Path

# One of each kind: gated delta rule, Kimi's with latent attention, Mamba-2, Mamba, lightning
# attention, a convolution alone, sparse attention by keys and by blocks; convolved queries and
# delayed values, several convolutions of a layer beside biases of relative positions,
# convolutions by token beside sinks by token, layers that run several times, and compressed
# windows beside experts by id.
FAMILIES = [
    "qwen3_next",
    "kimi_linear",
    "granitemoehybrid",
    "jamba",
    "minimax",
    "lfm2_moe",
    "deepseek_v32",
    "minimax_m3_vl_text",
    "zaya",
    "inkling_text",
    "inkling2_text",
    "inkling2_loop_text",
    "deepseek_v4",
]
FLAVOURS = [pytest.param(lower_ort, marks=pytest.mark.fused), lower_tensorrt]
NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 9),
    groups=st.integers(1, 2),
    repeats=st.integers(1, 3),
    of_each_row=st.booleans(),
    by_delta_rule=st.booleans(),
)
def test_linear_attention_is_its_formula_and_may_be_cut_anywhere(
    seed: int,
    tokens: int,
    groups: int,
    repeats: int,
    of_each_row: bool,
    by_delta_rule: bool,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    heads, size, width = groups * repeats, 5, 3

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    query, key = normal(2, tokens, groups, size), normal(2, tokens, groups, size)
    key = torch.nn.functional.normalize(key, dim=-1)
    value, past = normal(2, tokens, heads, width), normal(2, heads, size, width)
    decay = -normal(2, tokens, heads, size if of_each_row else 1).exp()
    beta = normal(2, tokens, heads).sigmoid() if by_delta_rule else None
    inputs = [query, key, value, decay, beta]

    found, state = ops.linear_attention(*inputs, past, 0.7)

    # S_t = (I - b k k^T) diag(exp g) S_(t-1) + b k v^T as products of matrices, b = 1 where the
    # rule has no I - k k^T.
    wide = [None if part is None else part.double() for part in inputs]
    for row in range(2):
        for head in range(heads):
            matrix = past[row, head].double()
            for token in range(tokens):
                q, k = (part[row, token, head // repeats] for part in (wide[0], wide[1]))  # type: ignore[index]
                v, g = wide[2][row, token, head], wide[3][row, token, head]  # type: ignore[index]
                matrix = torch.diag(g.expand(size).exp()) @ matrix
                if wide[4] is None:
                    matrix = matrix + torch.outer(k, v)
                else:
                    b = wide[4][row, token, head]
                    forget = torch.eye(size).double() - b * torch.outer(k, k)
                    matrix = forget @ matrix + b * torch.outer(k, v)
                expected = (0.7 * q @ matrix).float()
                torch.testing.assert_close(
                    found[row, token, head], expected, atol=1e-4, rtol=1e-4
                )
            torch.testing.assert_close(state[row, head], matrix.float(), atol=1e-4, rtol=1e-4)

    cut = tokens // 2
    first = [None if part is None else part[:, :cut] for part in inputs]
    rest = [None if part is None else part[:, cut:] for part in inputs]
    begun, between = ops.linear_attention(*first, past, 0.7)
    ended, last = ops.linear_attention(*rest, between, 0.7)
    assert torch.equal(torch.cat([begun, ended], dim=1), found)
    assert torch.equal(last, state)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), tokens=st.integers(1, 7), cut=st.integers(0, 7))
def test_convolution_sees_what_came_before_wherever_it_is_cut(
    seed: int, tokens: int, cut: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(2, 6, tokens, generator=draw)
    weight, bias = torch.randn(6, 4, generator=draw), torch.randn(6, generator=draw)
    padded = torch.nn.functional.pad(states, (3, 0))
    expected = torch.stack(
        [(padded[:, :, t : t + 4] * weight).sum(-1) + bias for t in range(tokens)], dim=-1
    )

    cut = min(cut, tokens)
    past, parts = torch.zeros(2, 6, 3), []
    for part in (states[:, :, :cut], states[:, :, cut:]):
        if part.shape[2]:
            output, past = ops.causal_conv(part, past, weight, bias, "none")
            parts.append(output)
    torch.testing.assert_close(torch.cat(parts, dim=2), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(past, padded[:, :, -3:])


def test_keys_are_chosen_by_score_among_those_that_are_visible() -> None:
    scores = torch.tensor([[[5.0, 1.0, 9.0, 9.0], [5.0, 1.0, 2.0, 3.0]]])
    mask = torch.tensor([[1, 1, 1, 1]])
    chosen = ops.select_keys(scores, mask, 2) == 0
    assert chosen.tolist() == [[[True, False, True, False], [True, False, False, True]]]
    hidden = ops.select_keys(scores, torch.tensor([[0, 1, 1, 1]]), 2) == 0
    assert hidden.tolist() == [[[False, True, True, False], [False, False, True, True]]]
    assert (ops.select_keys(scores, mask, 9) == 0)[0, 1].all()


def test_blocks_are_chosen_by_their_best_key_and_the_own_block_always() -> None:
    scores = torch.tensor(
        [[[[9.0, 0.0, 1.0, 2.0, 7.0, 0.0, 0.0], [1.0, 2.0, 5.0] + [0.0] * 4]]]
    )
    mask = torch.ones(1, 7, dtype=torch.int64)
    chosen = ops.select_blocks(scores, mask, 2, 2, 1) == 0
    # Of blocks {0, 1}, {2, 3}, {4, 5}, {6}: own blocks are the third and the fourth.
    assert chosen.int().tolist() == [[[[1, 1, 0, 0, 1, 1, 0], [0, 0, 1, 1, 0, 0, 1]]]]
    mask[0, :2] = 0
    hidden = ops.select_blocks(scores, mask, 2, 2, 1) == 0
    assert hidden[0, 0, 0].int().tolist() == [0, 0, 1, 1, 1, 1, 0]


def three_layers(family: str) -> Any:
    """Leave out the last layer: two with the family's state are left, and one between them."""
    # Entries of the configuration only: some families compute these lists from other entries.
    whole = tiny_config(family).to_dict()
    lists = {name: whole.get(name) for name in ("layer_types", "mlp_layer_types")}
    fewer = {name: entries[:3] for name, entries in lists.items() if entries}
    return tiny_config(family, num_hidden_layers=3, **fewer)


@pytest.fixture(scope="module")
def traced() -> Any:
    made: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in made:
            model = adapt_model(tiny_model(three_layers(family)))
            made[family] = model, trace(model)
        return made[family]

    return get


def run(graph: Any, ids: Any, mask: Any, steps: list[int], layers: int) -> Any:
    """Run a lowered graph in steps, and return its logits and what it caches at the end."""
    content = ir.to_proto(graph).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    inputs = [item for item in session.get_inputs() if item.name.startswith("past_key_values")]
    past = {
        item.name: np.zeros(cache_shape(item.shape, len(ids), 0), NUMPY[item.type])
        for item in inputs
    }
    positions = (mask.cumsum(1) - 1).clip(min=0)
    names = [item.name for item in session.get_outputs()]
    logits, start = [], 0
    for count in steps:
        stop = start + count
        feeds = {
            "input_ids": ids[:, start:stop],
            "attention_mask": mask[:, :stop],
            "position_ids": positions[:, start:stop],
            "k_cap": np.full(layers, 99),
        }
        results = dict(zip(names, session.run(None, feeds | past), strict=True))
        past = {name: results[name.replace("past_key_values", "present")] for name in past}
        logits.append(results["logits"])
        start = stop
    return np.concatenate(logits, axis=1), past


@pytest.mark.slow
@pytest.mark.states
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_agree_with_eager_over_padding_prefill_and_decode(
    traced: Any, family: str, flavour: Any
) -> None:
    model, graph = traced(family)
    ids = np.random.default_rng(2).integers(3, VOCAB_SIZE, (2, 14))
    mask = np.ones_like(ids)
    # Blocks of keys are counted from the first slot: padding changes what eager chooses.
    mask[1, :4] = family == "minimax_m3_vl_text"
    positions = (mask.cumsum(1) - 1).clip(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in given.items()}
        expected = model.model(**tensors, use_cache=False).logits.numpy()
    lowered = flavour.lower(graph.clone(), "fp32")
    # onnxruntime's own attention continues a batch by one token at a time.
    steps = [6, 5, 1, 1, 1] if flavour is lower_tensorrt else [9, 1, 1, 1, 1, 1]
    found, past = run(lowered, ids, mask, steps, len(model.layers))
    difference = np.abs(found - expected)[mask.astype(bool)].max()
    assert difference <= 2e-4
    assert all(array.dtype == np.float32 for array in past.values())


@pytest.mark.slow
@pytest.mark.states
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_keeps_states_in_float32(traced: Any, family: str, flavour: Any) -> None:
    model, graph = traced(family)
    ids = np.random.default_rng(2).integers(3, VOCAB_SIZE, (1, 14))
    with torch.no_grad():
        expected = model.model(input_ids=torch.from_numpy(ids), use_cache=False).logits
    lowered = flavour.lower(graph.clone(), "fp16")
    found, past = run(lowered, ids, np.ones_like(ids), [9, 1, 1, 3], len(model.layers))
    wanted = {name: np.float32 if "_state" in name else np.float16 for name in past}
    assert {name: array.dtype for name, array in past.items()} == wanted
    right, wrong = expected.log_softmax(-1), torch.from_numpy(found).log_softmax(-1)
    divergence = (right.exp() * (right - wrong)).sum(-1)
    # Of random experts some nearly tie, and rounding changes what a state takes in from there.
    assert divergence.quantile(0.25) < 0.01


@pytest.mark.slow
@pytest.mark.states
@pytest.mark.fused
@pytest.mark.parametrize(
    ("family", "target", "form"),
    [
        ("qwen3_next", "cpu", "shared_buffer"),
        ("qwen3_next", "tensorrt-rtx", "concat"),
        ("minimax_m3_vl_text", "cpu", "concat"),
    ],
)
def test_a_session_goes_back_to_a_marked_state(
    tmp_path: Path, family: str, target: str, form: str
) -> None:
    """Each choice continues the prompt's state, whether keys have shared buffers or not."""
    write_tiny_checkpoint(family, tmp_path / "model")
    request = ExportRequest(
        model=tmp_path / "model", output=tmp_path / "bundle", target=target, precision="fp32"
    )
    export_bundle(request)
    model = load_model(tmp_path / "model").model
    prompt, choices = "w5 w9 w7 w11", ["w12 w13 w14", "w15", "w16 w17"]
    with Session.open(tmp_path / "bundle", providers=["cpu"]) as session, torch.no_grad():
        assert session.explain().kv_cache == form
        expected = []
        for choice in choices:
            ids = session.encode(f"{prompt} {choice}")
            new = len(ids) - len(session.encode(prompt))
            logits = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            told = [logits[place - 1, ids[place]] for place in range(len(ids) - new, len(ids))]
            expected.append(float(sum(told)))
        for _ in range(2):
            # In turn each choice goes on from the prompt's state.
            found = session.classify(prompt, choices, template="{text} ")
            told = [float(score) for score in found.scores]
            assert told == pytest.approx(expected, abs=1e-3)
            assert session.generate(prompt, max_new_tokens=3).new_tokens
