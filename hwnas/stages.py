"""The stages of the main job, each on its own: data and settings, latency table, supernet, one network, its proof.

Each stage keeps its result in a folder and does nothing where that result is there already, so that what was killed
goes on where it stopped.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas.latency import LatencyTable, Prediction, load_table, table_path
from hwnas.network import Network
from hwnas.runs import Proof, write_bytes, write_text
from hwnas.space import Architecture, SearchSpace

if TYPE_CHECKING:
    from hwnas.data import DataSet
    from hwnas.devices import Device
    from hwnas.jax_network import FixedNetwork
    from hwnas.supernet import Supernet
    from hwnas.training import Progress, Recipe, Scorer


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a job tells what it does.

    Attributes:
        stage: called with a sentence when a stage begins.
        note: called with a sentence that the user should read.
        progress: called with done, total and a few words during a stage.
    """

    stage: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int, str], None] = lambda done, total, words: None


@dataclass(frozen=True, slots=True)
class Job:
    """What is searched for, on what, and how.

    Attributes:
        space: the search space, its classes already those of the data.
        data: the images.
        source: what `load_data` read them from.
        device: the device's name.
        threads, batch, precision: how the device runs models.
        seed: of everything that is drawn.
        runs: the folder that holds supernets and runs.
        tables: the folder of latency tables.
        epochs, retrain_epochs: passes over the training images for the supernet and for the winner.
        batch_size, learning_rate: of both trainings.
        listener: is told what happens.
    """

    space: SearchSpace
    data: "DataSet"
    source: str
    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    precision: str = "fp32"
    seed: int = 0
    runs: Path = Path("runs")
    tables: Path = field(default_factory=lambda: tables_folder())
    epochs: int = 10
    retrain_epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 0.1
    listener: Listener = Listener()


def tables_folder() -> Path:
    """Where the latency tables of this user lie: `$HWNAS_TABLES`, else beside the cache of data sets."""
    from hwnas.datasets import cache_folder

    return Path(os.environ.get("HWNAS_TABLES") or cache_folder() / "latency_tables")


def make_job(space: SearchSpace, source: str, **settings: Any) -> Job:
    """A job on a data source; the space's classifier gets the classes of the data."""
    from hwnas.data import load_data
    from hwnas.datasets import cache_folder
    from hwnas.training import use_compilation_cache

    use_compilation_cache(cache_folder() / "compiled")
    data = load_data(source, image_size=space.input_size, seed=settings.get("seed", 0))
    return Job(replace(space, classes=len(data.classes)), data, source, **settings)


# ---- latency table -----------------------------------------------------------------------------------------------


def latency_table(job: Job, device: "Device") -> tuple[Path, LatencyTable]:
    """The table of the job's space on its device; measured if it is missing or does not cover the space."""
    from hwnas.profiling import covers, profile

    conditions = device.conditions(job.threads, job.batch, job.precision)
    path = table_path(job.tables, job.space.name, conditions)
    if path.exists():
        table = load_table(path)
        table.check_device(conditions)
        if covers(table, job.space):
            return path, table
    job.listener.stage(f"Measuring every unit of {job.space.name} on {job.device} ({conditions.chip})")
    table = profile(
        job.space,
        device,
        threads=job.threads,
        batch=job.batch,
        precision=job.precision,
        folder=job.tables,
        on_progress=job.listener.progress,
        seed=job.seed,
    )
    return path, table


# ---- supernet ----------------------------------------------------------------------------------------------------


def supernet_folder(job: Job, recipe: "Recipe") -> Path:
    """The folder of a supernet, whose name tells space, data, and, in eight digits, everything else that made it."""
    facts = json.dumps([job.space.digest, job.data.fingerprint, asdict(recipe), job.seed])
    digits = hashlib.sha256(facts.encode()).hexdigest()[:8]
    return job.runs / f"supernet-{job.space.name}-{file_name(job.data.name)}-{digits}"


def supernet_recipe(job: Job) -> "Recipe":
    """How the supernet of a job is trained."""
    from hwnas.training import Recipe

    return Recipe(job.epochs, job.batch_size, job.learning_rate)


def trained_supernet(job: Job) -> tuple[Path, "Supernet"]:
    """The supernet of a job, trained if it is not yet."""
    from flax import nnx

    from hwnas.supernet import Supernet
    from hwnas.training import sandwich, train

    recipe = supernet_recipe(job)
    folder = supernet_folder(job, recipe)
    job.listener.stage(f"Training the supernet of {job.space.name} on {job.data.name}, {recipe.epochs} epochs")
    facts = {"space": job.space.name, "data": job.data.name, "data_fingerprint": job.data.fingerprint}
    facts |= {"recipe": asdict(recipe), "seed": job.seed, "sampling": "sandwich: largest, smallest, 1 uniform"}
    write_text(folder / "supernet.json", json.dumps(facts, indent=1))
    model = train(
        Supernet(job.space, rngs=nnx.Rngs(job.seed)),
        job.data,
        recipe,
        folder / "checkpoints",
        paths=sandwich(job.space, job.seed),
        seed=job.seed,
        on_step=_step_listener(job),
    )
    return folder, model


def file_name(text: str) -> str:
    """Letters, digits, dots and hyphens of a text, to stand in the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _step_listener(job: Job) -> Callable[["Progress"], None]:
    def on_step(progress: "Progress") -> None:
        words = f"loss {progress.loss:.3f}, {progress.images_per_second:.0f} images/s"
        job.listener.progress(progress.step, progress.steps, words)

    return on_step


def timing_of(measurement: Measurement) -> Timing:
    """The summary of a measurement."""
    return Timing(measurement.median_ms, measurement.spread_ms, len(measurement.samples_ms))


# ---- one network -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """A single network after training, with its batch-norm statistics."""

    name: str
    network: Network
    model: "FixedNetwork"
    scorer: "Scorer"
    statistics: Any
    validation_accuracy: float


def retrained(
    job: Job, network: Network, folder: Path, *, supernet: "Supernet | None", architecture: Architecture | None
) -> Trained:
    """Trains one network, from the supernet's weights if one is given, and scores it on the validation split.

    Inherited weights train on at half the learning rate.
    """
    from flax import nnx

    from hwnas.jax_network import FixedNetwork
    from hwnas.supernet import slice_weights
    from hwnas.training import Recipe, Scorer, train

    inherited = supernet is not None and architecture is not None
    rate = job.learning_rate / 2 if inherited else job.learning_rate
    recipe = Recipe(job.retrain_epochs, job.batch_size, rate)
    weights = slice_weights(supernet, architecture) if supernet and architecture else None
    how = "from inherited weights" if inherited else "from new weights"
    job.listener.stage(f"Training {network.name} {how}, {recipe.epochs} epochs")
    digits = hashlib.sha256(repr((network.units, asdict(recipe), inherited)).encode()).hexdigest()[:8]
    model = train(
        FixedNetwork(network, rngs=nnx.Rngs(job.seed), weights=weights),
        job.data,
        recipe,
        folder / "checkpoints" / digits,
        seed=job.seed,
        on_step=_step_listener(job),
    )
    scorer = Scorer(model, job.data, calibration_images=1024)
    statistics = scorer.statistics()
    return Trained(network.name, network, model, scorer, statistics, scorer.accuracy(job.data.validation))


def model_of(trained: Trained, job: Job, facts: dict[str, Any]) -> bytes:
    """The ONNX file of a trained network, with facts in its metadata."""
    from hwnas.export import network_weights, onnx_bytes

    side = job.space.input_size
    facts = {
        "hwnas": "1",
        "space": job.space.name,
        "data": job.data.name,
        "classes": json.dumps(job.data.classes),
        "input": f"float32 RGB [{job.batch}, 3, {side}, {side}], (x / 255 - mean) / std",
        "mean": json.dumps(job.data.mean),
        "std": json.dumps(job.data.std),
    } | {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    weights = network_weights(trained.model, trained.statistics)
    return onnx_bytes(trained.network, weights, batch=job.batch, metadata=facts)


def proved(
    job: Job,
    trained: Trained,
    architecture: Architecture,
    prediction: Prediction,
    table_digest: str,
    device: "Device",
    output: Path,
) -> Proof:
    """Exports a trained network to `output` and checks what was promised of it."""
    from hwnas.export import agreement, file_digest, measure_models, operator_counts, opset

    job.listener.stage(f"Proving {output.name}")
    timing = timing_of(measure_models(device, [model_of(trained, job, {})], threads=job.threads)[0])
    facts = {
        "architecture": architecture.to_json(),
        "device": job.device,
        "threads": job.threads,
        "precision": job.precision,
        "predicted_ms": prediction.latency_ms,
        "upper_ms": prediction.upper_ms,
        "measured_ms": timing.median_ms,
        "measured_spread_ms": timing.spread_ms,
        "validation_accuracy": trained.validation_accuracy,
        "table_sha256": table_digest,
    }
    model = model_of(trained, job, facts)
    images, share, largest = agreement(model, trained.scorer, trained.statistics, job.data, batch=job.batch)
    write_bytes(output, model)
    return Proof(
        images=images,
        agreement=share,
        largest_difference=largest,
        operators=operator_counts(model),
        opset=opset(model),
        predicted_ms=prediction.latency_ms,
        upper_ms=prediction.upper_ms,
        measured=timing,
        table_sha256=table_digest,
        model_sha256=file_digest(output),
    )
