"""The controller while other programs take the processor: how many tokens are in time?

A session generates tokens for three periods. In the second one, busy processes compete for the
cores. The deadline of a token is what it takes at the full k on the idle machine, and some
room. The same is done by a session that stays at the full k, and by one that stays on the
lowest rung, in turn, several times. A token counts as possible where the lowest rung would have
been fast enough, by the ladder's costs. Run it from the repository's root on a machine that is
otherwise idle::

    python -m benchmarks.adaptive_k.under_load --work load

`--record FILE` keeps every token's time of the first session. The model is random, its
experts dominate (hidden size 1024, 8 layers of 16 experts, top-4).
Markdown goes to stdout, progress to stderr; --work keeps the bundle.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from benchmarks.commands import Commands
from benchmarks.tables import write_table
from benchmarks.wide_model import write_wide_model
from edgemoe_runtime import Session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemoe_runtime.adaptive_k.k_controller import KController

_PROMPT = "w5 w9 w17 w33 w65 w7 w14 w28"
_TOKENS_OF_A_REQUEST = 64


@dataclass
class Seen:
    """Every token of one session.

    Attributes:
        milliseconds: how long it took, with what was done beside the engine.
        at: when it ended.
        rungs: its rung's number on the ladder.
    """

    milliseconds: list[float] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    rungs: list[int] = field(default_factory=list)


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep processors busy."""
    loop = [sys.executable, "-c", "while True: pass"]
    started = [subprocess.Popen(loop) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def watch(session: Session) -> Seen:
    """Note every new token of a session from now on."""
    seen = Seen()
    controller: KController = session._service.state.controller
    take = controller.after_step

    def note(seconds: float) -> None:
        seen.milliseconds.append(1000 * seconds + controller.host_overhead_ms)
        seen.at.append(time.monotonic())
        seen.rungs.append(controller.ladder.index(controller.rung))
        take(seconds)

    controller.after_step = note  # type: ignore[method-assign]
    return seen


def generate_for(session: Session, seconds: float) -> None:
    """Answer requests for a while."""
    end, seed = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        # By chance, for the likeliest token of a random model may be the end of the text.
        session.generate(
            _PROMPT, max_new_tokens=_TOKENS_OF_A_REQUEST, temperature=1.0, seed=seed
        )
        seed += 1


def in_time(seen: Seen, costs: list[float], deadline: float) -> tuple[str, str]:
    """Return the share of tokens in time, and that of those that some rung can keep in time."""
    took = np.array(seen.milliseconds)
    possible = took / np.array(costs)[seen.rungs] * costs[-1] <= deadline
    return f"{np.mean(took <= deadline):.1%}", f"{np.mean(took[possible] <= deadline):.1%}"


def back_at_full(seen: Seen, free_at: float) -> str:
    """Return how long after the load the first token ran at the full k."""
    for at, rung in zip(seen.at, seen.rungs, strict=True):
        if at > free_at and rung == 0:
            return f"{at - free_at:.1f} s"
    return "never"


def write_trace(path: Path, seen: Seen) -> None:
    """Write when tokens ended, in seconds from the first one, and how long they took."""
    rows = [
        f"{at - seen.at[0]:.3f},{took:.2f}"
        for at, took in zip(seen.at, seen.milliseconds, strict=True)
    ]
    path.write_text("\n".join(["seconds,milliseconds", *rows]) + "\n")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--precision", default="fp32", show_default=True)
@click.option("--room", default=1.25, show_default=True, help="Deadline over the idle time.")
@click.option("--seconds", default=10.0, show_default=True, help="Of each period.")
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--record",
    type=click.Path(path_type=Path),
    help="CSV of every token of a session that stays at the full k: what "
    "tests/runtime/test_recorded_load.py replays.",
)
@click.option("--busy", "processes", default=len(os.sched_getaffinity(0)), show_default=True)
@click.option("--threads", default=len(os.sched_getaffinity(0)), show_default=True)
def main(
    work: Path,
    precision: str,
    room: float,
    seconds: float,
    rounds: int,
    record: Path | None,
    processes: int,
    threads: int,
) -> None:
    """Load the machine, and count tokens in time."""
    work.mkdir(parents=True, exist_ok=True)
    model, lines = write_wide_model(work)
    commands = Commands(work, threads)
    asked: tuple[object, ...] = (
        "--target",
        "cpu",
        "--precision",
        precision,
        "--keep",
        1,
        "--max-drop",
        1e6,
    )
    asked += ("--accept-large-drop", "--accept-weak-evidence", "--no-speed")
    commands.make(f"bundle-{precision}", "export", model, *asked, "--task", f"wide={lines}")
    bundle = work / f"bundle-{precision}"

    with Session.open(bundle, threads=threads) as session:
        seen = watch(session)
        generate_for(session, seconds)
        idle_ms = statistics.median(seen.milliseconds)
        ladder = session.manifest.ladder("wide")
    deadline = room * idle_ms
    costs = [1.0 if rung.cost is None else rung.cost.decode for rung in ladder]
    shown = [f"{rung.name} {cost:.2f}" for rung, cost in zip(ladder, costs, strict=True)]
    click.echo(
        f"{idle_ms:.1f} ms a token at the full k, {deadline:.1f} ms allowed; rungs "
        f"{', '.join(shown)}\n"
    )
    arms: dict[str, dict[str, Any]] = {
        "stays at the full k": {"adapt": False},
        "adapts": {"token_ms": deadline},
        "stays on the lowest rung": {"k_cap": ladder[-1].k_cap},
    }
    rows = []
    for number in range(rounds):
        for name, given in arms.items():
            click.echo(f"round {number + 1}, {name}", err=True)
            with Session.open(bundle, threads=threads, **given) as session:
                generate_for(session, 1.0)
                seen = watch(session)
                generate_for(session, seconds)
                with busy(processes):
                    generate_for(session, seconds)
                    free_at = time.monotonic()
                generate_for(session, seconds)
                moves = session.explain().k_move_count
            if record is not None and number == 0 and name == "stays at the full k":
                write_trace(record, seen)
            if name == "stays on the lowest rung":
                seen.rungs = [len(ladder) - 1] * len(seen.at)
            shares = in_time(seen, costs, deadline)
            back = back_at_full(seen, free_at) if name == "adapts" else ""
            rows.append([str(number + 1), name, str(len(seen.at)), *shares, str(moves), back])
    heading = ["round", "session", "tokens", "in time", "in time where a rung allows it"]
    write_table([*heading, "moves", "back at the full k after"], rows)


if __name__ == "__main__":
    main()
