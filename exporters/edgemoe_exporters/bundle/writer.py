"""Write a bundle's directory: graphs, weights stored once, tokenizer files.

    BUNDLE/
      <task>.onnx         one graph per task, with tensors below 1 KiB inline
      shared.onnx.data    what two or more tasks read; a stack of experts is here as a whole
                          where any of it is common, since each task's must be contiguous
      <task>.onnx.data    what only that task reads
      config.json ...     those of the checkpoint (config.json: see hf_config)
      manifest.json       written last, by the caller

The graphs' tensors point at (offset, length) ranges, which overlap where tasks share experts.
The same graphs give the same bytes: nothing here depends on time, file_range or machine.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe.errors import ExportError
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.progress import track
from edgemoe_exporters.bundle.hf_config import write_config
from edgemoe_exporters.bundle.journal import Contents, WeightJournal
from edgemoe_exporters.bundle.task_names import check_task_names
from edgemoe_exporters.bundle.weight_store import (
    ALIGNMENT_BYTES,
    ByteRange,
    FileLayout,
    WeightStore,
)
from edgemoe_exporters.graph.metadata import (
    KEY_PREFIX,
    SAME_BYTES,
    SETS_SHAPES,
    stacked_layer,
)
from edgemoe_runtime.bundle.file_entry import FileEntry, SizeReport
from edgemoe_runtime.bundle.graph_spec import TensorSpec
from edgemoe_runtime.bundle.names import (
    MANIFEST_FILE,
    SHARED_WEIGHTS_FILE,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from edgemoe_exporters.bundle.expert_layout import StackLayout

_INLINE_BYTES = 1024  # shape arithmetic must stay inline: engines read it while they parse
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
_HASH_BYTES = 8 << 20  # 8 MiB


class BundleWriter:
    """Writes graphs and weights of a bundle into a directory; a context manager.

    Args:
        directory: An empty directory, usually a staged one.
        tasks: Names of the tasks, in the order in which their graphs will be added.
        layouts: Per decoder layer, the order of the experts; where absent, nothing is stacked.
        journal: What an interrupted export wrote there, in a file outside of the directory;
            None where the bundle is written in one go.

    Raises:
        ExportError: A task's name cannot be a file's name.
    """

    def __init__(
        self,
        directory: Path,
        tasks: Sequence[str],
        layouts: Mapping[int, StackLayout] | None = None,
        journal: Path | None = None,
    ) -> None:
        check_task_names(tasks)
        self._directory = directory
        self._tasks = tuple(tasks)
        self._layouts = dict(layouts or {})
        self._graphs: dict[str, tuple[ir.Model, list[tuple[ir.Value, ByteRange]]]] = {}
        self._journal = WeightJournal(journal)
        self._weights = WeightStore(directory, self._journal)
        self.separate_stacks: list[str] = []

    def __enter__(self) -> BundleWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._weights.__exit__(kind, error, traceback)

    def add_graph(self, task: str, model: ir.Model) -> None:
        """Write the weights of one task's graph and free them; the model is changed.

        Tensors with metadata `edgemoe.expert_axis` 0 have the experts of the layer
        `edgemoe.layer` as first axis, in the order of that layer's layout.

        Args:
            task: One of the tasks.
            model: Its graph; each weight is computed once, written and freed.

        Raises:
            OutputError: The disk has no room for the weights.
            ExportError: A stack of experts does not fit its layer's layout.
        """
        if task not in self._tasks or task in self._graphs:
            raise ExportError(f"task must be one of {self._tasks}, each once, got {task!r}.")
        _strip_origins(model)
        known = [
            value
            for graph in model.graphs()
            for value in graph.initializers.values()
            if value.const_value is not None
        ]
        values = [value for value in known if _is_large(_tensor(value))]
        for value in known:
            if isinstance(value.const_value, ir.LazyTensor) and not _is_large(_tensor(value)):
                # What stays inline is read before the source of the weights is closed.
                value.const_value = ir.tensor(_tensor(value).numpy(), name=value.name)
        ranges = []
        stored: dict[str, ByteRange] = {}
        for value in track(values, f"write the weights of {task}"):
            tensor = _tensor(value)
            byte_range = stored.get(tensor.metadata_props.get(SAME_BYTES, ""))
            if byte_range is None:
                byte_range = self._store(task, value, tensor)
            stored[str(value.name)] = byte_range
            ranges.append((value, byte_range))
            _point(value, tensor, "weights.spool", 0, byte_range.length)
        self._weights.sync()
        self._graphs[task] = (model, ranges)

    def finish(self) -> SizeReport:
        """Write the weight files and the graphs.

        Returns:
            Bytes of the weights that tasks share and of each task's own files; the total is
            that of all files in the directory, so copy the model's files first.

        Raises:
            ExportError: A task's graph was not added.
        """
        missing = [task for task in self._tasks if task not in self._graphs]
        if missing:
            raise ExportError(f"every task must have a graph, got none for {missing}.")
        files = self._weights.finish()
        for task, (model, ranges) in self._graphs.items():
            self._write_graph(task, model, ranges, files)
        own = {
            task: files.sizes.get(f"{task}.onnx.data", 0)
            + (self._directory / f"{task}.onnx").stat().st_size
            for task in self._tasks
        }
        return SizeReport(
            total_bytes=sum(
                path.stat().st_size for path in self._directory.rglob("*") if path.is_file()
            ),
            shared_bytes=files.sizes.get(SHARED_WEIGHTS_FILE, 0),
            task_bytes=own,
        )

    def _store(self, task: str, value: ir.Value, tensor: ir.TensorProtocol) -> ByteRange:
        name = str(value.name)
        contents = self._journal.recall(task, name)
        data = None if contents is not None else _bytes_of(tensor)
        length = tensor.nbytes
        layer = stacked_layer({**tensor.metadata_props, **value.metadata_props})
        layout = None if layer is None else self._layouts.get(layer)
        is_stack, parts = False, 1
        if layout is not None:
            count = layout.windows[task].count
            if tensor.shape[0] != count or length % count:
                raise ExportError(
                    f"{name} must have the {count} experts of task {task} in layer {layer} "
                    f"as whole bytes on its first axis, got shape {list(tensor.shape)} of "
                    f"{tensor.dtype}. This is a defect of the lowering: please report it."
                )
            # A window into the stack must begin at an address that engines take.
            is_stack = length // count % ALIGNMENT_BYTES == 0
            parts = count if is_stack else 1
        if contents is None:
            assert data is not None
            contents = Contents.of(data, parts)
        if layout is None or not is_stack:
            return self._weights.put(task, name, contents, data)
        byte_range, stacked = self._weights.put_stack(task, name, contents, data, layout)
        if not stacked:
            self.separate_stacks.append(f"{task}: {name}")
        return byte_range

    def _write_graph(
        self,
        task: str,
        model: ir.Model,
        ranges: Sequence[tuple[ir.Value, ByteRange]],
        files: FileLayout,
    ) -> None:
        for value, byte_range in ranges:
            file_range = files.find(byte_range)
            _point(value, _tensor(value), file_range.file, file_range.offset, file_range.length)
        proto = ir.to_proto(model)
        (self._directory / f"{task}.onnx").write_bytes(
            proto.SerializeToString(deterministic=True)
        )


def copy_model_files(source: Path | Checkpoint, directory: Path) -> None:
    """Copy configuration, tokenizer and chat template of a checkpoint into a bundle.

    Args:
        source: The checkpoint.
        directory: The bundle.

    Raises:
        ExportError: The checkpoint has no config.json or no tokenizer.json.
    """
    checkpoint = Checkpoint.open(source)
    for name in _MODEL_FILES:
        path = checkpoint.path / name
        if name == "config.json" and (content := checkpoint.read(name)) is not None:
            if b'"text_config"' in content and checkpoint.wrapper is not None:
                # A graph is the language model alone, so its settings are.
                own = checkpoint.config.to_json_string(use_diff=False)
                content = own.encode("utf-8")
            write_config(content, directory / name)
        elif checkpoint.gguf is not None and (content := checkpoint.read(name)) is not None:
            (directory / name).write_bytes(content)
        elif path.is_file():
            shutil.copyfile(path, directory / name)
        elif name in {"config.json", "tokenizer.json"}:
            raise ExportError(
                f"a checkpoint must have {name} to be exported, got none in {checkpoint.path}. "
                "Save the model with its (fast) tokenizer: tokenizer.save_pretrained(...)."
            )


def list_files(directory: Path) -> dict[str, FileEntry]:
    """Hash every file of a bundle but the manifest.

    Args:
        directory: The bundle.

    Returns:
        Digest and size by POSIX path relative to `directory`, sorted.
    """
    entries = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if path.is_file() and name != MANIFEST_FILE:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_HASH_BYTES):
                    digest.update(chunk)
            entries[name] = FileEntry(sha256=digest.hexdigest(), size=path.stat().st_size)
    return entries


def tensor_specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Describe graph inputs or outputs for the manifest.

    Args:
        values: Inputs or outputs of a graph, with type and shape.

    Returns:
        One description each; dynamic dimensions by name.

    Raises:
        ExportError: One has no type or shape.
    """
    specs = []
    for value in values:
        if value.dtype is None or value.shape is None:
            raise ExportError(
                f"a graph's inputs and outputs must have type and shape, got {value} without. "
                "This is a defect of the lowering: please report it."
            )
        shape = tuple(
            dim if isinstance(dim, int) else str(dim.value or f"{value.name}_{axis}")
            for axis, dim in enumerate(value.shape)
        )
        dtype = np.dtype(value.dtype.numpy()).name
        specs.append(
            TensorSpec(
                name=str(value.name),
                dtype=dtype,
                shape=shape,
                sets_shapes=SETS_SHAPES in value.metadata_props,
            )
        )
    return tuple(specs)


def set_default_input(model: ir.Model, name: str, values: Sequence[int]) -> None:
    """Make an int64 vector input optional, for callers that do not know it.

    Args:
        model: A graph for onnxruntime; other parsers take such an input for a constant.
        name: The input, int64 `[len(values)]`.
        values: Its value where it is left out.

    Raises:
        ExportError: The graph has no such input.
    """
    found = [value for value in model.graph.inputs if value.name == name]
    if not found:
        raise ExportError(f"a graph must have the input {name}, got none of that name.")
    found[0].const_value = ir.tensor(np.array(values, np.int64), name=name)
    model.graph.initializers[name] = found[0]


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    if tensor is None:
        raise ExportError(f"initializer {value.name} must have a value, got none.")
    return tensor


def _bytes_of(tensor: ir.TensorProtocol) -> memoryview:
    """View a tensor's content as stored, uint8 [length], without a copy where possible."""
    array = tensor.numpy()
    if tensor.dtype.bitwidth < 8 or array.dtype.byteorder == ">" or sys.byteorder != "little":
        return memoryview(tensor.tobytes())
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _is_large(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _INLINE_BYTES


def _point(
    value: ir.Value, tensor: ir.TensorProtocol, file: str, offset: int, length: int
) -> None:
    value.const_value = ir.ExternalTensor(
        file,
        offset,
        length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=str(value.name),
    )


def _strip_origins(model: ir.Model) -> None:
    """Drop the tracer's notes on source files, which differ from machine to machine."""
    model.doc_string = None
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        values = [*graph.inputs, *graph.initializers.values()]
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            values.extend(node.outputs)
        for value in values:
            value.doc_string = None
            for key in [key for key in value.metadata_props if not key.startswith(KEY_PREFIX)]:
                del value.metadata_props[key]
