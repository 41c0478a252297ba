"""Every command once, each on what the one before it made."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import transformers
from tokenizers import Tokenizer

from edgemoe.cli.machine import examine
from edgemoe_runtime import Session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

# Lines that chose the experts are judged here: scores are compared, not believed.
READ = "--calibration-lines=warn"

Answer: TypeAlias = "Callable[..., dict[str, Any]]"


@pytest.fixture(scope="module")
def statistics(road: Path, answer: Answer) -> Path:
    """Statistics of both tasks, measured in two shards and added up."""
    shards = [road / f"shard{index}.safetensors" for index in range(2)]
    for index, shard in enumerate(shards):
        tasks = [f"--task={name}={road / name}.jsonl" for name in ("code", "prose")]
        answer("calibrate", road / "moe", *tasks, "-o", shard, "--shard", f"{index}/2")
    merged = road / "merged.safetensors"
    told = answer("merge-stats", *shards, "-o", merged)
    assert set(told["tokens"]) == {"code", "prose"}
    return merged


@pytest.mark.slow
def test_workers_give_the_file_of_one_run_and_missing_shards_are_named(
    road: Path, answer: Answer, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    tasks = [f"--task={name}={road / name}.jsonl" for name in ("code", "prose")]
    one, several = tmp_path / "one", tmp_path / "several"
    command = ("calibrate", road / "moe", *tasks, "--threads", 1)
    answer(*command, "-o", one)
    answer(*command, "-o", several, "--workers", 2)
    assert one.read_bytes() == several.read_bytes()

    parts = [tmp_path / "part0", tmp_path / "part2"]
    for index, part in zip((0, 2), parts, strict=True):
        answer(*command, "-o", part, "--shard", f"{index}/3")
    told = invoke("merge-stats", *parts, "-o", tmp_path / "most")
    assert told.stdout.endswith("; of code only 0/3, 2/3; of prose only 0/3, 2/3\n")
    wrong = invoke(*command, "-o", one, "--workers", 2, "--shard", "0/2")
    assert wrong.exit_code == 2
    assert "--shard cannot be used with --workers or --ray" in wrong.stderr


@pytest.fixture(scope="module")
def plan(road: Path, statistics: Path, answer: Answer) -> Path:
    path = road / "plan.json"
    asked = ("--task", "code", "--method", "reap", "--keep", 0.5)
    told = answer("prune", road / "moe", "--stats", statistics, *asked, "-o", path)
    assert told["experts_per_layer"] == [4, 4]
    assert told["experts_before"] == [8, 8]
    return path


@pytest.fixture(scope="module")
def pruned(road: Path, plan: Path, answer: Answer) -> Path:
    path = road / "pruned"
    assert answer("apply", road / "moe", "--plan", plan, "-o", path)["family"] == "glm4_moe"
    return path


def test_a_dense_checkpoint_is_carved_and_judged(
    road: Path, answer: Answer, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(dense)
    tokenizer = Tokenizer.from_file(str(road / "moe/tokenizer.json"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(dense)
    shape = ("--experts=4", "--top-k=4", "--max-tokens=1200")

    told = answer(
        "carve", dense, "-o", tmp_path / "moe", *shape, "--data", road / "prose.jsonl"
    )

    assert told["active_fraction"] == 1
    task = f"--task=prose={road}/prose.jsonl"
    assert answer("inspect", tmp_path / "moe")["experts_per_layer"] == [4, 4]
    assert answer("inspect", dense)["kind"] == "dense checkpoint"
    carved, before = (answer("evaluate", path, task) for path in (tmp_path / "moe", dense))
    assert carved["value"] == pytest.approx(before["value"], rel=1e-3)


def test_shards_add_up_to_the_whole(road: Path, statistics: Path, answer: Answer) -> None:
    whole = road / "whole.safetensors"
    answer("calibrate", road / "moe", f"--task=code={road}/code.jsonl", "-o", whole)

    merged = answer("inspect", statistics)["tasks"]["code"]

    assert merged["tokens"] == answer("inspect", whole)["tasks"]["code"]["tokens"]
    # Both shards are there, so it is one pass over the whole file.
    assert merged["passes"] == 1


@pytest.mark.parametrize("method", ["frequency", "random", "uncurl"])
def test_each_method_makes_a_plan_that_applies(
    road: Path, statistics: Path, answer: Answer, tmp_path: Path, method: str
) -> None:
    asked = ("--task", "prose", "--method", method, "--keep-experts", 5, "--seed", 1)
    answer("prune", road / "moe", "--stats", statistics, *asked, "-o", tmp_path / "plan.json")

    told = answer(
        "apply", road / "moe", "--plan", tmp_path / "plan.json", "-o", tmp_path / "out"
    )

    assert told["experts_per_layer"] == [5, 5]


def test_transformers_opens_the_pruned_checkpoint(pruned: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(pruned)

    assert model.config.n_routed_experts == 4


def test_evaluate_answers_the_contract(pruned: Path, answer: Answer, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "while value:"}\n{"text": "return 0"}\n')
    told = answer("evaluate", pruned, f"--task=code={tmp_path}/t.jsonl", "--k-cap", 1)

    assert set(told) >= {"task", "metric", "value", "ci95", "n", "perplexity", "tokens"}
    low, high = told["ci95"]
    assert low <= told["value"] <= high
    assert told["n"] == 2


def test_lines_that_chose_experts_are_told_refused_or_skipped(
    road: Path, pruned: Path, invoke: Callable[..., Any], tmp_path: Path
) -> None:
    read = f"--task=code={road}/code.jsonl"
    assert "12 of 12 lines" in invoke("evaluate", pruned, read, READ).stderr
    refused = invoke("evaluate", pruned, read)
    assert refused.exit_code == 1
    assert "12 of 12 lines" in refused.stderr
    lines = (road / "code.jsonl").read_text().splitlines(keepends=True)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "while value:"}\n' + lines[0])
    task = f"--task=code={mixed}"
    skipped = invoke("evaluate", pruned, task, "--calibration-lines", "skip", "--json")
    assert json.loads(skipped.stdout)["n"] == 1
    assert "lines" not in skipped.stderr


@pytest.mark.fused
def test_a_bundle_scores_as_its_checkpoint_does(
    road: Path, pruned: Path, answer: Answer, tmp_path: Path
) -> None:
    answer("export", pruned, "-o", tmp_path / "b", "--target", "cpu", "--precision", "fp32")
    task = f"--task=code={road}/code.jsonl"

    exported = answer("evaluate", tmp_path / "b", task, READ, "--max-tokens", 400)

    eager = answer("evaluate", pruned, task, READ, "--max-tokens", 400)
    assert exported["value"] == pytest.approx(eager["value"], rel=1e-5)
    # Texts as a whole, behind the tokenizer's end token, in several windows each.
    whole = (task, READ, "--rolling", "--window", 50, "--max-tokens", 400)
    exported, eager = (answer("evaluate", path, *whole) for path in (tmp_path / "b", pruned))
    assert eager["details"]["prefix_token"] == 0
    for key in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        assert exported["details"][key] == pytest.approx(eager["details"][key], rel=1e-5)


def test_a_bundle_is_judged_by_what_it_generates(
    road: Path, bundle: Path, answer: Answer, invoke: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    rows: list[dict[str, str]] = []
    with Session.open(bundle, task="code") as session:
        for length in range(1, 60):
            prompt = ("def add(first, second):\n    return " * 3)[:length]
            made = session.generate(prompt, max_new_tokens=1)
            ids = tokenizer.encode(prompt).ids
            # Random weights make tokens that no text would be cut into.
            if tokenizer.encode(prompt + made.text).ids == [*ids, *made.tokens]:
                rows.append({"prompt": prompt, "completion": made.text})
    assert len(rows) >= 3
    rows = [*rows[:3], {"prompt": "if value", "completion": " is not what it would say"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    told = answer("evaluate", bundle, f"--task=code={tmp_path}/t.jsonl", "--generate")

    assert (told["metric"], told["value"], told["n"]) == ("exact_match", 0.75, 4)
    refused = invoke("evaluate", bundle, f"--task=code={road}/code.jsonl", READ, "--generate")
    assert refused.exit_code == 1
    assert "--generate" in refused.stderr


ACCEPT = ("--accept-large-drop", "--accept-weak-evidence")


@pytest.mark.fused
def test_export_takes_a_plan(
    road: Path, plan: Path, answer: Answer, invoke: Callable[..., Any], tmp_path: Path
) -> None:
    planned = ("export", road / "moe", "--target", "cpu", "--plan", f"code={plan}")
    judged = ("--task", f"code={road}/prose.jsonl", "--max-drop", 9, *ACCEPT)

    # The plan's own lines are no evidence.
    same = ("--task", f"code={road}/code.jsonl", "--max-drop", 9, *ACCEPT)
    refused = invoke(*planned, *same, "-o", tmp_path / "b")
    assert refused.exit_code == 1
    assert "12 of 12 lines" in refused.stderr
    told = answer(*planned, *judged, "-o", tmp_path / "b")

    assert told["precision"] == "int4"
    quality = told["tasks"]["code"]["quality"]
    assert quality["passed"] is True
    assert math.isfinite(quality["after"]["value"])
    assert answer("inspect", tmp_path / "b")["tasks"]["code"]["experts_per_layer"] == [4, 4]


def test_run_answers_the_contract(bundle: Path, answer: Answer) -> None:
    told = answer("run", bundle, "--task=code", "--prompt=def add(", "--max-new-tokens=6")

    assert set(told) >= {
        "text", "tokens", "prompt_tokens", "new_tokens", "seconds", "ms_per_token",
        "experts_per_token", "k_cap", "backend", "fallbacks",
    }  # fmt: skip
    assert told["new_tokens"] == len(told["tokens"]) <= 6
    assert told["experts_per_token"] == told["k_cap"] == 2
    with Session.open(bundle, task="code") as session:
        assert session.generate("def add(", max_new_tokens=6).text == told["text"]


def test_run_prints_the_text_and_streams_the_same(
    bundle: Path, invoke: Callable[..., Any]
) -> None:
    asked = ("run", bundle, "--task=prose", "--prompt=The belt", "--max-new-tokens=8")

    whole = invoke(*asked, "--k-cap", 1)
    streamed = invoke(*asked, "--k-cap", 1, "--stream")

    assert whole.exit_code == streamed.exit_code == 0
    assert whole.stdout == streamed.stdout
    assert "1 experts per token" in whole.stderr


def test_run_tells_how_a_deadline_was_kept(
    bundle: Path, answer: Answer, invoke: Callable[..., Any]
) -> None:
    asked = ("run", bundle, "--task=code", "--prompt=def add(", "--max-new-tokens=6")

    met = answer(*asked, "--deadline-ms", 600_000, "--token-ms", 600_000)
    assert met["deadline_met"] is True
    assert met["k_moves"] == met["fallbacks"] == []
    missed = invoke(*asked, "--deadline-ms", 0.001)
    assert "deadline, " in missed.stderr
    # On a busy machine no second rung may have been worth having.
    assert re.search("no rung is fast enough|too slow", missed.stderr)
    assert "[deadline of 0.001 ms missed]" in missed.stderr


@pytest.mark.slow
def test_export_shows_the_rungs_that_it_measured(
    road: Path, invoke: Callable[..., Any], answer: Answer, tmp_path: Path
) -> None:
    asked = ("export", road / "moe", "--target=cpu", f"--task=code={road}/code.jsonl")

    told = invoke(*asked, "-o", tmp_path / "a")
    assert "rung full: 2 experts per token at most, drop 0.000" in told.stdout
    ladder = answer("inspect", tmp_path / "a")["tasks"]["code"]["k_ladder"]
    assert ladder[0]["cost"] == {"prefill": 1.0, "decode": 1.0}
    assert "rung full" not in invoke(*asked, "-o", tmp_path / "b", "--no-ladder").stdout


def test_bench_answers_the_contract(bundle: Path, answer: Answer) -> None:
    asked = ("--prompt-tokens=16", "--new-tokens=4", "--repeat=2", "--threads=1")
    told = answer("bench", bundle, "--task=code", *asked)

    for name in ("prefill_tokens_per_s", "load_s", "peak_rss_bytes"):
        assert told[name] > 0
    assert "decode_tokens_per_s" in told
    assert told["threads"] == 1
    assert told["prompt_tokens"] >= 16


def test_verify_counts_what_it_hashed(bundle: Path, answer: Answer) -> None:
    told = answer("verify", bundle)

    assert told["ok"] is True
    assert told["tasks"] == ["code", "prose"]
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    assert told["hashed_files"] == len(files)


def test_inspect_knows_every_noun(
    road: Path, statistics: Path, plan: Path, pruned: Path, bundle: Path, answer: Answer
) -> None:
    nouns = [road / "moe", pruned, statistics, plan, bundle]

    kinds = [answer("inspect", noun)["kind"] for noun in nouns]

    assert kinds == ["MoE checkpoint", "MoE checkpoint", "statistics", "plan", "bundle"]
    assert answer("inspect", pruned)["provenance"]["method"] == "reap"


def test_inspect_shows_layers_of_different_sizes(
    road: Path, statistics: Path, plan: Path, invoke: Any, answer: Answer, tmp_path: Path
) -> None:
    document = json.loads(plan.read_text())
    document["layers"][1]["experts"] = [{"members": [expert]} for expert in range(3)]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    answer("apply", road / "moe", "--plan", tmp_path / "plan.json", "-o", tmp_path / "ragged")

    told = answer("inspect", tmp_path / "ragged")

    assert told["kind"] == "ragged MoE checkpoint"
    assert told["experts_per_layer"] == [4, 3]
    assert "4, 3" in invoke("inspect", tmp_path / "ragged").stdout


def test_compile_is_refused_politely_where_it_cannot_be_done(
    bundle: Path, invoke: Callable[..., Any]
) -> None:
    for target in ("cpu", "tensorrt-rtx", "jetson-orin"):
        result = invoke("compile", bundle, "--target", target)

        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")


def test_doctor_reads_a_jetsons_files(tmp_path: Path) -> None:
    release = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64"
    files = {
        "etc/nv_tegra_release": release,
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
        "proc/meminfo": "MemTotal:        7790000 kB\nMemAvailable:    6000000 kB\n",
        "sys/class/thermal/thermal_zone0/type": "tj-thermal",
        "sys/class/thermal/thermal_zone0/temp": "97500",
        "sys/class/thermal/cooling_device0/type": "gpu-throttle-alert",
        "sys/class/thermal/cooling_device0/cur_state": "1",
        "sys/class/thermal/cooling_device1/type": "pwm-fan",
        "sys/class/thermal/cooling_device1/cur_state": "3",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    facts = examine(tmp_path)

    assert facts["device"] == "jetson-orin"
    assert facts["jetpack"] == "6.2 (L4T 36.4.3)"
    assert facts["memory"]["total_bytes"] == 7790000 * 1024
    assert facts["temperatures_c"] == {"tj-thermal": 97.5}
    assert facts["throttling"] == ["gpu-throttle-alert"]
    assert any("aarch64" in advice for advice in facts["missing"])


def test_doctor_tells_what_is_here(answer: Answer, invoke: Callable[..., Any]) -> None:
    told = answer("doctor")

    assert "CPUExecutionProvider" in told["onnxruntime_providers"]
    assert told["memory"]["total_bytes"] > 0
    assert invoke("doctor").stdout.startswith("machine")
