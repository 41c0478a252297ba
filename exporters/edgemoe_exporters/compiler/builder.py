"""Parse one graph and build one engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import CompileError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe_exporters.compiler.api import TensorrtApi
    from edgemoe_exporters.compiler.profiles import Profile
    from edgemoe_runtime.json_fields import Json

_SHOWN_ERRORS = 3
_SHOWN_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class BuilderFlags:
    """Builder settings that change the engine; they are part of its key.

    Attributes:
        tf32: Whether float32 products may be rounded to 11 bits. Experts are chosen by
            differences smaller than that.
        optimization_level: How long the builder searches, 0 to 5.
    """

    tf32: bool = False
    optimization_level: int = 3

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "strongly_typed": True,
            "tf32": self.tf32,
            "optimization_level": self.optimization_level,
        }


def build_engine(
    api: TensorrtApi,
    graph: Path,
    compute_capability: int,
    profile: Profile,
    flags: BuilderFlags,
) -> memoryview:
    """Build an engine.

    Args:
        api: The TensorRT package.
        graph: ONNX file; it and its external data must have been verified, because the
            parser opens whatever the file names.
        compute_capability: GPU to build for.
        profile: Shapes of the dynamic inputs, values of those that shapes depend on.
        flags: Builder settings.

    Returns:
        The serialised engine.

    Raises:
        CompileError: TensorRT refuses the graph, the shapes or the build; its words are in
            the message.
    """
    log = api.make_log()
    builder = api.module.Builder(log)
    network = builder.create_network(api.network_flags())
    _parse(api, graph, network, log)
    config = builder.create_builder_config()
    api.set_capability(config, compute_capability)
    if not flags.tf32:
        config.clear_flag(api.module.BuilderFlag.TF32)
    config.builder_optimization_level = flags.optimization_level
    config.add_optimization_profile(_profile(builder, network, profile))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise CompileError(
            f"{api.package} {api.version} cannot build {graph.name} for SM"
            f"{compute_capability}: {_shown(log.errors)}.{_remedy(log.errors, network)}"
        )
    return memoryview(engine)


def _parse(api: TensorrtApi, graph: Path, network: Any, log: Any) -> None:
    parser = api.module.OnnxParser(network, log)
    if parser.parse_from_file(str(graph)):
        return
    errors = [_parser_error(parser.get_error(index)) for index in range(parser.num_errors)]
    raise CompileError(
        f"{api.package} {api.version} cannot parse {graph.name}: "
        f"{_shown(errors or log.errors)}. Export the bundle again with --target tensorrt-rtx; "
        "if that is how it was made, please report this message."
    )


def _parser_error(error: Any) -> str:
    operator, name = error.node_operator(), error.node_name()
    where = f"node {name} ({operator}): " if operator or name else ""
    return f"{where}{error.desc()}"


def _profile(builder: Any, network: Any, shapes: Profile) -> Any:
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for tensor in inputs:
        dynamic = tensor.is_shape_tensor or any(size < 0 for size in tensor.shape)
        if dynamic and tensor.name not in shapes:
            raise CompileError(
                f"every dynamic input must be one of {', '.join(shapes)}, got {tensor.name}: "
                "manifest and graph disagree. Export the bundle again."
            )
    profile = builder.create_optimization_profile()
    for tensor in inputs:
        if tensor.is_shape_tensor:
            profile.set_shape_input(tensor.name, *shapes[tensor.name])
        elif tensor.name in shapes:
            profile.set_shape(tensor.name, *shapes[tensor.name])
    return profile


def _shown(errors: Sequence[str]) -> str:
    """Return the first few errors in one line: TensorRT prints a page for each."""
    lines = [" ".join(error.split()) for error in dict.fromkeys(errors)]
    short = [
        line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}..."
        for line in lines[:_SHOWN_ERRORS]
    ]
    return "; ".join(short).rstrip(".") or "no reason given"


def _remedy(errors: Sequence[str], network: Any) -> str:
    text = " ".join(errors)
    if "FP32 GEMM is not supported" in text:
        return (
            " TensorRT-RTX has no float32 matrix products for Turing: export the bundle with "
            "--precision fp16, or leave 75 out."
        )
    if "memory" in text.lower():
        return " Lower max_batch, max_sequence or max_length, or free memory."
    if any(network.get_input(index).is_shape_tensor for index in range(network.num_inputs)):
        return " Graphs of --static-shapes are simpler: export the bundle again with it."
    return ""
