"""What a policy saves: graphs whose tokens choose k beside graphs with a fixed k.

A random model whose experts dominate (hidden size 1024, 8 layers of 16 experts, top-4) is
exported with every fixed k up to its top-k, and with policies whose tokens use different
numbers. All bundles are timed in turn by ``edgemoe bench``, several times. A policy should take
as long as a fixed k of the same mean would, between the two fixed k beside it. Run it from the
repository's root on a machine that is otherwise idle::

    python benchmarks/adaptive_k/speed.py --work speed

Markdown goes to stdout, progress to stderr; --work keeps what is finished.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import click
import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "compression"))
from commands import Commands, write_table
from wide_model import write_wide_model

_TOP_K = 4
_KINDS = ("prefill", "decode")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--precision", "precisions", multiple=True, default=("fp32", "int4"))
@click.option("--mean-k", "means", type=float, multiple=True, default=(2.5,))
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    work: Path, precisions: tuple[str, ...], means: tuple[float, ...], rounds: int, threads: int
) -> None:
    """Time policies."""
    work.mkdir(parents=True, exist_ok=True)
    model, lines = write_wide_model(work)
    commands = Commands(work, threads)
    plans = {}
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
        bundles = {}
        for name in plans:
            bundle = f"{name}-{precision}"
            plan = f"model={work / f'{name}.json'}"
            asked = ("--target", "cpu", "--precision", precision, "--plan", plan)
            commands.make(bundle, "export", model, *asked)
            bundles[name] = work / bundle
        rows += _time(commands, precision, bundles, rounds, threads)
    heading = ["precision", "policy", "experts per token", "prefill / top-k"]
    heading += ["prefill / fixed k of that mean", "decode / top-k"]
    write_table([*heading, "decode / fixed k of that mean"], rows)


def _time(
    commands: Commands, precision: str, bundles: dict[str, Path], rounds: int, threads: int
) -> list[list[str]]:
    """Return what time each bundle takes, over that of top-k and that of a fixed k."""
    asked = ("--prompt-tokens", 128, "--new-tokens", 32, "--repeat", 1, "--threads", threads)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in bundles}
    used = {}
    for number in range(rounds):
        for name, bundle in bundles.items():
            key = f"bench-{precision}-{name}-{number}"
            answer = commands.run(key, "bench", bundle, *asked).answer
            used[name] = answer["experts_per_token"]
            seconds[name].append(tuple(1 / answer[f"{kind}_tokens_per_s"] for kind in _KINDS))
    # In each round every bundle ran beside the others: ratios are of one round.
    shares = {
        name: [
            [
                took / whole
                for took, whole in zip(times, seconds[f"fixed-{_TOP_K}"][n], strict=True)
            ]
            for n, times in enumerate(found)
        ]
        for name, found in seconds.items()
    }
    medians = {
        name: [statistics.median(turn[kind] for turn in found) for kind in range(len(_KINDS))]
        for name, found in shares.items()
    }
    steps = range(1, _TOP_K + 1)
    rows = []
    for name, found in medians.items():
        row = [precision, name, f"{used[name]:.2f}"]
        for kind in range(len(_KINDS)):
            fixed = [medians[f"fixed-{k}"][kind] for k in steps]
            expected = float(np.interp(used[name], list(steps), fixed))
            row += [f"{found[kind]:.2f}", f"{found[kind] / expected:.2f}"]
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
