"""The main job from a space and a budget to a proved model: the work of `hwnas search`."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hwnas.conditions import profile_command
from hwnas.errors import HwnasError
from hwnas.guideline_prior import check_setting, sampler_weights
from hwnas.latency import LatencyTable, Measurement, Prediction
from hwnas.network import macs, parameters
from hwnas.runs import Candidate, Compared, HeldOut, Proof, Requirement, RunResult, write_text
from hwnas.space import Architecture, lower
from hwnas.stages import (
    Budget,
    Job,
    file_name,
    latency_table,
    save_settings,
    supernet_folder,
    supernet_recipe,
    trained_supernet,
)
from hwnas.trained import Trained, memory_mb, model_of, proved, retrained, timing_of

if TYPE_CHECKING:
    from hwnas.devices import Device
    from hwnas.evolution import Limit, Weights
    from hwnas.predictor import PredictorSampler
    from hwnas.search import Scored, SearchResult
    from hwnas.supernet import Supernet
    from hwnas.target import Further, Target

FINALISTS = 5
"""How many of the best candidates are measured whole at a time."""
SEARCH_ATTEMPTS = 3
"""How often the search is lengthened if no finalist keeps the budget."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a search looks for.

    Attributes:
        budget_ms: what a run of the model may take, in milliseconds.
        trials: architectures that the search scores.
        sampler: one of `search.SAMPLERS`.
        storage: an Optuna storage URL; without one a SQLite file in the run's folder.
        from_scratch: trains the winner from new weights instead of those of the supernet.
        baselines: trains and measures ShuffleNet V2 0.5x and 1x by the same recipe.
        guidelines: one of `guideline_prior.SETTINGS`: how the device's verdicts on G1 to G4 shape what is drawn.
        memory_mb: what the model may add to the peak memory of a process, in megabytes of 1,000,000 bytes.
        size_mb: what its file may take.
        predictor: how many of the trials are drawn evenly and train a predictor of accuracy, which chooses the others.
        further: the budgets of further devices that the same model must keep.
    """

    budget_ms: float
    trials: int = 40
    sampler: str = "evolution"
    storage: str | None = None
    from_scratch: bool = False
    baselines: bool = False
    guidelines: str = "off"
    memory_mb: float | None = None
    size_mb: float | None = None
    predictor: int | None = None
    further: tuple[Budget, ...] = ()


def run_folder(job: Job, plan: Plan) -> Path:
    """Where a run keeps its results unless another folder is given."""
    supernet = supernet_folder(job, supernet_recipe(job)).name
    settings = f"{job.device}-{plan.budget_ms:g}ms" + (f"-t{job.threads}" if job.threads > 1 else "")
    settings += (f"-b{job.batch}" if job.batch > 1 else "") + ("-scratch" if plan.from_scratch else "")
    settings += f"-{plan.guidelines}" if plan.guidelines != "off" else ""
    settings += f"-predictor{plan.predictor}" if plan.predictor else ""
    for name, most_mb in (("memory", plan.memory_mb), ("size", plan.size_mb)):
        settings += f"-{name}-{most_mb:g}MB" if most_mb is not None else ""
    settings += "".join(f"-{one.device}-{one.budget_ms:g}ms" for one in plan.further)
    return job.runs / f"{supernet.removeprefix('supernet-')}-{file_name(settings)}"


def find(job: Job, plan: Plan, folder: Path | None = None) -> tuple[Path, RunResult]:
    """Finds, trains, exports and proves the most accurate network within a budget.

    Args:
        job: space, data, device and settings.
        plan: budget and how to search.
        folder: of the run; `run_folder(job, plan)` by default.

    Returns:
        The run's folder, and what was found.

    Raises:
        HwnasError: what the user gave cannot work; the message says what to do.
    """
    from hwnas.limits import check_limit_settings, limits_of
    from hwnas.opening import open_device
    from hwnas.predictor import check_first
    from hwnas.report import write_report
    from hwnas.search import check_budget, check_settings
    from hwnas.supernet_file import check_supernet
    from hwnas.target import Target, check_further, further_of

    check_settings(plan.budget_ms, plan.trials, plan.sampler)
    check_setting(plan.guidelines, plan.sampler)
    check_first(plan.predictor, plan.trials, plan.sampler, plan.guidelines)
    check_limit_settings(plan.memory_mb, plan.size_mb)
    check_further(job.device, plan.further)
    if plan.from_scratch and not job.retrain_epochs:
        raise HwnasError("--from-scratch starts from new weights; --retrain-epochs 0 leaves them so. Give 1 or more.")
    if job.supernet:  # before minutes go into a table
        check_supernet(Path(job.supernet), job.space, job.data.classes)
    folder = folder or run_folder(job, plan)
    seconds: dict[str, float] = {}
    with ExitStack() as opened:
        names = [one.device for one in plan.further]
        device, *others = [opened.enter_context(open_device(name, job.listener.note)) for name in (job.device, *names)]
        with timed(seconds, "latency table"):
            path, table = latency_table(job, device)
            further = further_of(job, plan.further, others)
        weights = sampler_weights(job.space, job.sources[0], table, plan.guidelines)
        own_limits = limits_of(job, table, table.digest, plan.memory_mb, plan.size_mb, names)
        target = Target(device, table, table.digest, own_limits, further)
        limits = target.limits(job.space)
        check_budget(job.space, table.predictor(job.space), plan.budget_ms, job.device, weights, limits)
        with timed(seconds, "supernet"):
            _, supernet = trained_supernet(job, table)
        if not (folder / "run.json").exists():  # a finished run stays whole until the new one is
            save_settings(folder, job, plan=asdict(plan), table=str(path))
        with timed(seconds, "search"):
            result, measured, target = searched(job, plan, folder, target, supernet, weights)
        with timed(seconds, "training and proof of the winner"):
            winner, architecture, proof = proved_winner(job, plan, folder, measured, target, supernet)
        baselines = []
        if plan.baselines:
            with timed(seconds, "baselines"):
                baselines = [trained_baseline(job, folder, width) for width in ("0.5x", "1x")]
        job.listener.stage("Measuring side by side, scoring on the test split, writing the report")
        compared = side_by_side(job, device, [winner, *baselines])
    found = RunResult(
        space=job.space.name,
        data=job.data.name,
        device=job.device,
        chip=table.conditions.chip,
        runtime=f"{table.conditions.runtime} {table.conditions.runtime_version}",
        threads=job.threads,
        batch=job.batch,
        precision=job.precision,
        budget_ms=plan.budget_ms,
        binds=result.budget_binds,
        fastest_ms=fastest_ms(job, target.table),
        scored=tuple(scored_candidates(job, result, further)),
        finalists=tuple(measured),
        winner=compared[0],
        proof=proof,
        baselines=tuple(compared[1:]),
        seconds=seconds,
        held_out=held_out_of(job, plan, result),
        origin=table.conditions.origin,
    )
    write_text(folder / "architecture.json", architecture.to_json())
    save_settings(folder, job, plan=asdict(plan), table=str(path), checkpoints=winner.checkpoints)
    found.save(folder)
    write_report(folder, found)
    return folder, found


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Notes the wall time of a stage."""
    started = time.monotonic()
    yield
    seconds[stage] = time.monotonic() - started


def fastest_ms(job: Job, table: LatencyTable) -> float:
    """The least upper estimate found in the space, in milliseconds."""
    from hwnas.evolution import fastest, upper_ms_of

    upper_ms = upper_ms_of(job.space, table.predictor(job.space))
    return upper_ms(fastest(job.space, upper_ms, 0.0))


# ---- search and finalists ------------------------------------------------------------------------------------------


def searched(
    job: Job,
    plan: Plan,
    folder: Path,
    target: "Target",
    supernet: "Supernet",
    weights: "Weights | None",
) -> tuple["SearchResult", list[Candidate], "Target"]:
    """Searches, then measures the best candidates whole until one keeps the budget.

    What the measurements teach goes back into the estimates, by which further candidates are chosen.

    Returns:
        The study, every candidate that was measured, and the target with corrected tables.
    """
    from hwnas.candidate_scoring import SharedScorer
    from hwnas.search import search

    score = SharedScorer(supernet, job.data)
    measured: list[Candidate] = []
    attempt = 0
    while True:
        attempt += 1
        trials, limits = plan.trials * attempt, target.limits(job.space)
        sampler = predictor_sampler(job, plan, target.table, limits) if plan.predictor else plan.sampler
        job.listener.stage(f"Scoring {trials} architectures within {plan.budget_ms:g} ms")
        result = search(
            job.space,
            lambda architecture: score(job.space.encode(architecture)),
            target.table.predictor(job.space),
            budget_ms=plan.budget_ms,
            device=job.device,
            trials=trials,
            storage=plan.storage or folder / "study.db",
            name=f"{folder.name}-{target.digest[:8]}",  # with a new table the search begins anew
            sampler=sampler,
            seed=job.seed,
            weights=weights,
            limits=limits,
            identity={
                "table_sha256": target.digest,
                **{f"table_sha256 of {one.name}": one.digest for one in target.further},
                "supernet": supernet_folder(job, supernet_recipe(job)).name,
                "guidelines": plan.guidelines,
                **({"predictor": str(plan.predictor)} if plan.predictor else {}),  # its first trials are drawn evenly
            },
            on_trial=_trial_listener(job, trials),
        )
        for note in result.notes:
            job.listener.note(note)
        new, target = _measured_finalists(job, plan, result, target, measured)
        measured += new
        if attempt == SEARCH_ATTEMPTS or any(candidate.kept for candidate in measured):
            return result, measured, target


def predictor_sampler(job: Job, plan: Plan, table: LatencyTable, limits: "Sequence[Limit]") -> "PredictorSampler":
    """The sampler that draws `plan.predictor` architectures evenly and goes on by a predictor."""
    from hwnas.feasible import feasible
    from hwnas.lookup import array_predictor
    from hwnas.predictor import PredictorSampler

    assert plan.predictor
    draws = feasible(job.space, array_predictor(table, job.space), plan.budget_ms)
    return PredictorSampler(draws, table.predictor(job.space), first=plan.predictor, seed=job.seed, limits=limits)


def held_out_of(job: Job, plan: Plan, result: "SearchResult") -> HeldOut | None:
    """How well a predictor does on the architectures that were drawn evenly; `None` if the search had none."""
    import numpy as np

    from hwnas.predictor import LEAST_FIRST, held_out

    first = sorted(result.scored, key=lambda scored: scored.number)[: plan.predictor or 0]
    if len(first) < LEAST_FIRST:
        return None
    codes = np.array([job.space.encode(scored.architecture) for scored in first])
    return held_out(job.space, codes, np.array([scored.accuracy for scored in first]), job.seed)


def _trial_listener(job: Job, trials: int) -> Callable[["Scored", int], None]:
    def on_trial(scored: "Scored", done: int) -> None:
        words = f"{scored.accuracy:.1%} at {scored.prediction.latency_ms:.3g} ms"
        job.listener.progress(done, trials, words)

    return on_trial


def _measured_finalists(
    job: Job,
    plan: Plan,
    result: "SearchResult",
    target: "Target",
    measured: list[Candidate],
) -> tuple[list[Candidate], "Target"]:
    """Measures the best candidates that were not measured yet and that the tables still believe to be in budget."""
    from hwnas.export import measure_models, onnx_bytes
    from hwnas.onnx_model import random_weights

    known = [json.dumps(candidate.architecture) for candidate in measured]
    table, device, limits = target.table, target.device, target.limits(job.space)
    chosen = []
    for scored in result.scored:
        network = lower(job.space, scored.architecture)
        prediction = table.predict(network)
        fresh = json.dumps(json.loads(scored.architecture.to_json())) not in known
        within = prediction.upper_ms <= plan.budget_ms and target.keeps_elsewhere(network)
        if fresh and within and len(chosen) < FINALISTS:
            chosen.append((scored, network, prediction))
    if not chosen:
        return [], target
    job.listener.stage(f"Measuring the {len(chosen)} best on {job.device}")
    models = [
        onnx_bytes(network, random_weights(network, job.seed), batch=job.batch, precision=job.precision, metadata={})
        for _, network, _ in chosen
    ]
    timings = measure_models(device, models, threads=job.threads)
    elsewhere = [one.measured(models) for one in target.further]
    if (pace := max(timing.pace for timing in timings)) > 1:
        job.listener.note(
            f"The machine is {pace:.2f} times slower now than when the latency table was measured, and stayed so. "
            f"Search again when it is quiet, or measure the table anew: {table.profile_command}"
        )
    found = []
    for index, ((scored, _, prediction), timing, model) in enumerate(zip(chosen, timings, models, strict=True)):
        found_there = {
            one.what: times[index].median_ms + times[index].spread_ms
            for one, times in zip(target.further, elsewhere, strict=True)
        }
        if any(limit.name == "memory" for limit in limits):
            found_there["memory"] = memory_mb(device, model, job)
        requirements = tuple(
            Requirement(limit.name, limit.most, limit.needs(scored.architecture), found_there[limit.name], limit.unit)
            for limit in limits
            if limit.name in found_there  # the size holds to the byte: the proof alone looks at the file
        )
        candidate = candidate_of(scored.architecture, scored.accuracy, prediction, timing, plan.budget_ms, requirements)
        found.append(candidate)
        if not candidate.kept:
            further = "".join(f"; {requirement.text}" for requirement in requirements)
            job.listener.note(
                f"Dropped a candidate of {scored.accuracy:.1%}: it was predicted at {prediction.latency_ms:.3g} ms and "
                f"measured at {timing.median_ms:.3g} ms; the budget is {plan.budget_ms:g} ms{further}."
            )
    return found, target.corrected([network for _, network, _ in chosen], timings, elsewhere)


def scored_candidates(job: Job, result: "SearchResult", further: "Sequence[Further]") -> Iterator[Candidate]:
    """A row of the report for every scored architecture, with its latency on further devices, too."""
    predictors = {one.name: one.table.predictor(job.space) for one in further}
    for scored in result.scored:
        row = candidate_of(scored.architecture, scored.accuracy, scored.prediction)
        there = {name: predict(scored.architecture).latency_ms for name, predict in predictors.items()}
        yield replace(row, elsewhere_ms=there)


def candidate_of(
    architecture: Architecture,
    accuracy: float,
    prediction: Prediction,
    measurement: Measurement | None = None,
    budget_ms: float = 0.0,
    requirements: tuple[Requirement, ...] = (),
) -> Candidate:
    """A row of the report."""
    row = Candidate(json.loads(architecture.to_json()), accuracy, prediction.latency_ms, prediction.upper_ms)
    if measurement is None:
        return row
    timing = timing_of(measurement)
    kept = timing.median_ms + timing.spread_ms <= budget_ms and all(r.kept for r in requirements)
    return replace(row, measured=timing, kept=kept, requirements=requirements)


# ---- winner and baselines ------------------------------------------------------------------------------------------


def proved_winner(
    job: Job,
    plan: Plan,
    folder: Path,
    measured: list[Candidate],
    target: "Target",
    supernet: "Supernet",
) -> tuple[Trained, Architecture, Proof]:
    """Trains the most accurate finalist on, exports it and measures it; the next one if it breaks budget or limits.

    Raises:
        HwnasError: no architecture that was measured keeps the budget and the limits.
    """
    limits = target.limits(job.space)
    elsewhere = {one.name: lambda model, one=one: one.measured([model])[0].median_ms for one in target.further}
    for candidate in sorted(measured, key=lambda c: -c.accuracy):
        if not candidate.kept:
            continue
        architecture = job.space.from_json(json.dumps(candidate.architecture))
        network = replace(lower(job.space, architecture), name="found")
        winner = retrained(job, network, folder, inherited=None if plan.from_scratch else (supernet, architecture))
        promise, output = target.table.predict(network), folder / "model.onnx"
        proof = proved(job, winner, architecture, promise, target.digest, target.device, output, limits, elsewhere)
        if proof.measured.median_ms <= plan.budget_ms and all(r.kept for r in proof.requirements):
            return winner, architecture, proof
        further = "".join(f"; {requirement.text}" for requirement in proof.requirements)
        job.listener.note(
            f"Dropped a finalist after training: the exported model measured {proof.measured.median_ms:.3g} ms; the "
            f"budget is {plan.budget_ms:g} ms{further}."
        )
    least = min((c.measured.median_ms for c in measured if c.measured), default=float("nan"))
    also = "".join(f" and {limit.most:g} {limit.unit} of {limit.name}" for limit in limits)
    raise HwnasError(
        f"None of the {len(measured)} best architectures keeps the budget of {plan.budget_ms:g} ms{also} as measured "
        f"on {job.device}; the fastest of them took {least:.3g} ms. The latency table may no longer hold, or the "
        f"machine is busy: measure it anew ({profile_command(job.sources[0], target.table.conditions)}), or raise the "
        "budget."
    )


def trained_baseline(job: Job, folder: Path, width: str) -> Trained:
    """ShuffleNet V2 at the space's input size, trained from new weights for as many epochs as supernet and winner."""
    from hwnas.reference.shufflenet import shufflenet_v2

    network = shufflenet_v2(
        width,
        input_size=job.space.input_size,
        classes=job.space.classes,
        stem_stride=job.space.stem_stride,
        max_pool=job.space.max_pool,
    )
    longer = replace(job, retrain_epochs=job.epochs + job.retrain_epochs)
    return retrained(longer, network, folder)


def side_by_side(job: Job, device: "Device", networks: list[Trained]) -> list[Compared]:
    """Measures networks in the same minutes and scores them on the test split, which is read here only."""
    from hwnas.export import measure_models

    models = [model_of(trained, job, {}) for trained in networks]
    timings = measure_models(device, models, threads=job.threads)
    return [
        Compared(
            name=trained.network.name,
            macs=macs(trained.network),
            parameters=parameters(trained.network),
            validation_accuracy=trained.validation_accuracy,
            test_accuracy=trained.scorer.accuracy(job.data.test),
            measured=timing_of(timing),
        )
        for trained, timing in zip(networks, timings, strict=True)
    ]
