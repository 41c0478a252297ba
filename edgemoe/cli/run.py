"""`edgemoe run`: a bundle continues a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.api.checks import check_bundle
from edgemoe.cli.options import PATH, command, report, reporting

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe_runtime.decoding.answers import Generation


@command('edgemoe run demo/bundle --task code --prompt "import os" --max-new-tokens 32')
@click.argument("bundle", type=PATH)
@click.option("--prompt", required=True, help="Text to continue.")
@click.option("--task", metavar="NAME", help="The task, where the bundle has several.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens to generate at most.",
)
@click.option("--k-cap", type=click.IntRange(1), help="At most so many experts per token.")
@click.option(
    "--deadline-ms",
    type=click.FloatRange(0, min_open=True),
    help="Time for the whole answer in ms: the k ladder is used to keep it.",
)
@click.option(
    "--token-ms",
    type=click.FloatRange(0, min_open=True),
    help="Time for each new token in ms, kept likewise.",
)
@click.option(
    "--adapt/--no-adapt",
    default=None,
    help="Adapt the experts per token along the k ladder.  [default: where a time is given]",
)
@click.option(
    "--temperature", type=float, default=0.0, help="Of sampling; 0, the default, is greedy."
)
@click.option(
    "--top-p", type=float, default=1.0, help="Nucleus sampling with a temperature, (0, 1]."
)
@click.option("--seed", type=int, help="Seed of sampling.")
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="Stop sequence: end before this text. Repeatable.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads of the engine.")
@click.option("--backend", metavar="NAME", help="Only this engine: onnxruntime, tensorrt ...")
@click.option("--stream", is_flag=True, help="Print tokens as they are generated.")
@reporting
def run(
    bundle: Path,
    prompt: str,
    task: str | None,
    max_new_tokens: int,
    k_cap: int | None,
    deadline_ms: float | None,
    token_ms: float | None,
    adapt: bool | None,
    temperature: float,
    top_p: float,
    seed: int | None,
    stop: tuple[str, ...],
    threads: int | None,
    backend: str | None,
    stream: bool,
    as_json: bool,
) -> None:
    """Generate text with BUNDLE, behind a prompt. Needs no torch."""
    check_bundle(bundle)
    from edgemoe_runtime import Session, TextStream

    with Session.open(
        bundle,
        task=task,
        k_cap=k_cap,
        deadline_ms=deadline_ms,
        token_ms=token_ms,
        adapt=adapt,
        threads=threads,
        backend=backend,
    ) as session:
        answer = session.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=stop,
            stream=stream,
        )
        if isinstance(answer, TextStream):
            # What was printed cannot be taken back, so a stream is never asked again.
            for piece in answer:
                if not as_json:
                    click.echo(piece, nl=False)
            answer = answer.generation
    report(answer.to_dict(), "" if stream else answer.text, as_json=as_json)
    if not as_json:
        click.echo(_summary(answer), err=True)


def _summary(answer: Generation) -> str:
    lines = [f"[not {fallback}]" for fallback in answer.fallbacks]
    lines += [f"[k {move}]" for move in answer.k_moves]
    lines.append(
        f"[{answer.new_tokens} tokens, {answer.ms_per_token:.1f} ms each, "
        f"{answer.seconds:.2f} s in all, {answer.experts_per_token:.3g} experts per token, "
        f"{answer.backend}]"
    )
    if answer.deadline_met is not None:
        kept = "kept" if answer.deadline_met else "missed"
        lines.append(f"[deadline of {answer.deadline_ms:g} ms {kept}]")
    return "\n".join(lines)
