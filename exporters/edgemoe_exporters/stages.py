"""The stages of an export: score the checkpoint, write graphs, compare and score them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from edgemoe_exporters.bundle.engine_release import needed_onnxruntime
from edgemoe_exporters.bundle.manifest import (
    CREATED_BY,
    describe_cache,
    describe_model,
    describe_plan,
)
from edgemoe_exporters.bundle.writer import BundleWriter, list_files, tensor_specs
from edgemoe_exporters.lowering.quantize_once import quantization_cache
from edgemoe_exporters.report import TaskReport
from edgemoe_exporters.request import AUTO
from edgemoe_exporters.sources.recovered import recoveries_in, steps_of
from edgemoe_exporters.validation.agreement import (
    Agreement,
    choose_rows,
    measure_agreement,
    run_checkpoint,
)
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_exporters.validation.graph_scorer import GraphScorer
from edgemoe_exporters.validation.k_ladder import (
    LadderTask,
    floor_of,
    measure_rungs,
    time_ladders,
)
from edgemoe_exporters.validation.parity import check_parity, measure_parity
from edgemoe_exporters.validation.parity_text import sample_tokens
from edgemoe_exporters.validation.quality_gate import check_before, check_quality
from edgemoe_runtime.bundle.k_ladder import KRung
from edgemoe_runtime.bundle.manifest import Manifest
from edgemoe_runtime.bundle.manifest_file import save_manifest
from edgemoe_runtime.bundle.task_entry import QualityReport, TaskEntry, WeightsInfo
from edgemoe_runtime.execution_providers import release_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.models.contract import MoeModel
    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.choosing import TaskChooser
    from edgemoe_exporters.graph_making import GraphMaker
    from edgemoe_exporters.request import ExportRequest
    from edgemoe_exporters.resumable_export import ExportCheckpointing
    from edgemoe_exporters.sources.eager_run import EagerRun
    from edgemoe_exporters.sources.opening import ModelSource
    from edgemoe_exporters.sources.task_model import TaskModel
    from edgemoe_exporters.validation.graph_calls import Runner
    from edgemoe_exporters.validation.speed import Speed
    from edgemoe_runtime.bundle.cache_spec import KvCache
    from edgemoe_runtime.bundle.file_entry import SizeReport
    from edgemoe_runtime.bundle.graph_spec import TensorSpec
    from edgemoe_runtime.bundle.task_entry import ExpertGroup

OnStage: TypeAlias = "Callable[[str], None]"


@dataclass(frozen=True, kw_only=True)
class WrittenGraphs:
    """The graphs of a bundle, and what they must agree with.

    Attributes:
        eager: The eager model's answers by task.
        inputs: Inputs of every task's graph.
        outputs: Outputs of every task's graph.
        cache: The cache among them.
        size: Bytes on disk.
        separate_stacks: Stacks of experts that were stored apart although tasks share them.
        needs_onnxruntime: The oldest release that computes all of them, such as `1.31`.
    """

    eager: Mapping[str, list[EagerRun]]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    cache: KvCache
    size: SizeReport
    separate_stacks: tuple[str, ...]
    needs_onnxruntime: str


@dataclass(frozen=True)
class ExportStages:
    """The stages of one export, in the order in which they run.

    Attributes:
        chooser: Chooses what each task's graph is made from; it has the data.
        maker: Makes graphs.
        checkpointing: Where it writes, and what its finished steps gave.
        source: The checkpoint.
        end_tokens: Tokens that end a text.
    """

    chooser: TaskChooser
    maker: GraphMaker
    checkpointing: ExportCheckpointing
    source: ModelSource
    end_tokens: tuple[int, ...]

    @property
    def request(self) -> ExportRequest:
        """What to export."""
        return self.maker.request

    @property
    def model(self) -> MoeModel:
        """The whole model's structure; its tensors may have no contents."""
        return self.chooser.checkpoint.structure

    @property
    def vocabulary(self) -> int:
        """Tokens that the model chooses from."""
        return int(self.model.config.vocab_size)

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        return int(self.model.config.max_position_embeddings)

    def evaluate_before(self) -> dict[str, Evaluation]:
        """Return the score of the whole model on each task's held-out examples."""
        scores = {}
        for name, held_out in self.chooser.data.held_out.items():
            self.maker.on_stage(f"evaluate the checkpoint on {name}")
            scores[name] = self.checkpointing.evaluation(
                name,
                "checkpoint",
                self.chooser.held_out_key(name),
                # The model is loaded only where there is no score yet.
                lambda name=name: self.chooser.evaluate(self.source.scorer(), name),  # type: ignore[misc]
            )
            if self.request.max_drop is not None and not self.request.accept_weak_evidence:
                check_before(held_out, scores[name], self.vocabulary)
        return scores

    def write_graphs(
        self, tasks: Mapping[str, TaskModel], layouts: Mapping[int, StackLayout]
    ) -> WrittenGraphs:
        """Lower and write the graph of each task."""
        eager = {}
        needed: list[str] = []
        counts_experts = any(task.policy is not None for task in tasks.values())
        staged = self.checkpointing.staged
        writing = BundleWriter(
            staged, tuple(tasks), layouts, journal=self.checkpointing.journal
        )
        with writing as writer:
            for name, task in tasks.items():
                self.maker.on_stage(f"make the graph of {name}")
                self.maker.traced(task)
                with task.opened(layouts, name) as small:
                    eager[name] = self.checkpointing.eager(
                        name, partial(small.run_eager, self._sample(name))
                    )
                    lowered = self.maker.lowered(task, small, counts_experts=counts_experts)
                    inputs = tensor_specs(lowered.graph.inputs)
                    outputs = tensor_specs(lowered.graph.outputs)
                    depth = int(self.model.config.num_hidden_layers)
                    cache = describe_cache(lowered.graph, inputs, depth)
                    needed.append(needed_onnxruntime(lowered))
                    writer.add_graph(name, lowered)
            self.maker.on_stage("write the bundle")
            size = writer.finish()
            return WrittenGraphs(
                eager=eager,
                inputs=inputs,
                outputs=outputs,
                cache=cache,
                size=size,
                separate_stacks=tuple(writer.separate_stacks),
                needs_onnxruntime=max(needed, key=release_numbers),
            )

    def sharing_quantised(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which no matrix is quantised twice, where several graphs are."""
        request = self.request
        timed = request.speed and self.maker.target.name == "cpu"
        several = len(request.names) > 1 or request.keep == AUTO or timed
        return (
            quantization_cache(self.checkpointing.scratch)
            if several
            else contextlib.nullcontext()
        )

    def validate(
        self,
        name: str,
        task: TaskModel,
        eager: list[EagerRun],
        before: Mapping[str, Evaluation],
        layouts: Mapping[int, StackLayout],
    ) -> TaskReport:
        """Compare a written graph with the eager model, and its score with the one before."""
        most = task.full_k
        self.maker.on_stage(f"compare the graph of {name} with the eager model")
        runner = self.maker.open(self.checkpointing.staged / f"{name}.onnx")
        parity = self.checkpointing.parity(name, partial(measure_parity, runner, eager, most))
        check_parity(parity, self.maker.precision, name)
        quality, table, ladder = None, None, None
        whole = runner if isinstance(runner, GraphRunner) else None
        if whole is not None:
            table = whole.mean_experts(self._sample(name), most)
        if name in before:
            self.maker.on_stage(f"evaluate the graph of {name}")
            held_out = self.chooser.data.held_out[name]
            scorer = GraphScorer(runner, most, self.max_length)
            key = {
                **self.chooser.graph_key(task),
                **self.chooser.held_out_key(name),
                "order": task.list_experts(layouts, name),
            }
            after = self.checkpointing.evaluation(
                name, "graph", key, partial(self.chooser.evaluate, scorer, name)
            )
            quality = check_quality(
                held_out, before[name], after, self.request.max_drop, self.vocabulary
            )
            if self.request.ladder and most and whole is not None:
                self.maker.on_stage(f"judge the k ladder of {name}")
                ladder_task = LadderTask(
                    held_out,
                    self.chooser.tokenizer,
                    self.max_length,
                    self.request.held_out_tokens,
                )
                floor = floor_of(self.request.max_drop, before[name], after)
                ladder = measure_rungs(
                    whole,
                    ladder_task,
                    most,
                    floor,
                    task.policy,
                    surely=self.request.max_drop is not None,
                )
        agreement = Agreement.of_parity(parity)
        if self.is_changed(task):
            agreement = self._agree(name, runner, most)
            quality = _with_agreement(quality, agreement)
        return TaskReport(
            parity=parity,
            quality=quality,
            agreement=agreement,
            weights=self._weights(name, task),
            experts_per_layer=task.plan.experts_per_layer,
            k_table=table,
            k_ladder=ladder,
        )

    def is_changed(self, task: TaskModel) -> bool:
        """Return whether a task's model is another than the exported checkpoint."""
        return task.recovered is not None or self.is_pruned(task) or bool(task.plan.k_policy)

    def is_pruned(self, task: TaskModel) -> bool:
        """Return whether a task has fewer experts than the checkpoint, or others."""
        whole = tuple(tuple(range(count)) for count in self.model.experts_per_layer)
        return task.ids != whole or task.widths != self.model.shape.widths_per_layer

    def write_manifest(
        self,
        tasks: Mapping[str, TaskModel],
        layouts: Mapping[int, StackLayout],
        graphs: WrittenGraphs,
        reports: Mapping[str, TaskReport],
    ) -> Manifest:
        """Write manifest.json, last of all files."""
        full = (tuple(map(max, zip(*(task.full_k for task in tasks.values()), strict=True))),)
        manifest = Manifest(
            created_by=CREATED_BY,
            model=describe_model(
                self.source.moe, self.request.model.resolve().name, self.end_tokens
            ),
            target=self.maker.target.name,
            flavour=self.maker.target.flavour,
            precision=self.maker.precision,
            needs_onnxruntime=graphs.needs_onnxruntime,
            kv_cache=graphs.cache,
            tasks={
                name: TaskEntry(
                    graph=f"{name}.onnx",
                    top_k=max(task.full_k),
                    experts_per_layer=task.plan.experts_per_layer,
                    experts=self._experts(name, task, layouts),
                    plan=describe_plan(task.plan, task.view),
                    parity=reports[name].parity.to_report(),
                    quality=reports[name].quality,
                    k_table=reports[name].k_table,
                    k_ladder=reports[name].k_ladder,
                    weights=reports[name].weights,
                )
                for name, task in tasks.items()
            },
            inputs=graphs.inputs,
            outputs=graphs.outputs,
            k_ladder=(KRung(name="full", k_cap=full[0]),),
            size=graphs.size,
            files=list_files(self.checkpointing.staged),
        )
        if self.maker.target.name == "cpu":
            manifest = time_ladders(self.checkpointing.staged, manifest, self.maker.on_stage)
        save_manifest(manifest, self.checkpointing.staged)
        return manifest

    def _experts(
        self, name: str, task: TaskModel, layouts: Mapping[int, StackLayout]
    ) -> tuple[tuple[ExpertGroup, ...], ...] | None:
        """Return the original ids of a task's experts, or None where all stay in order."""
        listed = task.list_experts(layouts, name)
        in_order = tuple(tuple(range(count)) for count in self.model.experts_per_layer)
        return None if listed == in_order else listed

    def _weights(self, name: str, task: TaskModel) -> WeightsInfo:
        """Say whose weights a task has."""
        model = self.request.model.resolve().name
        if task.recovered is None:
            known = recoveries_in(steps_of(self.model.provenance))
            sha256 = self.checkpointing.fingerprint(self.chooser.checkpoint.hashes)
            return WeightsInfo(
                checkpoint=model,
                checkpoint_sha256=sha256,
                recovered_by=tuple(reversed(known)),
            )
        given = name in self.chooser.data.recovered
        path = task.recovered.checkpoint.path.resolve()
        return WeightsInfo(
            checkpoint=path.name if given else model,
            checkpoint_sha256=task.recovered.checkpoint.sha256,
            recovered_by=task.recovered.recovered_by,
        )

    def _agree(self, name: str, runner: Runner, most: tuple[int, ...]) -> Agreement:
        """Compare a graph with the checkpoint as it was."""
        self.maker.on_stage(f"compare the graph of {name} with the checkpoint")
        held_out = self.chooser.data.held_out.get(name)
        rows = choose_rows(held_out, self.chooser.tokenizer, self.vocabulary, self.max_length)
        reference = run_checkpoint(self.source.layers, rows, self.checkpointing.work, name)
        return measure_agreement(runner, rows, reference, most)

    def _sample(self, name: str) -> list[int]:
        held_out = self.chooser.data.held_out.get(name)
        return sample_tokens(held_out, self.chooser.tokenizer, self.vocabulary)


def _with_agreement(quality: QualityReport | None, agreement: Agreement) -> QualityReport:
    """Add an agreement to the entry of the manifest."""
    if quality is None:
        quality = QualityReport(before=None, after=None, data=None, max_drop=None, passed=None)
    return replace(
        quality,
        same_token_share=agreement.same_token_share,
        kl_nats=agreement.kl_nats,
        positions=agreement.positions,
    )


def with_speed(report: TaskReport, speed: Speed | None) -> TaskReport:
    """Add times to a report, and to its entry of the manifest.

    Args:
        report: The report.
        speed: The times; None where there are none.

    Returns:
        The report with them.
    """
    if speed is None:
        return report
    quality = report.quality
    if quality is not None:
        quality = replace(quality, speed=speed.to_json())
    return replace(report, speed=speed, quality=quality)
