"""An export of a checkpoint that is larger than memory goes on where it was ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgemoe.errors import EdgemoeError, OutputError, ParityError
from edgemoe_exporters import stages
from edgemoe_exporters.bundle.journal import Contents, WeightJournal
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest

if TYPE_CHECKING:
    from collections.abc import Callable

KILLED_RUNS = Path(__file__).parents[1] / "edgemoe" / "killed_runs.py"


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.fused
@pytest.mark.slow
def test_ten_kills_change_nothing(
    checkpoint: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    given = [f"--task={name}={path}" for name, path in tasks.items()]
    command = ["export", str(checkpoint), *given, "--keep", "0.5", "--memory-limit", "0"]
    command += ["--target", "cpu", "--precision", "int4"]
    found = []
    for kills, name in (("10", "killed"), ("0", "whole")):
        output = str(tmp_path / name)
        done = subprocess.run(
            [
                sys.executable,
                str(KILLED_RUNS),
                "1",
                kills,
                "150",
                f"{output}.partial",
                *command,
                "-o",
                output,
            ],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
        resumed = json.loads(done.stdout.splitlines()[-1])
        assert len(resumed) == int(kills) + 1
        assert sum(resumed) >= int(kills) // 2
        found.append(files_of(Path(output)))
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.slow
@pytest.mark.fused
def test_what_is_refused_leaves_nothing_and_other_unfinished_work_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request(**changes: Any) -> ExportRequest:
        given = {"precision": "fp32", "memory_limit_bytes": 0, **changes}
        return ExportRequest(
            model=checkpoint, output=tmp_path / "out" / "bundle", target="cpu", **given
        )

    def fail(error: BaseException) -> Callable[..., None]:
        def raise_it(*_: object) -> None:
            raise error

        return raise_it

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(stages, "check_parity", fail(ParityError("too far, got 9.")))
    with pytest.raises(ParityError):
        export_bundle(request())
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.setattr(stages, "check_parity", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        export_bundle(request())
    kept = files_of(tmp_path / "out")
    assert any(name.endswith("model.onnx.data") for name in kept)
    with pytest.raises(OutputError, match=r"bundle\.partial with another options"):
        export_bundle(request(precision="int4"))
    assert files_of(tmp_path / "out") == kept
    monkeypatch.undo()
    # What was written is not computed again.
    monkeypatch.setattr("edgemoe_exporters.bundle.writer._bytes_of", fail(AssertionError()))
    export_bundle(request())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bundle"]


def test_a_journal_gives_what_was_written_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    data = memoryview(np.arange(12, dtype=np.uint8).data)
    first, second = Contents.of(data), Contents.of(data, parts=3)
    assert first.key != second.key
    assert len({*second.digests}) == 3
    journal = WeightJournal(path)
    assert not journal.has_earlier
    with (tmp_path / "spool").open("wb") as spool:
        journal.note("code", "one", first, spool)
        journal.note("code", "two", second, spool)
        assert not path.exists()
        journal.sync(spool)
    with path.open("ab") as file:
        file.write(b'{"task": "code", "na')
    again = WeightJournal(path)
    assert again.recall("code", "one") == first
    with pytest.raises(EdgemoeError, match="got code: two for prose: two"):
        again.recall("prose", "two")
    assert again.recall("code", "two") == second
    assert again.recall("code", "three") is None
    assert path.read_bytes().count(b"\n") == 2
