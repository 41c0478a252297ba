"""The stages of an export: choose experts, write graphs, compare and score them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from edgemoe.evaluate.evaluation import evaluate
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.keep_all import keep_all
from edgemoe.prune.registry import make_plan
from edgemoe_exporters.bundle.engine_release import needed_onnxruntime
from edgemoe_exporters.bundle.manifest import (
    CREATED_BY,
    describe_cache,
    describe_model,
    describe_plan,
)
from edgemoe_exporters.bundle.task_experts import list_experts, sizes_after_pruning
from edgemoe_exporters.bundle.writer import (
    BundleWriter,
    list_files,
    set_default_input,
    tensor_specs,
)
from edgemoe_exporters.lowering import onnxruntime as lower_ort
from edgemoe_exporters.lowering import tensorrt as lower_tensorrt
from edgemoe_exporters.lowering.k_policy import count_experts_used, full_k, has_policies
from edgemoe_exporters.lowering.quantize_once import quantization_cache
from edgemoe_exporters.request import TaskReport
from edgemoe_exporters.tracing.trace import trace
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
from edgemoe_exporters.validation.quality_gate import check_quality
from edgemoe_exporters.validation.sliced_runner import SlicedRunner, weight_bytes
from edgemoe_runtime.bundle.k_ladder import KRung
from edgemoe_runtime.bundle.manifest import Manifest
from edgemoe_runtime.bundle.manifest_file import save_manifest
from edgemoe_runtime.bundle.task_entry import TaskEntry
from edgemoe_runtime.execution_providers import release_numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import onnx_ir as ir
    from tokenizers import Tokenizer

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.bundle.expert_layout import StackLayout
    from edgemoe_exporters.request import ExportRequest
    from edgemoe_exporters.resumable_export import ExportCheckpointing
    from edgemoe_exporters.sources.eager_run import EagerRun
    from edgemoe_exporters.sources.opening import ModelSource
    from edgemoe_exporters.targets import Target
    from edgemoe_exporters.task_data import TaskData
    from edgemoe_exporters.validation.graph_calls import Runner
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
        request: What to export.
        target: Its target.
        precision: Its precision.
        checkpointing: Where it writes, and what its finished steps gave.
        source: The checkpoint.
        tokenizer: The model's.
        data: Task files and plans.
        on_stage: Called with a short text at the beginning of each stage.
        limit: Largest graph that is opened as a whole, in bytes.
        end_tokens: Tokens that end a text.
    """

    request: ExportRequest
    target: Target
    precision: str
    checkpointing: ExportCheckpointing
    source: ModelSource
    tokenizer: Tokenizer
    data: TaskData
    on_stage: OnStage
    limit: int
    end_tokens: tuple[int, ...]

    @property
    def model(self) -> MoeModel:
        """The whole model."""
        return self.source.moe

    def choose_plans(self, counts: tuple[int, ...]) -> dict[str, Plan]:
        """Return the plan of every task, in the order of the request."""
        plans = {}
        whole = sizes_after_pruning(self.request.method, self.model.shape, ())
        cuts = sizes_after_pruning(self.request.method, self.model.shape, counts) != whole
        for name in self.request.names:
            if name in self.data.plans:
                plans[name] = self.data.plans[name]
            elif name in self.data.calibration and cuts:
                self.on_stage(f"choose the experts for {name}")
                statistics = self.checkpointing.statistics(name, partial(self._collect, name))
                plans[name] = make_plan(
                    statistics,
                    name,
                    self.request.method,
                    counts,
                    seed=self.request.seed,
                    open_oracle=lambda windows: LayerOracle(self.source.layers, windows),
                )
            else:
                plans[name] = keep_all(self.model.shape)
        return plans

    def evaluate_before(self) -> dict[str, Evaluation]:
        """Return the score of the whole model on each task's held-out examples."""
        scores = {}
        for name, held_out in self.data.held_out.items():
            self.on_stage(f"evaluate the checkpoint on {name}")
            scores[name] = self.checkpointing.evaluation(
                name, "before", partial(self._evaluate, self.source.scorer(), held_out)
            )
        return scores

    def write_graphs(
        self, plans: Mapping[str, Plan], layouts: Mapping[int, StackLayout]
    ) -> WrittenGraphs:
        """Trace the model once; lower and write it with each task's experts."""
        eager = {}
        needed: list[str] = []
        lower: Callable[[ir.Model, str], ir.Model] = lower_ort.lower
        if self.target.flavour == "tensorrt":
            lower = partial(lower_tensorrt.lower, static_shapes=self.request.static_shapes)
        self.on_stage("trace the model")
        traced = trace(self.model)
        several = len(plans) > 1
        memory = (
            quantization_cache(self.checkpointing.staged)
            if several
            else contextlib.nullcontext()
        )
        writing = BundleWriter(
            self.checkpointing.staged, tuple(plans), layouts, journal=self.checkpointing.journal
        )
        with memory, writing as writer:
            for name, plan in plans.items():
                self.on_stage(f"make the graph of {name}")
                with self.source.of_task(plan, layouts, name) as small:
                    eager[name] = self.checkpointing.eager(
                        name, partial(small.run_eager, self._sample(name))
                    )
                    bound = small.bind(traced)
                    if has_policies(self.model, plans.values()):
                        count_experts_used(bound)
                    lowered = lower(bound, self.precision)
                    if self.target.flavour == "ort":
                        # optimum does not know this input, and opens bundles all the same.
                        set_default_input(lowered, "k_cap", full_k(self.model, plan))
                    inputs = tensor_specs(lowered.graph.inputs)
                    outputs = tensor_specs(lowered.graph.outputs)
                    depth = int(self.model.config.num_hidden_layers)
                    cache = describe_cache(lowered.graph, inputs, depth)
                    needed.append(needed_onnxruntime(lowered))
                    writer.add_graph(name, lowered)
            self.on_stage("write the bundle")
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

    def validate(
        self, name: str, plan: Plan, eager: list[EagerRun], before: Mapping[str, Evaluation]
    ) -> TaskReport:
        """Compare a written graph with the eager model, and its score with the one before."""
        most = full_k(self.model, plan)
        self.on_stage(f"compare the graph of {name} with the eager model")
        runner = self._open_graph(self.checkpointing.staged / f"{name}.onnx")
        parity = self.checkpointing.parity(name, partial(measure_parity, runner, eager, most))
        check_parity(parity, self.precision, name)
        quality, table, ladder = None, None, None
        whole = runner if isinstance(runner, GraphRunner) else None
        if whole is not None:
            table = whole.mean_experts(self._sample(name), most)
        if name in before:
            self.on_stage(f"evaluate the graph of {name}")
            held_out = self.data.held_out[name]
            longest = int(self.model.config.max_position_embeddings)
            scorer = GraphScorer(runner, most, longest)
            after = self.checkpointing.evaluation(
                name, "after", partial(self._evaluate, scorer, held_out)
            )
            quality = check_quality(held_out, before[name], after, self.request.max_drop)
            if self.request.ladder and most and whole is not None:
                self.on_stage(f"judge the k ladder of {name}")
                ladder_task = LadderTask(
                    held_out, self.tokenizer, longest, self.request.held_out_tokens
                )
                floor = floor_of(self.request.max_drop, before[name], after)
                policy = plan.k_policy or self.model.k_policy
                ladder = measure_rungs(whole, ladder_task, most, floor, policy)
        return TaskReport(parity=parity, quality=quality, k_table=table, k_ladder=ladder)

    def _open_graph(self, path: Path) -> Runner:
        """Open a written graph as a whole, or in slices where it is too large."""
        if weight_bytes(path) <= self.limit:
            return GraphRunner(path)
        # Kernels may keep a second copy of a slice's matrices.
        return SlicedRunner(path, self.limit // 4, self.checkpointing.work)

    def write_manifest(
        self,
        plans: Mapping[str, Plan],
        layouts: Mapping[int, StackLayout],
        graphs: WrittenGraphs,
        reports: Mapping[str, TaskReport],
    ) -> Manifest:
        """Write manifest.json, last of all files."""
        manifest = Manifest(
            created_by=CREATED_BY,
            model=describe_model(
                self.model, self.request.model.resolve().name, self.end_tokens
            ),
            target=self.target.name,
            flavour=self.target.flavour,
            precision=self.precision,
            needs_onnxruntime=graphs.needs_onnxruntime,
            kv_cache=graphs.cache,
            tasks={
                name: TaskEntry(
                    graph=f"{name}.onnx",
                    top_k=max(full_k(self.model, plan)),
                    experts_per_layer=plan.experts_per_layer,
                    experts=self._experts(name, plan, layouts),
                    plan=describe_plan(plan, self.model),
                    parity=reports[name].parity.to_report(),
                    quality=reports[name].quality,
                    k_table=reports[name].k_table,
                    k_ladder=reports[name].k_ladder,
                )
                for name, plan in plans.items()
            },
            inputs=graphs.inputs,
            outputs=graphs.outputs,
            k_ladder=(KRung(name="full", k_cap=full_k(self.model, *plans.values())),),
            size=graphs.size,
            files=list_files(self.checkpointing.staged),
        )
        if self.target.name == "cpu":
            manifest = time_ladders(self.checkpointing.staged, manifest, self.on_stage)
        save_manifest(manifest, self.checkpointing.staged)
        return manifest

    def _experts(
        self, name: str, plan: Plan, layouts: Mapping[int, StackLayout]
    ) -> tuple[tuple[ExpertGroup, ...], ...] | None:
        """Return the original ids of a task's experts, or None where all stay in order."""
        listed = list_experts(plan, layouts, name)
        in_order = tuple(tuple(range(count)) for count in self.model.experts_per_layer)
        return None if listed == in_order else listed

    def _sample(self, name: str) -> list[int]:
        vocabulary = int(self.model.config.vocab_size)
        return sample_tokens(self.data.held_out.get(name), self.tokenizer, vocabulary)

    def _collect(self, name: str) -> Statistics:
        limit = self.request.calibration_tokens
        return self.source.collect(self.data.calibration[name], self.tokenizer, limit)

    def _evaluate(self, scorer: Scorer, task: TaskFile) -> Evaluation:
        return evaluate(scorer, task, self.tokenizer, max_tokens=self.request.held_out_tokens)
