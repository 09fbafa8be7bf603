"""Scoring candidates, which are architectures of a supernet, in the way that is quickest where it runs.

On an accelerator the supernet's own program does it, compiled once for all (`scoring.Scorer`). On a CPU a candidate
becomes a network of its own, with its part of the supernet's weights, and runs in ONNX Runtime, a batch on each core:
several times quicker, and nothing is compiled by XLA (`python -m benchmarks score-speed`).
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from itertools import islice
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hwnas import processes
from hwnas.data import Batch, DataSet, Split, stratified_subset
from hwnas.network import Network
from hwnas.onnx_model import Weights, statistics_onnx, to_onnx
from hwnas.scoring import Scorer
from hwnas.space import lower
from hwnas.spread import Spread
from hwnas.supernet import Supernet, slice_weights

IMAGES_A_RUN = 16
"""Few enough that the feature maps of a core stay in its cache."""

Found = TypeVar("Found")


class CandidateScorer:
    """Scores architectures of one trained supernet in ONNX Runtime, as `scoring.Scorer` does in XLA.

    Args:
        supernet: the trained one.
        data: its training images give the statistics of the batch norms.
        calibration_images: how many of them, always the same.
        batch_size: images that are normalised together when statistics are estimated.
    """

    def __init__(
        self, supernet: Supernet, data: DataSet, *, calibration_images: int = 256, batch_size: int = 64
    ) -> None:
        self.supernet, self.data = supernet, data
        self.batch_size = min(batch_size, len(data.train))
        count = max(1, min(calibration_images, len(data.train)) // self.batch_size)
        chosen = stratified_subset(data.train, count * self.batch_size, seed=0).batches(self.batch_size, seed=0)
        self.calibration = [batch.images for batch in chosen]
        self.mean, self.std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (data.mean, data.std))
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def of(self, supernet: Supernet) -> "CandidateScorer":
        """A scorer of other weights of the same supernet."""
        other = copy(self)
        other.supernet = supernet
        return other

    def accuracy(self, split: Split, code: Iterable[int]) -> float:
        """The share of a split's images that one architecture classifies rightly, its statistics estimated first."""
        return self.correct(split, tuple(code)) / len(split)

    def correct(self, split: Split, code: tuple[int, ...], part: int = 0, parts: int = 1) -> int:
        """How many images of a part of a split one architecture classifies rightly; parts are made of whole batches."""
        architecture = self.supernet.space.decode(code)
        network, weights = lower(self.supernet.space, architecture), slice_weights(self.supernet, architecture)
        batches = -(-len(split) // self.batch_size)
        first, end = part * batches // parts, (part + 1) * batches // parts
        chosen = islice(split.batches(self.batch_size, seed=None, start_batch=first), end - first)
        logits = self.logits_of(network, weights | self.statistics(network, weights))
        return sum(self._on_cores(lambda batch: int((logits(batch.images).argmax(-1) == batch.labels).sum()), chosen))

    def statistics(self, network: Network, weights: Weights) -> dict[str, np.ndarray]:
        """`{node name}.mean` and `.variance` of every batch norm, cumulative over the calibration images."""
        session = _session(statistics_onnx(network, weights, batch=self.batch_size))
        names = [output.name for output in session.get_outputs()]

        def told(images: np.ndarray) -> list[np.ndarray]:
            return session.run(names, {"image": self._inputs(images)})

        runs = list(self._on_cores(told, self.calibration))
        of_batches = {name: np.stack(arrays).astype(np.float64) for name, *arrays in zip(names, *runs, strict=True)}
        found = {}
        for name in names:
            values = of_batches[name].mean(0)
            if name.endswith(".variance"):  # of batches of one size: the mean of theirs, and that of their means
                values += of_batches[name.removesuffix("variance") + "mean"].var(0)
            found[name] = values.astype(np.float32)
        return found

    def logits_of(self, network: Network, weights: Weights) -> Callable[[np.ndarray], np.ndarray]:
        """A function that tells the logits `[N, classes]` of uint8 images `[N, H, W, 3]`."""
        session = _session(to_onnx(network, weights, batch=IMAGES_A_RUN))

        def logits(images: np.ndarray) -> np.ndarray:
            missing = -len(images) % IMAGES_A_RUN
            inputs = self._inputs(np.pad(images, ((0, missing), *[(0, 0)] * 3)))
            runs = inputs.reshape(-1, IMAGES_A_RUN, *inputs.shape[1:])
            return np.concatenate([session.run(["logits"], {"image": run})[0] for run in runs])[: len(images)]

        return logits

    def _inputs(self, images: np.ndarray) -> np.ndarray:
        """uint8 `[N, H, W, 3]` as a network takes it: float32 `[N, 3, H, W]`, normalised."""
        return (np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32) / 255 - self.mean) / self.std

    def _on_cores(self, function: Callable[[Any], Found], batches: Iterable[Batch | np.ndarray]) -> Iterator[Found]:
        """What a function tells of each batch, in order, one batch on each core and as many read ahead."""
        waiting: deque[Future[Found]] = deque()
        with ThreadPoolExecutor(self.cores) as pool:
            for batch in batches:
                waiting.append(pool.submit(function, batch))
                if len(waiting) > 2 * self.cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


SupernetScorer = Scorer | CandidateScorer


def scorer_of(supernet: Supernet, data: DataSet, *, calibration_images: int = 256) -> SupernetScorer:
    """The quickest scorer of a supernet's architectures for the form that it has; arguments as for `Scorer`."""
    kind = CandidateScorer if supernet.form.control_flow else Scorer
    return kind(supernet, data, calibration_images=calibration_images)


def _session(model: Any) -> Any:
    """ONNX Runtime with the model, on the core of whoever calls it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


# ---- all processes -----------------------------------------------------------------------------------------------


class SharedScorer:
    """Scores architectures of a supernet on the validation split, with the devices of all processes.

    Call it in the leading process; the others must be ready for its orders (`following.follow`).
    """

    def __init__(self, supernet: Supernet, data: DataSet) -> None:
        processes.order("score with")
        self.scorer, self.data = scorer_of(with_weights_of_leader(supernet), data), data

    def __call__(self, code: Iterable[int]) -> float:
        """The accuracy of an architecture by its encoding, as `Scorer.accuracy` tells it."""
        code = tuple(map(int, code))
        processes.order("score", code=code)
        own = self.scorer.correct(self.data.validation, code, 0, processes.count())
        return (own + sum(map(int, processes.answers()))) / len(self.data.validation)


def with_weights_of_leader(supernet: Supernet) -> Supernet:
    """The same network with the weights that the leading process has; all processes call it together."""
    if processes.count() == 1:
        return supernet
    graph, weights = nnx.split(supernet, nnx.Param)
    everyone = Spread(Mesh(np.array(jax.devices()), ("images",)))
    return nnx.merge(graph, everyone.alone(everyone.of_leader(weights)))
