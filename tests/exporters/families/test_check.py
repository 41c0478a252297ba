from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from edgemoe.models.routing.identification import identify_router
from edgemoe_exporters.families.check import STEPS, check_family
from edgemoe_exporters.families.table import render_table

if TYPE_CHECKING:
    from edgemoe.models.routing.identification import RouterSpec

GRAPHS = ["ort", "tensorrt"]


@pytest.mark.slow
@pytest.mark.fused
def test_a_family_is_tried_from_checkpoint_to_graphs() -> None:
    report = check_family("deepseek_v2", engine=False)

    assert not report.failed
    assert [report.results[step] for step in list(STEPS)[:4]] == ["yes"] * 4
    assert all(0 < float(report.results[step]) < 1e-4 for step in GRAPHS)
    assert report.results["streamed"] == "yes"
    table = render_table([report])
    assert "| `deepseek_v2` |  | yes | yes | yes | yes | " in table
    assert "Of 1 families: 1 calibrated" in table


def test_a_family_without_graphs_says_so_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_nothing(*asked: Any) -> RouterSpec:
        return replace(identify_router(*asked), rule=None, tensors=None)

    monkeypatch.setattr("edgemoe.models.discovery.identify_router", find_nothing)

    report = check_family("olmoe", graphs=True, engine=False)

    assert not report.failed
    assert list(report.results) == list(STEPS)[:5]
    table = render_table([report])
    assert "| `olmoe` |  | yes | yes | yes | yes | no [1] |" in table
    assert "[1] the router of olmoe must be of a kind that graphs know" in table


def test_what_fails_is_told_and_does_not_end_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemoe_exporters.families.check.save_model", lambda *_, **__: None)

    report = check_family("mixtral", graphs=False)

    assert report.failed == ["uniform"]
    assert report.results["uniform"].startswith("no: ")
