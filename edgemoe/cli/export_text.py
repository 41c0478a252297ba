"""What `edgemoe export` prints: what changed, in terms of whoever uses the bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.disk import human_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemoe_exporters.report import ExportReport, TaskReport
    from edgemoe_exporters.validation.speed import Speed
    from edgemoe_runtime.bundle.k_ladder import KRung
    from edgemoe_runtime.bundle.task_entry import QualityReport

_PARITY = (
    "parity is the largest difference of a logit from PyTorch with the same weights: that the "
    "graph is right, not that the task is done well"
)


def describe_export(exported: ExportReport) -> str:
    """Describe an export for a person.

    Args:
        exported: Its report.

    Returns:
        Lines: the bundle, each task, warnings and notes.
    """
    size = exported.size
    lines = [
        f"{exported.output}: {exported.flavour} {exported.precision} for {exported.target}, "
        f"{human_bytes(size.total_bytes)}, of which {human_bytes(size.shared_bytes)} shared "
        f"(unpruned about {human_bytes(exported.unpruned_bytes)}; the checkpoint in fp32: "
        f"{human_bytes(exported.checkpoint_bytes)})"
    ]
    for name, task in exported.tasks.items():
        lines.append(
            f"  {name}: {sum(task.experts_per_layer)} of {sum(exported.experts_before)} "
            f"experts; weights: {task.weights.described}"
        )
        lines += [f"    {line}" for line in _describe_task(task)]
    lines.append(f"  ({_PARITY})")
    lines += [f"  warning: {warning}" for warning in exported.warnings]
    return "\n".join([*lines, *(f"  note: {note}" for note in exported.notes)])


def _describe_task(task: TaskReport) -> Iterator[str]:
    if task.quality is not None and task.quality.before and task.quality.after:
        yield _describe_quality(task.quality)
    agreement = task.agreement
    yield (
        f"same best token as the checkpoint in {agreement.same_token_share:.1%} of "
        f"{agreement.positions} positions, KL {agreement.kl_nats:.3g} nats; "
        f"parity {task.parity.max_abs_logit_difference:.2g}"
    )
    if task.speed is not None:
        yield _describe_speed(task.speed)
    for rung in task.k_ladder or ():
        yield describe_rung(rung)


def _describe_quality(quality: QualityReport) -> str:
    """Say how much worse a score is, how sure that is, and what was allowed."""
    before: Any = quality.before
    after: Any = quality.after
    drop: Any = quality.drop
    shown = f"{before['metric']} {before['value']:.4g} before, {after['value']:.4g} after"
    if drop is None:
        return shown
    low, high = drop["ci95"]
    value, chance = drop["value"], drop["chance"]
    points = 100 if before["metric"] == "accuracy" else None
    unit = " points" if points else "%"
    shown += (
        f": {_hundredths(value)}{unit} worse, 95% interval {_hundredths(low)} to "
        f"{_hundredths(high)}, {drop['lines']} held-out lines, chance {chance:.6g}"
    )
    if quality.max_drop is not None:
        shown += f"; --max-drop {quality.max_drop:g} holds"
    if drop["weak_evidence"]:
        shown += f" (weak evidence: {'; '.join(map(str, drop['weak_evidence']))})"
    return shown


def _describe_speed(speed: Speed) -> str:
    shown = f"{speed.ms_per_token:.3g} ms for a token of a short answer"
    if speed.unpruned_ms_per_token is not None:
        shown += (
            f", {speed.unpruned_ms_per_token:.3g} unpruned ({speed.times_unpruned:.2f} times "
            "as fast)"
        )
    if speed.checkpoint_ms_per_token is not None:
        shown += (
            f", {speed.checkpoint_ms_per_token:.3g} by transformers in fp32 "
            f"({speed.times_checkpoint:.2f} times as fast)"
        )
    return shown


def describe_rung(rung: KRung) -> str:
    """Say what a rung of the k ladder is, loses and costs."""
    layers = max(len(rung.k_cap), 1)
    shown = f"rung {rung.name}: {sum(rung.k_cap) / layers:.3g} experts per token at most"
    if rung.quality is not None:
        low, high = rung.quality.drop_ci95
        shown += f", drop {rung.quality.drop:.3f} [{low:.3f}, {high:.3f}]"
    if rung.cost is not None:
        shown += f", time {rung.cost.decode:.2f} (prompts {rung.cost.prefill:.2f})"
    return shown


def _hundredths(value: object) -> str:
    assert isinstance(value, (int, float))
    return f"{100 * value:+.3g}"
