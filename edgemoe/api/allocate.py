"""Decide how many experts each token uses."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.api.arguments import (
    as_float,
    as_path,
    check_at_least_one,
    check_plan,
    files_of,
    load_plan,
    option_texts,
    read_task,
)
from edgemoe.api.checks import check_checkpoint, check_output, check_seed
from edgemoe.api.extras import needs
from edgemoe.api.method_names import POLICIES, check_name, check_options
from edgemoe.api.running import running
from edgemoe.errors import AllocationError
from edgemoe.staging import reserved
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from edgemoe.api.arguments import OneTask, Options, StrPath
    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.plans.plan import Plan
    from edgemoe.progress import OnProgress


@dataclass(frozen=True, kw_only=True)
class AllocatedPlan:
    """A plan with a k policy, and what the policy means on the task.

    Attributes:
        plan: The plan.
        task: Name of the task.
        tokens: Tokens that were counted.
        mean_k: Experts per token and MoE layer under the policy.
        mean_k_before: The same with the router's own top_k.
        mean_k_per_layer: `mean_k` of each MoE layer.
        most_k_per_layer: Most experts that the policy gives a token in each MoE layer.
    """

    plan: Plan
    task: str
    tokens: int
    mean_k: float
    mean_k_before: float
    mean_k_per_layer: tuple[float, ...]
    most_k_per_layer: tuple[int, ...]


def allocate(
    model: StrPath,
    task: OneTask,
    policy: str = "fisher",
    output: StrPath | None = None,
    *,
    plan: Plan | StrPath | None = None,
    mean_k: float | None = None,
    options: Options = (),
    max_tokens: int = 16384,
    seed: int = 0,
    threads: int | None = None,
    force: bool = False,
    on_progress: OnProgress | None = None,
) -> AllocatedPlan:
    """Decide how many of a checkpoint's experts each token uses.

    The decision is added to a plan, which `edgemoe.apply_plan` writes into a checkpoint.
    No weight changes, and a token's number depends on that token alone. With `output` the plan
    is written as JSON; the training of `ada-k` keeps its state in `<output>.partial`, and after
    an interruption the same call goes on. Without `output` nothing is written.

    Sources: `ada-k` https://arxiv.org/abs/2410.10456, `top-p` https://arxiv.org/abs/2403.07652,
    `alloc-l` https://arxiv.org/abs/2604.08133; each file of `edgemoe.allocate` names that
    of its policy.

    Args:
        model: Checkpoint directory.
        task: What k is decided on: its file by its name, or a task that is loaded.
        policy: `fisher`, `fixed`, `alloc-l`, `top-p` or `ada-k`.
        output: Plan file to write; None writes none.
        plan: What is done to the model first, or its file: the new plan does both, with the
            new policy in place of one that the plan has. None takes the model as it is.
        mean_k: Experts per token and layer to aim at, in [1, top_k]; None takes the policy's
            own: two thirds of the router's top_k, but `ada-k` goes where its regulariser leads.
        options: Options of the policy by name, such as `{"k": 4}` for `fixed`.
        max_tokens: Tokens of the task to read, from its first example on, in [1, inf).
        seed: Seed of policies that draw, in [0, 2**32).
        threads: CPU threads, in [1, inf); None leaves what they are.
        force: Whether `output`, and unfinished work of another call, may be replaced.
        on_progress: Called with each `edgemoe.progress.ProgressEvent`; None draws a bar
            where stderr is a terminal.

    Returns:
        `.plan`, and the means of the experts per token before and after.

    Raises:
        ArgumentError: A count is out of range.
        AllocationError: The policy, the mean, an option or the seed is out of range, or the
            model's routers do not allow it.
        PlanError: The plan does not fit the checkpoint, or the policy has no such option.
        TaskFileError: The task file breaks the format, or has no token.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        StreamingError: The policy cannot run this model's layers.
        OutputError: `output` exists and `force` is false, is of a training that was
            interrupted, or cannot be written.
        MissingDependencyError: The extra `export` is not installed.

    Example:
        >>> from edgemoe import allocate
        >>> allocated = allocate("moe", {"code": "code.jsonl"}, mean_k=1.5)
        >>> saved = allocated.mean_k_before - allocated.mean_k
    """
    check_at_least_one(max_tokens=max_tokens, threads=threads)
    path, target = Path(model), as_path(output)
    needs("export")
    check_name(policy, POLICIES)
    texts = option_texts(options)
    check_options(policy, POLICIES, texts)
    check_seed(seed, 2**32, AllocationError)
    data = [task.path] if isinstance(task, TaskFile) else task.values()
    check_output(target, path, *files_of(*data, plan), force=force, directory=False)
    check_checkpoint(path)
    loaded = read_task(task, path)
    start = None if plan is None else replace(load_plan(plan), k_policy=None)
    with (
        running("export", threads=threads, on_progress=on_progress),
        reserved(target, force=force, directory=False, resumes=True),
    ):
        from edgemoe.allocate.registry import find_policy, read_options
        from edgemoe.models.checkpoint import Checkpoint

        chosen = read_options(policy, texts)
        if target is not None and not find_policy(policy).trains:
            _refuse_unfinished(target)
        checkpoint = Checkpoint(path)
        if start is not None:
            check_plan(start, checkpoint)
        return _decide(
            checkpoint,
            loaded,
            policy,
            start,
            target,
            mean_k=as_float(mean_k),
            chosen=chosen,
            max_tokens=max_tokens,
            seed=seed,
            threads=threads,
            force=force,
        )


def _refuse_unfinished(output: Path) -> None:
    from edgemoe.errors import OutputError
    from edgemoe.resume import partial_path

    if partial_path(output).exists():
        raise OutputError(
            f"{partial_path(output)} is of a training that was interrupted. Finish it with the "
            "same command, remove it, or choose another -o."
        )


def _decide(
    model: Checkpoint,
    task: TaskFile,
    policy: str,
    start: Plan | None,
    output: Path | None,
    *,
    mean_k: float | None,
    chosen: dict[str, Any],
    max_tokens: int,
    seed: int,
    threads: int | None,
    force: bool,
) -> AllocatedPlan:
    """Open the model, carry out what comes first, and decide."""
    from edgemoe.allocate.registry import allocate as allocate_k
    from edgemoe.allocate.registry import find_policy
    from edgemoe.allocate.usage import count_experts
    from edgemoe.apply.in_memory import apply_plan
    from edgemoe.calibrate.windows import cut_tasks
    from edgemoe.layerwise.provider import InMemoryLayers
    from edgemoe.models.checkpoint import load_model
    from edgemoe.models.k_policy import following
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.plans.keep_all import keep_all
    from edgemoe.recover.state import PROGRESS
    from edgemoe.resume import resumable, resume_key

    opened = load_model(model)
    sha256 = opened.sha256
    if start is None:
        start = replace(keep_all(opened.shape), checkpoint_sha256=sha256)
    else:
        opened = apply_plan(opened, start)
    windows = cut_tasks(opened, [task], model.tokenizer, max_tokens=max_tokens).by_task[
        task.name
    ]
    key = resume_key(
        "allocate",
        sha256,
        plan=start,
        lines=task,
        policy=policy,
        options=[mean_k, max_tokens, seed, threads, sorted(chosen.items())],
    )
    with contextlib.ExitStack() as stack:
        work = None
        if output is not None and find_policy(policy).trains:
            work = stack.enter_context(resumable(output, key, PROGRESS, force=force))
        made = allocate_k(
            LayerOracle(InMemoryLayers(opened), windows),
            policy,
            task=task.name,
            mean_k=mean_k,
            seed=seed,
            options=chosen,
            work=work,
        )
        before = count_experts(opened, windows)
        with following(opened, made):
            after = count_experts(opened, windows)
        found = replace(start, k_policy=made)
        if output is not None:
            found.save(output, force=force)
    return AllocatedPlan(
        plan=found,
        task=task.name,
        tokens=len(after),
        mean_k=float(after.mean()),
        mean_k_before=float(before.mean()),
        mean_k_per_layer=tuple(float(mean) for mean in after.mean(axis=0)),
        most_k_per_layer=tuple(rule.slots for rule in made.rules),
    )
