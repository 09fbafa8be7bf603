"""A predictor of accuracy finds better architectures, and what is told of it is what it does on unseen ones."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from test_feasible import SMALL, every_code
from test_lookup import random_table

from hwnas.errors import HwnasError
from hwnas.evolution import NothingLeftError
from hwnas.feasible import Feasible, feasible
from hwnas.latency import LatencyTable, load_table
from hwnas.lookup import array_predictor
from hwnas.predictor import CANDIDATES, PredictorSampler, best_predicted, check_first, fitted, held_out, there
from hwnas.ranking import kendall_tau
from hwnas.search import SearchResult, search
from hwnas.space import Architecture
from hwnas.space_toml import load_space

TINY = load_space("shufflenet-tiny")
TABLES = Path(__file__).parents[1] / "latency_tables" / "amd-epyc-2-cores"
EFFECTS = np.random.default_rng(7).normal(0, 0.01, sum(TINY.radices))
STARTS = np.concatenate([[0], np.cumsum(TINY.radices)[:-1]])


def truth(codes: np.ndarray) -> np.ndarray:
    """An accuracy to which each value at each place that is there adds something, and some together."""
    added = (EFFECTS[STARTS + codes] * there(TINY, codes)).sum(1)
    return 0.7 + added + 0.02 * np.sin(codes[:, 0] + codes[:, 1])


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    return load_table(TABLES / "shufflenet-tiny-fp32-t1-b1.json")


@pytest.fixture(scope="module")
def within(table: LatencyTable) -> Feasible:
    predict = array_predictor(table, TINY)
    drawn = np.random.default_rng(0).integers(0, TINY.radices, (2000, len(TINY.radices)))
    return feasible(TINY, predict, float(np.median(predict(drawn)[1])))


@pytest.fixture(scope="module")
def drawn(within: Feasible) -> np.ndarray:
    return np.array([within.draw(Random(seed)) for seed in range(80)])


def searched(folder: Path, within: Feasible, trials: int, accuracy) -> SearchResult:
    space = within.space
    latency = random_table(space).predictor(space)
    sampler = PredictorSampler(within, latency, first=10, seed=3)
    return search(
        space, accuracy, latency, budget_ms=within.budget_ms, device="cpu", trials=trials,
        storage=folder / "study.db", name="predictor", sampler=sampler,
    )  # fmt: skip


def proposals(result: SearchResult) -> list[Architecture]:
    return [scored.architecture for scored in sorted(result.scored, key=lambda scored: scored.number)]


def drawn_accuracy(architecture: Architecture) -> float:
    return Random(str(architecture)).random()


def small_within(share: float) -> tuple[Feasible, int]:
    """The architectures of the small space within a budget that this share of them keeps, and their number."""
    predict = array_predictor(random_table(SMALL), SMALL)
    upper_ms = predict(every_code(SMALL))[1]
    budget_ms = float(np.quantile(upper_ms, share))
    return feasible(SMALL, predict, budget_ms), int((upper_ms <= budget_ms).sum())


def test_the_predicted_ones_are_better_than_all_drawn_ones(table: LatencyTable, within: Feasible):
    noise = np.random.default_rng(1)
    sampler = PredictorSampler(within, table.predictor(TINY), first=40, seed=3)
    scored: list[tuple[tuple[int, ...], float]] = []
    for number in range(60):
        code = sampler.propose(scored, {code for code, _ in scored}, Random(number))
        assert code == TINY.canonical(code)
        assert within.keeps(code)
        scored.append((code, float(truth(np.array([code]))[0] + noise.normal(0, 0.003))))
    true = truth(np.array([code for code, _ in scored]))
    assert len({code for code, _ in scored}) == 60
    assert np.median(true[40:]) > true[:40].max()


def test_a_search_that_stopped_goes_on_as_if_nothing_had_been(tmp_path: Path):
    within, _ = small_within(0.5)
    whole = searched(tmp_path / "whole", within, 15, drawn_accuracy)
    for trials in (6, 12, 15):
        stopped = searched(tmp_path / "stopped", within, trials, drawn_accuracy)
    assert proposals(stopped) == proposals(whole)
    assert len(set(proposals(whole))) == 15


def test_what_is_ranked_is_feasible_canonical_distinct_and_in_order(within: Feasible, drawn: np.ndarray):
    predictor = fitted(TINY, drawn, truth(drawn))
    best = best_predicted(within, predictor, drawn, seed=0)
    assert len(np.unique(best, axis=0)) == len(best) == CANDIDATES
    assert (within.predictor(best)[1] <= within.budget_ms).all()
    assert all(TINY.canonical(code) == tuple(code) for code in best[:: CANDIDATES // 50].tolist())
    assert (np.diff(predictor(best)) <= 1e-12).all()
    assert predictor(best[:1])[0] > truth(drawn).max()


def test_a_place_whose_unit_is_not_there_adds_nothing():
    drawn = np.array([TINY.encode(TINY.sample(Random(seed))) for seed in range(80)])
    predictor = fitted(TINY, drawn, truth(drawn))
    filled = np.where(there(TINY, drawn), drawn, np.array(TINY.radices) - 1)
    assert (filled != drawn).any()
    assert np.array_equal(predictor(filled), predictor(drawn))


def test_the_error_of_shrinking_is_that_of_leaving_each_one_out(drawn: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    """The closed form picks the shrinkage that fitting without each architecture in turn would pick."""
    codes, accuracies = drawn[:20], truth(drawn[:20]) + np.random.default_rng(0).normal(0, 0.01, 20)
    chosen = fitted(TINY, codes, accuracies)

    def left_out(shrinkage: float) -> float:
        monkeypatch.setattr("hwnas.predictor.SHRINKAGES", (shrinkage,))
        rest = [np.delete(np.arange(20), index) for index in range(20)]
        errors = [
            fitted(TINY, codes[r], accuracies[r])(codes[i : i + 1])[0] - accuracies[i] for i, r in enumerate(rest)
        ]
        return float(np.mean(np.square(errors)))

    shrinkages = np.logspace(-2, 4, 25)
    best = min(shrinkages, key=left_out)
    monkeypatch.setattr("hwnas.predictor.SHRINKAGES", (float(best),))
    assert np.allclose(fitted(TINY, codes, accuracies).weights, chosen.weights)


def test_what_is_told_of_the_predictor_is_what_it_does_on_others(within: Feasible, drawn: np.ndarray):
    accuracies = truth(drawn) + np.random.default_rng(2).normal(0, 0.003, len(drawn))
    told = held_out(TINY, drawn, accuracies)
    others = np.array([within.draw(Random(seed)) for seed in range(1000, 1300)])
    predictor = fitted(TINY, drawn, accuracies)
    assert told.error < told.spread
    assert told.low < kendall_tau(list(predictor(others)), list(truth(others))) < 1
    assert told.tau > 0.4


def test_accuracies_of_pure_noise_are_ranked_on_seen_ones_and_not_on_held_out_ones(drawn: np.ndarray):
    seen, held = [], []
    for seed in range(10):
        noise = np.random.default_rng(seed).normal(0.7, 0.02, len(drawn))
        seen.append(kendall_tau(list(fitted(TINY, drawn, noise).above_mean(drawn)), list(noise)))
        held.append(held_out(TINY, drawn, noise, seed).tau)
    assert np.mean(seen) > 0.4
    assert abs(np.mean(held)) < 0.08


def test_equal_accuracies_give_no_correlation_and_do_not_stop_the_search(tmp_path: Path, drawn: np.ndarray):
    told = held_out(TINY, drawn, np.full(len(drawn), 0.5))
    assert (told.error, told.spread, told.tau) == (0, 0, 0)
    assert len(set(proposals(searched(tmp_path, small_within(0.5)[0], 12, lambda architecture: 0.5)))) == 12


def test_a_space_with_fewer_candidates_than_asked_is_proposed_to_the_last():
    within, count = small_within(0.01)
    sampler = PredictorSampler(within, random_table(SMALL).predictor(SMALL), first=10)
    scored: dict[tuple[int, ...], float] = {}
    for number in range(count):
        code = sampler.propose(list(scored.items()), set(scored), Random(number))
        assert code not in scored
        scored[code] = Random(str(code)).random()
    with pytest.raises(NothingLeftError):
        sampler.propose(list(scored.items()), set(scored), Random(count))
    assert len(scored) == count > 30
    assert all(map(within.keeps, scored))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((9, 40, "evolution", "off"), "at least 10 scored architectures. --predictor is 9"),
        ((40, 40, "evolution", "off"), "fewer than all of them. It is 40 of 40"),
        ((20, 40, "tpe", "off"), "the sampler is 'tpe'"),
        ((20, 40, "evolution", "strict"), "the guidelines are 'strict'"),
    ],
)
def test_a_predictor_that_cannot_be_trained_is_refused(settings: tuple, words: str):
    with pytest.raises(HwnasError, match=words):
        check_first(*settings)
