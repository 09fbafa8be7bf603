"""A trained network becomes an ONNX file, and the file is proved: it runs, agrees with JAX, and keeps its promise."""

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.data import DataSet, normalize
from hwnas.devices import Device, Timing
from hwnas.errors import HwnasError
from hwnas.jax_network import FixedNetwork, Statistics
from hwnas.latency import Measurement
from hwnas.network import Network
from hwnas.onnx_model import to_onnx
from hwnas.quantization import activation_ranges
from hwnas.scoring import Scorer

PROOF_IMAGES = 1024
"""Real images on which the model and JAX are compared; training images, so that the test split stays unread."""


AGREEING = 5
"""Samples of a model that is proved: more than for a table, so that their spread means something."""


def network_weights(model: FixedNetwork, statistics: Statistics) -> dict[str, np.ndarray]:
    """All arrays of a trained network, batch-norm statistics included, by the names of `network.weight_shapes`."""
    weights = {name: np.asarray(value[...]) for name, value in model.weights.items()}
    for name, (mean, variance) in statistics.items():
        weights[f"{name}.mean"], weights[f"{name}.variance"] = np.asarray(mean), np.asarray(variance)
    return weights


def onnx_bytes(
    network: Network,
    weights: Mapping[str, Any],
    *,
    batch: int,
    precision: str,
    metadata: Mapping[str, str],
    images: np.ndarray | None = None,
) -> bytes:
    """The checked ONNX file of a network.

    Args:
        batch, precision: of the model.
        metadata: facts for the file.
        images: `[N, 3, H, W]`, normalised, over which the ranges of an int8 model's activations are taken; without
            them it is good for timing only.
    """
    import onnx

    ranges = None
    if precision != "fp32" and images is not None:
        ranges = activation_ranges(to_onnx(network, weights, batch=batch), images)
    model = to_onnx(network, weights, batch=batch, precision=precision, ranges=ranges, metadata=metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def network_input(images: np.ndarray, data: DataSet) -> np.ndarray:
    """Images uint8 `[N, H, W, 3]` as an exported model takes them: float32 `[N, 3, H, W]`, normalised."""
    return np.asarray(normalize(images, data.mean, data.std)).transpose(0, 3, 1, 2)


def measure_models(device: Device, models: list[bytes], *, threads: int) -> list[Measurement]:
    """Times whole networks as one group, so that all see the same minutes of the device."""
    found = device.measure_steadily(models, Timing(threads=threads, agreeing=AGREEING, sample_ms=5.0))
    return [found[index] for index in range(len(models))]


def operator_counts(model: bytes) -> dict[str, int]:
    """How many of each operator an ONNX model has, the most frequent first."""
    import onnx

    return dict(Counter(node.op_type for node in onnx.load_from_string(model).graph.node).most_common())


def opset(model: bytes) -> int:
    """The version of the plain ONNX operators that a model asks for."""
    import onnx

    return onnx.load_from_string(model).opset_import[0].version


def agreement(
    model: bytes, scorer: Scorer, statistics: Statistics, data: DataSet, *, batch: int
) -> tuple[int, float, float]:
    """Runs real images through the ONNX model and through JAX.

    Returns:
        The number of images, the share whose arg-max agrees, and the largest difference between two logits.

    Raises:
        HwnasError: fewer training images than the proof takes.
    """
    import onnxruntime

    if len(data.train) < PROOF_IMAGES:
        raise HwnasError(
            f"The proof compares {PROOF_IMAGES} real images; the training split of {data.name} has {len(data.train)}. "
            "Give a larger data set."
        )
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    total, same, largest = 0, 0, 0.0
    for images, _ in data.train.batches(scorer.batch_size, seed=None):
        if total >= PROOF_IMAGES:
            break
        expected = scorer.logits(images, statistics)
        found = _run_batches(session, network_input(images, data), batch)
        total += len(expected)
        same += int((found.argmax(1) == expected.argmax(1)).sum())
        largest = float(np.maximum(largest, np.abs(found - expected).max()))  # Python's own max would lose a NaN
    return total, same / total, largest


def _run_batches(session: Any, inputs: np.ndarray, batch: int) -> np.ndarray:
    """Runs images through a model of a fixed batch size; the last batch is filled up with copies of its last image."""
    results = []
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        filled = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        results.append(session.run(None, {"image": np.ascontiguousarray(filled)})[0][: len(part)])
    return np.concatenate(results)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
