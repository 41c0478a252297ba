"""The statistics file: round trip, merging, refusals."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from edgemoe.calibrate.sample import TokenSample, Window
from edgemoe.calibrate.statistics import Statistics, merge
from edgemoe.calibrate.sums import LayerSums
from edgemoe.calibrate.task_statistics import Source, TaskStatistics
from edgemoe.errors import OutputError, StatisticsError
from edgemoe.models.shapes import LayerShape, ModelShape

SHAPE = ModelShape(
    family="glm4_moe",
    layers=(
        LayerShape(layer=1, num_experts=4, top_k=2),
        LayerShape(layer=2, num_experts=6, top_k=2),
    ),
    hidden_size=8,
    intermediate_size=4,
)


def make_sample(line: int = 1) -> TokenSample:
    lengths = (5, 2, 2)
    return TokenSample.of(
        [
            Window(line=line, start=5 * executor, ids=[line, *range(length - 1)], digest=-line)
            for executor, length in enumerate(lengths)
        ]
    )


def make_statistics(seed: int, *tasks: str, checkpoint: str = "c") -> Statistics:
    random = np.random.Generator(np.random.PCG64(seed))

    def sums(experts: int) -> LayerSums:
        indices = np.argsort(-random.random((9, experts)), axis=1)[:, :2]
        logits = random.normal(size=(9, experts))
        return LayerSums.of_tokens(
            logits, random.random((9, 2)), indices, random.random((9, 2))
        )

    return Statistics(
        checkpoint_sha256=checkpoint,
        shape=SHAPE,
        tasks={
            task: TaskStatistics(
                sources=(
                    Source(
                        sha256=f"{task}{seed}",
                        lines=3,
                        tokens=9,
                        sequence_length=5,
                        sample=make_sample(seed + 1),
                    ),
                ),
                layers={layer.layer: sums(layer.num_experts) for layer in SHAPE.layers},
            )
            for task in tasks
        },
    )


def assert_equal(left: Statistics, right: Statistics) -> None:
    assert left._to_bytes() == right._to_bytes()


def test_round_trip_is_exact_and_the_hash_is_the_files(tmp_path: Path) -> None:
    statistics = make_statistics(0, "b", "a")
    path = tmp_path / "deep" / "stats.safetensors"
    statistics.save(path)
    loaded = Statistics.load(path)
    assert_equal(loaded, statistics)
    assert loaded.shape == SHAPE
    assert loaded.task("a").sources == statistics.task("a").sources
    assert loaded.task("a").windows == make_sample().windows
    assert hashlib.sha256(path.read_bytes()).hexdigest() == statistics.sha256 == loaded.sha256
    with pytest.raises(OutputError, match="--force"):
        statistics.save(path)
    statistics.save(path, force=True)


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_merging_commutes_and_associates_exactly(a: int, b: int, c: int) -> None:
    # Each of another file: the same lines would be counted twice.
    first = make_statistics(3 * a, "x", "y")
    second, third = make_statistics(3 * b + 1, "y"), make_statistics(3 * c + 2, "y", "z")
    assert_equal(merge(first, second), merge(second, first))
    left = merge(first, second, third)
    assert set(left.tasks) == {"x", "y", "z"}
    assert left.task("y").tokens == 27
    assert_equal(left, merge(first, merge(second, third)))
    assert_equal(left, merge(third, first, second))
    assert_equal(merge(first), first)


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_lines_are_counted_once(n: int, m: int, data: st.DataObject) -> None:
    i, j = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, m - 1))
    base = make_statistics(0, "a")

    def shard(index: int, of: int) -> Statistics:
        task = base.task("a")
        source = replace(task.sources[0], shard=(index, of))
        return replace(base, tasks={"a": replace(task, sources=(source,))})

    common = set(range(i, n * m, n)) & set(range(j, n * m, m))
    if common:
        with pytest.raises(StatisticsError, match="counted once"):
            merge(shard(i, n), shard(j, m))
    else:
        whole = n == m == 2
        assert len(merge(shard(i, n), shard(j, m)).task("a").sources) == (1 if whole else 2)


@given(st.integers(1, 7), st.booleans(), st.data())
def test_all_shards_make_one_pass_and_some_stay_visible(
    of: int, capped: bool, data: st.DataObject
) -> None:
    source = Source(sha256="file", lines=2, tokens=9, sequence_length=5, sample=make_sample())
    limits = [100 if capped and index == 0 else None for index in range(of)]
    shards = [
        replace(
            statistics,
            tasks={
                "a": replace(
                    statistics.task("a"),
                    sources=(
                        replace(
                            source,
                            shard=(index, of),
                            max_tokens=limits[index],
                            sample=make_sample(index + 1),
                        ),
                    ),
                )
            },
        )
        for index, statistics in enumerate(make_statistics(i, "a") for i in range(of))
    ]
    order = data.draw(st.permutations(shards))
    middle = data.draw(st.integers(1, of))
    merged = merge(merge(*order[:middle]), *order[middle:])
    assert_equal(merged, merge(*shards))
    if len(set(limits)) == 1:
        assert merged.task("a").sources == (
            replace(source, lines=2 * of, tokens=9 * of, max_tokens=limits[0]),
        )
        read = [(w.line, w.start, w.ids[0], w.digest) for w in merged.task("a").windows]
        assert read == [(i, s, i, -i) for i in range(1, of + 1) for s in (0, 5, 10)]
    else:
        assert len(merged.task("a").sources) == of
    with pytest.raises(StatisticsError, match="counted once"):
        merge(merged, shards[0])
    if of > 1:
        assert {s.shard[0] for s in merge(*order[1:]).task("a").sources} == {
            s.task("a").sources[0].shard[0] for s in order[1:]
        }


def test_statistics_of_other_checkpoints_do_not_add_up() -> None:
    with pytest.raises(StatisticsError, match="one checkpoint"):
        merge(make_statistics(0, "a"), make_statistics(0, "a", checkpoint="d"))
    smaller = replace(make_statistics(0, "a"), shape=replace(SHAPE, layers=SHAPE.layers[:1]))
    with pytest.raises(StatisticsError, match="one checkpoint"):
        merge(make_statistics(0, "a"), smaller)
    with pytest.raises(StatisticsError, match=r"one of \['a'\]"):
        make_statistics(0, "a").task("b")


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    with pytest.raises(StatisticsError, match="does not exist"):
        Statistics.load(path)
    with pytest.raises(StatisticsError, match="got a directory"):
        Statistics.load(tmp_path)
    for content in (b"", b"{}", b"x" * 100, make_statistics(0, "a")._to_bytes()[:-8]):
        path.write_bytes(content)
        with pytest.raises(StatisticsError, match="must be a file that `edgemoe calibrate`"):
            Statistics.load(path)
    save_file({"a": np.zeros(2)}, path)
    with pytest.raises(StatisticsError, match="must be a file that `edgemoe calibrate`"):
        Statistics.load(path)
    save_file({"a": np.zeros(2)}, path, metadata={"edgemoe": "[]"})
    with pytest.raises(StatisticsError, match="got a safetensors file of weights"):
        Statistics.load(path)


def test_missing_malformed_and_infinite_sums_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats"
    statistics = make_statistics(0, "a")
    statistics.save(path)
    from safetensors import safe_open
    from safetensors.numpy import load_file

    tensors = load_file(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()

    def refuse(match: str, header: str | None = None, **changes: np.ndarray | None) -> None:
        changed = {**tensors, **{k.replace("_", "/", 2): v for k, v in changes.items()}}
        save_file(
            {name: value for name, value in changed.items() if value is not None},
            path,
            metadata={"edgemoe": header or metadata["edgemoe"]},
        )
        with pytest.raises(StatisticsError, match=match):
            Statistics.load(path)

    refuse(r"a/1/count must be float64\[4\], got none", a_1_count=None)
    refuse(r"got float64\[5\]", a_1_count=np.zeros(5))
    refuse(r"got float32\[4\]", a_1_count=np.zeros(4, np.float32))
    refuse("a/2/logit_gram must be finite", a_2_logit_gram=np.full((6, 6), np.nan))
    header = json.loads(metadata["edgemoe"])
    refuse(r"a/2/norm_remainder must be int64\[6\], got none", a_2_norm_remainder=None)
    refuse("version 1", json.dumps({**header, "version": 1}))
    refuse("malformed", json.dumps({**header, "tasks": {"a": [{"lines": 1}]}}))
    refuse("malformed", json.dumps({**header, "shape": {}}))


def test_without_tokens_the_sums_stay_and_the_text_goes(tmp_path: Path) -> None:
    statistics = make_statistics(0, "a", "b")
    bare = statistics.without_tokens()
    bare.save(tmp_path / "bare")
    loaded = Statistics.load(tmp_path / "bare")
    assert_equal(loaded, bare)
    assert statistics.has_tokens
    assert not loaded.has_tokens
    # Whether a line was read can still be told.
    assert loaded.task("a").digests == statistics.task("a").digests
    assert loaded.task("a").tokens == 9
    tensors = load_file(tmp_path / "bare")
    assert all(value.size == 0 for name, value in tensors.items() if name.endswith("/ids"))
    for layer, sums in loaded.task("a").layers.items():
        of_all = statistics.task("a").layers[layer].to_arrays()
        assert all(np.array_equal(value, of_all[n]) for n, value in sums.to_arrays().items())
    with pytest.raises(StatisticsError, match=r"without --no-texts, or choose a method"):
        _ = loaded.task("a").windows


def test_merged_halves_have_text_only_where_both_have(tmp_path: Path) -> None:
    def half(index: int) -> Statistics:
        whole = make_statistics(5, "a")
        (source,) = whole.task("a").sources
        part = replace(source, shard=(index, 2), sample=make_sample(index + 1))
        return replace(whole, tasks={"a": replace(whole.task("a"), sources=(part,))})

    both = merge(half(0), half(1))
    assert both.has_tokens
    one = merge(half(0), half(1).without_tokens())
    assert_equal(one, merge(half(1).without_tokens(), half(0)))
    assert not one.has_tokens
    assert_equal(one, both.without_tokens())


def test_what_can_hold_text_is_for_its_owner_alone(tmp_path: Path) -> None:
    for statistics in (make_statistics(0, "a"), make_statistics(0, "a").without_tokens()):
        statistics.save(tmp_path / "stats", force=True)
        assert (tmp_path / "stats").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda h: h["shape"]["layers"][0].update(top_k=[2]), r"top_k must be an integer"),
        (lambda h: h["shape"]["layers"][0].update(top_k=5), r"at most the 4 experts"),
        (lambda h: h["shape"]["layers"][0].update(n_group=-0.0), r"n_group must be an integer"),
        (lambda h: h["shape"]["layers"][1].update(layer=1), r"each decoder layer once"),
        (lambda h: h["shape"].pop("family"), r"must have the keys \['family'\]"),
        (lambda h: h["tasks"]["a"][0].update(tokens=[-1]), r"tokens must be an integer >= 0"),
        (lambda h: h["tasks"]["a"][0].update(shard=[1]), r"shard must be an index"),
        (lambda h: h["tasks"]["a"][0].update(shard=[2, 2]), r"shard must be an index"),
        (lambda h: h["tasks"]["a"][0].update(more=1), r"must have no keys but"),
        (lambda h: h.update(checkpoint_sha256=7), r"checkpoint_sha256 must be a non-empty"),
    ],
)
def test_each_value_of_the_header_is_checked(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], told: str
) -> None:
    path = tmp_path / "stats"
    make_statistics(0, "a").save(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["edgemoe"])
    change(header)
    save_file(load_file(path), path, metadata={"edgemoe": json.dumps(header)})
    with pytest.raises(StatisticsError, match=f"{told}.*Calibrate again"):
        Statistics.load(path)
