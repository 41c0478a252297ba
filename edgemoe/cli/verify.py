"""`edgemoe verify`: is a bundle whole, unaltered and safe to open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.api.checks import check_bundle
from edgemoe.cli.options import PATH, command, report, reporting
from edgemoe.disk import human_bytes

if TYPE_CHECKING:
    from pathlib import Path


@command("edgemoe verify demo/bundle")
@click.argument("bundle", type=PATH)
@reporting
def verify(bundle: Path, as_json: bool) -> None:
    """Check that BUNDLE is whole, unaltered and safe to open.

    Compares SHA-256 digests, and graph inputs and outputs with the manifest; external data must
    lie inside the bundle. Engines are not hashed.
    """
    check_bundle(bundle)
    from edgemoe_runtime.bundle.integrity import verify_bundle
    from edgemoe_runtime.bundle.names import ENGINES_FOLDER

    verified = verify_bundle(bundle)
    engines = sorted(path.name for path in bundle.glob(f"{ENGINES_FOLDER}/*.engine"))
    unchecked = f"; engines not checked: {len(engines)}" if engines else ""
    report(
        {
            "bundle": bundle,
            "ok": True,
            "tasks": list(verified.tasks),
            "hashed_files": verified.hashed_files,
            "hashed_bytes": verified.hashed_bytes,
            "engines_not_checked": engines,
            "needs_onnxruntime": verified.manifest.needs_onnxruntime,
        },
        f"{bundle}: intact; {verified.hashed_files} files, "
        f"{human_bytes(verified.hashed_bytes)}, tasks {', '.join(verified.tasks)}{unchecked}; "
        f"needs onnxruntime {verified.manifest.needs_onnxruntime} or later",
        as_json=as_json,
    )
