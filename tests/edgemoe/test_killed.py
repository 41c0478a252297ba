"""Commands that are killed while they write: the next run is as if there had been none.

`apply`, `calibrate`, `recover` and `export` keep unfinished work, and have such tests in their
folders.
"""

from __future__ import annotations

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

from edgemoe.cli import main
from edgemoe.models.tiny import write_tiny_checkpoint

KILLED_RUNS = Path(__file__).parent / "killed_runs.py"
# More of them: EDGEMOE_KILLS=20 python -m pytest tests/edgemoe/test_killed.py
KILLS = int(os.environ.get("EDGEMOE_KILLS", "4"))

pytestmark = pytest.mark.slow

COMMANDS = {
    # The command, and operations on files that it takes at most.
    "prune": ("prune {moe} --stats {one} --task t --method reap --keep 0.5", 14),
    "decompose": ("decompose {moe} --stats {one} --task t --method svd --param-ratio 0.6", 14),
    "merge-stats": ("merge-stats {one} {two}", 14),
    "allocate": ("allocate {moe} --task t={lines} --policy top-p --mean-k 1.5", 14),
    "carve": ("carve {dense} --experts 4 --top-k 2 --data {text} --max-tokens 512", 60),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    names = ("moe", "dense", "one", "two", "text")
    found = {name: folder / name for name in names}
    found["lines"] = folder / "one.jsonl"
    write_tiny_checkpoint("glm4_moe", found["moe"])
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(found["dense"])
    shutil.copy(found["moe"] / "tokenizer.json", found["dense"])
    for number, name in enumerate(("one", "two")):
        lines = [" ".join(f"w{(7 * n + k + number) % 96}" for k in range(40)) for n in range(8)]
        task = folder / f"{name}.jsonl"
        task.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        found["text"].write_text("\n".join(lines * 3))
        given = ("calibrate", found["moe"], "--task", f"t={task}", "-o", found[name])
        assert CliRunner().invoke(main, [*map(str, given)]).exit_code == 0
    return found


def kill(work: Path, most: int, arguments: list[str], folder: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, (KILLED_RUNS, 0, kills, most, work)), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "KILLED_PREFIX": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])) == kills + 1


@pytest.mark.parametrize("name", COMMANDS)
def test_kills_change_nothing_and_leave_nothing(
    files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    command, most = COMMANDS[name]
    words = command.format(**files).split()
    for kills, folder in ((KILLS, tmp_path / "killed"), (0, tmp_path / "once")):
        folder.mkdir()
        output = folder / "out"
        kill(folder / "out.partial", most, [*words, "-o", str(output)], folder, kills)
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert content(tmp_path / "killed" / "out") == content(tmp_path / "once" / "out")


def content(path: Path) -> dict[str, bytes]:
    found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def test_kills_of_a_compiler_leave_a_whole_engine(
    files: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = tmp_path / "bundle"
    given = ("export", files["moe"], "--target", "tensorrt-rtx", "-o", bundle)
    assert CliRunner().invoke(main, [*map(str, given)]).exit_code == 0
    words = ["compile", str(bundle), "--target", "tensorrt-rtx"]
    kill(tmp_path / "none.partial", 20, words, bundle / "engines", KILLS)
    again = CliRunner().invoke(main, [*words, "--json"])
    assert again.exit_code == 0, again.output
    assert all(engine["cached"] for engine in json.loads(again.stdout)["engines"])
    kept = collections.Counter(path.suffix for path in (bundle / "engines").iterdir())
    assert set(kept) == {".engine", ".json", ".sh"}
    # Nothing of an unfinished one is left.
    assert len(set(kept.values())) == 1
