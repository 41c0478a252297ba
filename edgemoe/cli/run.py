"""`edgemoe run`: a bundle continues a prompt."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from edgemoe.api.checks import check_bundle
from edgemoe.cli.context_length import MAX_LENGTH, choose_length
from edgemoe.cli.options import PATH, command, report, reporting
from edgemoe.cli.prompt import read_prompt
from edgemoe.errors import ArgumentError

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe_runtime.decoding.answers import Generation


_TEMPLATE_TOKENS = 1024


@command(
    'edgemoe run demo/bundle --task code --prompt "import os" --max-new-tokens 32',
    'edgemoe run demo/bundle --task code --chat --prompt "What does os.walk do?"',
    "edgemoe run demo/bundle --task code --prompt-file question.txt",
)
@click.argument("bundle", type=PATH)
@click.option("--prompt", metavar="TEXT", help="Text to continue; - reads standard input.")
@click.option("--prompt-file", type=PATH, metavar="FILE", help="Text file to continue.")
@click.option(
    "--chat",
    is_flag=True,
    help="The prompt is what a user says: written by the bundle's chat template.",
)
@click.option("--system", metavar="TEXT", help="With --chat: a system message before it.")
@click.option("--task", metavar="NAME", help="The task, where the bundle has several.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens to generate at most.",
)
@click.option("--max-length", type=click.IntRange(1), **MAX_LENGTH)
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
    prompt: str | None,
    prompt_file: Path | None,
    chat: bool,
    system: str | None,
    task: str | None,
    max_new_tokens: int,
    max_length: int | None,
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
    """Generate text with BUNDLE, behind a prompt or in answer to a user. Needs no torch."""
    if system is not None and not chat:
        raise ArgumentError("--system is a message of a chat: give --chat too.")
    check_bundle(bundle)
    text = read_prompt(prompt, prompt_file)
    if max_length is None:
        # A token is a byte at least; what a template adds is much less than the slack.
        most = len(text.encode("utf-8", "replace")) + len(system or "") + max_new_tokens
        max_length = choose_length(bundle, most + _TEMPLATE_TOKENS * chat)
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
        max_length=max_length,
    ) as session:
        said = [] if system is None else [{"role": "system", "content": system}]
        said.append({"role": "user", "content": text})
        answer = (partial(session.chat, said) if chat else partial(session.generate, text))(
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
    if as_json:
        report(answer.to_dict(), "", as_json=True)
        return
    # The text of the model as it is: what it writes is the point.
    click.echo("" if stream else answer.text)
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
