"""The sampler's prior: what follows from a device's timings, and what the sampler then proposes."""

import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from conftest import Home
from test_experiments import timings
from test_pipeline import copied_runs, tiny_job
from test_search import SMALL, TINY, latency

from hwnas.calibration import Measurement
from hwnas.errors import HwnasError
from hwnas.evolution import EvolutionSampler, NothingLeftError, equal_weights, lawful
from hwnas.experiments import EXPERIMENTS, MULTIPLIERS, GuidelineTiming
from hwnas.guideline_prior import (
    DROPPED,
    STRENGTH,
    check_setting,
    choice_weights,
    exponents,
    penalty,
    plain_choice,
    sampler_weights,
)
from hwnas.latency import load_table
from hwnas.pipeline import Plan, find, run_folder
from hwnas.places import Place
from hwnas.search import check_budget
from hwnas.space import CHOICES
from hwnas.space_toml import load_space, parse_space
from hwnas.stages import Listener, load_settings
from hwnas.units import UnitChoice

NOTHING = dict.fromkeys(EXPERIMENTS, 0.0)
GROUPS_PUNISHED = NOTHING | {"G2": 0.5}


def as_reported(column: str) -> tuple[GuidelineTiming, ...]:
    """The timings that the paper's own device would have given."""

    def speed(timing: GuidelineTiming) -> float:
        rows = getattr(EXPERIMENTS[timing.case.guideline], column)
        return rows[timing.case.variant][MULTIPLIERS.index(timing.case.multiplier)]

    return tuple(replace(t, measurement=Measurement((1000 / speed(t),))) for t in timings(column))


def groups_never(groups_from: int = 2):
    """Weights of the tiny space under which no unit has so many groups."""
    at = [index for index, place in enumerate(TINY.places) if place.endswith(".groups")]
    values = [float(value < groups_from) for value in TINY.choices["groups"]]
    return [values if index in at else place for index, place in enumerate(equal_weights(TINY))]


# ---- from timings to weights ---------------------------------------------------------------------------------------


def test_the_exponent_is_the_one_by_which_the_timings_were_made():
    cost = {f"{g}_group{'s' * (g > 1)}": g**0.4 for g in (1, 2, 4, 8)}
    found = exponents(timings(**cost))
    assert found["G2"] == pytest.approx(0.4)
    assert [found[guideline] for guideline in ("G1", "G3", "G4")] == [0, 0, 0]


def test_a_guideline_that_turns_round_has_no_exponent():
    assert exponents(timings(**{"8_groups": 0.5}))["G2"] == 0


def test_the_papers_gpu_punishes_groups_and_fragments_more_than_its_arm_does():
    arm, gpu = exponents(as_reported("arm")), exponents(as_reported("gpu"))
    assert gpu["G2"] > 3 * arm["G2"] > 0.3
    assert gpu["G3"] > 5 * arm["G3"] > 0
    assert all(value > 0 for value in (*arm.values(), *gpu.values()))


@pytest.mark.parametrize("name", ["shufflenet-tiny", "shufflenet-224"])
@pytest.mark.parametrize("drop", [False, True])
def test_every_place_has_a_probability_for_each_value_and_keeps_one_at_least(name: str, drop: bool):
    space = load_space(name)
    weights = choice_weights(space, exponents(as_reported("gpu")), drop=drop)
    assert tuple(map(len, weights)) == space.radices
    assert all(sum(place) == pytest.approx(1) for place in weights)
    assert any(0.0 in place for place in weights) == drop


def test_where_nothing_is_punished_all_values_are_alike():
    for place, radix in zip(choice_weights(TINY, NOTHING, drop=True), TINY.radices, strict=True):
        assert place == pytest.approx([1 / radix] * radix)


def test_groups_are_drawn_less_by_the_power_that_the_formula_says_and_nothing_else_is():
    weights = dict(zip(TINY.places, choice_weights(TINY, GROUPS_PUNISHED, drop=False), strict=True))
    assert TINY.choices["groups"] == (1, 2, 4)
    for name in ("stage2.unit2.groups", "stage4.unit1.groups"):
        one, two, four = weights[name]
        assert one > two > four > 0
    one, two, four = weights["stage2.unit2.groups"]  # all its MACs but the depthwise ones are grouped
    assert (two / one, four / one) == pytest.approx((2 ** (-0.5 * STRENGTH), 4 ** (-0.5 * STRENGTH)))
    for name in ("stage2.depth", "stage3.width", "stage2.unit2.kernel", "stage2.unit2.residual"):
        assert max(weights[name]) == pytest.approx(min(weights[name]))


def test_strict_drops_exactly_the_values_whose_penalty_is_above_the_threshold():
    k = NOTHING | {"G2": 0.1}
    weights = dict(zip(TINY.places, choice_weights(TINY, k, drop=True), strict=True))
    width = max(TINY.stages[0].width)
    place = Place(2, width, width, 1, plain_choice(TINY))
    two, four = (penalty(TINY, place, {"groups": groups}, k) for groups in (2, 4))
    assert two < DROPPED < four
    assert [weight > 0 for weight in weights["stage2.unit2.groups"]] == [True, True, False]


def test_element_wise_operators_are_punished_where_the_shortcut_is_slow():
    k = exponents(timings(ReLU_and_a_shortcut=1.5, a_shortcut=1.4))
    weights = dict(zip(TINY.places, choice_weights(TINY, k, drop=False), strict=True))
    for choice in ("residual", "squeeze_excite", "extra_depthwise"):
        without, with_it = weights[f"stage3.unit2.{choice}"]
        assert without > 1.1 * with_it


def test_a_space_without_the_papers_unit_has_weights_too():
    text = """
name = "odd"
input_size = 16
classes = 4
stem = { channels = 16, stride = 1, max_pool = false }
head = { channels = 32 }
[unit]
split_ratio = ["1/4"]
kernel = [5, 7]
squeeze_excite = [true]
residual = [false, true]
groups = [2, 4]
extra_depthwise = [true]
[[stage]]
depth = [2]
width = [32]
"""
    space = parse_space(text)
    assert plain_choice(space).text == "1/4 k5 g2 se dw"
    assert tuple(map(len, choice_weights(space, GROUPS_PUNISHED, drop=False))) == space.radices
    assert len(CHOICES) * 2 + 2 == len(space.radices)


# ---- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("found")
def test_off_weighs_nothing_and_the_others_need_timings(home: Home):
    table = load_table(home.table)
    assert sampler_weights(TINY, "shufflenet-tiny", table, "off") is None
    for setting in ("prior", "strict"):
        with pytest.raises(HwnasError, match=r"Measure: hwnas guidelines --device cpu --space mine\.toml$"):
            sampler_weights(TINY, "mine.toml", table, setting)
    measured = replace(table, guidelines=as_reported("gpu"))
    prior, strict = (sampler_weights(TINY, "mine.toml", measured, setting) for setting in ("prior", "strict"))
    assert prior is not None
    assert strict is not None
    assert all(weight > 0 for place in prior for weight in place)
    assert any(weight == 0 for place in strict for weight in place)


def test_a_setting_that_is_none_and_a_sampler_that_cannot_follow_it_are_refused():
    check_setting("strict", "evolution")
    check_setting("off", "tpe")
    with pytest.raises(HwnasError, match=r"off, prior, strict\. It is 'on'"):
        check_setting("on", "evolution")
    with pytest.raises(HwnasError, match="Only the sampler 'evolution' follows the guidelines, and not 'tpe'"):
        check_setting("prior", "tpe")


# ---- the sampler under weights -------------------------------------------------------------------------------------


def proposals(sampler: EvolutionSampler, count: int) -> list[tuple[int, ...]]:
    """What a sampler proposes one after another, the first proposals being scored best."""
    scored: list[tuple[tuple[int, ...], float]] = []
    for number in range(count):
        code = sampler.propose(scored, {code for code, _ in scored}, random.Random(number))
        scored.append((code, -number))
    return [code for code, _ in scored]


def groups_of(codes: list[tuple[int, ...]]) -> list[int]:
    return [unit.groups for code in codes for stage in TINY.decode(code).stages for unit in stage.units]


def test_what_weighs_little_is_proposed_seldom():
    weights = [[0.9, 0.05, 0.05] if 0.0 in place else place for place in groups_never()]
    shy, equal = (proposals(EvolutionSampler(TINY, latency, 1.2, weights=given), 30) for given in (weights, None))
    assert groups_of(shy).count(1) / len(groups_of(shy)) > 1.5 * groups_of(equal).count(1) / len(groups_of(equal)) > 0


@pytest.mark.parametrize("budget_ms", [0.4, 1.2, 100])
def test_what_weighs_nothing_is_never_proposed_however_tight_the_budget(budget_ms: float):
    sampler = EvolutionSampler(TINY, latency, budget_ms, weights=groups_never())
    codes = proposals(sampler, 25)
    assert set(groups_of(codes)) == {1}
    assert all(code == TINY.canonical(code) for code in codes)
    assert all(latency(TINY.decode(code)).upper_ms <= budget_ms for code in codes)
    assert len(set(codes)) == 25


def test_a_forbidden_value_at_index_0_neither_forbids_shallow_stages_nor_slips_in_with_deeper_ones():
    text_order = tuple(reversed(TINY.choices["groups"]))  # 4, 2, 1: absent units encode as index 0, which is forbidden
    space = replace(TINY, choices=TINY.choices | {"groups": text_order})
    weights = [
        [0.0, 0.0, 1.0] if name.endswith(".groups") else place
        for name, place in zip(space.places, equal_weights(space), strict=True)
    ]
    codes = proposals(EvolutionSampler(space, latency, 1.2, weights=weights), 25)
    architectures = [space.decode(code) for code in codes]
    assert {unit.groups for a in architectures for stage in a.stages for unit in stage.units} == {1}
    assert len({tuple(stage.depth for stage in a.stages) for a in architectures}) > 1
    for code in codes:
        assert lawful(space, weights, code) == code


def test_equal_weights_draw_every_value_of_every_place():
    sampler = EvolutionSampler(TINY, latency, math.inf)
    drawn = [sampler.newcomer(sampler.floor, random.Random(number), 1.0) for number in range(200)]
    for place, radix in enumerate(TINY.radices):
        assert {code[place] for code in drawn} == set(range(radix))


def test_a_budget_that_only_dropped_values_meet_is_refused_with_what_the_others_need():
    everything, allowed = (
        EvolutionSampler(TINY, latency, 1.2, weights=weights).upper_ms(
            EvolutionSampler(TINY, latency, 0.0, weights=weights).floor
        )
        for weights in (None, groups_never())
    )
    budget_ms = (everything + allowed) / 2
    check_budget(TINY, latency, budget_ms, "cpu")
    with pytest.raises(HwnasError, match=rf"needs {allowed:.3g} ms .* on cpu"):
        check_budget(TINY, latency, budget_ms, "cpu", groups_never())


def test_when_all_allowed_architectures_are_proposed_nothing_is_left():
    weights = [[1.0] + [0.0] * (len(place) - 1) for place in equal_weights(SMALL)]
    weights[0] = [1.0] * SMALL.radices[0]
    weights[1] = [1.0] * SMALL.radices[1]
    sampler = EvolutionSampler(SMALL, latency, math.inf, weights=weights)
    only = {sampler.propose([], set(), random.Random(number)) for number in range(20)}
    assert len(only) == SMALL.radices[0] * SMALL.radices[1] == 2
    with pytest.raises(NothingLeftError):
        sampler.propose([], only, random.Random(0))


def test_a_mutation_draws_values_by_their_weights():
    weights = [[0.9, 0.05, 0.05] if 0.0 in place else place for place in groups_never()]
    sampler = EvolutionSampler(TINY, latency, math.inf, weights=weights)
    middle = TINY.encode(TINY.uniform(UnitChoice(groups=2)))
    changed = [sampler.mutate(middle, random.Random(number), 20.0) for number in range(100)]
    groups = groups_of(changed)
    assert groups.count(1) > 5 * groups.count(4) > 0


# ---- in a whole search ---------------------------------------------------------------------------------------------


class SearchedError(Exception):
    """Ends a job when its search is over."""


def test_a_strict_search_scores_nothing_that_the_device_punishes_and_its_study_knows_it(
    here: Home, found: dict[str, Any], tmp_path: Path
):
    def end(stage: str) -> None:
        if re.match(r"Measuring the \d best", stage):
            raise SearchedError

    replace(load_table(here.table), guidelines=as_reported("gpu")).save(tmp_path / "tables/cpu" / here.table.name)
    job = tiny_job(here, copied_runs(here, tmp_path), Listener(stage=end), tables=tmp_path / "tables")
    plan = Plan(1000, trials=4, guidelines="strict")
    with pytest.raises(SearchedError):
        find(job, plan)
    folder = run_folder(job, plan)
    assert folder.name == f"{found['run'].name}-strict"
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
    done = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) == 4
    assert {value for trial in done for name, value in trial.params.items() if name.endswith(".groups")} == {0}
    assert load_settings(folder)["plan"]["guidelines"] == "strict"
    with pytest.raises(HwnasError, match="belongs to another search: guidelines was strict, is prior"):
        find(job, replace(plan, guidelines="prior"), folder)


@pytest.mark.usefixtures("found")
def test_a_search_by_guidelines_without_timings_stops_before_it_trains(here: Home, tmp_path: Path, hwnas: Any):
    answer = hwnas("search", "--budget-ms", 1000, "--space", "tiny.toml", "--guidelines", "prior", "--runs", tmp_path)
    assert answer.status == 2
    assert answer.err.rstrip().endswith("Measure: hwnas guidelines --device cpu --space tiny.toml")
    assert list(tmp_path.iterdir()) == []
    answer = hwnas("search", "--budget-ms", 1000, "--space", "tiny.toml", "--guidelines", "strict", "--sampler", "tpe")
    assert answer.status == 2
    assert "Only the sampler 'evolution' follows the guidelines" in answer.err
