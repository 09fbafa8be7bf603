"""Scoring networks in ONNX Runtime, a batch on each core: what is quickest on a CPU, and compiles nothing.

The program that XLA makes of a supernet on a CPU takes several times as long, and half a minute to compile. On
accelerators `scoring.Scorer` does the same in JAX.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from hwnas.data import DataSet, Split
from hwnas.jax_network import FixedNetwork
from hwnas.machine_facts import CORES
from hwnas.network import Network
from hwnas.onnx_model import Weights, statistics_onnx, to_onnx
from hwnas.scoring import calibration_batches, part_of

IMAGES_A_RUN = 16
"""Few enough that the feature maps of a core stay in its cache."""

Given = TypeVar("Given")
Found = TypeVar("Found")


class OnnxScorer:
    """Scores networks on the images of a data set.

    Args:
        data: its training images give the statistics of the batch norms.
        calibration_images: how many of them, always the same.
        batch_size: images that are normalised together when statistics are estimated.
    """

    def __init__(self, data: DataSet, *, calibration_images: int = 256, batch_size: int = 64) -> None:
        self.batch_size = min(batch_size, len(data.train))
        self.calibration = [batch.images for batch in calibration_batches(data, calibration_images, self.batch_size)]
        self.mean, self.std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in (data.mean, data.std))
        self.cores = len(CORES)

    def correct_of(self, network: Network, weights: Weights, split: Split, part: int = 0, parts: int = 1) -> int:
        """How many images of a part of a split a network classifies rightly; parts are made of whole batches.

        Args:
            weights: arrays by name; means and variances of batch norms are estimated first.
        """
        chosen = part_of(split, self.batch_size, part, parts)
        logits = self.logits_of(network, {**weights, **self.statistics_of(network, weights)})
        return sum(self._on_cores(lambda batch: int((logits(batch.images).argmax(-1) == batch.labels).sum()), chosen))

    def statistics_of(self, network: Network, weights: Weights) -> dict[str, np.ndarray]:
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

    def _on_cores(self, function: Callable[[Given], Found], batches: Iterable[Given]) -> Iterator[Found]:
        """What a function tells of each batch, in order, one batch on each core and as many read ahead."""
        waiting: deque[Future[Found]] = deque()
        with ThreadPoolExecutor(self.cores) as pool:
            for batch in batches:
                waiting.append(pool.submit(function, batch))
                if len(waiting) > 2 * self.cores:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()


class NetworkScorer(OnnxScorer):
    """Scores one trained network, as `scoring.Scorer` does; further arguments as for `OnnxScorer`."""

    def __init__(self, model: FixedNetwork, data: DataSet, **settings: int) -> None:
        super().__init__(data, **settings)
        self.network = model.network
        self.weights = {name: np.asarray(value[...]) for name, value in model.weights.items()}

    def statistics(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Mean and variance of every batch norm, by the name of its node."""
        found = self.statistics_of(self.network, self.weights)
        names = [name.removesuffix(".mean") for name in found if name.endswith(".mean")]
        return {name: (found[f"{name}.mean"], found[f"{name}.variance"]) for name in names}

    def accuracy(self, split: Split) -> float:
        """The share of a split's images that it classifies rightly."""
        return self.correct_of(self.network, self.weights, split) / len(split)


def _session(model: Any) -> Any:
    """ONNX Runtime with the model, on the core of whoever calls it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # a plan for runs of one shape: it takes a third more memory, and no less time
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
