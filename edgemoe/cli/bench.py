"""`edgemoe bench`: how fast a bundle loads, reads a prompt and writes."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgemoe.api.checks import check_bundle
from edgemoe.cli.context_length import MAX_LENGTH, choose_length
from edgemoe.cli.options import PATH, command, report, reporting
from edgemoe.disk import human_bytes
from edgemoe.errors import EdgemoeError

if TYPE_CHECKING:
    from edgemoe_runtime import Session
    from edgemoe_runtime.decoding.answers import Generation

_SLACK = 16  # whole words may come to some tokens more than asked for
_PROSE = (
    "The spindle of station four vibrates above its limit. Check the bearing first, then the "
    "alignment, and write down what was found, because the next shift has to decide from it. "
)


@command("edgemoe bench demo/bundle --task code --prompt-tokens 256 --new-tokens 64")
@click.argument("bundle", type=PATH)
@click.option("--task", metavar="NAME", help="The task, where the bundle has several.")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Tokens of the prompt (prefill).",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    help="Tokens to generate (decode).",
)
@click.option(
    "--repeat",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    help="Measured repetitions.",
)
@click.option("--max-length", type=click.IntRange(1), **MAX_LENGTH)
@click.option("--k-cap", type=click.IntRange(1), help="At most so many experts per token.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads of the engine.")
@click.option("--backend", metavar="NAME", help="Only this engine: onnxruntime, tensorrt ...")
@reporting
def bench(
    bundle: Path,
    task: str | None,
    prompt_tokens: int,
    new_tokens: int,
    repeat: int,
    max_length: int | None,
    k_cap: int | None,
    threads: int | None,
    backend: str | None,
    as_json: bool,
) -> None:
    """Measure load time, memory, prefill and decode speed of BUNDLE.

    Medians of the repetitions, after a warm-up that is not counted.
    """
    check_bundle(bundle)
    from edgemoe_runtime import Session, load_manifest

    longest = load_manifest(bundle).model.max_position_embeddings
    needed = prompt_tokens + new_tokens
    if needed > min(longest, max_length or longest):
        limit = f"the model takes {longest} tokens"
        limit = limit if max_length is None else f"{limit} and --max-length is {max_length}"
        raise EdgemoeError(
            f"--prompt-tokens and --new-tokens must fit into a session, and {limit}, got "
            f"{prompt_tokens} + {new_tokens}. Give smaller numbers."
        )
    if max_length is None:
        max_length = choose_length(bundle, needed + _SLACK)
    with Session.open(
        bundle,
        task=task,
        k_cap=k_cap,
        threads=threads,
        backend=backend,
        max_length=max_length,
    ) as session:
        prompt = _prompt(session, prompt_tokens)
        session.generate(prompt, max_new_tokens=2)
        runs = [session.generate(prompt, max_new_tokens=new_tokens) for _ in range(repeat)]
        result = _summarise(session, runs)
    text = "\n".join(
        (
            f"{bundle}, task {result['task']}, {result['precision']}, {result['backend']}, "
            f"{result['threads']} threads, {result['experts_per_token']:.3g} experts per token",
            f"load     {result['load_s']:.2f} s",
            f"size     {human_bytes(result['bundle_bytes'])} on disk, "
            f"{human_bytes(result['peak_rss_bytes'])} of memory at most",
            f"prefill  {result['prefill_tokens_per_s']:.1f} tokens/s "
            f"({result['prompt_tokens']} tokens)",
            f"decode   {_rate(result['decode_tokens_per_s'])} ({result['new_tokens']} tokens)",
            f"request  {result['request_s']:.3f} s, from the prompt to the last token",
        )
    )
    report(result, text, as_json=as_json)


def _prompt(session: Session, tokens: int) -> str:
    """Return prose of so many tokens, or as near as whole words allow."""
    words = (_PROSE * (1 + tokens // 20)).split(" ")
    low, high = 1, len(words)
    while low < high:
        middle = (low + high) // 2
        if len(session.encode(" ".join(words[:middle]))) < tokens:
            low = middle + 1
        else:
            high = middle
    return " ".join(words[:low])


def _summarise(session: Session, runs: list[Generation]) -> dict[str, Any]:
    explanation = session.explain()
    prefill_s = statistics.median(run.prefill_seconds for run in runs)
    # The first new token comes out of the prefill.
    decode_rates = [
        (run.new_tokens - 1) / (run.seconds - run.prefill_seconds)
        for run in runs
        if run.new_tokens > 1
    ]
    return {
        "bundle": str(session.bundle),
        "task": session.task,
        "target": explanation.target,
        "precision": explanation.precision,
        "backend": explanation.backend,
        "fallbacks": [fallback.to_dict() for fallback in explanation.fallbacks],
        "threads": explanation.threads or len(os.sched_getaffinity(0)),
        "experts_per_token": runs[-1].experts_per_token,
        "repeat": len(runs),
        "prompt_tokens": runs[0].prompt_tokens,
        "new_tokens": runs[0].new_tokens,
        "load_s": explanation.load_seconds,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": runs[0].prompt_tokens / prefill_s,
        # None where the model ended its text with the first token.
        "decode_tokens_per_s": statistics.median(decode_rates) if decode_rates else None,
        "request_s": statistics.median(run.seconds for run in runs),
        "peak_rss_bytes": _peak_rss_bytes(),
        "bundle_bytes": session.manifest.size.total_bytes,
    }


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f} tokens/s"


def _peak_rss_bytes() -> int:
    """Return the most memory that this process held; Linux, where bundles run."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
