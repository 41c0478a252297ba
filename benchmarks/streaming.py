"""Memory, time and bytes of the commands that stream a checkpoint larger than memory.

Writes a random bfloat16 checkpoint of the shape of Qwen1.5-MoE-A2.7B (60 experts of width 1408,
4 per token, hidden size 2048, a shared expert of 5632, vocabulary 151936; 24 layers are 28 GB)
in the hub's layout, one tensor per expert's matrix, and runs `edgemoe calibrate`, `prune`,
`apply` and `export` on it, each in a process whose memory is limited. `cp` of the same
bytes stands beside them. Run it from the repository's root::

    python -m benchmarks.streaming WORK_DIRECTORY --layers 24 --memory-gib 6

The directory must have room for the checkpoint, one shard more and the pruned checkpoint; all
are removed when they are no longer needed, unless --keep-files is given. The limit is a memory
control group (version 1, where the process may make one: it counts page cache too, which the
kernel gives back under pressure), or else RLIMIT_DATA, which counts what the process allocates.
"""

from __future__ import annotations

import csv
import filecmp
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.random_checkpoint import write_checkpoint, write_task

if TYPE_CHECKING:
    from collections.abc import Sequence

_CGROUP = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: What the table calls it.
        arguments: Arguments of `edgemoe`.
        model: Checkpoint that it reads.
        copied: Checkpoint whose `cp` stands beside it.
        dropped: What is removed before the next command, for room.
    """

    name: str
    arguments: list[str]
    model: Path
    copied: Path
    dropped: Path | None = None


@dataclass
class Measurement:
    """What one command took.

    Attributes:
        step: The command.
        seconds: Wall time.
        cp_seconds: Wall time of `cp` and `sync` of the bytes that it streams.
        peak_rss_bytes: Largest resident set.
        peak_group_bytes: Largest use of the control group, page cache included; 0 without one.
        read_bytes: Bytes that it read by system calls.
        disk_read_bytes: Those of them that came from the disk.
        written_bytes: Bytes that it wrote.
    """

    step: str
    seconds: float = 0.0
    cp_seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_group_bytes: int = 0
    read_bytes: int = 0
    disk_read_bytes: int = 0
    written_bytes: int = 0


@dataclass
class MemoryLimit:
    """A limit on a process, by whatever this machine has.

    Attributes:
        limit_bytes: How much.
        group: The control group; None where RLIMIT_DATA is used.
    """

    limit_bytes: int
    group: Path | None = field(default=None)

    def __post_init__(self) -> None:
        group = _CGROUP / f"edgemoe-benchmark-{os.getpid()}"
        try:
            group.mkdir()
            (group / "memory.limit_in_bytes").write_text(str(self.limit_bytes))
        except OSError:
            return
        self.group = group

    def apply(self) -> None:
        """Limit the calling process."""
        if self.group is not None:
            (self.group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (self.limit_bytes, self.limit_bytes))

    def take_peak(self) -> int:
        """Return the group's largest use since the last call."""
        if self.group is None:
            return 0
        file = self.group / "memory.max_usage_in_bytes"
        peak = int(file.read_text())
        file.write_text("0")
        return peak

    def close(self) -> None:
        """Remove the group."""
        if self.group is not None:
            self.group.rmdir()


def make_steps(work: Path, keep: float, exports: Sequence[str]) -> list[Step]:
    """List the commands, each on what the one before it made.

    Args:
        work: Directory of all files.
        keep: Fraction of the experts that the plan keeps.
        exports: What it is exported for with the plan, each `TARGET:PRECISION`.

    Returns:
        The commands.
    """
    source, result = work / "model", work / "pruned"
    model, pruned = str(source), str(result)
    stats, plan = str(work / "statistics"), str(work / "plan.json")
    task = f"--task=random={work / 'random.jsonl'}"
    method = ["--task=random", "--method=reap", f"--keep={keep}"]
    bundle = ["-o", str(work / "bundle"), "--plan", f"random={plan}"]
    return [
        Step("calibrate", ["calibrate", model, task, "-o", stats], source, source),
        Step("prune", ["prune", model, "--stats", stats, *method, "-o", plan], source, source),
        Step("apply", ["apply", model, "--plan", plan, "-o", pruned], source, result, result),
        *(
            Step(
                f"export {target} {precision}",
                ["export", model, "--target", target, "--precision", precision, *bundle],
                source,
                source,
                work / "bundle",
            )
            for target, _, precision in (each.partition(":") for each in exports)
        ),
    ]


def measure(step: Step, limit: MemoryLimit) -> Measurement:
    """Run one command under the limit.

    Args:
        step: The command.
        limit: The limit.

    Returns:
        What it took, without `cp`.

    Raises:
        click.ClickException: It failed.
    """
    limit.take_peak()
    forget(step.model)
    begun = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "edgemoe.cli", *step.arguments],
        preexec_fn=limit.apply,
        stdout=subprocess.DEVNULL,
    ) as process:
        # The counters of a process can be read until somebody has waited for it.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        seconds = time.perf_counter() - begun
        counters = dict(
            line.split(": ")
            for line in Path(f"/proc/{process.pid}/io").read_text().splitlines()
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{step.name} failed with status {process.returncode}.")
    return Measurement(
        step=step.name,
        seconds=seconds,
        peak_rss_bytes=usage.ru_maxrss * 1024,
        peak_group_bytes=limit.take_peak(),
        read_bytes=int(counters["rchar"]),
        disk_read_bytes=int(counters["read_bytes"]),
        written_bytes=int(counters["wchar"]),
    )


def forget(path: Path) -> None:
    """Drop a checkpoint from the page cache, so that it is read from the disk.

    Args:
        path: Checkpoint directory.
    """
    os.sync()
    for file in path.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_copy(source: Path, scratch: Path) -> float:
    """Time `cp` of a checkpoint's weights, each file synced and removed again.

    Args:
        source: Checkpoint directory.
        scratch: File to write; one shard's room is enough.

    Returns:
        Seconds.
    """
    forget(source)
    seconds = 0.0
    for file in sorted(source.glob("*.safetensors")):
        begun = time.perf_counter()
        subprocess.run(["cp", str(file), str(scratch)], check=True)
        subprocess.run(["sync", str(scratch)], check=True)
        seconds += time.perf_counter() - begun
        scratch.unlink()
    return seconds


def check_sameness(work: Path) -> None:
    """Compare two shards with one run, and one plan applied and exported twice.

    Args:
        work: Directory with the checkpoint, the statistics and the plan.

    Raises:
        click.ClickException: Bytes differ.
    """
    model, plan = str(work / "model"), str(work / "plan.json")
    folder = work / "again"
    folder.mkdir()
    try:
        parts = [str(folder / f"part{index}") for index in range(2)]
        for index, part in enumerate(parts):
            task = f"--task=random={work / 'random.jsonl'}"
            run(["calibrate", model, task, "--shard", f"{index}/2", "-o", part])
        run(["merge-stats", *parts, "-o", str(folder / "statistics")])
        refuse_difference(work / "statistics", folder / "statistics")
        for first, second, arguments in (
            ("applied", "applied-again", ["apply", model, "--plan", plan]),
            ("bundle", "bundle-again", ["export", model, "--plan", f"random={plan}"]),
        ):
            if first == "bundle":
                arguments = [*arguments, "--target", "cpu", "--precision", "int4"]
            for output in (first, second):
                run([*arguments, "-o", str(folder / output)])
            for file in (folder / first).iterdir():
                refuse_difference(file, folder / second / file.name)
            shutil.rmtree(folder / first)
            shutil.rmtree(folder / second)
    finally:
        shutil.rmtree(folder)
    click.echo(
        "two shards: the bytes of one run; one plan applied and exported twice: same bytes"
    )


def run(arguments: list[str]) -> None:
    """Run one command.

    Args:
        arguments: Of `edgemoe`.

    Raises:
        click.ClickException: It failed.
    """
    command = [sys.executable, "-m", "edgemoe.cli", *arguments]
    if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
        raise click.ClickException(f"{arguments[0]} failed.")


def refuse_difference(one: Path, other: Path) -> None:
    """Compare two files.

    Args:
        one: A file.
        other: Another.

    Raises:
        click.ClickException: Their bytes differ.
    """
    if not filecmp.cmp(one, other, shallow=False):
        raise click.ClickException(f"{one} and {other} must have the same bytes.")


def to_table(measurements: list[Measurement]) -> str:
    """Write a Markdown table.

    Args:
        measurements: Its rows.

    Returns:
        The table.
    """
    head = (
        "| command | wall s | `cp` of its bytes s | peak RSS GB | peak group GB | read GB | "
        "from disk GB | written GB |\n|---|--:|--:|--:|--:|--:|--:|--:|\n"
    )
    return head + "\n".join(
        f"| {row.step} | {row.seconds:.1f} | {row.cp_seconds:.1f} | "
        f"{row.peak_rss_bytes / 1e9:.2f} | {row.peak_group_bytes / 1e9:.2f} | "
        f"{row.read_bytes / 1e9:.2f} | {row.disk_read_bytes / 1e9:.2f} | "
        f"{row.written_bytes / 1e9:.2f} |"
        for row in measurements
    )


@click.command()
@click.argument("work", type=click.Path(path_type=Path))
@click.option("--layers", default=24, show_default=True)
@click.option("--tokens", default=4096, show_default=True, help="Calibration tokens.")
@click.option("--keep", default=0.5, show_default=True, help="Fraction of experts kept.")
@click.option("--memory-gib", default=6.0, show_default=True)
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write rows here.")
@click.option("--only", help="Run only the commands that begin with this.")
@click.option(
    "--export",
    "exports",
    multiple=True,
    default=("cpu:int4", "jetson-orin:fp16"),
    show_default=True,
    help="TARGET:PRECISION; may be given several times.",
)
@click.option("--same", is_flag=True, help="Compare shards and repeated commands, too.")
@click.option("--keep-files", is_flag=True)
def main(
    work: Path,
    layers: int,
    tokens: int,
    keep: float,
    memory_gib: float,
    csv_path: Path | None,
    only: str | None,
    exports: tuple[str, ...],
    same: bool,
    keep_files: bool,
) -> None:
    """Measure the streaming commands on a large random checkpoint in WORK."""
    limit = MemoryLimit(int(memory_gib * (1 << 30)))
    made = [work / name for name in ("model", "pruned", "bundle", "statistics", "plan.json")]
    made += [work / "random.jsonl"]
    try:
        begun = time.perf_counter()
        size = write_checkpoint(work / "model", layers, 4_000_000_000)
        write_task(work / "random.jsonl", tokens)
        click.echo(
            f"{layers} layers, {size / 1e9:.1f} GB, written in "
            f"{time.perf_counter() - begun:.0f} s; limit {memory_gib} GiB by "
            f"{'control group' if limit.group else 'RLIMIT_DATA'}; {tokens} tokens",
            err=True,
        )
        rows = []
        for step in make_steps(work, keep, exports):
            if only is not None and not step.name.startswith(only):
                continue
            row = measure(step, limit)
            row.cp_seconds = time_copy(step.copied, work / "copy")
            rows.append(row)
            click.echo(str(row), err=True)
            if step.dropped is not None and not keep_files:
                shutil.rmtree(step.dropped)
        if same:
            check_sameness(work)
        click.echo(to_table(rows))
        if csv_path is not None:
            with csv_path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(asdict(rows[0])))
                writer.writeheader()
                writer.writerows(asdict(row) for row in rows)
    finally:
        limit.close()
        if not keep_files:
            for path in made:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
