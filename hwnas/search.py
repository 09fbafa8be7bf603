"""`search`: the most accurate architectures of a space within a budget.

It sees two callables, `accuracy(architecture)` and `latency(architecture)`, and keeps everything in an Optuna study on
disk: a search that was killed goes on where it stopped, and several processes may search in one study.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from hwnas.errors import HwnasError
from hwnas.evolution import (
    Code,
    EvolutionSampler,
    Limit,
    NothingLeftError,
    Weights,
    descend,
    equal_weights,
    fastest,
    lawful,
    proposed_code,
    upper_ms_of,
    within_budget,
)
from hwnas.latency import Prediction
from hwnas.space import Architecture, SearchSpace
from hwnas.study import check_identity, fail_stale_trials, open_study, owner, storage_errors

SAMPLERS = ("evolution", "tpe", "nsgaii", "random")
"""Ours, which proposes only what is new and within the budget, and Optuna's, whose other proposals are not scored."""

PATIENCE = 500
"""Proposals in a row without a new architecture within the budget after which a search ends."""


@dataclass(frozen=True, slots=True)
class Scored:
    """An architecture within the budget and what is known of it.

    Attributes:
        accuracy: on the validation split, as `accuracy` gave it.
        prediction: of the latency table.
        number: of its trial in the study.
    """

    architecture: Architecture
    accuracy: float
    prediction: Prediction
    number: int


@dataclass(frozen=True, slots=True)
class SearchResult:
    """What a study holds.

    Attributes:
        scored: every scored architecture, best first.
        pareto: those that no other beats in both accuracy and predicted latency, fastest first.
        budget_binds: whether some architecture of the space is over the budget.
        notes: sentences for the user: a budget that does not bind, a search that ended early.
    """

    scored: tuple[Scored, ...]
    pareto: tuple[Scored, ...]
    budget_binds: bool
    notes: tuple[str, ...]

    @property
    def best(self) -> Scored:
        """The most accurate; the faster one of equals."""
        return self.scored[0]


def search(
    space: SearchSpace,
    accuracy: Callable[[Architecture], float],
    latency: Callable[[Architecture], Prediction],
    *,
    budget_ms: float,
    device: str,
    trials: int,
    storage: str | Path,
    name: str,
    sampler: str | BaseSampler = "evolution",
    seed: int = 0,
    weights: Weights | None = None,
    limits: Sequence[Limit] = (),
    identity: Mapping[str, str] | None = None,
    on_trial: Callable[[Scored, int], None] | None = None,
) -> SearchResult:
    """Scores architectures within the budget until the study holds `trials` of them.

    Run again with the same study it goes on where it stopped, or only reports if nothing is left to do. Several
    processes may call it with one study at the same time; together they score at most one architecture each too many.

    Args:
        space: what is searched.
        accuracy: scores an architecture on the validation split; higher is better. Called once for each at most.
        latency: predicts an architecture's latency; its upper estimate must be within the budget.
        budget_ms: the budget in milliseconds.
        device: what the budget is for, for messages.
        trials: architectures scored in the study in total, those of earlier runs included.
        storage: a SQLite file, made if missing, or the URL of a database that Optuna can use.
        name: of the study.
        sampler: one of `SAMPLERS`, or one that was made, which has its own seed, weights and limits.
        seed: the same seed and study give the same proposals.
        weights: how often the sampler `evolution` draws each value of each place; see `EvolutionSampler`.
        limits: hard constraints beside the budget.
        identity: what else makes scores comparable, such as the digests of table and supernet.
        on_trial: called after each scored architecture with it and the number scored in the study so far.

    Raises:
        HwnasError: a setting out of range, a budget that nothing meets, a study of another search, a broken storage.
    """
    check_settings(budget_ms, trials, sampler)
    slowest_ms = check_budget(space, latency, budget_ms, device, weights, limits)
    notes: list[str] = []
    if slowest_ms <= budget_ms:
        notes.append(
            f"The budget does not bind: {budget_ms:g} ms is enough for every architecture of {space.name} on {device}; "
            f"the slowest needs {slowest_ms:.3g} ms (upper estimate)."
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with storage_errors(storage):
        study = open_study(storage, name, make_sampler(sampler, space, latency, budget_ms, seed, weights, limits))
        check_identity(
            study,
            {
                "space": space.name,
                "space_sha256": space.digest,
                "budget_ms": repr(float(budget_ms)),
                **{f"{limit.name} limit": repr(float(limit.most)) for limit in limits},
                **(identity or {}),
            },
        )
        fail_stale_trials(study)
        worker = _Worker(study, space, accuracy, latency, budget_ms, limits)
        wasted = 0
        while (done := len(worker.scored())) < trials:
            if wasted >= PATIENCE:
                notes.append(
                    f"The sampler '{sampler}' found nothing new within {budget_ms:g} ms in {wasted} proposals; the "
                    f"search ended with {done} of {trials} architectures. Use the sampler 'evolution'."
                )
                break
            try:
                found = worker.try_one(trials)
            except NothingLeftError:
                notes.append(f"Every architecture of {space.name} within {budget_ms:g} ms is scored: {done} in all.")
                break
            wasted = 0 if found else wasted + 1
            if found and on_trial:
                on_trial(found, len(worker.scored()))
        return summarise(space, worker.scored(), slowest_ms > budget_ms, notes)


def summarise(space: SearchSpace, trials: list[FrozenTrial], budget_binds: bool, notes: list[str]) -> SearchResult:
    """The result of a study's scored trials; `HwnasError` if there is none."""
    if not trials:
        raise HwnasError(" ".join([*notes, "No architecture was scored."]))
    scored = sorted(
        (scored_of(space, trial) for trial in trials),
        key=lambda s: (-s.accuracy, s.prediction.latency_ms, s.number),
    )
    return SearchResult(tuple(scored), pareto_set(scored), budget_binds, tuple(notes))


def pareto_set(scored: list[Scored]) -> tuple[Scored, ...]:
    """Those that nothing else beats in accuracy without being slower, fastest first."""
    pareto: list[Scored] = []
    for one in sorted(scored, key=lambda s: (s.prediction.latency_ms, -s.accuracy, s.number)):
        if not pareto or one.accuracy > pareto[-1].accuracy:
            pareto.append(one)
    return tuple(pareto)


def scored_of(space: SearchSpace, trial: FrozenTrial) -> Scored:
    """Reads a scored trial back."""
    code = proposed_code(space, trial.params)
    assert code is not None
    prediction = Prediction(trial.user_attrs["latency_ms"], trial.user_attrs["upper_ms"])
    return Scored(space.decode(code), trial.values[0], prediction, trial.number)


# ---- before the search -----------------------------------------------------------------------------------------------


def check_settings(budget_ms: float, trials: int, sampler: str | BaseSampler) -> None:
    """Raises `HwnasError` for a setting that makes no sense."""
    if not (math.isfinite(budget_ms) and budget_ms > 0):
        raise HwnasError(f"The budget is a number of milliseconds above 0. It is {budget_ms}.")
    if trials < 1:
        raise HwnasError(f"At least one architecture must be scored. The number of trials is {trials}.")
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise HwnasError(f"The sampler is one of {', '.join(SAMPLERS)}. It is '{sampler}'.")


def check_budget(
    space: SearchSpace,
    latency: Callable[[Architecture], Prediction],
    budget_ms: float,
    device: str,
    weights: Weights | None = None,
    limits: Sequence[Limit] = (),
) -> float:
    """The upper estimate of an architecture over the budget, or of the slowest one if all are within it.

    Architectures with values of weight 0 do not count.

    Raises:
        HwnasError: nothing is within the budget, or a limit, or all together; the message says what the least needs.
    """
    any_ms = upper_ms_of(space, latency)
    weights = weights or equal_weights(space)

    def upper_ms(code: Code) -> float:
        return any_ms(lawful(space, weights, code))

    least_ms = upper_ms(fastest(space, upper_ms, budget_ms))
    if not least_ms <= budget_ms:
        raise HwnasError(
            f"The fastest architecture of {space.name} needs {least_ms:.3g} ms (upper estimate) on {device}; the "
            f"budget is {budget_ms:g} ms. Raise the budget, or take a smaller space."
        )
    if limits:
        check_limits(space, latency, budget_ms, device, weights, limits)
    largest = space.encode(space.largest)
    if upper_ms(largest) > budget_ms:
        return upper_ms(largest)
    return upper_ms(descend(space, lambda code: -upper_ms(code), largest))


def check_limits(
    space: SearchSpace,
    latency: Callable[[Architecture], Prediction],
    budget_ms: float,
    device: str,
    weights: Weights,
    limits: Sequence[Limit],
) -> None:
    """Raises `HwnasError` if nothing meets one of the limits, or nothing meets the budget and all limits together."""

    def legal(code: Code) -> Code:
        return lawful(space, weights, code)

    for limit in limits:

        def need(code: Code, limit: Limit = limit) -> float:
            return limit.needs(space.decode(legal(code)))

        if not (least := need(fastest(space, need, limit.most))) <= limit.most:
            raise HwnasError(
                f"The architecture of {space.name} of least {limit.name} needs {least:.3g} {limit.unit} (upper "
                f"estimate); the limit is {limit.most:g} {limit.unit}. Raise {limit.option}, or take a smaller space."
            )
    together = upper_ms_of(space, latency, budget_ms, limits)
    nearest = legal(fastest(space, lambda code: together(legal(code)), budget_ms))
    if not together(nearest) <= budget_ms:
        architecture = space.decode(nearest)
        needs = [f"{latency(architecture).upper_ms:.3g} ms of {budget_ms:g} ms"]
        needs += [
            f"{limit.needs(architecture):.3g} {limit.unit} {limit.name} of {limit.most:g} {limit.unit}"
            for limit in limits
        ]
        raise HwnasError(
            f"No architecture found in {space.name} meets the budget and the limits together; the nearest needs "
            f"{', '.join(needs)} (upper estimates on {device}). Raise the one that is exceeded."
        )


def make_sampler(
    name: str | BaseSampler,
    space: SearchSpace,
    latency: Callable[[Architecture], Prediction],
    budget_ms: float,
    seed: int,
    weights: Weights | None = None,
    limits: Sequence[Limit] = (),
) -> BaseSampler:
    """The sampler of that name; Optuna's read the budget from the constraint that each trial carries."""
    if isinstance(name, BaseSampler):
        return name
    if name == "evolution":
        return EvolutionSampler(space, latency, budget_ms, seed=seed, weights=weights, limits=limits)
    stock = {"tpe": TPESampler, "nsgaii": NSGAIISampler, "random": RandomSampler}
    return stock[name](seed=seed)


# ---- one trial -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Worker:
    """What one process needs to score architectures of a study."""

    study: Study
    space: SearchSpace
    accuracy: Callable[[Architecture], float]
    latency: Callable[[Architecture], Prediction]
    budget_ms: float
    limits: Sequence[Limit]

    def scored(self) -> list[FrozenTrial]:
        """The study's scored trials; finished ones over the budget carry no score."""
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return [trial for trial in trials if within_budget(trial)]

    def try_one(self, wanted: int) -> Scored | None:
        """Asks the sampler once; None if what it proposed was not scored. An interrupted trial is marked failed.

        A repeated architecture fails its trial, because every sampler of Optuna leaves failed trials out, whereas a
        copied score would count double and fill the population with copies. One over the budget finishes with its
        constraint violated and no score, from which Optuna's samplers learn where the budget ends.
        """
        trial = self.study.ask()
        try:
            trial.set_user_attr("owner", owner())
            return self.run(trial, wanted)
        finally:
            # whatever ended it; a trial that was told stays as it is
            self.study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)

    def run(self, trial: Trial, wanted: int) -> Scored | None:
        code = self.claim(trial)
        holders = [t.number for t in self.holders(code) if t.number != trial.number]
        if holders:
            trial.set_user_attr("repeats", min(holders))
            return None
        architecture = self.space.decode(code)
        prediction = self.latency(architecture)
        trial.set_user_attr("latency_ms", prediction.latency_ms)
        trial.set_user_attr("upper_ms", prediction.upper_ms)
        trial.set_constraint("upper_ms_over_budget", prediction.upper_ms - self.budget_ms)
        kept = prediction.upper_ms <= self.budget_ms
        for limit in self.limits:
            need = limit.needs(architecture)
            trial.set_user_attr(f"{limit.name} ({limit.unit})", need)
            trial.set_constraint(f"{limit.name} over limit", need - limit.most)
            kept = kept and need <= limit.most
        if not kept:
            self.study.tell(trial, -math.inf)
            return None
        if len(self.scored()) >= wanted:
            return None
        started = time.monotonic()
        value = float(self.accuracy(architecture))
        if not math.isfinite(value):
            raise HwnasError(
                f"An accuracy is a finite number. Trial {trial.number} got {value}: the supernet's weights are broken. "
                f"Train it again."
            )
        trial.set_user_attr("scoring_seconds", round(time.monotonic() - started, 3))
        told = self.study.tell(trial, value, skip_if_finished=True)
        return Scored(architecture, value, prediction, trial.number) if told.state == TrialState.COMPLETE else None

    def claim(self, trial: Trial) -> Code:
        """Has the sampler propose, writes the proposal into the study, and returns it in canonical form."""
        for place, radix in zip(self.space.places, self.space.radices, strict=True):
            if radix > 1:
                trial.suggest_int(place, 0, radix - 1)
        code = proposed_code(self.space, trial.params)
        assert code is not None
        return code

    def holders(self, code: Code) -> list[FrozenTrial]:
        """The running and finished trials with this architecture.

        Read after the own claim is written, so of two workers that claim the same at least one sees the other. Each
        that sees another gives up: both may, and then nothing is lost but a proposal.
        """
        states = (TrialState.RUNNING, TrialState.COMPLETE)
        trials = self.study.get_trials(deepcopy=False, states=states)
        return [trial for trial in trials if proposed_code(self.space, trial.params) == code]
