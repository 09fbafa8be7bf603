"""A predictor of accuracy, trained on architectures that the supernet has scored, and the search that it guides.

Scoring takes seconds, predicting microseconds. So the first architectures are drawn evenly from the feasible ones and
scored; a model learns from them, ranks 100,000 others, and only the best predicted are scored (Wen et al. 2019, Neural
Predictor for Neural Architecture Search, arXiv 1912.00848, section 3). The model is ridge regression on which value
stands at which place (Hoerl and Kennard 1970); how far it shrinks is decided by the error on each architecture left
out, which has a closed form (Allen 1974).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hwnas.errors import HwnasError
from hwnas.evolution import Code, EvolutionSampler, Limit
from hwnas.feasible import Feasible
from hwnas.latency import Prediction
from hwnas.linear_model import one_hot
from hwnas.ranking import rank_correlation
from hwnas.runs import HeldOut
from hwnas.space import CHOICES, Architecture, SearchSpace

LEAST_FIRST = 10
"""From fewer scored architectures nothing is learned."""
CANDIDATES = 100_000
"""Different feasible architectures that are ranked at a time."""
CHILDREN = 20_000
"""Bred at a time from the best predicted ones."""
PARENTS = 1_000
MUTATIONS = 2.0
"""Places of a child that are drawn anew, on average."""
BARREN = 5
"""Rounds of children in a row that bring fewer than one new in a hundred, after which breeding ends."""
FOLDS = 5
SHRINKAGES = tuple(float(value) for value in np.logspace(-2, 4, 25))
"""Penalties on squared weights that are tried."""
DRAWS = 1_000
"""Drawn for one new architecture, before the neighbours of the known ones are looked through."""

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Predictor:
    """Predicts accuracies; `fitted` makes it.

    Attributes:
        space: of the encodings.
        weights: what each value of each place adds, place after place, `[sum of the radices]`.
        mean: of the accuracies that it was fitted on.
        offset: what the weights add up to on average over the architectures that it was fitted on.
    """

    space: SearchSpace
    weights: Floats
    mean: float
    offset: float

    def __call__(self, codes: Codes) -> Floats:
        """The predicted accuracies `[N]` of canonical encodings `[N, places]`."""
        return self.mean + self.above_mean(codes)

    def above_mean(self, codes: Codes) -> Floats:
        """The same less the mean of what the predictor knows."""
        starts = np.concatenate([[0], np.cumsum(self.space.radices)[:-1]])
        return (self.weights[starts + codes] * there(self.space, codes)).sum(1) - self.offset


def there(space: SearchSpace, codes: Codes) -> NDArray[np.bool_]:
    """Which places of encodings `[N, places]` belong to units that the architecture has, of the same shape."""
    found, start = np.ones(codes.shape, bool), 0
    for stage in space.stages:
        depth, most = np.array(stage.depth)[codes[:, start]], max(stage.depth)
        units = np.repeat(np.arange(most), len(CHOICES))
        found[:, start + 2 : start + 2 + len(units)] = units < depth[:, None]
        start += 2 + len(units)
    return found


def fitted(space: SearchSpace, codes: Codes, accuracies: Floats) -> Predictor:
    """The predictor of least leave-one-out error.

    Args:
        space: of the encodings.
        codes: canonical encodings, `[N, places]`.
        accuracies: theirs, `[N]`.
    """
    features = one_hot(space, codes, there(space, codes))
    centre, mean = features.mean(0), float(accuracies.mean())
    u, s, vt = np.linalg.svd(features - centre, full_matrices=False)
    turned = u.T @ (accuracies - mean)

    def error(shrinkage: float) -> float:
        kept = s**2 / (s**2 + shrinkage)
        left = accuracies - mean - u @ (kept * turned)
        return float(np.mean((left / (1 - 1 / len(codes) - (u**2) @ kept)) ** 2))

    shrinkage = min(reversed(SHRINKAGES), key=error)
    weights = vt.T @ (s / (s**2 + shrinkage) * turned)
    return Predictor(space, weights, mean, float(centre @ weights))


def held_out(space: SearchSpace, codes: Codes, accuracies: Floats, seed: int = 0) -> HeldOut:
    """How well predictors do that were fitted on four fifths of the architectures, on the fifth that they never saw.

    Everything is fitted anew each time, the shrinkage too. Predictions of the five are ranked together by what they
    say above their own mean: a fifth of high accuracies leaves a low mean behind, which would count against it.

    Args:
        space: of the encodings.
        codes: canonical encodings `[N, places]`, drawn evenly.
        accuracies: theirs, `[N]`.
        seed: of the division.
    """
    predicted, above = np.empty(len(codes)), np.empty(len(codes))
    for fold in np.array_split(np.random.default_rng(seed).permutation(len(codes)), FOLDS):
        rest = np.setdiff1d(np.arange(len(codes)), fold)
        predictor = fitted(space, codes[rest], accuracies[rest])
        predicted[fold], above[fold] = predictor(codes[fold]), predictor.above_mean(codes[fold])
    tau = rank_correlation(list(above), list(accuracies))
    error = float(np.sqrt(np.mean((predicted - accuracies) ** 2)))
    return HeldOut(len(codes), error, float(np.std(accuracies)), tau.tau, tau.low, tau.high)


def best_predicted(feasible: Feasible, predictor: Predictor, start: Codes, seed: int) -> Codes:
    """Up to `CANDIDATES` different feasible architectures, best predicted first, `[N, places]`; takes seconds.

    They are bred from `start`: uniform crossover of two of the best predicted, and mutation.

    Args:
        feasible: the space, its latency table and the budget.
        predictor: judges.
        start: canonical encodings of feasible architectures, `[M, places]`.
        seed: of all randomness.
    """
    space, rng = feasible.space, np.random.default_rng([seed, len(start)])
    radices = np.array(space.radices)
    rate = MUTATIONS / max(1, int((radices > 1).sum()))
    factors = rng.integers(2**63, size=len(radices))

    def distinct(codes: Codes) -> Codes:
        """Each once, by 63-bit digests: two that share one by chance would count as one."""
        return codes[np.unique(codes @ factors, return_index=True)[1]]

    def best_first(codes: Codes) -> Codes:
        return codes[np.argsort(-predictor(codes), kind="stable")]

    found, barren = best_first(distinct(start)), 0
    while len(found) < CANDIDATES and barren < BARREN:
        parents = found[:PARENTS]
        mother, father = parents[rng.integers(len(parents), size=(2, CHILDREN))]
        children = np.where(rng.random(mother.shape) < 0.5, mother, father)
        drawn = rng.integers(radices, size=children.shape)
        children = np.where(rng.random(children.shape) < rate, drawn, children)
        children = distinct(children * there(space, children))
        children = children[feasible.predictor(children)[1] <= feasible.budget_ms]
        before, found = len(found), best_first(distinct(np.concatenate([found, children])))
        barren = barren + 1 if len(found) - before < CHILDREN / 100 else 0
    return found[:CANDIDATES]


class PredictorSampler(EvolutionSampler):
    """Proposes `first` architectures evenly drawn, then those that a predictor fitted on what is scored thinks best.

    It is fitted anew each time that as many again are scored. A proposal depends on the seed and on the study's trials
    alone. The corners of a small space are looked through as `EvolutionSampler` does.

    Args:
        feasible: draws evenly, within the budget.
        first: how many.
        latency, seed, limits: as those of `EvolutionSampler`.
    """

    def __init__(
        self,
        feasible: Feasible,
        latency: Callable[[Architecture], Prediction],
        *,
        first: int,
        seed: int = 0,
        limits: Sequence[Limit] = (),
    ) -> None:
        super().__init__(feasible.space, latency, feasible.budget_ms, seed=seed, limits=limits)
        self.feasible, self.first = feasible, first
        self.ranked: tuple[int, list[Code]] = (0, [])

    def propose(self, scored: Sequence[tuple[Code, float]], seen: set[Code], rng: random.Random) -> Code:
        def fits(code: Code) -> bool:
            return code not in seen and self.upper_ms(code) <= self.budget_ms

        if len(scored) < self.first:
            drawn = (self.feasible.draw(rng) for _ in range(DRAWS))
            return next(filter(fits, drawn), None) or self.near(self.floor, seen)
        known = len(scored) // self.first * self.first
        if self.ranked[0] != known:
            codes = np.array([code for code, _ in scored[:known]])
            predictor = fitted(self.space, codes, np.array([accuracy for _, accuracy in scored[:known]]))
            best = best_predicted(self.feasible, predictor, codes, self.seed)
            self.ranked = known, [tuple(code) for code in best.tolist()]
        return next(filter(fits, self.ranked[1]), None) or self.near(self.floor, seen)


def check_first(first: int | None, trials: int, sampler: str, guidelines: str) -> None:
    """Raises `HwnasError` if a search by predictor cannot be done."""
    if first is None:
        return
    if first < LEAST_FIRST:
        raise HwnasError(
            f"A predictor learns from at least {LEAST_FIRST} scored architectures. --predictor is {first}."
        )
    if first >= trials:
        raise HwnasError(
            f"--predictor is how many of the --trials are drawn evenly, fewer than all of them. It is {first} of "
            f"{trials}. Give more --trials."
        )
    if sampler != "evolution" or guidelines != "off":
        raise HwnasError(
            f"--predictor draws evenly and decides alone what comes then; the sampler is '{sampler}', the guidelines "
            f"are '{guidelines}'. Leave --sampler and --guidelines out, or --predictor."
        )
