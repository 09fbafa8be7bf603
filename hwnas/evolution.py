"""`EvolutionSampler`: evolution under a hard budget, as an Optuna sampler.

Scoring an architecture takes seconds, predicting its latency about a millisecond. So each proposal first breeds a
litter of children of the best architectures (tournament, uniform crossover, mutation: the operators of Real et al.
2019), keeps only those that the table says are within the budget and that nobody has scored, and then lets a linear
model of everything scored so far choose one of them by its upper confidence bound.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hwnas.latency import Prediction
from hwnas.linear_model import features, upper_confidence
from hwnas.space import Architecture, SearchSpace

Code = tuple[int, ...]

FIRST_GENERATION = 10
"""Architectures drawn at random before the first children."""
PARENTS = 16
"""How many of the best are parents."""
LITTER = 32
"""Children bred for each proposal."""
ATTEMPTS = 20
"""Children tried for each one wanted; the more have failed, the more places are mutated."""


Weights = Sequence[Sequence[float]]
"""For each place of the encoding, how often each value is drawn relative to the others of the place."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A hard constraint beside the budget: what an architecture needs of something may be at most so much.

    Attributes:
        name: of what is limited: `memory`, `size`, `latency on gpu`.
        most: the limit.
        needs: what an architecture needs, at most.
        unit: of both, such as `MB` of 1,000,000 bytes.
        option: of the command line that gives the limit.
    """

    name: str
    most: float
    needs: Callable[[Architecture], float]
    unit: str
    option: str


class NothingLeftError(Exception):
    """Every architecture within the budget that single changes lead to has been proposed."""


# ---- the space as Optuna sees it -------------------------------------------------------------------------------------


def distributions(space: SearchSpace) -> dict[str, BaseDistribution]:
    """The parameters of a trial: an index into the choices for each place of the encoding that has more than one."""
    return {
        place: IntDistribution(0, radix - 1)
        for place, radix in zip(space.places, space.radices, strict=True)
        if radix > 1
    }


def proposed_code(space: SearchSpace, params: Mapping[str, Any]) -> Code | None:
    """The canonical encoding of a trial's parameters; None if not all of them have been written."""
    code = [0 if radix == 1 else params.get(place) for place, radix in zip(space.places, space.radices, strict=True)]
    return None if None in code else space.canonical([index for index in code if index is not None])


def within_budget(trial: FrozenTrial) -> bool:
    """Whether none of the trial's constraints is violated."""
    return all(value <= 0 for value in trial.constraints.values())


def upper_ms_of(
    space: SearchSpace,
    latency: Callable[[Architecture], Prediction],
    budget_ms: float = 0.0,
    limits: Sequence[Limit] = (),
) -> Callable[[Code], float]:
    """The upper estimate of a canonical encoding in milliseconds, remembered for the encodings asked for last.

    With limits it is the greatest of the upper estimate and, for each limit, the same share of the budget that the
    architecture needs of the limit. So it is within the budget exactly if the architecture meets all of them, and one
    search by it descends in what is scarcest.
    """

    @lru_cache(maxsize=20_000)
    def upper_ms(code: Code) -> float:
        architecture = space.decode(code)
        shares = [limit.needs(architecture) / limit.most for limit in limits]
        return max(latency(architecture).upper_ms, *(budget_ms * share for share in shares), 0.0)

    return upper_ms


def equal_weights(space: SearchSpace) -> Weights:
    """Weights that prefer nothing."""
    return [[1.0] * radix for radix in space.radices]


def lawful(space: SearchSpace, weights: Weights, code: Code) -> Code:
    """A canonical encoding with each value of weight 0 replaced by the heaviest one of its place."""
    changed = [i if place[i] else place.index(max(place)) for place, i in zip(weights, code, strict=True)]
    return code if tuple(changed) == code else space.canonical(changed)


def neighbours(space: SearchSpace, code: Code) -> Iterable[Code]:
    """Every architecture that differs in one place."""
    for place, radix in enumerate(space.radices):
        for index in range(radix):
            if index != code[place]:
                yield space.canonical((*code[:place], index, *code[place + 1 :]))


def descend(space: SearchSpace, cost: Callable[[Code], float], start: Code) -> Code:
    """The encoding of least `cost` that single changes reach from `start`, taking each one that helps at once."""
    best, least, stale = start, cost(start), False
    while not stale:
        stale = True
        for place, radix in enumerate(space.radices):
            for index in range(radix):
                code = space.canonical((*best[:place], index, *best[place + 1 :]))
                if (value := cost(code)) < least:
                    best, least, stale = code, value, False
    return best


def fastest(space: SearchSpace, upper_ms: Callable[[Code], float], budget_ms: float) -> Code:
    """The architecture of fewest MACs if it is within the budget; if not, the fastest that `descend` finds."""
    smallest = space.encode(space.smallest)
    return smallest if upper_ms(smallest) <= budget_ms else descend(space, upper_ms, smallest)


# ---- the sampler -----------------------------------------------------------------------------------------------------


class EvolutionSampler(BaseSampler):
    """Proposes architectures that are within the budget and that no running or finished trial of the study holds.

    A proposal depends on the seed and on the study's trials alone, so a resumed study goes on as if nothing had been.

    Args:
        space: what is searched; the study's parameters are `distributions(space)`, its direction is to maximise.
        latency: predicts an architecture; its upper estimate is held against the budget. It is asked some dozens of
            times for a proposal.
        budget_ms: what the upper estimate of each proposal stays under.
        seed: of all that is drawn.
        weights: for each place of the encoding, how often each value is drawn relative to the others; one of weight 0
            is never proposed. All alike by default.
        limits: what else each proposal meets.

    Raises (when asked):
        NothingLeftError: every architecture within the budget has been proposed.
    """

    def __init__(
        self,
        space: SearchSpace,
        latency: Callable[[Architecture], Prediction],
        budget_ms: float,
        *,
        seed: int = 0,
        weights: Weights | None = None,
        limits: Sequence[Limit] = (),
    ) -> None:
        self.space, self.budget_ms, self.seed = space, budget_ms, seed
        self.weights = weights or equal_weights(space)
        self.upper_ms = upper_ms_of(space, latency, budget_ms, limits)
        self.live = [place for place, radix in enumerate(space.radices) if radix > 1]

    @cached_property
    def floor(self) -> Code:
        """Where too slow architectures are moved to."""
        return self.lawful(fastest(self.space, lambda code: self.upper_ms(self.lawful(code)), self.budget_ms))

    def lawful(self, code: Code) -> Code:
        """`lawful` under the sampler's weights."""
        return lawful(self.space, self.weights, code)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return distributions(self.space)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        seen: set[Code] = set()
        scored: list[tuple[Code, float]] = []
        for other in study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.COMPLETE)):
            code = proposed_code(self.space, other.params)
            if code is None or other.number == trial.number:
                continue
            seen.add(code)
            if other.state == TrialState.COMPLETE and within_budget(other):
                scored.append((code, other.values[0]))
        code = self.propose(scored, seen, random.Random(f"{self.seed}:{trial.number}"))
        return {place: index for place, index in zip(self.space.places, code, strict=True) if place in search_space}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise ValueError(f"'{param_name}' with {param_distribution} is no place of the space {self.space.name}.")

    def propose(self, scored: Sequence[tuple[Code, float]], seen: set[Code], rng: random.Random) -> Code:
        """A canonical encoding within the budget that is not in `seen`.

        Args:
            scored: what is known: canonical encodings within the budget with their accuracies.
            seen: what must not come again.
            rng: all randomness.

        Raises:
            NothingLeftError: there is none.
        """
        floor = self.floor
        if len(scored) < FIRST_GENERATION:
            litter = self.litter(lambda strength: self.newcomer(floor, rng, strength), seen, 1)
        else:
            parents = [code for code, _ in sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:PARENTS]]
            litter = self.litter(lambda strength: self.child(parents, floor, rng, strength), seen, LITTER)
        if not litter:
            return self.near(floor, seen)
        if len(litter) == 1:
            return litter[0]
        codes = [code for code, _ in scored]
        hopes = upper_confidence(self.features(codes), [value for _, value in scored], self.features(litter))
        return litter[int(np.argmax(hopes))]

    def litter(self, breed: Callable[[float], Code], seen: set[Code], wanted: int) -> list[Code]:
        """Up to `wanted` different codes of `breed(strength)` that are within the budget and not in `seen`."""
        found: dict[Code, None] = {}
        for attempt in range(wanted * ATTEMPTS):
            code = self.lawful(breed(1.5 + 4 * attempt / (wanted * ATTEMPTS)))
            if code not in seen and code not in found and self.upper_ms(code) <= self.budget_ms:
                found[code] = None
                if len(found) == wanted:
                    break
        return list(found)

    def newcomer(self, floor: Code, rng: random.Random, strength: float) -> Code:
        """A random architecture moved to an upper estimate in the last third of what the budget leaves."""
        least = self.upper_ms(floor)
        goal = least + (self.budget_ms - least) * rng.uniform(0.7, 1.0)
        drawn = [rng.choices(range(len(weights)), weights)[0] for weights in self.weights]
        code = self.shrink(self.space.canonical(drawn), floor, goal, rng)
        for _ in range(len(self.live)):
            if self.upper_ms(code) > 0.9 * goal:
                break
            grown = self.mutate(code, rng, 1.0)
            if self.upper_ms(code) < self.upper_ms(grown) <= goal:
                code = grown
        return self.mutate(code, rng, strength) if strength > 2.5 else code

    def child(self, parents: Sequence[Code], floor: Code, rng: random.Random, strength: float) -> Code:
        """Tournament of three, uniform crossover half of the time, mutation; half of the too slow ones are mended."""
        code = parents[min(rng.randrange(len(parents)) for _ in range(3))]
        if rng.random() < 0.5:
            other = rng.choice(parents)
            code = self.space.canonical([rng.choice(pair) for pair in zip(code, other, strict=True)])
        code = self.mutate(code, rng, strength)
        return code if rng.random() < 0.5 else self.shrink(code, floor, self.budget_ms, rng)

    def mutate(self, code: Code, rng: random.Random, strength: float) -> Code:
        """Changes `strength` places on average (geometric, at least one), to values drawn by their weights."""
        count = 1
        while rng.random() < 1 - 1 / strength:
            count += 1
        changed = list(code)
        for place in rng.sample(self.live, min(count, len(self.live))):
            others = [index for index in range(self.space.radices[place]) if index != changed[place]]
            weights = [self.weights[place][index] for index in others]
            if any(weights):
                changed[place] = rng.choices(others, weights)[0]
        return self.space.canonical(changed)

    def shrink(self, code: Code, floor: Code, goal_ms: float, rng: random.Random) -> Code:
        """Takes over places of `floor`, in random order and where it helps, until the upper estimate is at the goal."""
        for place in rng.sample(self.live, len(self.live)):
            if self.upper_ms(code) <= goal_ms:
                break
            smaller = self.space.canonical((*code[:place], floor[place], *code[place + 1 :]))
            if self.upper_ms(smaller) < self.upper_ms(code):
                code = smaller
        return code

    def near(self, floor: Code, seen: set[Code]) -> Code:
        """The first unseen architecture within the budget among `floor` and all neighbours of what has been seen."""
        if floor not in seen and self.upper_ms(floor) <= self.budget_ms:
            return floor
        for code in sorted(seen):
            for neighbour in map(self.lawful, neighbours(self.space, code)):
                if neighbour not in seen and self.upper_ms(neighbour) <= self.budget_ms:
                    return neighbour
        raise NothingLeftError(f"Every architecture of {self.space.name} within {self.budget_ms:g} ms is proposed.")

    def features(self, codes: Sequence[Code]) -> np.ndarray:
        """`linear_model.features` of encodings, `[N, F]`."""
        return features(self.space, codes, [self.upper_ms(code) for code in codes])
