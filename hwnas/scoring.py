"""Scoring architectures of a trained network on a split, with the statistics of their batch norms estimated anew.

Whole batches go to devices: each computes what one device alone would, and nothing is added up but counts of images. So
an accuracy is the same number on any number of devices and processes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hwnas.data import Batch, DataSet, Split, normalize, stratified_subset
from hwnas.jax_layers import compiled
from hwnas.jax_network import FixedNetwork
from hwnas.spread import Spread
from hwnas.supernet import Statistics, Supernet


def run(model: Supernet | FixedNetwork, images: Any, code: Any, statistics: Statistics | None = None) -> Any:
    """Calls either kind of network; a single one has no use for the code."""
    if isinstance(model, Supernet):
        return model(images, code, statistics)
    return model(images, statistics)


def calibration_batches(data: DataSet, images: int, batch_size: int) -> Iterator[Batch]:
    """Whole batches of training images, evenly by class and always the same, that statistics are estimated over."""
    count = max(1, min(images, len(data.train)) // batch_size)
    return stratified_subset(data.train, count * batch_size, seed=0).batches(batch_size, seed=0)


def part_of(split: Split, batch_size: int, part: int, parts: int) -> Iterator[Batch]:
    """The batches of one of several parts of a split, in order."""
    batches = -(-len(split) // batch_size)
    first, end = part * batches // parts, (part + 1) * batches // parts
    return islice(split.batches(batch_size, seed=None, start_batch=first), end - first)


class Scorer:
    """Scores architectures of one trained network; compiled once for all of them.

    Args:
        model: the trained network.
        data: its training images give the statistics.
        calibration_images: how many of them the statistics are estimated over, always the same.
        batch_size: images at a time; by default what suits the form of the network.
    """

    def __init__(
        self,
        model: Supernet | FixedNetwork,
        data: DataSet,
        *,
        calibration_images: int = 256,
        batch_size: int | None = None,
    ) -> None:
        graph, weights = nnx.split(model, nnx.Param)
        self.devices = jax.local_devices()
        self.spread = Spread(Mesh(np.array(self.devices), ("images",)) if len(self.devices) > 1 else None)
        self.weights = self.spread.everywhere(weights)
        self.batch_size = min(batch_size or (64 if model.form.control_flow else 256), len(data.train))
        chosen = calibration_batches(data, calibration_images, self.batch_size)
        self.calibration = [(self._placed(batches), len(batches)) for batches in self._rounds(chosen)]

        def statistics(weights, images, code):
            return run(nnx.merge(graph, weights), normalize(images, data.mean, data.std), code)[1]

        def logits(weights, images, code, statistics):
            return run(nnx.merge(graph, weights), normalize(images, data.mean, data.std), code, statistics)[0]

        self._batch_statistics = compiled(self._on_each_device(statistics))
        self._logits = compiled(self._on_each_device(logits))

    def of(self, model: Supernet | FixedNetwork) -> "Scorer":
        """A scorer of other weights of the same network; nothing is compiled anew."""
        other = copy(self)
        other.weights = self.spread.everywhere(nnx.split(model, nnx.Param)[1])
        return other

    def statistics(self, code: Iterable[int] = ()) -> Statistics:
        """Means and variances of every batch norm for one architecture, cumulative over the calibration images."""
        traced = jnp.asarray(tuple(code), jnp.int32)
        rounds = [(self._batch_statistics(self.weights, images, traced), count) for images, count in self.calibration]
        batches = [batch for found, count in rounds for batch in self._apart(found)[:count]]
        total = batches[0]
        for number, batch in enumerate(batches[1:], 1):
            total = _merge_statistics(total, batch, float(number))
        return total

    def logits(self, images: np.ndarray, statistics: Statistics, code: Iterable[int] = ()) -> np.ndarray:
        """The logits `[N, classes]` of uint8 images `[N, H, W, 3]`, N at most the batch size."""
        batch = Batch(images, np.zeros(len(images), np.int32))
        return self._logits_of([batch], statistics, tuple(code))[0]

    def _logits_of(self, batches: Sequence[Batch], statistics: Statistics, code: tuple[int, ...]) -> list[np.ndarray]:
        """The logits of as many batches as there are devices at most."""
        found = self._logits(self.weights, self._placed(batches), jnp.asarray(code, jnp.int32), statistics)
        logits = self._apart(found)
        return [np.asarray(one)[: len(batch.labels)] for one, batch in zip(logits, batches, strict=False)]

    def accuracy(self, split: Split, code: Iterable[int] = ()) -> float:
        """The share of a split's images that one architecture classifies rightly, its statistics estimated first."""
        return self.correct(split, tuple(code)) / len(split)

    def correct(self, split: Split, code: tuple[int, ...], part: int = 0, parts: int = 1) -> int:
        """How many images of a part of a split one architecture classifies rightly; parts are made of whole batches."""
        statistics, chosen = self.statistics(code), part_of(split, self.batch_size, part, parts)
        return sum(
            int((logits.argmax(-1) == batch.labels).sum())
            for batches in self._rounds(chosen)
            for logits, batch in zip(self._logits_of(batches, statistics, code), batches, strict=True)
        )

    # ---- whole batches on each device

    def _rounds(self, batches: Iterable[Batch]) -> Iterator[list[Batch]]:
        """Groups of as many batches as there are devices; the last may be smaller."""
        rest = iter(batches)
        while group := list(islice(rest, len(self.devices))):
            yield group

    def _placed(self, batches: Sequence[Batch]) -> Any:
        """The images of a batch for each device, filled up with black: `[D, B, H, W, 3]`; of one device without D."""
        images = np.zeros((len(self.devices), self.batch_size, *batches[0].images.shape[1:]), np.uint8)
        for place, batch in zip(images, batches, strict=False):
            place[: len(batch.images)] = batch.images
        if self.spread.mesh is None:
            return jax.device_put(images[0])
        return jax.device_put(images, NamedSharding(self.spread.mesh, PartitionSpec("images")))

    def _on_each_device(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(weights, images, ...)` for images that `_placed` made; results have an axis D, too."""
        mesh = self.spread.mesh
        if mesh is None:
            return function

        def on_own_images(weights: Any, images: jax.Array, *rest: Any) -> Any:
            return jax.tree.map(lambda x: x[None], function(weights, images[0], *rest))

        def on_all(weights: Any, images: jax.Array, *rest: Any) -> Any:
            everywhere, own = PartitionSpec(), PartitionSpec("images")
            places = (everywhere, own, *(everywhere for _ in rest))
            mapped = jax.shard_map(on_own_images, mesh=mesh, in_specs=places, out_specs=own, check_vma=False)
            return mapped(weights, images, *rest)

        return on_all

    def _apart(self, tree: Any) -> list[Any]:
        """The results of the devices."""
        if self.spread.mesh is None:
            return [tree]
        host = jax.tree.map(np.asarray, tree)
        return [jax.tree.map(lambda x, d=d: x[d], host) for d in range(len(self.devices))]


@jax.jit
def _merge_statistics(total: Statistics, batch: Statistics, count: float) -> Statistics:
    """Joins the statistics of `count` batches with those of one more of the same size (Chan et al. 1979)."""

    def merge(old, new):
        difference = new[0] - old[0]
        mean = old[0] + difference / (count + 1)
        variance = (count * old[1] + new[1]) / (count + 1) + difference**2 * count / (count + 1) ** 2
        return mean, variance

    is_pair = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(merge, total, batch, is_leaf=is_pair)
