"""The search: what a sampler may propose, what a study keeps, and what happens when a process is killed."""

import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path

import optuna
import pytest

from hwnas import search as search_module
from hwnas.errors import HwnasError
from hwnas.evolution import (
    EvolutionSampler,
    Limit,
    NothingLeftError,
    distributions,
    neighbours,
    proposed_code,
    upper_confidence,
    upper_ms_of,
)
from hwnas.latency import Prediction
from hwnas.search import SAMPLERS, pareto_set, search
from hwnas.space import Architecture, SearchSpace
from hwnas.space_toml import load_space, parse_space
from hwnas.study import FOREIGN_STALE, open_study, storage_url, this_host

TINY = load_space("shufflenet-tiny")

SMALL_TEXT = """
name = "small"
input_size = 16
classes = 3
[stem]
channels = 16
stride = 1
max_pool = false
[unit]
split_ratio = ["1/4", "1/2", "3/4"]
kernel = [3, 5, 7]
squeeze_excite = [false, true]
residual = [false]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1]
width = [16, 32]
[head]
channels = 32
"""
SMALL = parse_space(SMALL_TEXT)  # 36 architectures


def latency(architecture: Architecture) -> Prediction:
    """Made up: every choice costs, and the upper estimate is a tenth above the expected one."""
    ms = 0.1
    for stage in architecture.stages:
        for unit in stage.units:
            c = float(unit.split_ratio) * stage.width / 100
            ms += 0.02 + c * c * (0.2 + 0.4 / unit.groups) + 0.004 * c * unit.kernel**2
            ms += 0.03 * unit.squeeze_excite + 0.02 * unit.extra_depthwise + 0.002 * unit.residual
    return Prediction(ms, 1.1 * ms)


def made_up_accuracy(space: SearchSpace, seed: int, interaction: float = 1.0):
    """Grows with what is spent, has a taste of its own in each place, and pairs of places that interact."""
    rng = random.Random(f"made up {seed}")
    taste = [[rng.gauss(0, 0.5) for _ in range(radix)] for radix in space.radices]
    pairs = [rng.sample(range(len(space.radices)), 2) for _ in range(len(space.radices))]
    pair_taste = [{(i, j): rng.gauss(0, interaction) for i in range(4) for j in range(4)} for _ in pairs]

    def accuracy(architecture: Architecture) -> float:
        code = space.encode(architecture)
        value = 70 + 5 * math.log(latency(architecture).latency_ms)
        value += sum(row[index] for row, index in zip(taste, code, strict=True))
        return value + sum(table[code[a], code[b]] for (a, b), table in zip(pairs, pair_taste, strict=True))

    return accuracy


def run_search(storage: Path | str, trials: int = 8, **changes):
    settings = {
        "space": SMALL,
        "accuracy": made_up_accuracy(SMALL, 0),
        "latency": latency,
        "budget_ms": 0.2,
        "device": "a test",
        "trials": trials,
        "storage": storage,
        "name": "study",
    }
    return search(**settings | changes)


def codes_of(result) -> list[tuple[int, ...]]:
    return [SMALL.encode(one.architecture) for one in result.scored]


def kernels_mb(architecture: Architecture) -> float:
    """Made up: a megabyte for each row of each kernel, and squeeze-excite costs nothing."""
    return float(sum(unit.kernel for stage in architecture.stages for unit in stage.units))


def channels_mb(architecture: Architecture) -> float:
    return float(sum(stage.width for stage in architecture.stages))


# ---- the sampler ---------------------------------------------------------------------------------------------------


def evolve(space: SearchSpace, accuracy, budget_ms: float, count: int, seed: int = 0):
    """What the sampler proposes for a study that scores everything, with the scores."""
    sampler = EvolutionSampler(space, latency, budget_ms, seed=seed)
    scored: list[tuple[tuple[int, ...], float]] = []
    for number in range(count):
        code = sampler.propose(scored, {code for code, _ in scored}, random.Random(f"{seed}:{number}"))
        scored.append((code, accuracy(space.decode(code))))
    return scored


@pytest.mark.parametrize("budget_ms", [0.45, 0.8, 3.0])
def test_the_sampler_never_repeats_and_never_leaves_the_budget(budget_ms: float):
    scored = evolve(TINY, made_up_accuracy(TINY, 1), budget_ms, 50)
    codes = [code for code, _ in scored]
    assert len(set(codes)) == 50
    assert all(TINY.canonical(code) == code for code in codes)
    assert all(latency(TINY.decode(code)).upper_ms <= budget_ms for code in codes)


def test_what_the_sampler_proposes_meets_every_limit_and_uses_most_of_the_scarcest():
    sampler = EvolutionSampler(
        TINY,
        latency,
        3.0,
        limits=(
            Limit("memory", 40.0, kernels_mb, "MB", "--memory-mb"),
            Limit("size", 500.0, channels_mb, "MB", "--size-mb"),
        ),
    )
    accuracy, scored = made_up_accuracy(TINY, 1), []
    for number in range(40):
        code = sampler.propose(scored, {code for code, _ in scored}, random.Random(number))
        scored.append((code, accuracy(TINY.decode(code))))
    found = [TINY.decode(code) for code, _ in scored]
    assert len({code for code, _ in scored}) == 40
    assert all(kernels_mb(architecture) <= 40 and channels_mb(architecture) <= 500 for architecture in found)
    assert all(latency(architecture).upper_ms <= 3 for architecture in found)
    assert any(kernels_mb(a) > 34 or channels_mb(a) > 430 for a in found)
    free = [TINY.decode(code) for code, _ in evolve(TINY, accuracy, 3.0, 40)]
    assert any(kernels_mb(architecture) > 40 for architecture in free)


def test_without_limits_the_load_of_an_architecture_is_its_upper_estimate():
    code = TINY.encode(TINY.largest)
    assert upper_ms_of(TINY, latency, 3.0)(code) == latency(TINY.largest).upper_ms
    limit = Limit("memory", kernels_mb(TINY.largest) / 2, kernels_mb, "MB", "--memory-mb")
    assert upper_ms_of(TINY, latency, 30.0, (limit,))(code) == pytest.approx(60.0)


def test_every_place_of_the_encoding_can_change():
    codes = [code for seed in range(3) for code, _ in evolve(TINY, made_up_accuracy(TINY, seed), 3.0, 30, seed)]
    stuck = [TINY.places[i] for i, radix in enumerate(TINY.radices) if radix > 1 and len({c[i] for c in codes}) == 1]
    assert stuck == []


def test_the_first_generation_uses_most_of_the_budget_but_is_not_all_alike():
    codes = [code for code, _ in evolve(TINY, made_up_accuracy(TINY, 3), 1.0, 10)]
    uppers = [latency(TINY.decode(code)).upper_ms for code in codes]
    assert min(uppers) > 0.5
    assert max(uppers) - min(uppers) > 0.05
    assert min(sum(a != b for a, b in zip(codes[0], code, strict=True)) for code in codes[1:]) > 10


def best_of_random(space: SearchSpace, accuracy, budget_ms: float, count: int, seed: int) -> float:
    rng = random.Random(f"random {seed}")
    scored: list[float] = []
    while len(scored) < count:
        architecture = space.sample(rng)
        if latency(architecture).upper_ms <= budget_ms:
            scored.append(accuracy(architecture))
    return max(scored)


@pytest.mark.parametrize("interaction", [0.3, 1.5])
def test_sixty_evaluations_of_evolution_beat_six_hundred_of_random_search(interaction: float):
    for seed in range(2):
        accuracy = made_up_accuracy(TINY, seed, interaction)
        ours = max(value for _, value in evolve(TINY, accuracy, 1.3, 60, seed))
        assert ours > best_of_random(TINY, accuracy, 1.3, 600, seed) + 1.0


def test_proposals_depend_on_seed_and_history_alone():
    def numbers(seed: int, pause: bool) -> list[dict[str, int]]:
        study = optuna.create_study(direction="maximize", sampler=EvolutionSampler(SMALL, latency, 0.2, seed=seed))
        for number in range(16):
            if pause and number == 12:
                study.sampler = EvolutionSampler(SMALL, latency, 0.2, seed=seed)
            trial = study.ask(distributions(SMALL))
            study.tell(trial, float(sum(trial.params.values())))
        return [trial.params for trial in study.trials]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert numbers(1, pause=False) == numbers(1, pause=True)
    assert numbers(1, pause=False) != numbers(2, pause=False)


def test_the_sampler_ends_when_every_architecture_within_the_budget_is_proposed():
    upper_ms = upper_ms_of(SMALL, latency)
    everything = {code for start in (SMALL.smallest, SMALL.largest) for code in closure(SMALL, SMALL.encode(start))}
    within = {code for code in everything if upper_ms(code) <= 0.2}
    assert len(everything) == SMALL.size
    assert 0 < len(within) < SMALL.size
    sampler = EvolutionSampler(SMALL, latency, 0.2)
    seen: set[tuple[int, ...]] = set()
    for number in range(len(within)):
        seen.add(sampler.propose([(code, 0.0) for code in sorted(seen)], seen, random.Random(number)))
    assert seen == within
    with pytest.raises(NothingLeftError):
        sampler.propose([(code, 0.0) for code in sorted(seen)], seen, random.Random(0))


def closure(space: SearchSpace, start: tuple[int, ...]) -> set[tuple[int, ...]]:
    found, frontier = {start}, [start]
    while frontier:
        new = set(neighbours(space, frontier.pop())) - found
        found |= new
        frontier += new
    return found


def test_a_parameter_of_another_space_is_a_bug():
    study = optuna.create_study(sampler=EvolutionSampler(SMALL, latency, 0.2))
    with pytest.raises(ValueError, match="no place of the space small"):
        study.ask().suggest_int("something else", 0, 3)


def test_the_linear_model_prefers_what_was_good_and_hopes_for_what_is_unknown():
    import numpy as np

    rng = np.random.default_rng(0)
    known = np.zeros((40, 4))
    known[:, :3] = rng.integers(0, 2, (40, 3))
    values = (3 * known[:, 0] - 2 * known[:, 1]).tolist()
    good, bad, good_and_unknown = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]])
    hopes = upper_confidence(known, values, np.array([good, bad, good_and_unknown], dtype=float))
    assert hopes[0] > hopes[1] + 1
    assert hopes[2] > hopes[0]
    assert np.isfinite(upper_confidence(known, [1.0] * 40, known)).all()


# ---- the budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget_ms", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_that_is_no_time_is_refused(tmp_path: Path, budget_ms: float):
    with pytest.raises(HwnasError, match=r"number of milliseconds above 0\. It is"):
        run_search(tmp_path / "study.db", budget_ms=budget_ms)
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_nothing_meets_says_what_the_fastest_needs(tmp_path: Path):
    def odd(architecture: Architecture) -> Prediction:
        """The fewest MACs are not the fastest here: kernel 3 is slow and the wide stage is quick."""
        unit, stage = architecture.stages[0].units[0], architecture.stages[0]
        ms = 5 - 1 * (unit.kernel == 5) - 1 * (stage.width == 32) - (unit.split_ratio == Fraction(1, 2))
        return Prediction(ms, ms + 0.5)

    with pytest.raises(HwnasError, match=r"fastest architecture of small needs 2\.5 ms .* on a test; the budget is 1 "):
        run_search(tmp_path / "study.db", latency=odd, budget_ms=1)
    found = run_search(tmp_path / "study.db", latency=odd, budget_ms=2.6, trials=2)
    assert {one.prediction.upper_ms for one in found.scored} == {2.5}


def test_a_budget_that_does_not_bind_is_told_and_searched(tmp_path: Path):
    result = run_search(tmp_path / "study.db", budget_ms=10, trials=3)
    assert not result.budget_binds
    assert len(result.scored) == 3
    slowest = max(latency(SMALL.decode(code)).upper_ms for code in closure(SMALL, SMALL.encode(SMALL.smallest)))
    assert (
        f"does not bind: 10 ms is enough for every architecture of small on a test; the slowest needs {slowest:.3g}"
        in (result.notes[0])
    )


# ---- the study -----------------------------------------------------------------------------------------------------


def test_a_search_scores_each_architecture_once_and_keeps_the_best_first(tmp_path: Path):
    called: list[Architecture] = []
    told: list[int] = []
    truth = made_up_accuracy(SMALL, 0)

    def accuracy(architecture: Architecture) -> float:
        called.append(architecture)
        return truth(architecture)

    result = run_search(tmp_path / "new" / "study.db", accuracy=accuracy, on_trial=lambda _, done: told.append(done))
    assert told == list(range(1, 9))
    assert len(set(called)) == len(called) == 8
    assert result.budget_binds
    assert result.notes == ()
    assert {one.architecture for one in result.scored} == set(called)
    assert [one.accuracy for one in result.scored] == sorted((truth(a) for a in called), reverse=True)
    assert all(one.prediction == latency(one.architecture) for one in result.scored)
    assert result.best is result.scored[0]
    assert result.best in result.pareto


def test_the_pareto_set_holds_what_nothing_beats():
    space_point = SMALL.smallest

    def one(number: int, accuracy: float, ms: float):
        return search_module.Scored(space_point, accuracy, Prediction(ms, ms), number)

    points = [one(0, 50, 1), one(1, 60, 2), one(2, 55, 3), one(3, 60, 2.5), one(4, 70, 4), one(5, 50, 0.5)]
    assert [p.number for p in pareto_set(points)] == [5, 1, 4]


def test_running_again_only_reports_and_running_with_more_goes_on(tmp_path: Path):
    first = run_search(tmp_path / "study.db", trials=5)

    def never(architecture: Architecture) -> float:
        raise AssertionError(architecture)

    assert run_search(tmp_path / "study.db", trials=5, accuracy=never) == first
    more = run_search(tmp_path / "study.db", trials=9)
    whole = run_search(tmp_path / "other.db", trials=9)
    assert more == whole
    assert set(codes_of(first)) < set(codes_of(more))


def test_a_space_smaller_than_the_search_ends_it_with_a_note(tmp_path: Path):
    result = run_search(tmp_path / "study.db", trials=100, budget_ms=0.15)
    within = [c for c in closure(SMALL, SMALL.encode(SMALL.smallest)) if latency(SMALL.decode(c)).upper_ms <= 0.15]
    assert sorted(codes_of(result)) == sorted(within)
    assert result.notes == (f"Every architecture of small within 0.15 ms is scored: {len(within)} in all.",)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "evolution"])
@pytest.mark.filterwarnings("error")
def test_a_stock_sampler_scores_only_what_is_new_and_within_the_budget(tmp_path: Path, sampler: str):
    scored: list[Architecture] = []
    truth = made_up_accuracy(SMALL, 0)

    def accuracy(architecture: Architecture) -> float:
        scored.append(architecture)
        return truth(architecture)

    result = run_search(tmp_path / "study.db", accuracy=accuracy, sampler=sampler, trials=6, budget_ms=0.18)
    assert len(scored) == len(set(scored)) == 6
    assert all(latency(architecture).upper_ms <= 0.18 for architecture in scored)
    assert {one.architecture for one in result.scored} == set(scored)
    study = open_study(tmp_path / "study.db", "study", optuna.samplers.RandomSampler())
    over = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE and t.values == [-math.inf]]
    assert over
    assert all(trial.constraints["upper_ms_over_budget"] > 0 for trial in over)
    repeats = [trial for trial in study.trials if "repeats" in trial.user_attrs]
    for trial in repeats:
        original = study.trials[trial.user_attrs["repeats"]]
        assert proposed_code(SMALL, original.params) == proposed_code(SMALL, trial.params)
        assert trial.state == optuna.trial.TrialState.FAIL


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_scores_only_what_meets_the_limits(tmp_path: Path, sampler: str):
    limits = (Limit("memory", 5.0, kernels_mb, "MB", "--memory-mb"),)
    result = run_search(tmp_path / "study.db", 6, sampler=sampler, limits=limits, budget_ms=9.0)
    assert {kernels_mb(one.architecture) for one in result.scored} <= {3.0, 5.0}
    study = open_study(tmp_path / "study.db", "study", optuna.samplers.RandomSampler())
    told = [trial for trial in study.get_trials() if "memory (MB)" in trial.user_attrs]
    for trial in told:
        assert trial.constraints["memory over limit"] == trial.user_attrs["memory (MB)"] - 5.0
    broken = [trial for trial in told if trial.user_attrs["memory (MB)"] > 5]
    assert all(trial.value == -math.inf for trial in broken)
    assert bool(broken) == (sampler != "evolution")


def test_limits_that_nothing_meets_are_refused_with_what_the_least_needs(tmp_path: Path):
    with pytest.raises(
        HwnasError, match=r"least memory needs 3 MB \(upper estimate\); the limit is 2\.9 MB\. Raise --memory-mb"
    ):
        run_search(tmp_path / "study.db", limits=(Limit("memory", 2.9, kernels_mb, "MB", "--memory-mb"),))
    against = Limit("size", 4.0, lambda architecture: 10.0 - kernels_mb(architecture), "MB", "--size-mb")
    with pytest.raises(
        HwnasError, match=r"meets the budget and the limits together; the nearest needs .* memory of 5 MB"
    ):
        run_search(
            tmp_path / "study.db",
            budget_ms=9.0,
            limits=(Limit("memory", 5.0, kernels_mb, "MB", "--memory-mb"), against),
        )
    assert not (tmp_path / "study.db").exists()


def test_a_study_with_another_limit_is_another_search(tmp_path: Path):
    run_search(tmp_path / "study.db", 3, limits=(Limit("memory", 5.0, kernels_mb, "MB", "--memory-mb"),))
    with pytest.raises(HwnasError, match=r"memory limit was 5\.0, is 7\.0"):
        run_search(tmp_path / "study.db", 3, limits=(Limit("memory", 7.0, kernels_mb, "MB", "--memory-mb"),))


def test_a_sampler_that_finds_nothing_new_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(search_module, "PATIENCE", 20)
    result = run_search(tmp_path / "study.db", sampler="random", trials=36, budget_ms=0.14)
    assert 0 < len(result.scored) < 36
    assert "The sampler 'random' found nothing new within 0.14 ms in 20 proposals" in result.notes[0]


def test_an_unknown_sampler_and_no_trials_are_refused(tmp_path: Path):
    with pytest.raises(HwnasError, match=r"one of evolution, tpe, nsgaii, random\. It is 'annealing'"):
        run_search(tmp_path / "study.db", sampler="annealing")
    with pytest.raises(HwnasError, match="number of trials is 0"):
        run_search(tmp_path / "study.db", trials=0)


def test_a_study_of_another_table_budget_or_space_is_refused_with_the_difference(tmp_path: Path):
    run_search(tmp_path / "study.db", trials=1, identity={"table": "aaa"})
    with pytest.raises(HwnasError, match=r"table was aaa, is bbb\. .* Give another run folder"):
        run_search(tmp_path / "study.db", trials=1, identity={"table": "bbb"})
    with pytest.raises(HwnasError, match=r"budget_ms was 0\.2, is 0\.3"):
        run_search(tmp_path / "study.db", trials=1, identity={"table": "aaa"}, budget_ms=0.3)
    other = parse_space(SMALL_TEXT.replace("[3, 5, 7]", "[5, 3, 7]"))
    with pytest.raises(HwnasError, match="space_sha256 was"):
        run_search(tmp_path / "study.db", trials=1, identity={"table": "aaa"}, space=other)
    assert len(run_search(tmp_path / "study.db", trials=1, identity={"table": "aaa"}).scored) == 1


# ---- interrupted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["accuracy", "latency"])
def test_ctrl_c_loses_nothing_finished_and_the_search_goes_on(tmp_path: Path, where: str):
    truth = made_up_accuracy(SMALL, 0)
    calls = {"accuracy": 0, "latency": 0}

    def count(name: str) -> None:
        calls[name] += 1
        # latency: once trials run, not in the checks before the search
        if name == where and calls[name] >= 4 and calls["accuracy"] >= 3:
            raise KeyboardInterrupt

    def accuracy(architecture: Architecture) -> float:
        count("accuracy")
        return truth(architecture)

    def interrupted(architecture: Architecture) -> Prediction:
        count("latency")
        return latency(architecture)

    with pytest.raises(KeyboardInterrupt):
        run_search(tmp_path / "study.db", accuracy=accuracy, latency=interrupted)
    study = open_study(tmp_path / "study.db", "study", optuna.samplers.RandomSampler())
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE"] * 3 + ["FAIL"]
    assert len(run_search(tmp_path / "study.db").scored) == 8


def test_an_accuracy_that_is_no_number_stops_the_search_and_fails_the_trial(tmp_path: Path):
    with pytest.raises(HwnasError, match="Trial 0 got nan"):
        run_search(tmp_path / "study.db", accuracy=lambda _: math.nan)
    study = open_study(tmp_path / "study.db", "study", optuna.samplers.RandomSampler())
    assert [trial.state.name for trial in study.trials] == ["FAIL"]


WORKER = """
import os, sys
sys.path.insert(0, {tests!r})
from test_search import SMALL, made_up_accuracy, run_search

truth, calls = made_up_accuracy(SMALL, 0), []

def accuracy(architecture):
    calls.append(architecture)
    if len(calls) == {stop_at}:
        print("scoring", *SMALL.encode(architecture), flush=True)
        sys.stdin.read()
    with open({log!r}, "a") as log:
        log.write(repr(SMALL.encode(architecture)) + chr(10))
    return truth(architecture)

run_search({storage!r}, trials={trials}, accuracy=accuracy, sampler={sampler!r})
"""


def start_worker(folder: Path, storage: str, trials: int, stop_at: int = 0, sampler: str = "evolution"):
    code = WORKER.format(
        tests=str(Path(__file__).parent),
        log=str(folder / "log"),
        storage=storage,
        trials=trials,
        stop_at=stop_at,
        sampler=sampler,
    )
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_killed_search_goes_on_and_proposes_the_lost_architecture_again(tmp_path: Path):
    storage = tmp_path / "study.db"
    with start_worker(tmp_path, str(storage), trials=8, stop_at=4) as worker:
        assert worker.stdout is not None
        line = worker.stdout.readline()
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    lost = tuple(int(word) for word in line.split()[1:])
    study = open_study(storage, "study", optuna.samplers.RandomSampler())
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3 + ["RUNNING"]
    assert proposed_code(SMALL, study.trials[3].params) == lost

    within = [c for c in closure(SMALL, SMALL.encode(SMALL.smallest)) if latency(SMALL.decode(c)).upper_ms <= 0.2]
    result = run_search(storage, trials=len(within))
    assert lost in codes_of(result)
    assert sorted(codes_of(result)) == sorted(within)
    assert study.trials[3].state == optuna.trial.TrialState.FAIL


def test_a_running_trial_of_a_living_process_is_left_alone(tmp_path: Path):
    storage = tmp_path / "study.db"
    with start_worker(tmp_path, str(storage), trials=3, stop_at=1) as worker:
        assert worker.stdout is not None
        claimed = tuple(int(word) for word in worker.stdout.readline().split()[1:])
        result = run_search(storage, trials=2)
        assert claimed not in codes_of(result)
        study = open_study(storage, "study", optuna.samplers.RandomSampler())
        assert study.trials[0].state == optuna.trial.TrialState.RUNNING
        worker.communicate()
    assert worker.returncode == 0
    result = run_search(storage, trials=3)
    assert claimed in codes_of(result)
    assert len(result.scored) == 3


def test_a_trial_of_another_host_is_given_up_after_a_day(tmp_path: Path):
    run_search(tmp_path / "study.db", trials=1)
    study = open_study(tmp_path / "study.db", "study", optuna.samplers.RandomSampler())
    now = datetime.now()
    for host, age in (("elsewhere", FOREIGN_STALE * 2), ("elsewhere", timedelta(hours=1)), (this_host(), timedelta(0))):
        trial = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, user_attrs={"owner": [host, 2**22 + 1, "1"]}
        )
        trial.datetime_start = now - age
        study.add_trial(trial)
    run_search(tmp_path / "study.db", trials=1)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "RUNNING", "FAIL"]


def test_two_processes_score_no_architecture_twice_and_reach_the_count(tmp_path: Path):
    # random sampling with one seed has both propose the same, in the same order
    workers = [start_worker(tmp_path, str(tmp_path / "study.db"), trials=10, sampler="random") for _ in range(2)]
    for worker in workers:
        worker.communicate()
        assert worker.returncode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines))
    result = run_search(tmp_path / "study.db", trials=1)
    assert len(result.scored) == len(lines)
    assert 10 <= len(lines) <= 11


def test_of_two_workers_that_claim_the_same_neither_scores_it_twice(tmp_path: Path):
    """The worst interleaving: the other claims while this one is between its claim and its check."""
    study = open_study(tmp_path / "study.db", "study", EvolutionSampler(SMALL, latency, 0.2))
    scored: list[Architecture] = []

    def accuracy(architecture: Architecture) -> float:
        scored.append(architecture)
        return 1.0

    worker = search_module._Worker(study, SMALL, accuracy, latency, 0.2, ())
    first, second = study.ask(), study.ask()
    code = worker.claim(first)
    for place, index in zip(SMALL.places, code, strict=True):
        if place in distributions(SMALL):
            study._storage.set_trial_param(second._trial_id, place, index, distributions(SMALL)[place])
    assert {trial.number for trial in worker.holders(code)} == {0, 1}
    assert worker.run(first, wanted=5) is None
    assert scored == []


# ---- the storage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["no database", "pages"])
def test_a_damaged_study_is_one_clear_message(tmp_path: Path, damage: str):
    path = tmp_path / "study.db"
    run_search(path, trials=2)
    content = path.read_bytes()
    if damage == "no database":
        path.write_bytes(os.urandom(4096))
    else:
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with pytest.raises(
        HwnasError, match=rf"storage {path} cannot be used: .*(not a database|malformed).* move it away"
    ):
        run_search(path, trials=3)


def test_a_file_of_any_name_and_a_missing_folder_work(tmp_path: Path):
    path = tmp_path / "50% {odd}?#é" / "my study.db"
    run_search(path, trials=1)
    assert path.is_file()
    with sqlite3.connect(path) as connection:
        assert connection.execute("select count(*) from trials").fetchone() == (1,)
    (tmp_path / "file").write_text("")
    with pytest.raises(HwnasError, match="cannot be made"):
        run_search(tmp_path / "file" / "study.db", trials=1)


def test_a_server_that_does_not_answer_is_one_message_without_the_password(caplog: pytest.LogCaptureFixture):
    with pytest.raises(HwnasError, match="Check that the server runs") as caught:
        run_search("postgresql://someone:s3cret@127.0.0.1:1/hwnas")
    assert "someone:***@127.0.0.1:1/hwnas" in str(caught.value)
    assert "s3cret" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("url", ["postgresql://a:s3cret@host:port/x", "nosuch://a:s3cret@host/x"])
def test_a_url_that_cannot_be_read_is_refused_without_showing_the_password(url: str):
    with pytest.raises(HwnasError) as caught:
        run_search(url)
    assert "s3cret" not in str(caught.value)


def test_postgresql_urls_name_the_driver_that_hwnas_installs():
    assert storage_url("postgres://me@host/db").drivername == "postgresql+psycopg"
    assert storage_url("postgresql://me@host/db").drivername == "postgresql+psycopg"
    assert storage_url(Path("runs/one/study.db")).database == str(Path.cwd() / "runs/one/study.db")


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server of this test's own, reached by a socket in a folder."""
    binaries = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not binaries:
        pytest.skip("no PostgreSQL server under /usr/lib/postgresql: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="hwnas-postgresql-"))
    as_user: list[str] = []
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]

    def run(program: str, *arguments: str) -> None:
        command = [*as_user, str(binaries[-1].parent / program), "-D", str(folder / "data"), *arguments]
        # to a file: the server keeps what it inherits open
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, cwd=folder)

    try:
        run("initdb", "--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c shared_buffers=16MB"
        run("pg_ctl", "start", "-w", "-o", options)
        yield f"postgresql://postgres:s3cret@/postgres?host={folder}"
        run("pg_ctl", "stop", "-w", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        (folder.parent / f"{folder.name}.log").unlink(missing_ok=True)


def test_a_study_lives_in_postgresql_and_two_processes_share_it(tmp_path: Path, postgresql: str):
    workers = [start_worker(tmp_path, postgresql, trials=8) for _ in range(2)]
    for worker in workers:
        worker.communicate()
        assert worker.returncode == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == len(set(lines))
    assert 8 <= len(lines) <= 9
    assert len(run_search(postgresql, trials=8).scored) == len(lines)


# ---- the layers ----------------------------------------------------------------------------------------------------


def test_the_search_loads_neither_jax_nor_onnxruntime():
    code = "import sys, hwnas.search; print(sorted({'jax', 'flax', 'onnxruntime', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
