"""What a trust report tells, and that a job of hours can be stopped at any time."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Answer, Home

from hwnas import trust as trust_module
from hwnas.errors import HwnasError
from hwnas.ranking import rank_correlation
from hwnas.trust import Judged, TrustReport
from hwnas.trust_report import trust_facts, trust_picture, trust_rows, trust_words

Command = Callable[..., Answer]
STAGES = {"stages": [{"width": 16, "units": [{}]}, {"width": 32, "units": [{}, {}]}]}
INHERITED = [0.20, 0.30, 0.25, 0.40, 0.50, 0.45]
MACS = [10, 30, 20, 60, 40, 50]
FROM_SCRATCH = [(0.60, 0.65), (0.66, 0.64), (0.68, 0.66), (0.70, 0.74), (0.80, 0.78), (0.81, 0.75)]


@pytest.fixture
def report() -> TrustReport:
    rows = zip(INHERITED, FROM_SCRATCH, strict=True)
    judged = tuple(
        Judged(STAGES, 1.0 + n, macs, inherited, scores)
        for n, (macs, (inherited, scores)) in enumerate(zip(MACS, rows, strict=True))
    )
    return TrustReport(
        "supernet-x", "space", "data", "cpu", "chip", "20 epochs", 400, judged, 2.5, 40,
        {"evolution": replace(judged[5], inherited=0.46), "random": judged[3]},
    )  # fmt: skip


def test_a_report_ranks_gaps_and_compares_by_the_mean_over_seeds(report: TrustReport):
    means = [sum(scores) / 2 for scores in FROM_SCRATCH]
    facts = trust_facts(report)
    assert facts["kendall_tau"]["tau"] == rank_correlation(INHERITED, means).tau == pytest.approx(13 / 15)
    assert facts["kendall_tau_top_third"]["count"] == 2
    assert facts["kendall_tau_top_third"]["tau"] == 1  # 50 and 45 % inherited, 79 and 78 % from scratch
    assert facts["kendall_tau_between_seeds"]["tau"] == pytest.approx(11 / 15)
    assert facts["kendall_tau_of_latency_alone"]["tau"] == pytest.approx(13 / 15)
    assert facts["kendall_tau_of_macs_alone"]["tau"] == rank_correlation(MACS, means).tau == pytest.approx(7 / 15)
    assert facts["gaps"] == pytest.approx([mean - low for mean, low in zip(means, INHERITED, strict=True)])
    assert facts["search_over_random"] == pytest.approx(0.78 - 0.72)
    assert facts["accuracy_standard_error"] == pytest.approx((0.70583 * 0.29417 / 400) ** 0.5, rel=1e-3)
    slowest_first = replace(report, judged=tuple(replace(one, latency_ms=-one.latency_ms) for one in report.judged))
    assert slowest_first.latency_correlation.tau == pytest.approx(-13 / 15)
    rows, words = trust_rows(report), " ".join(trust_words(report))
    assert rows[1] == ("1×16, 2×32", "1.00 ms", "20.0 %", "60.0 % 65.0 %", "+42.5")
    assert [row[0] for row in rows[-2:]] == ["best of evolution", "best of random"]
    for part in (
        "alone: 0.87 (95 %",
        "alone: 0.47 (95 %",
        "scratch: 0.87 (95 % interval",
        "+29.0 to +42.5",
        "400 validation images",
        "78.0 %",
        "72.0 %",
        "+6.0 points",
    ):
        assert part in words


def test_without_a_second_seed_nothing_is_said_of_seeds(report: TrustReport):
    once = replace(report, judged=tuple(replace(one, from_scratch=one.from_scratch[:1]) for one in report.judged))
    assert once.ceiling is None
    assert "seed alone" not in " ".join(trust_words(once))


def test_the_picture_holds_every_architecture_and_both_winners(report: TrustReport):
    root = ElementTree.fromstring(trust_picture(report))
    notes = [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}title")]
    for scores, inherited in zip(FROM_SCRATCH, INHERITED, strict=True):
        assert any(f"inherited {inherited:.1%}"[:-1] in n and f"{sum(scores) / 2:.1%}"[:-1] in n for n in notes)
    assert any("inherited 46.0" in note for note in notes)


def test_a_trust_report_goes_on_where_it_was_stopped_and_trains_nothing_twice(
    hwnas: Command, found: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    really, trained = trust_module.retrained, []

    def stopped_at_the_third(*arguments: Any) -> Any:
        if len(trained) == 2:
            raise HwnasError("the power went")
        trained.append(arguments[1].name)
        return really(*arguments)

    def counted(*arguments: Any) -> Any:
        trained.append(arguments[1].name)
        return really(*arguments)

    command = ("trust", found["run"], "--architectures", 4, "--epochs", 1, "--trials", 2)
    monkeypatch.setattr(trust_module, "retrained", stopped_at_the_third)
    assert hwnas(*command).status == 2
    monkeypatch.setattr(trust_module, "retrained", counted)
    first = json.loads(hwnas(*command, "--json").out)
    judged = [*first["judged"], *first["winners"].values()]
    different = {json.dumps(one["architecture"]) for one in judged}
    assert len(trained) == len(set(trained)) == len(different)
    again = hwnas(*command)
    assert len(trained) == len(different)
    assert f"{first['kendall_tau']['tau']:.2f} (95 % interval" in again.out
    folder = found["run"].parent.parent / first["report"]
    assert json.loads((folder / "trust.json").read_text())["judged"] == first["judged"]
    assert (folder / "trust.svg").is_file()
    assert not list(folder.glob("checkpoints/*"))
    scored = {json.dumps(one["architecture"]): one["accuracy"] for one in found["scored"]}
    shared = [one for one in judged if json.dumps(one["architecture"]) in scored]
    assert shared
    assert all(one["inherited"] == scored[json.dumps(one["architecture"])] for one in shared)
    assert [one["latency_ms"] for one in first["judged"]] == sorted(one["latency_ms"] for one in first["judged"])


def supernet_of(found: dict[str, Any]) -> Path:
    (folder,) = found["run"].parent.glob("supernet-*")
    return folder


def test_without_a_latency_table_the_command_that_measures_it_is_told(
    hwnas: Command, found: dict[str, Any], home: Home, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("HWNAS_TABLES", str(tmp_path))
    told = hwnas("trust", supernet_of(found))
    assert told.status == 2
    assert f"hwnas profile --device cpu --space {home.space}" in told.err
    told = hwnas("trust", supernet_of(found), "--table", tmp_path / "none.json")
    assert told.status == 2
    assert "none.json" in told.err


def test_what_cannot_be_judged_is_told_in_one_sentence(hwnas: Command, found: dict[str, Any], tmp_path: Path):
    assert "is not the folder of a run" in hwnas("trust", tmp_path).err
    assert "at least 4 architectures" in hwnas("trust", found["run"], "--architectures", 3).err
    (tmp_path / "supernet.json").write_text("{}")
    assert "Run hwnas train again" in hwnas("trust", tmp_path).err
