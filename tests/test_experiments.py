"""The paper's four experiments: their networks, and what is read off timings of them."""

from dataclasses import replace

import pytest

from hwnas.calibration import Measurement
from hwnas.experiments import (
    EXPERIMENTS,
    MULTIPLIERS,
    WIDTHS,
    Case,
    GuidelineTiming,
    all_cases,
    cases,
    check_complete,
    slowdowns,
    verdict,
)
from hwnas.guidelines import network_sheet, unit_sheet
from hwnas.network import macs, node_memory_access


def timings(widths: str = "arm", **costs: float) -> tuple[GuidelineTiming, ...]:
    """Made up: every network takes a millisecond, those named in `costs` (by variant, `_` for a space) so many."""
    named = {name.replace("_", " "): cost for name, cost in costs.items()}
    return tuple(GuidelineTiming(case, Measurement((named.get(case.variant, 1.0),) * 3)) for case in all_cases(widths))


# ---- the networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("guideline", EXPERIMENTS)
def test_the_networks_of_an_experiment_have_nearly_equal_macs_in_ten_blocks(guideline: str, widths: str):
    for multiplier in MULTIPLIERS:
        networks = [case.network for case in cases(guideline, widths) if case.multiplier == multiplier]
        first = macs(networks[0])
        for network in networks:
            assert macs(network) == pytest.approx(first, rel=0.06)
            assert len(network.units) == 10
            assert network.input.shape == network.outputs[0].shape
            assert network.input.shape[1:] == (56, 56)


@pytest.mark.parametrize(
    ("guideline", "widths", "relative"),
    [
        ("G1", "gpu", [1, 1.053, 1.413, 1.811]),
        ("G1", "arm", [1, 1.031, 1.420, 1.824]),
        ("G2", "gpu", [1, 1.40, 1.98, 2.78]),
    ],
)
def test_memory_access_grows_along_the_variants_as_counted_from_the_paper(
    guideline: str, widths: str, relative: list[float]
):
    def access(case: Case) -> int:
        return node_memory_access(case.network.units[0].nodes[0])

    found = [access(case) for case in cases(guideline, widths) if case.multiplier == 1]
    assert [value / found[0] for value in found] == pytest.approx(relative, abs=0.006)


def test_184_channels_stand_for_the_misprinted_180_that_8_does_not_divide():
    channels = [case.network.input.shape[0] for case in cases("G2", "arm") if case.variant == "8 groups"]
    assert channels == [184, 368, 736]


def test_each_experiment_varies_its_own_guideline_and_follows_it_best_in_its_first_variant():
    for guideline, experiment in EXPERIMENTS.items():
        sheets = {case.variant: network_sheet(case.network).whole for case in cases(guideline, "arm")}
        values = {variant: sheet.value(guideline) for variant, sheet in sheets.items()}
        assert min(values.values()) == values[experiment.variants[0]]
        assert all(values[extreme] == max(values.values()) for extreme in experiment.extremes)
    assert [round(unit_sheet(case.network.units[0]).fragments) for case in cases("G3", "arm")[::3]] == [1, 2, 4, 2, 4]


# ---- what is read off timings --------------------------------------------------------------------------------------


def test_the_reported_slowdowns_are_those_computed_from_the_paper():
    eight = slowdowns("G2", timings())[-1]
    assert eight.gpu == pytest.approx((3.87, 2.90, 1.90), abs=0.005)
    assert eight.arm == pytest.approx((1.44, 1.36, 1.28), abs=0.005)
    in_series, in_parallel = slowdowns("G3", timings())[2], slowdowns("G3", timings())[4]
    assert in_series.gpu == pytest.approx((3.25, 1.71, 1.24), abs=0.005)
    assert in_parallel.gpu == pytest.approx((3.54, 2.23, 1.49), abs=0.005)
    both = slowdowns("G4", timings())[-1]
    assert both.arm == pytest.approx((1.169, 1.195, 1.08), abs=0.001)


def test_a_slowdown_is_that_of_the_medians_and_its_spread_comes_from_both():
    noisy = [
        replace(t, measurement=Measurement((1.0, 1.2, 1.4, 1.6, 9.0))) if t.case.variant == "8 groups" else t
        for t in timings()
    ]
    assert slowdowns("G2", noisy)[-1].here == pytest.approx((1.4, 1.4, 1.4))
    assert slowdowns("G2", noisy)[-1].spread == pytest.approx((0.2, 0.2, 0.2))
    all_noisy = [replace(t, measurement=Measurement((1.0, 1.2, 1.4, 1.6, 9.0))) for t in timings()]
    first, *_, last = slowdowns("G2", all_noisy)
    assert first.spread == (0, 0, 0)
    assert last.spread == pytest.approx((2**0.5 * 0.2 / 1.4,) * 3)


def test_a_verdict_says_what_breaking_the_guideline_costs_here_and_in_the_paper():
    text = verdict("G2", timings(**{"8_groups": 1.9}))
    assert text == "G2 holds here: 8 groups cost 1.90x (1.90x to 1.90x); the paper's ARM 1.36x, GPU 2.77x."
    assert verdict("G2", timings(**{"8_groups": 1.05})).startswith("G2 hardly matters here: 8 groups cost 1.05x")
    assert verdict("G2", timings(**{"8_groups": 0.8})).startswith("G2 turns round here")
    one_way = verdict("G3", timings(**{"4_fragments_in_parallel": 1.5}))
    assert one_way.startswith("G3 holds here: 4 fragments in series cost 1.00x")
    assert "4 fragments in parallel cost 1.50x" in one_way


def test_timings_are_all_of_the_four_experiments_or_none():
    whole = timings("gpu")
    check_complete(whole)
    check_complete(())
    for broken in (whole[:-1], whole[1:], (*whole, whole[0]), (*whole[:-1], timings("arm")[-1])):
        with pytest.raises(ValueError, match="not those of the four experiments"):
            check_complete(broken)
