"""What a policy saves: graphs whose tokens choose k beside graphs with a fixed k.

A random model whose experts dominate (hidden size 1024, 8 layers of 16 experts, top-4) is
exported with every fixed k up to its top-k, and with policies whose tokens use different
numbers. All bundles answer the same prompts of the task's words in turn, several times, and the
one of the whole top-k does so under lower caps too. A policy and a cap should take as long as a
fixed k of the same mean would, between the two fixed k beside it. Run it from the repository's
root on a machine that is otherwise idle::

    python -m benchmarks.adaptive_k.speed --work speed
    python -m benchmarks.adaptive_k.speed --work speed --target tensorrt-rtx --precision fp32

The second takes graphs for TensorRT and, where no GPU is, runs them in onnxruntime on the CPU:
that tells what work they do, not how fast TensorRT is. Beside them stand graphs of
--static-shapes.

Markdown goes to stdout, progress to stderr; --work keeps what is finished.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
import numpy as np

from benchmarks.commands import Commands
from benchmarks.tables import write_table
from benchmarks.wide_model import write_wide_model
from edgemoe_runtime import Generation, Session

_TOP_K = 4
_NEW_TOKENS = 48


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--target", default="cpu", show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("fp32", "int4"))
@click.option("--mean-k", "means", type=float, multiple=True, default=(2.5,))
@click.option("--rounds", type=click.IntRange(1, 24), default=7, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    work: Path,
    target: str,
    precisions: tuple[str, ...],
    means: tuple[float, ...],
    rounds: int,
    threads: int,
) -> None:
    """Time policies."""
    work.mkdir(parents=True, exist_ok=True)
    model, lines = write_wide_model(work)
    commands = Commands(work, threads)
    plans: dict[str, tuple[object, ...]] = {}
    for k in range(1, _TOP_K + 1):
        name = f"fixed-{k}"
        plans[name] = ("--policy", "fixed", "--set", f"k={k}")
    for mean in means:
        plans[f"top-p-{mean:g}"] = ("--policy", "top-p", "--mean-k", mean)
        plans[f"fisher-{mean:g}"] = ("--policy", "fisher", "--mean-k", mean)
    for name, given in plans.items():
        commands.make(f"{name}.json", "allocate", model, "--task", f"wide={lines}", *given)
    rows = []
    for precision in precisions:
        contestants: dict[str, tuple[Path, int | None]] = {}
        for name in plans:
            bundle = (
                f"{name}-{precision}" if target == "cpu" else f"{name}-{target}-{precision}"
            )
            plan = f"model={work / f'{name}.json'}"
            asked = ("--target", target, "--precision", precision, "--plan", plan)
            commands.make(bundle, "export", model, *asked)
            contestants[name] = work / bundle, None
            if name == f"fixed-{_TOP_K}":
                contestants |= {f"cap {k}": (work / bundle, k) for k in range(1, _TOP_K)}
                if target != "cpu":
                    commands.make(
                        f"static-{bundle}", "export", model, *asked, "--static-shapes"
                    )
                    contestants["static shapes"] = work / f"static-{bundle}", None
        rows += _time(precision, contestants, read_prompts(lines, rounds), threads)
    heading = ["precision", "policy"]
    for kind in ("prompt", "new tokens"):
        heading += [f"{kind}: experts per token", "time / top-k", "time / fixed k of that mean"]
    write_table(heading, rows)


def read_prompts(lines: Path, count: int) -> list[str]:
    """Put two lines of the task together for each prompt, 128 tokens."""
    texts = [json.loads(line)["text"] for line in lines.read_text().splitlines()]
    return [f"{texts[2 * n]} {texts[2 * n + 1]}" for n in range(count)]


def _answer(session: Session, prompt: str) -> list[Generation]:
    """Answer a prompt until there are enough new tokens: a random model ends when it likes."""
    answers: list[Generation] = []
    while sum(answer.new_tokens - 1 for answer in answers) < _NEW_TOKENS:
        # By chance, for the likeliest token of a random model is often the same.
        answers.append(
            session.generate(
                prompt, max_new_tokens=_NEW_TOKENS, temperature=1.0, seed=len(answers)
            )
        )
    return answers


def _measure(
    bundle: Path, cap: int | None, prompt: str, threads: int
) -> tuple[list[float], list[float]]:
    """Return seconds per token and experts per token, of the prompt and of new tokens."""
    with Session.open(bundle, threads=threads, adapt=False) as session:
        session.set_k_cap(cap)
        alone = session.generate(prompt, max_new_tokens=1)
        answers = _answer(session, prompt)
    # The last token of an answer is never fed.
    fed = sum(one.new_tokens - 1 for one in answers)
    prefill = statistics.median(one.prefill_seconds / one.prompt_tokens for one in answers)
    decode = sum(one.seconds - one.prefill_seconds for one in answers) / fed
    in_prompt = alone.experts_per_token
    everywhere = sum(
        one.experts_per_token * (one.prompt_tokens + one.new_tokens - 1) for one in answers
    )
    in_answers = (everywhere - in_prompt * sum(one.prompt_tokens for one in answers)) / fed
    return [prefill, decode], [in_prompt, in_answers]


def _time(
    precision: str,
    contestants: dict[str, tuple[Path, int | None]],
    prompts: list[str],
    threads: int,
) -> list[list[str]]:
    """Return what time each bundle takes, over that of top-k and that of a fixed k."""
    seconds: dict[str, list[list[float]]] = {name: [] for name in contestants}
    experts: dict[str, list[list[float]]] = {name: [] for name in contestants}
    for number, prompt in enumerate(prompts):
        for name, (bundle, cap) in contestants.items():
            click.echo(f"{precision}, round {number + 1}, {name}", err=True)
            took, used = _measure(bundle, cap, prompt, threads)
            seconds[name].append(took)
            experts[name].append(used)
    whole = np.array(seconds[f"fixed-{_TOP_K}"])
    # In each round every bundle ran beside the others: quotients are of one round.
    shares = {name: np.median(np.array(took) / whole, axis=0) for name, took in seconds.items()}
    steps = range(1, _TOP_K + 1)
    rows = []
    for name, found in shares.items():
        row = [precision, name]
        for kind, used in enumerate(np.mean(experts[name], axis=0)):
            fixed = [shares[f"fixed-{k}"][kind] for k in steps]
            expected = np.interp(used, steps, fixed)
            row += [f"{used:.2f}", f"{found[kind]:.2f}", f"{found[kind] / expected:.2f}"]
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
