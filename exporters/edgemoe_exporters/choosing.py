"""Choose what each task's graph is made from: its plan, how deep it cuts, and its recovery."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from edgemoe.api.apply_plan import apply_plan
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.gate import judge_drop
from edgemoe.models.opening import open_larger
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.keep_all import KEEP_ALL, keep_all
from edgemoe.prune.registry import count_for, make_plan
from edgemoe.recover.recovery import recover_checkpoint
from edgemoe.sweep.recoveries import read_recoveries
from edgemoe_exporters.bundle.task_experts import sizes_after_pruning
from edgemoe_exporters.cut_search import find_deepest, list_cuts
from edgemoe_exporters.export_keys import digest_lines
from edgemoe_exporters.request import AUTO
from edgemoe_exporters.sources.opening import ModelSource
from edgemoe_exporters.sources.recovered import RecoveredCheckpoint
from edgemoe_exporters.sources.task_model import TaskModel
from edgemoe_exporters.validation.graph_scorer import GraphScorer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tokenizers import Tokenizer

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.evaluate.gate import JudgedDrop
    from edgemoe.evaluate.scorer import Scorer
    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.plan import Plan
    from edgemoe_exporters.cut_search import Cut
    from edgemoe_exporters.graph_making import GraphMaker
    from edgemoe_exporters.resumable_export import ExportCheckpointing
    from edgemoe_exporters.task_data import TaskData


@dataclass(frozen=True)
class TaskChooser:
    """Chooses the task models of one export.

    Attributes:
        checkpoint: The exported checkpoint.
        source: Its weights.
        data: Task files, plans and recovered checkpoints.
        maker: Makes graphs of cuts that are tried.
        checkpointing: Where results are kept.
        tokenizer: The model's.
    """

    checkpoint: Checkpoint
    source: ModelSource
    data: TaskData
    maker: GraphMaker
    checkpointing: ExportCheckpointing
    tokenizer: Tokenizer

    @property
    def shape(self) -> ModelShape:
        """The whole model."""
        return self.checkpoint.structure.shape

    def choose(self, before: Mapping[str, Evaluation]) -> dict[str, TaskModel]:
        """Return the model of every task, in the order of the request.

        Args:
            before: Scores of the checkpoint on held-out lines.

        Returns:
            The models.

        Raises:
            QualityGateError: `--keep auto` found no cut that holds.
        """
        request = self.maker.request
        found = {}
        for name in request.names:
            if name in self.data.recovered:
                found[name] = self._with_weights(self.data.recovered[name])
            elif name in self.data.plans:
                found[name] = self._model_of(name, self.data.plans[name])
            elif name in self.data.calibration and request.keep == AUTO:
                found[name] = self._find_deepest(name, before[name])
            elif name in self.data.calibration:
                keep = request.keep_or_default
                assert keep is not None
                counts = count_for(request.method, self.shape, keep)
                found[name] = self._model_of(name, self._make_plan(name, counts))
            else:
                found[name] = self._model_of(name, keep_all(self.shape))
        return found

    def evaluate(self, scorer: Scorer, name: str) -> Evaluation:
        """Score a model on a task's held-out lines.

        Args:
            scorer: The model.
            name: The task.

        Returns:
            Its score.
        """
        limit = self.maker.request.held_out_tokens
        return evaluate(scorer, self.data.held_out[name], self.tokenizer, max_tokens=limit)

    def held_out_key(self, name: str) -> dict[str, Any]:
        """Return what decides a score of a task besides the model, as JSON values."""
        request = self.maker.request
        return {
            "lines": digest_lines(self.data.held_out[name]),
            "tokens": request.held_out_tokens,
        }

    def graph_key(self, task: TaskModel) -> dict[str, Any]:
        """Return what decides a graph besides the checkpoint, as JSON values."""
        request = self.maker.request
        recovered = task.recovered
        return {
            "flavour": self.maker.target.flavour,
            "precision": self.maker.precision,
            "static_shapes": request.static_shapes,
            "plan": task.plan.sha256,
            "weights": None if recovered is None else recovered.checkpoint.sha256,
        }

    def _make_plan(self, name: str, counts: tuple[int, ...]) -> Plan:
        request = self.maker.request
        whole = sizes_after_pruning(request.method, self.shape, ())
        if sizes_after_pruning(request.method, self.shape, counts) == whole:
            return keep_all(self.shape)
        self.maker.on_stage(f"choose the experts for {name}")
        key = {
            "lines": digest_lines(self.data.calibration[name]),
            "tokens": request.calibration_tokens,
        }
        statistics = self.checkpointing.statistics(name, key, partial(self._collect, name))
        return make_plan(
            statistics,
            name,
            request.method,
            counts,
            seed=request.seed,
            open_oracle=lambda windows: LayerOracle(self.source.layers, windows),
        )

    def _collect(self, name: str) -> Statistics:
        limit = self.maker.request.calibration_tokens
        return self.source.collect(self.data.calibration[name], self.tokenizer, limit)

    def _model_of(self, name: str, plan: Plan) -> TaskModel:
        """Take the checkpoint's own weights, or recover what the plan leaves of them."""
        if name in self.maker.request.recovered_here and plan.method != KEEP_ALL:
            return self._with_weights(self._recover(name, plan))
        return TaskModel.of_plan(self.source, self.checkpoint.structure, plan)

    def _with_weights(self, recovered: RecoveredCheckpoint) -> TaskModel:
        # One task at a time is in memory beside the exported checkpoint.
        larger = None
        if self.checkpointing.work is not None:
            larger = open_larger(recovered.checkpoint, self.maker.limit)
        source = ModelSource(recovered.checkpoint, larger, self.checkpointing.work)
        return TaskModel.of_recovered(source, recovered)

    def _recover(self, name: str, plan: Plan) -> RecoveredCheckpoint:
        texts = self.maker.request.recover
        key = {
            "plan": plan.sha256,
            "methods": list(texts),
            "lines": digest_lines(self.data.calibration[name]),
        }
        path = self.checkpointing.recovered(
            name, key, partial(self._make_recovered, name, plan)
        )
        return RecoveredCheckpoint.open(name, path, self.checkpoint, plan)

    def _make_recovered(self, name: str, plan: Plan, path: Path) -> None:
        """Carry out a plan, and recover what it leaves by one method after the other."""
        # A recovery holds two models of its own.
        self.source.release()
        step = path.with_name("pruned")
        if not step.exists():
            self.maker.on_stage(f"prune the checkpoint for {name}")
            apply_plan(self.checkpoint.path, plan, step)
        methods = list(read_recoveries(self.maker.request.recover).items())
        for number, (method, options) in enumerate(methods, start=1):
            output = path if number == len(methods) else path.with_name(f"recovered-{number}")
            if not output.exists():
                self.maker.on_stage(f"recover {name} by {method}")
                recover_checkpoint(
                    step,
                    [self.data.calibration[name]],
                    output,
                    method=method,
                    teacher=self.checkpoint.path,
                    options=options,
                )
            shutil.rmtree(step)
            step = output

    def _find_deepest(self, name: str, before: Evaluation) -> TaskModel:
        request = self.maker.request
        assert request.max_drop is not None
        cuts = list_cuts(request.method, self.shape)
        tried: dict[Cut, TaskModel] = {}

        def judge(cut: Cut) -> JudgedDrop:
            tried[cut] = self._model_of(name, self._make_plan(name, cut.counts))
            return self._judge_cut(name, tried[cut], cut, before)

        return tried[find_deepest(name, cuts, judge, request.max_drop)]

    def _judge_cut(
        self, name: str, task: TaskModel, cut: Cut, before: Evaluation
    ) -> JudgedDrop:
        def score() -> Evaluation:
            self.maker.on_stage(f"judge --keep {cut.keep:g} of {name}")
            folder = self.checkpointing.scratch / f"{name}-{cut.keep:g}"
            folder.mkdir()
            runner = self.maker.open(self.maker.write_alone(task, name, folder))
            longest = int(task.view.config.max_position_embeddings)
            try:
                return self.evaluate(GraphScorer(runner, task.full_k, longest), name)
            finally:
                shutil.rmtree(folder)

        key = {**self.graph_key(task), **self.held_out_key(name)}
        after = self.checkpointing.evaluation(name, f"cut {cut.keep:g}", key, score)
        return judge_drop(before, after, int(task.view.config.vocab_size))
