"""A trust report: how far a supernet's word on an architecture agrees with training it from scratch.

Architectures spread over the range of latencies are scored twice on the validation split: with the weights that they
inherit from the supernet, and trained from new weights, all by one recipe. What a search needs of the first is the
order of the second. The most accurate architecture that a search finds on the supernet, and that of a random search
with as many evaluations, are trained from new weights beside them.

Every score is written when it is there, and a network in training leaves a checkpoint each half minute.
"""

import json
import math
import random
import shutil
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas import side_by_side
from hwnas.conditions import profile_command
from hwnas.errors import HwnasError
from hwnas.latency import LatencyTable, load_table, matching_table, table_path
from hwnas.network import macs
from hwnas.ranking import RankCorrelation, best_third, rank_correlation
from hwnas.runs import write_text
from hwnas.space import Architecture, lower
from hwnas.stages import (
    SETTINGS,
    Job,
    Listener,
    load_settings,
    make_job,
    trained_supernet,
)
from hwnas.trained import retrained
from hwnas.whole_networks import candidates, spread

if TYPE_CHECKING:
    from hwnas.candidate_scoring import SharedScorer

LEAST_ARCHITECTURES, TRIALS = 4, 40
SAMPLERS = ("evolution", "random")
"""Our search, and the one that it must beat."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a trust report is to tell.

    Attributes:
        architectures: how many are judged, spread over latency.
        epochs: passes over the training images of each training from scratch.
        seeds: trainings from scratch of each architecture.
        budget_ms: of the two searches; by default that of the run, or the middle of the range.
        trials: architectures that each search scores; by default as many as the run did, or 40.
        batch_size, learning_rate: of each training from scratch; by default those of the supernet.
    """

    architectures: int = 20
    epochs: int = 20
    seeds: int = 1
    budget_ms: float | None = None
    trials: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if self.architectures < LEAST_ARCHITECTURES:
            raise HwnasError(
                f"A trust report needs at least {LEAST_ARCHITECTURES} architectures, and 20 to say much. It was given "
                f"{self.architectures}."
            )


@dataclass(frozen=True, slots=True)
class Judged:
    """An architecture with its scores, all of them shares of the validation images, 0 to 1.

    Attributes:
        architecture: as `Architecture.to_json` writes it, parsed.
        latency_ms: the table's estimate.
        macs: multiply-adds for one image.
        inherited: with the weights of the supernet.
        from_scratch: trained from new weights, by seed.
    """

    architecture: dict[str, Any]
    latency_ms: float
    macs: int
    inherited: float
    from_scratch: tuple[float, ...]

    @property
    def trained(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.from_scratch)

    @property
    def gap(self) -> float:
        """What training from scratch adds to the inherited accuracy."""
        return self.trained - self.inherited


@dataclass(frozen=True, slots=True)
class TrustReport:
    """What was found.

    Attributes:
        supernet: the name of its folder.
        space, data, device, chip: names; device and chip are those of the latency table.
        recipe: of the trainings from scratch, in words.
        validation_images: on which everything was scored.
        judged: the architectures, the fastest first.
        budget_ms, trials: of the two searches.
        winners: the most accurate architecture of each search by inherited accuracy, by the search's sampler.
    """

    supernet: str
    space: str
    data: str
    device: str
    chip: str
    recipe: str
    validation_images: int
    judged: tuple[Judged, ...]
    budget_ms: float
    trials: int
    winners: dict[str, Judged]

    @property
    def correlation(self) -> RankCorrelation:
        """Of inherited accuracy and accuracy from scratch."""
        return _correlation(self.judged)

    @property
    def top_correlation(self) -> RankCorrelation:
        """The same within the third that is best from scratch, where it is hard."""
        return _correlation([self.judged[index] for index in best_third([one.trained for one in self.judged])])

    @property
    def latency_correlation(self) -> RankCorrelation:
        """Of latency alone and accuracy from scratch: what ranks by size needs no supernet."""
        return rank_correlation([one.latency_ms for one in self.judged], [one.trained for one in self.judged])

    @property
    def macs_correlation(self) -> RankCorrelation:
        """Of multiply-adds alone and accuracy from scratch."""
        return rank_correlation([one.macs for one in self.judged], [one.trained for one in self.judged])

    @property
    def ceiling(self) -> RankCorrelation | None:
        """Of two trainings from scratch that differ in the seed alone: what no score can be expected to exceed."""
        if len(self.judged[0].from_scratch) < 2:
            return None
        first, second = zip(*(one.from_scratch[:2] for one in self.judged), strict=True)
        return rank_correlation(first, second)

    @property
    def noise(self) -> float:
        """The standard error of an accuracy from the number of validation images (binomial)."""
        mean = statistics.fmean(one.trained for one in self.judged)
        return math.sqrt(mean * (1 - mean) / self.validation_images)


def _correlation(judged: "list[Judged] | tuple[Judged, ...]") -> RankCorrelation:
    return rank_correlation([one.inherited for one in judged], [one.trained for one in judged])


def trust(
    folder: Path, question: Question, *, table_file: Path | None = None, listener: Listener | None = None
) -> tuple[Path, TrustReport]:
    """Judges the supernet of a folder that `hwnas train` or `hwnas search` printed; goes on where it stopped.

    Args:
        folder: of the supernet, or of a run that searched one.
        question: what to tell.
        table_file: a latency table of the space; by default that of the run, or the one of the job's device.
        listener: is told what happens.

    Returns:
        The folder of the report, beside that of the supernet, and the report.

    Raises:
        HwnasError: the folder is neither, there is no latency table, or a budget that nothing meets.
    """
    settings = _settings(folder)
    job = make_job(
        settings["space"],
        settings["data"],
        listener=listener or Listener(),
        runs=folder.parent,
        **{name: settings[name] for name in SETTINGS},
    )
    plan = settings.get("plan", {})
    budget_ms, trials = question.budget_ms or plan.get("budget_ms"), question.trials or plan.get("trials")
    table = _table(job, table_file or settings.get("table"))
    return judge(job, table, replace(question, budget_ms=budget_ms, trials=trials))


def judge(job: Job, table: LatencyTable, question: Question) -> tuple[Path, TrustReport]:
    """Judges the supernet of a job, which is trained if it is not yet; see `trust`.

    The trainings from scratch take batch size and learning rate of the job, unless the question has its own.
    """
    from hwnas.candidate_scoring import SharedScorer

    sum_ms = spread(candidates(job.space, table.unit_ms(job.space), random.Random(job.seed)), question.architectures)
    chosen = [job.space.decode(code) for code in sum_ms]
    supernet_path, supernet = trained_supernet(job, table)
    report_folder = job.runs / f"trust-{supernet_path.name.removeprefix('supernet-')}"
    job = replace(
        job,
        retrain_epochs=question.epochs,
        batch_size=question.batch_size or job.batch_size,
        learning_rate=question.learning_rate or job.learning_rate,
    )
    scores = Scores(job, report_folder, supernet_path.name, SharedScorer(supernet, job.data))
    ends_ms = [table.predict(lower(job.space, chosen[end])).upper_ms for end in (0, -1)]
    budget_ms, trials = question.budget_ms or math.sqrt(ends_ms[0] * ends_ms[1]), question.trials or TRIALS
    winners = {sampler: scores.winner(table, sampler, budget_ms, trials) for sampler in SAMPLERS}
    everyone = dict.fromkeys([*chosen, *winners.values()])
    job.listener.stage(f"Scoring {len(chosen)} architectures with inherited weights")
    inherited = {}
    for done, architecture in enumerate(everyone, 1):
        inherited[architecture] = scores.inherited(architecture)
        job.listener.progress(done, len(everyone), f"{inherited[architecture]:.1%}")
    trained: dict[Architecture, list[float]] = {architecture: [] for architecture in everyone}
    for seed in range(question.seeds):
        for architecture, accuracy in scores.from_scratch(list(everyone), job.seed + seed).items():
            trained[architecture].append(accuracy)

    def judged(architecture: Architecture) -> Judged:
        network, facts = lower(job.space, architecture), json.loads(architecture.to_json())
        latency_ms, scores = table.predict(network).latency_ms, tuple(trained[architecture])
        return Judged(facts, latency_ms, macs(network), inherited[architecture], scores)

    recipe = f"{question.epochs} epochs, batch {job.batch_size}, learning rate {job.learning_rate:g}"
    report = TrustReport(
        supernet=supernet_path.name,
        space=job.space.name,
        data=job.data.name,
        device=table.conditions.device,
        chip=table.conditions.chip,
        recipe=recipe + (f", {question.seeds} seeds" if question.seeds > 1 else ""),
        validation_images=len(job.data.validation),
        judged=tuple(judged(architecture) for architecture in chosen),
        budget_ms=budget_ms,
        trials=trials,
        winners={sampler: judged(architecture) for sampler, architecture in winners.items()},
    )
    write_text(report_folder / "trust.json", json.dumps(asdict(report), indent=1))
    return report_folder, report


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of a run or of a supernet."""
    path = folder / "supernet.json"
    if not path.is_file():
        return load_settings(folder)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
        return {name: settings[name] for name in ("space", "data", *SETTINGS)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HwnasError(
            f"{path} does not tell how the supernet was made ({error!r}). Run hwnas train again with its settings: "
            "it writes that file anew and trains nothing twice."
        ) from None


def _table(job: Job, file: "Path | str | None") -> LatencyTable:
    """The latency table that spreads the architectures; it is not measured here."""
    from hwnas.opening import open_device

    if file is not None and Path(file).is_file():
        return load_table(Path(file))
    if file is not None:
        raise HwnasError(f"There is no latency table {file}. Give another with --table, or measure it: hwnas profile.")
    with open_device(job.device) as opened:
        conditions = opened.conditions(job.threads, job.batch, job.precision)
    table = matching_table(table_path(job.tables, job.space.name, conditions), conditions)
    if table is None:
        raise HwnasError(
            f"Architectures are spread over latency, and there is no latency table of {job.space.name} on "
            f"{job.device}. Measure it with: {profile_command(job.sources[0], conditions)}. Or give one with --table."
        )
    return table


class Scores:
    """Scores of architectures, each made once and kept in the folder; `known` are those made so far, by name."""

    def __init__(self, job: Job, folder: Path, supernet: str, scorer: "SharedScorer") -> None:
        self.job, self.folder, self.supernet, self.scorer = job, folder, supernet, scorer
        self.path = folder / "scores.json"
        try:
            self.known: dict[str, float] = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError as error:
            raise HwnasError(f"{self.path} is damaged ({error}). Remove it: its scores are then made anew.") from None

    def _key(self, what: str, architecture: Architecture) -> str:
        return f"{what}: {' '.join(map(str, self.job.space.encode(architecture)))}"

    def _keep(self, key: str, score: float) -> float:
        self.known[key] = score
        write_text(self.path, json.dumps(self.known, indent=1))
        return score

    def inherited(self, architecture: Architecture) -> float:
        """The accuracy with the supernet's weights."""
        key = self._key("inherited", architecture)
        if key in self.known:
            return self.known[key]
        return self._keep(key, self.scorer(self.job.space.encode(architecture)))

    def from_scratch(self, architectures: list[Architecture], seed: int) -> dict[Architecture, float]:
        """The accuracy of each after a training from new weights, whose checkpoints are removed when it is done."""
        job = replace(self.job, seed=seed)
        how = f"{job.retrain_epochs} epochs, batch {job.batch_size}, learning rate {job.learning_rate:g}, seed {seed}"
        keys = {architecture: self._key(f"from scratch, {how}", architecture) for architecture in architectures}
        size = side_by_side.at_a_time(job, len(architectures)) if side_by_side.helps() else 1
        for first in range(0, len(architectures), size):  # the same groups again after a stop
            group = [one for one in architectures[first : first + size] if keys[one] not in self.known]
            if not group:
                continue
            if size > 1:
                accuracies, checkpoints = side_by_side.accuracies_from_scratch(job, group, self.folder)
            else:
                accuracies, checkpoints = self._one_from_scratch(job, group[0], first, len(architectures))
            for architecture, accuracy in zip(group, accuracies, strict=True):
                self._keep(keys[architecture], accuracy)
            shutil.rmtree(self.folder / checkpoints, ignore_errors=True)  # only these: others may be half way
        return {architecture: self.known[key] for architecture, key in keys.items()}

    def _one_from_scratch(
        self, job: Job, architecture: Architecture, index: int, count: int
    ) -> tuple[list[float], str]:
        import jax

        name = f"architecture {index + 1} of {count}" + (f", seed {job.seed}" if job.seed != self.job.seed else "")
        trained = retrained(job, replace(lower(job.space, architecture), name=name), self.folder)
        jax.clear_caches()  # what was compiled for one network is of no use to the next
        return [trained.validation_accuracy], trained.checkpoints

    def winner(self, table: LatencyTable, sampler: str, budget_ms: float, trials: int) -> Architecture:
        """The most accurate of so many architectures that a search scores with inherited weights."""
        from hwnas.search import search

        job, digest = self.job, table.digest
        job.listener.stage(f"Scoring {trials} architectures within {budget_ms:.3g} ms, sampler {sampler}")
        result = search(
            job.space,
            self.inherited,
            table.predictor(job.space),
            budget_ms=budget_ms,
            device=table.conditions.device,
            trials=trials,
            storage=self.folder / "study.db",
            name=f"{sampler}-{budget_ms:.6g}ms-{digest[:8]}",
            sampler=sampler,
            seed=job.seed,
            identity={"table_sha256": digest, "supernet": self.supernet},
            on_trial=lambda scored, done: job.listener.progress(done, trials, f"{scored.accuracy:.1%}"),
        )
        for note in result.notes:
            job.listener.note(note)
        return result.scored[0].architecture
