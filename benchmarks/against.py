"""A search on real images: CIFAR-10, at the measured latency of ShuffleNet V2, against that and against random search.

The found network, ShuffleNet V2 and the best of a random search with as many evaluations are trained from new weights
by one recipe, with several seeds, and measured side by side. Both searches score with the supernet that comes with
hwnas, or with one that is trained first. With an `AGAINST_SPEEDUP` of 1.3, say, the search must find a network so many
times as fast as ShuffleNet V2, and there is no random search. Everything is kept in `runs/benchmark-against`, so that a
run that was stopped goes on. How large and how long is set by the environment variables below.
"""

import json
import os
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.result import Result, this_machine
from hwnas.data import DataSet, TrainSplit, ValidationSplit, load_data
from hwnas.devices import Device
from hwnas.errors import HwnasError
from hwnas.export import measure_models
from hwnas.network import Network, macs
from hwnas.opening import open_device
from hwnas.pipeline import Plan, searched
from hwnas.reference.shufflenet import shufflenet_v2
from hwnas.runs import write_text
from hwnas.space import lower
from hwnas.space_toml import load_space
from hwnas.stages import Job, Listener, latency_table, trained_supernet
from hwnas.supernet_file import file_facts, supernet_path
from hwnas.target import Target
from hwnas.trained import model_of, retrained, timing_of
from hwnas.training import prepare_process

SCALE = os.environ.get("AGAINST_SCALE", "0.5x")
IMAGES = int(os.environ.get("AGAINST_IMAGES", "45000"))
VALIDATION = int(os.environ.get("AGAINST_VALIDATION", "5000"))
SUPERNET_EPOCHS = int(os.environ.get("AGAINST_SUPERNET_EPOCHS", "0"))
"""Of a supernet of `shufflenet-tiny`; with 0, the supernet that comes with hwnas is taken."""
EPOCHS = int(os.environ.get("AGAINST_EPOCHS", "60"))
SEEDS = range(int(os.environ.get("AGAINST_SEEDS", "3")))
TRIALS = int(os.environ.get("AGAINST_TRIALS", "100"))
SPEEDUP = float(os.environ.get("AGAINST_SPEEDUP", "1"))
SAMPLERS = ("evolution", "random") if SPEEDUP == 1 else ("evolution",)
FOLDER = Path(f"runs/benchmark-against/{SCALE}-{IMAGES}-{SUPERNET_EPOCHS}-{EPOCHS}-{SPEEDUP:g}")
BATCH_SIZE, LEARNING_RATE = 64, 0.1

RIVALS = {"against-shufflenet": "ShuffleNet V2", "against-random": "random search with as many evaluations"}


def cifar10() -> DataSet:
    """CIFAR-10, found beside the checkout, in the cache or downloaded; its splits are cut as asked."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
    data = load_data(str(beside) if beside.is_dir() else "cifar10", image_size=32)
    images, held_out = data.train.images, data.validation.images
    assert isinstance(images, np.ndarray)
    assert isinstance(held_out, np.ndarray)
    train = TrainSplit(images[:IMAGES], data.train.labels[:IMAGES])
    return replace(
        data, train=train, validation=ValidationSplit(held_out[:VALIDATION], data.validation.labels[:VALIDATION])
    )


def best_of(job: Job, sampler: str, budget_ms: float, opened: Device) -> tuple[Network, float]:
    """The most accurate finalist within the budget, and its score with inherited weights."""
    path, table = latency_table(job, opened)
    _, supernet = trained_supernet(job)
    plan = Plan(budget_ms, trials=TRIALS, sampler=sampler)
    _, measured, _ = searched(job, plan, FOLDER / sampler, Target(opened, table, table.digest), supernet, None)
    kept = [candidate for candidate in measured if candidate.kept]
    if not kept:
        raise HwnasError(f"No finalist of '{sampler}' kept {budget_ms:.3g} ms; the table at {path} no longer holds.")
    best = max(kept, key=lambda candidate: candidate.accuracy)
    return replace(lower(job.space, job.space.from_json(json.dumps(best.architecture))), name=sampler), best.accuracy


def make_job() -> Job:
    """The settings of the experiment."""
    prepare_process(FOLDER / "compiled")
    supernet = None if SUPERNET_EPOCHS else str(supernet_path("cifar10"))
    space = load_space(file_facts(Path(supernet))["space"] if supernet else "shufflenet-tiny")
    return Job(
        space,
        cifar10(),
        (space.name, "cifar10"),
        runs=FOLDER,
        supernet=supernet,
        epochs=SUPERNET_EPOCHS,
        retrain_epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        listener=Listener(lambda text: print(text, flush=True), lambda text: print(f"Note: {text}", flush=True)),
    )


def run(name: str) -> Result:
    if name == "against-random" and "random" not in SAMPLERS:
        raise SystemExit("With AGAINST_SPEEDUP there is no random search to compare with. Leave it out.")
    job = make_job()
    baseline = shufflenet_v2(SCALE, input_size=32, classes=10, stem_stride=1, max_pool=False)
    with open_device("cpu") as opened:
        from hwnas.onnx_model import random_weights, to_onnx

        model = to_onnx(baseline, random_weights(baseline, 0)).SerializeToString()
        budget_file = FOLDER / "budget.json"
        if not budget_file.exists():
            budget_ms = measure_models(opened, [model], threads=1)[0].median_ms
            write_text(budget_file, json.dumps(budget_ms))
        budget_ms = json.loads(budget_file.read_text()) / SPEEDUP
        networks, inherited = [baseline], {}
        for sampler in SAMPLERS:
            network, inherited[sampler] = best_of(job, sampler, budget_ms, opened)
            networks.append(network)
        trained = {n.name: [retrained(replace(job, seed=s), n, FOLDER / n.name) for s in SEEDS] for n in networks}
        models = [model_of(trained[n.name][0], job, {}) for n in networks]
        timings = [timing_of(m) for m in measure_models(opened, models, threads=1)]
    speed = timings[0].median_ms / timings[1].median_ms
    accuracy = {which: [t.scorer.accuracy(job.data.test) for t in rows] for which, rows in trained.items()}
    mean = {which: 100 * statistics.mean(values) for which, values in accuracy.items()}
    deviation = {w: 100 * statistics.stdev(v) if len(v) > 1 else float("nan") for w, v in accuracy.items()}
    rival = "random" if name == "against-random" else baseline.name
    gain = mean["evolution"] - mean[rival]
    return Result(
        name=name,
        value=round(gain, 2),
        unit=f"points of test accuracy over {RIVALS[name]}, at {speed:.2f} times the speed of ShuffleNet V2 {SCALE}",
        target="above the spread over seeds" if SPEEDUP == 1 else f"at least 0 at {SPEEDUP:g} times the speed or more",
        met=gain > deviation["evolution"] + deviation[rival] if SPEEDUP == 1 else gain >= 0 and speed >= SPEEDUP,
        spread=", ".join(f"{which} {mean[which]:.2f} ± {deviation[which]:.2f} %" for which in mean),
        device=this_machine(),
        details={
            "budget": f"{budget_ms:.3f} ms (ShuffleNet V2 {SCALE}, measured, over {SPEEDUP:g})",
            "measured side by side": {
                n.name: f"{t.median_ms:.3f} ms ± {t.spread_ms:.3f}, {macs(n) / 1e6:.1f} M MACs"
                for n, t in zip(networks, timings, strict=True)
            },
            "score with inherited weights": {which: f"{100 * value:.2f} %" for which, value in inherited.items()},
            "images": f"{len(job.data.train)} training, {len(job.data.validation)} validation",
            "training": f"each network {EPOCHS} epochs, {len(SEEDS)} seeds; supernet: "
            + (f"{SUPERNET_EPOCHS} epochs" if SUPERNET_EPOCHS else "the one that comes with hwnas"),
            "evaluations": f"{TRIALS} of each search",
        },
    )
