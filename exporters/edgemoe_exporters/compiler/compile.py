"""Compile the graphs of a bundle to TensorRT engines, into the bundle's cache."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.errors import CompileError
from edgemoe.progress import reporting_to, track
from edgemoe_exporters.compiler.api import TensorrtApi, load_api
from edgemoe_exporters.compiler.builder import BuilderFlags, build_engine
from edgemoe_exporters.compiler.cache import engine_path, look_up, script_path, store
from edgemoe_exporters.compiler.commands import build_command, build_script
from edgemoe_exporters.compiler.profiles import choose_limits, make_profile
from edgemoe_exporters.compiler.targets import Machine, choose_capabilities, find_target
from edgemoe_runtime.bundle.engine_cache import EngineKey, graph_fingerprint
from edgemoe_runtime.bundle.integrity import verify_bundle
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from edgemoe.progress import OnProgress
    from edgemoe_exporters.compiler.profiles import Profile
    from edgemoe_exporters.compiler.targets import CompileTarget
    from edgemoe_runtime.bundle.manifest import Manifest

_TURING = 75


@dataclass(frozen=True, kw_only=True)
class CompiledEngine:
    """One engine in the bundle's cache.

    Attributes:
        task: Task of the bundle.
        compute_capability: GPU it is for: 86 is SM 8.6.
        path: The engine; its key is beside it with the suffix .json.
        script: A shell script that builds it by hand.
        command: The command in that script.
        size_bytes: Size of the engine.
        seconds: How long building it took now; 0 where it was cached.
        cached: Whether it was there already.
        reason: Why it was built; empty where it was cached.
    """

    task: str
    compute_capability: int
    path: Path
    script: Path
    command: str
    size_bytes: int
    seconds: float
    cached: bool
    reason: str


def compile_bundle(
    bundle: str | os.PathLike[str],
    target: str,
    *,
    task: str | None = None,
    compute_capabilities: Sequence[int] | None = None,
    max_batch: int | None = None,
    max_sequence: int | None = None,
    max_length: int | None = None,
    force: bool = False,
    machine: Machine | None = None,
    on_progress: OnProgress | None = None,
) -> list[CompiledEngine]:
    """Build the engines of a bundle that its cache does not hold yet.

    Args:
        bundle: Directory that `edgemoe export` wrote with a TensorRT target.
        target: `tensorrt-rtx`, `tensorrt`, `jetson-orin` or `jetson-thor`.
        task: Task to compile; all where None.
        compute_capabilities: GPUs to build for, such as 86 for SM 8.6; all of the target where
            None.
        max_batch: Largest batch in rows; by default 1, which is what the runtime uses.
        max_sequence: Most new tokens in one call; by default 256.
        max_length: Most tokens of a row, past and new; by default the model's, at most 2048.
        force: Whether to build even what the cache holds.
        machine: The machine that compiles; this one where None.
        on_progress: Called with an `edgemoe.progress.ProgressEvent` after each engine; None
            draws a bar where stderr is a terminal.

    Returns:
        One entry per task and compute capability.

    Raises:
        CompileError: The target cannot be built here, or TensorRT refuses.
        MissingDependencyError: The TensorRT package is not installed.
        BundleError: The bundle is damaged or unsafe.
        OutputError: The engine cannot be written.
    """
    bundle = Path(bundle)
    wanted = find_target(target)
    manifest = load_manifest(bundle)
    tasks = sorted(manifest.tasks) if task is None else [manifest.task(task)[0]]
    if manifest.flavour != "tensorrt":
        raise CompileError(
            "a bundle to compile must have TensorRT's operators, got flavour "
            f"{manifest.flavour} (target {manifest.target}). Export the model again with "
            f"--target {target}."
        )
    if manifest.target != target:
        raise CompileError(
            f"engines must be for the target of the bundle, which is {manifest.target}, got "
            f"{target}: its shapes and precisions were chosen for the other. Give --target "
            f"{manifest.target}, or export the model again with --target {target}."
        )
    _refuse_windows(manifest, wanted)
    limits = choose_limits(
        manifest,
        max_batch=max_batch,
        max_sequence=max_sequence,
        max_length=max_length,
    )
    profile = make_profile(manifest, limits)
    machine = Machine.detect() if machine is None else machine
    if wanted.on_jetson and machine.jetson_target != wanted.name:
        raise CompileError(_on_the_device(bundle, manifest, wanted, tasks, profile))
    asked = None if compute_capabilities is None else tuple(compute_capabilities)
    capabilities = choose_capabilities(wanted, asked, machine)
    if asked is None and manifest.precision == "fp32" and len(capabilities) > 1:
        # TensorRT for RTX has no float32 products for Turing.
        capabilities = tuple(number for number in capabilities if number != _TURING)
    api = load_api(wanted.package)
    # The parser opens whatever file a graph names, so nothing unverified may reach it.
    verify_bundle(bundle, tasks=tasks)
    jobs = [(name, capability) for name in tasks for capability in capabilities]
    with reporting_to(on_progress):
        return [
            _compile(api, bundle, manifest, name, capability, profile, force=force)
            for name, capability in track(jobs, "Building engines")
        ]


def _refuse_windows(manifest: Manifest, target: CompileTarget) -> None:
    """Refuse what the builder of TensorRT for RTX 1.7 does not end with, nor run out of."""
    windows = [s.name for s in manifest.kv_cache.states if s.name.endswith(_WINDOWS)]
    if windows and target.package == "tensorrt_rtx":
        raise CompileError(
            "graphs for TensorRT for RTX must not compress windows of positions, got "
            f"{windows[0]}: its builder (1.7) takes all memory and does not end. Export the "
            "model again with --target cuda or cpu."
        )


_WINDOWS = ".compressor"


def _compile(
    api: TensorrtApi,
    bundle: Path,
    manifest: Manifest,
    task: str,
    compute_capability: int,
    profile: Profile,
    *,
    force: bool,
) -> CompiledEngine:
    flags = BuilderFlags()
    graph = manifest.tasks[task].graph
    wanted = EngineKey(
        task=task,
        graph_sha256=graph_fingerprint(manifest, task),
        precision=manifest.precision,
        package=api.package,
        package_version=api.version,
        compute_capability=compute_capability,
        shapes=profile,
        flags=flags.to_json(),
        engine_sha256="",
        engine_size=0,
    )
    engine = engine_path(bundle, wanted)
    command = build_command(
        api.package, api.version, graph, engine.name, compute_capability, profile, flags
    )
    wanted = replace(wanted, command=command)
    found = "it was asked for" if force else look_up(engine, wanted)
    cached = isinstance(found, EngineKey)
    seconds = 0.0
    if isinstance(found, EngineKey):
        key, reason = found, ""
    else:
        reason = found
        started = time.perf_counter()
        content = build_engine(api, bundle / graph, compute_capability, profile, flags)
        seconds = time.perf_counter() - started
        key = store(engine, content, wanted, build_script(engine.name, command))
    return CompiledEngine(
        task=task,
        compute_capability=compute_capability,
        path=engine,
        script=script_path(engine),
        command=command,
        size_bytes=key.engine_size,
        seconds=seconds,
        cached=cached,
        reason=reason,
    )


def _on_the_device(
    bundle: Path,
    manifest: Manifest,
    target: CompileTarget,
    tasks: list[str],
    profile: Profile,
) -> str:
    """Return what to run on a Jetson, where its engines have to be built."""
    name = bundle.resolve().name
    lines = [
        f"target {target.name} must be compiled on {target.place} itself, for TensorRT "
        f"builds for the GPU that it runs on; this machine is none. Copy {name} there and run:",
        *(f"    edgemoe compile {name} --target {target.name} --task {task}" for task in tasks),
        "JetPack's own tool builds the same engine (edgemoe loads only those that `edgemoe "
        "compile` wrote); in the bundle run:",
    ]
    for task in tasks:
        command = build_command(
            target.package,
            None,
            manifest.tasks[task].graph,
            f"{task}__{manifest.precision}__sm{target.capabilities[0]}.engine",
            target.capabilities[0],
            profile,
            BuilderFlags(),
        )
        lines.append(f"    mkdir -p engines && {command}")
    return "\n".join(lines)
