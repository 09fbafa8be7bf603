"""A single network: trained or read back, made into a model, and proved to be what was promised of it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas.errors import HwnasError
from hwnas.latency import Measurement, Prediction
from hwnas.memory import MEGABYTE
from hwnas.network import Network
from hwnas.runs import Proof, Requirement, Timing, write_bytes
from hwnas.space import Architecture
from hwnas.stages import Job, step_listener

if TYPE_CHECKING:
    from hwnas.devices import Device
    from hwnas.evolution import Limit
    from hwnas.jax_network import FixedNetwork
    from hwnas.onnx_scoring import NetworkScorer
    from hwnas.scoring import Scorer
    from hwnas.supernet import Supernet

RANGE_IMAGES = 64
"""Training images over which the ranges of an int8 model are taken."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A single network after training, with its batch-norm statistics, and where in the run its checkpoints lie."""

    network: Network
    model: "FixedNetwork"
    scorer: "Scorer | NetworkScorer"
    statistics: Any
    validation_accuracy: float
    checkpoints: str


def retrained(
    job: Job, network: Network, folder: Path, *, inherited: "tuple[Supernet, Architecture] | None" = None
) -> Trained:
    """Trains one network and scores it on the validation split.

    Args:
        job: data and settings.
        network: what to train.
        folder: of the run; the checkpoints go to a folder in it that is named after the network and the recipe.
        inherited: the supernet and the architecture in it whose weights to start from; they train on at half the
            learning rate. Without it the weights are new.
    """
    from flax import nnx

    from hwnas.jax_network import FixedNetwork
    from hwnas.supernet import slice_weights
    from hwnas.training import Recipe, train

    rate = job.learning_rate / 2 if inherited else job.learning_rate
    recipe = Recipe(job.retrain_epochs, job.batch_size, rate)
    how = "from inherited weights" if inherited else "from new weights"
    job.listener.stage(f"Training {network.name} {how}, {recipe.epochs} epochs")
    digits = hashlib.sha256(repr((network.units, recipe, bool(inherited), job.seed)).encode()).hexdigest()[:8]
    with step_listener(job, folder / "events" / digits) as on_step:
        model = train(
            FixedNetwork(network, rngs=nnx.Rngs(job.seed), weights=slice_weights(*inherited) if inherited else None),
            job.data,
            recipe,
            folder / "checkpoints" / digits,
            seed=job.seed,
            on_step=on_step,
        )
    return _scored(job, network, model, f"checkpoints/{digits}")


def restored(job: Job, network: Network, folder: Path, checkpoints: str) -> Trained:
    """A network that `retrained` trained in a run's folder; `HwnasError` if its checkpoint is missing or damaged."""
    from flax import nnx

    from hwnas.jax_network import FixedNetwork
    from hwnas.training import trained_already

    model = trained_already(FixedNetwork(network, rngs=nnx.Rngs(0)), folder / checkpoints)
    if model is None:
        raise HwnasError(
            f"{folder} holds no trained network: {checkpoints} is empty. Run the command that made the run again."
        )
    return _scored(job, network, model, checkpoints)


def _scored(job: Job, network: Network, model: "FixedNetwork", checkpoints: str) -> Trained:
    from hwnas.onnx_scoring import NetworkScorer
    from hwnas.scoring import Scorer

    kind = NetworkScorer if model.form.control_flow else Scorer
    scorer = kind(model, job.data, calibration_images=1024)
    accuracy = scorer.accuracy(job.data.validation)
    return Trained(network, model, scorer, scorer.statistics(), accuracy, checkpoints)


def model_of(trained: Trained, job: Job, facts: dict[str, Any]) -> bytes:
    """The ONNX file of a trained network, with facts in its metadata."""
    from hwnas.export import network_input, network_weights, onnx_bytes

    weights = network_weights(trained.model, trained.statistics)
    sample = next(job.data.train.batches(min(RANGE_IMAGES, len(job.data.train)), seed=0)).images
    return onnx_bytes(
        trained.network,
        weights,
        batch=job.batch,
        precision=job.precision,
        metadata=metadata_of(job, facts),
        images=network_input(sample, job.data),
    )


def metadata_of(job: Job, facts: dict[str, Any]) -> dict[str, str]:
    """What the metadata of a job's model says, further facts included."""
    side = job.space.input_size
    return {
        "hwnas": "1",
        "space": job.space.name,
        "data": job.data.name,
        "classes": json.dumps(job.data.classes),
        "input": f"float32 RGB [{job.batch}, 3, {side}, {side}], (x / 255 - mean) / std",
        "mean": json.dumps(job.data.mean),
        "std": json.dumps(job.data.std),
    } | {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}


def timing_of(measurement: Measurement) -> Timing:
    """The summary of a measurement."""
    return Timing(measurement.median_ms, measurement.spread_ms, len(measurement.samples_ms))


def memory_mb(device: "Device", model: bytes, job: Job) -> float:
    """What a model adds to the peak memory of a process, measured now."""
    from hwnas.devices import Timing as Protocol

    ((_, found),) = device.peak_memory([model], Protocol(threads=job.threads, seed=job.seed))
    return found / MEGABYTE


def proof_facts(
    job: Job,
    architecture: Architecture,
    prediction: Prediction,
    timing: Timing,
    validation_accuracy: float,
    table_digest: str,
    memory: tuple[float, float] | None = None,
    elsewhere: Mapping[str, tuple[float, float]] | None = None,
) -> dict[str, Any]:
    """The facts that go into the metadata of a proved model.

    Promised and measured are `memory`, in MB, and the latencies on further devices in `elsewhere`, in ms.
    """
    facts: dict[str, Any] = {
        "architecture": architecture.to_json(),
        "device": job.device,
        "threads": job.threads,
        "precision": job.precision,
        "predicted_ms": prediction.latency_ms,
        "upper_ms": prediction.upper_ms,
        "measured_ms": timing.median_ms,
        "measured_spread_ms": timing.spread_ms,
        "validation_accuracy": validation_accuracy,
        "table_sha256": table_digest,
    }
    if memory:
        facts |= dict(zip(("memory_promised_mb", "memory_measured_mb"), memory, strict=True))
    if elsewhere:
        names = "upper_ms", "measured_ms"
        facts["further_devices"] = {name: dict(zip(names, ms, strict=True)) for name, ms in elsewhere.items()}
    return facts


def proved(
    job: Job,
    trained: Trained,
    architecture: Architecture,
    prediction: Prediction,
    table_digest: str,
    device: "Device",
    output: Path,
    limits: "Sequence[Limit]" = (),
    elsewhere: Mapping[str, Callable[[bytes], float]] | None = None,
) -> Proof:
    """Exports a trained network to `output` and checks what was promised of it, limits beside the budget included.

    `elsewhere` measures a model's latency on further devices in ms; the limit of each is named `latency on NAME`.
    """
    from hwnas.export import agreement, file_digest, measure_models, operator_counts, opset
    from hwnas.scoring import Scorer

    job.listener.stage(f"Proving {output.name}")
    bare = model_of(trained, job, {})
    timing = timing_of(measure_models(device, [bare], threads=job.threads)[0])
    promised = {limit.name: limit.needs(architecture) for limit in limits}
    measured = {f"latency on {name}": measure(bare) for name, measure in (elsewhere or {}).items()}
    further = {name: (promised[what], measured[what]) for name, what in zip(elsewhere or (), measured, strict=True)}
    if "memory" in promised:
        measured["memory"] = memory_mb(device, bare, job)
    memory = (promised["memory"], measured["memory"]) if "memory" in promised else None
    accuracy = trained.validation_accuracy
    facts = proof_facts(job, architecture, prediction, timing, accuracy, table_digest, memory, further)
    model = model_of(trained, job, facts)
    measured["size"] = len(model) / MEGABYTE
    in_jax = trained.scorer if isinstance(trained.scorer, Scorer) else Scorer(trained.model, job.data)
    images, share, largest = agreement(model, in_jax, trained.statistics, job.data, batch=job.batch)
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
        requirements=tuple(Requirement(x.name, x.most, promised[x.name], measured[x.name], x.unit) for x in limits),
    )
