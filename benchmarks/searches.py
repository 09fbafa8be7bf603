"""Searches side by side on one supernet: with and without the guidelines' prior, under MACs and under latency.

The supernet is that of the default space on the handwritten digits, trained as `hwnas search` trains it. It lies with
all scores in `runs/benchmark-searches`, so that a run that was stopped goes on.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.result import Result, this_machine
from hwnas.devices import Device
from hwnas.export import measure_models
from hwnas.guideline_prior import SETTINGS, Weights, sampler_weights
from hwnas.guideline_profiling import measure_guidelines
from hwnas.latency import LatencyTable, Prediction
from hwnas.network import Network, macs
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.scoring import Scorer
from hwnas.search import Scored, search
from hwnas.space import Architecture, lower
from hwnas.stages import Job, latency_table, make_job, trained_supernet

FOLDER = Path("runs/benchmark-searches")
TRIALS, SEEDS = 24, 3
MACS_TRIALS = 16
PRIOR_BUDGET_MS = 0.5
MACS_LIMITS = (2.5e6, 5e6)


def run(name: str) -> Result:
    job = make_job("shufflenet-tiny", "digits", runs=FOLDER)
    with open_device("cpu") as opened:
        path, table = latency_table(job, opened)
        if not table.guidelines:
            kept = path.with_suffix(".guidelines")
            table = replace(table, guidelines=measure_guidelines(opened, kept))
            table.save(path)
            kept.unlink()
        _, supernet = trained_supernet(job)
        score = remembered(job, Scorer(supernet, job.data))
        which: Callable[..., Result] = guideline_prior if name == "guideline-prior" else macs_against_latency
        return which(name, job, table, score, opened)


def remembered(job: Job, scorer: Scorer) -> Callable[[Architecture], float]:
    """The validation accuracy of architectures; each is scored once, and kept on disk."""
    path = FOLDER / "scores.json"
    scores: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def accuracy(architecture: Architecture) -> float:
        code = job.space.encode(architecture)
        key = " ".join(map(str, code))
        if key not in scores:
            scores[key] = scorer.accuracy(job.data.validation, code)
            path.write_text(json.dumps(scores))
        return scores[key]

    return accuracy


def found(
    job: Job,
    score: Callable[[Architecture], float],
    cost: Callable[[Architecture], Prediction],
    limit: float,
    seed: int,
    weights: Weights | None = None,
    trials: int = TRIALS,
) -> list[Scored]:
    """The architectures that one search scores, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        result = search(
            job.space, score, cost, budget_ms=limit, device="cpu", trials=trials, storage=Path(folder) / "study.db",
            name="search", seed=seed, weights=weights,
        )  # fmt: skip
    return sorted(result.scored, key=lambda scored: scored.number)


def guideline_prior(
    name: str, job: Job, table: LatencyTable, score: Callable[[Architecture], float], opened: Device
) -> Result:
    """The best accuracy so far, averaged over the evaluations of a search, under each setting of `--guidelines`."""
    sooner: dict[str, list[float]] = {}
    best: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        for setting in SETTINGS:
            weights = sampler_weights(job.space, job.sources[0], table, setting)
            scored = found(job, score, table.predictor(job.space), PRIOR_BUDGET_MS, seed, weights)
            accuracies = [one.accuracy for one in scored]
            so_far = [100 * max(accuracies[: n + 1]) for n in range(len(accuracies))]
            sooner.setdefault(setting, []).append(statistics.fmean(so_far))
            best.setdefault(setting, []).append(so_far[-1])
            print(f"seed {seed}, {setting}: {so_far[-1]:.2f} %", flush=True)
    gains = [after - before for after, before in zip(sooner["prior"], sooner["off"], strict=True)]
    gain, spread = statistics.fmean(gains), statistics.stdev(gains)
    return Result(
        name=name,
        value=round(gain, 2),
        unit="points of validation accuracy that the prior gains, best so far averaged over the evaluations",
        target="above the spread over seeds: then it is the default",
        met=gain > spread / len(gains) ** 0.5,
        spread=f"standard deviation over {SEEDS} seeds {spread:.2f} points",
        device=f"{this_machine()}; budget {PRIOR_BUDGET_MS:g} ms, {TRIALS} evaluations a search",
        details={
            **{f"best so far, {s}": ", ".join(f"{value:.2f}" for value in values) for s, values in sooner.items()},
            **{f"best at the end, {s}": ", ".join(f"{value:.2f}" for value in values) for s, values in best.items()},
        },
    )


def macs_against_latency(
    name: str, job: Job, table: LatencyTable, score: Callable[[Architecture], float], opened: Device
) -> Result:
    """A search under a limit of MACs, then one under the measured latency of what it found, on the same supernet."""
    space, latency = job.space, table.predictor(job.space)

    def network(scored: Scored) -> Network:
        return lower(space, scored.architecture)

    def by_macs(architecture: Architecture) -> Prediction:
        count = macs(lower(space, architecture)) / 1e6
        return Prediction(count, count)

    def by_latency(architecture: Architecture) -> Prediction:
        expected_ms = latency(architecture).latency_ms
        return Prediction(expected_ms, expected_ms)

    def measured_ms(scored: Scored) -> float:
        model = to_onnx(network(scored), random_weights(network(scored), 0)).SerializeToString()
        return measure_models(opened, [model], threads=1)[0].median_ms

    def best(cost: Callable[[Architecture], Prediction], limit: float, seed: int) -> Scored:
        return max(found(job, score, cost, limit, seed, trials=MACS_TRIALS), key=lambda scored: scored.accuracy)

    gains, rows = [], {}
    for limit in MACS_LIMITS:
        for seed in range(SEEDS):
            under_macs = best(by_macs, limit / 1e6, seed)
            budget_ms = measured_ms(under_macs)
            under_latency = best(by_latency, budget_ms, seed)
            gains.append(100 * (under_latency.accuracy - under_macs.accuracy))
            rows[f"{limit / 1e6:g} M MACs, seed {seed}"] = (
                f"{under_macs.accuracy:.2%} in {budget_ms:.3f} ms; under that latency {under_latency.accuracy:.2%} in "
                f"{measured_ms(under_latency):.3f} ms with {macs(network(under_latency)) / 1e6:.1f} M MACs"
            )
            print(f"{limit / 1e6:g} M MACs, seed {seed}: {gains[-1]:+.2f} points", flush=True)
    gain, spread = statistics.fmean(gains), statistics.stdev(gains)
    return Result(
        name=name,
        value=round(gain, 2),
        unit="points of validation accuracy at the same measured latency, latency over MACs as the limit",
        target="above 0 by more than the standard error",
        met=gain > spread / len(gains) ** 0.5,
        spread=f"standard deviation of {len(gains)} pairs {spread:.2f} points",
        device=f"{this_machine()}; {MACS_TRIALS} evaluations a search, inherited weights",
        details=rows,
    )
