"""Training and scoring of several networks at once on images that stay on the device: what fills a GPU.

Each compiled call does many steps: batches are gathered, augmented and learnt from on the device, and the host only
sends the places of the images. One network is one set of a supernet's weights. The supernet itself is trained with
several paths a step; architectures are trained from scratch beside each other, each in weights of its own that begin as
those of the single network would (`embedded`). What such a network does not use stays zero and gets no gradient, so
it is trained just as it would be alone.

All shapes are fixed by the space, the number of networks and paths and the batch, so nothing compiles again for
another architecture; `narrowed` makes the smallest space that holds given architectures, for which less is computed.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hwnas.data import DataSet, Split, TrainSplit, augment, normalize, stratified_part
from hwnas.errors import HwnasError
from hwnas.jax_layers import ACCELERATOR_FORM, Form
from hwnas.jax_network import FixedNetwork
from hwnas.space import CHOICES, Architecture, SearchSpace, Stage, lower
from hwnas.supernet import Statistics, Supernet, slice_weights
from hwnas.training import Recipe

MOMENTUM, GRADIENT_NORM = 0.9, 5.0
"""Of SGD, and what gradients are clipped to, as in `training`."""

Codes = np.ndarray
"""Encodings, `[networks, paths, places]`."""

Weights = Any
"""The parameters of a supernet, of `nnx.split`, or those of several on a new first axis."""


# ---- weights -------------------------------------------------------------------------------------------------------


def weights_of(supernet: Supernet) -> Weights:
    """A supernet's parameters."""
    return nnx.split(supernet, nnx.Param)[1]


def supernet_of(space: SearchSpace, weights: Weights, form: Form | None = None) -> Supernet:
    """The supernet with these parameters, in a form; without one, in the fastest for the device."""
    return nnx.merge(_graph(space, form), weights)


def _graph(space: SearchSpace, form: Form | None = None) -> Any:
    """All of a supernet but its parameters."""
    return nnx.split(Supernet(space, rngs=nnx.Rngs(0), form=form), nnx.Param)[0]


def narrowed(space: SearchSpace, architectures: Sequence[Architecture]) -> SearchSpace:
    """The smallest space of the same stages that holds all of the architectures."""
    units = [unit for architecture in architectures for stage in architecture.stages for unit in stage.units]
    choices = {
        name: tuple(value for value in space.choices[name] if any(getattr(unit, name) == value for unit in units))
        for name in CHOICES
    }
    choices["residual"] = tuple(sorted({False, *choices["residual"]}))  # what a stride-2 unit has
    stages = tuple(
        Stage(
            tuple(sorted({architecture.stages[index].depth for architecture in architectures})),
            tuple(sorted({architecture.stages[index].width for architecture in architectures})),
        )
        for index in range(len(space.stages))
    )
    return replace(space, choices=choices, stages=stages)


def embedded(space: SearchSpace, architecture: Architecture, weights: Mapping[str, Any]) -> Weights:
    """The parameters of a supernet in which an architecture has the given weights; all others are zero.

    Args:
        weights: of the single network, named as `network.weight_shapes` names them; the inverse of `slice_weights`.
    """
    leaves, structure = jax.tree.flatten(weights_of(Supernet(space, rngs=nnx.Rngs(0))))
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    numbered = [
        np.arange(start, start + leaf.size, dtype=np.int32).reshape(leaf.shape)
        for start, leaf in zip(starts[:-1], leaves, strict=True)
    ]
    flat = np.zeros(starts[-1], np.float32)
    places_of = supernet_of(space, jax.tree.unflatten(structure, numbered))
    for name, places in slice_weights(places_of, architecture).items():
        flat[places.astype(np.int64)] = np.asarray(weights[name])
    parts = [flat[start : start + leaf.size].reshape(leaf.shape) for start, leaf in zip(starts, leaves, strict=False)]
    return jax.tree.unflatten(structure, parts)


def fresh(space: SearchSpace, architecture: Architecture, seed: int) -> Weights:
    """The parameters in which an architecture starts as its single network would with this seed."""
    network = FixedNetwork(lower(space, architecture), rngs=nnx.Rngs(seed))
    return embedded(space, architecture, {name: value[...] for name, value in network.weights.items()})


def stacked(weights: Iterable[Weights]) -> Weights:
    """Parameters of several networks, on a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack([np.asarray(leaf) for leaf in leaves])), *weights)


# ---- training ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a compiled call of several steps tells.

    Attributes:
        steps: that are done.
        losses: of the chunk's steps, `[steps of a chunk, networks]`.
    """

    steps: int
    losses: np.ndarray


class ResidentTrainer:
    """Trains several networks of one space at once; compiled once, by `compile` or the first `train`.

    Args:
        space: of all networks.
        data: its training images go to the device.
        recipe: its `epochs` is not read: `train` is told how many steps.
        networks: how many sets of weights.
        paths: architectures that each network trains in a step; each takes an equal part of the batch.
        chunk: steps that a compiled call does.
        form: how they are computed; one without control flow, since all architectures of a call run as one.
    """

    def __init__(
        self,
        space: SearchSpace,
        data: DataSet,
        recipe: Recipe,
        *,
        networks: int = 1,
        paths: int = 1,
        chunk: int = 50,
        form: Form = ACCELERATOR_FORM,
    ) -> None:
        self.space, self.recipe, self.networks, self.paths, self.chunk = space, recipe, networks, paths, chunk
        if recipe.batch_size % paths or recipe.batch_size > len(data.train):
            raise HwnasError(
                f"A batch divides into the {paths} paths of a step and is at most as large as the training split of "
                f"{data.name}, {len(data.train)} images. It is {recipe.batch_size}. Give another --batch-size."
            )
        self.images, self.labels = on_device(data.train)
        step = _step(space, data, recipe, form)
        each_network = jax.vmap(step, in_axes=(0, 0, None, None, 0, None, 0, 0))

        def steps(weights, moments, images, labels, seeds, begin, rates, places, codes):
            def one(state, now):
                number, rate, at, code = now
                keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), number))(seeds)
                *state, loss = each_network(*state, images, labels, keys, rate, at, code)
                return tuple(state), loss

            numbers = begin + jnp.arange(chunk)
            (weights, moments), losses = jax.lax.scan(one, (weights, moments), (numbers, rates, places, codes))
            return weights, moments, losses

        self._steps: Any = jax.jit(steps, donate_argnums=(0, 1))

    def compile(self) -> None:
        """Compiles ahead of the first call; may run in a thread."""
        weights = stacked_shapes(self.space, self.networks)
        shape = jax.ShapeDtypeStruct
        batch = (self.chunk, self.networks, self.recipe.batch_size)
        codes = (self.chunk, self.networks, self.paths, len(self.space.radices))
        self._steps = self._steps.lower(
            weights,
            weights,
            self.images,
            self.labels,
            shape((self.networks,), jnp.int32),
            shape((), jnp.int32),
            shape((self.chunk,), jnp.float32),
            shape(batch, jnp.int32),
            shape(codes, jnp.int32),
        ).compile()

    def train(
        self,
        weights: Weights,
        codes: Callable[[int], Codes],
        steps: int,
        *,
        seeds: Sequence[int],
        on_chunk: Callable[[Chunk], None] = lambda chunk: None,
    ) -> Weights:
        """Trains networks by a linear warm-up and a cosine to zero.

        Args:
            weights: of all networks, `[networks, ...]`; it is not changed.
            codes: the encodings that a step trains, by its number.
            steps: how many; it is rounded up to whole chunks.
            seeds: of each network: batches and augmentation.
            on_chunk: is told of every compiled call.

        Raises:
            HwnasError: the loss of a network is no longer a number.
        """
        state = jax.tree.map(jnp.array, weights), jax.tree.map(jnp.zeros_like, weights)
        steps = -(-steps // self.chunk) * self.chunk
        batches = [_places(len(self.labels), self.recipe.batch_size, seed) for seed in seeds]
        rates = _rates(self.recipe, steps)
        seed_array = jnp.asarray(np.array(seeds, np.int32))
        for begin in range(0, steps, self.chunk):
            numbers = range(begin, begin + self.chunk)
            places = np.array([[next(batch) for batch in batches] for _ in numbers], np.int32)
            chosen = np.array([codes(number) for number in numbers], np.int32)
            *state, losses = self._steps(
                *state, self.images, self.labels, seed_array, jnp.int32(begin), rates[begin : begin + self.chunk],
                places, chosen,
            )  # fmt: skip
            found = np.asarray(losses)
            if not np.isfinite(found).all():
                network = int(np.argmin(np.isfinite(found).all(0)))
                raise HwnasError(
                    f"Training diverged: the loss of network {network} is no longer a number before step "
                    f"{begin + self.chunk}, at a learning rate of up to {self.recipe.learning_rate:g}. Give a lower "
                    "--learning-rate."
                )
            on_chunk(Chunk(begin + self.chunk, found))
        return state[0]


def on_device(split: Split) -> tuple[jax.Array, jax.Array]:
    """The images and labels of a split on the device; `HwnasError` if they do not lie in memory."""
    if not isinstance(split.images, np.ndarray):
        raise HwnasError("Images that stay on the device must fit in memory; these stream. Give a smaller data set.")
    return jnp.asarray(split.images), jnp.asarray(split.labels)


def stacked_shapes(space: SearchSpace, networks: int) -> Weights:
    """The shapes of the parameters of several networks, `[networks, ...]`."""
    weights = weights_of(Supernet(space, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((networks, *leaf.shape), leaf.dtype), weights)


def fixed_codes(codes: Sequence[Sequence[int]]) -> Callable[[int], Codes]:
    """For networks that train one architecture each."""
    array = np.array(codes, np.int32)[:, None]
    return lambda step: array


def sandwich_codes(space: SearchSpace, seed: int, paths: int) -> Callable[[int], Codes]:
    """For a supernet: uniform random paths, of which the first is the largest or the smallest one in turn."""
    ends = [space.encode(space.largest), space.encode(space.smallest)]
    radices = np.array(space.radices)

    def codes(step: int) -> Codes:
        drawn = np.random.default_rng((seed, step)).integers(0, radices, (paths, len(radices)), np.int32)
        if paths > 1:
            drawn[0] = ends[step % 2]
        return drawn[None]

    return codes


def _places(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """The places of the images of each batch, shuffled anew in each epoch, without end."""
    epoch = 0
    while True:
        order = np.random.default_rng((seed, epoch)).permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]
        epoch += 1


def _rates(recipe: Recipe, steps: int) -> np.ndarray:
    """The learning rate of each step, `[steps]`."""
    warm = max(1, round(recipe.warm_up * steps))
    number = np.arange(1, steps + 1)
    cosine = (1 + np.cos(np.pi * np.clip((number - warm) / max(1, steps - warm), 0, 1))) / 2
    return (recipe.learning_rate * np.where(number < warm, number / warm, cosine)).astype(np.float32)


def _step(space: SearchSpace, data: DataSet, recipe: Recipe, form: Form) -> Callable[..., Any]:
    """One step of one network: `(weights, moments, images, labels, key, rate, places [B], codes [P, places])`."""
    flip, mean, std, graph = data.flip, data.mean, data.std, _graph(space, form)

    def loss(weights, images, labels, code):
        logits, _ = nnx.merge(graph, weights)(images, code)
        return smoothed_cross_entropy(logits, labels, recipe.label_smoothing)

    def step(weights, moments, images, labels, key, rate, places, codes):
        paths = codes.shape[0]
        batch = augment(key, images[places], flip=flip, mean=mean, std=std)
        parts = batch.reshape(paths, -1, *batch.shape[1:]), labels[places].reshape(paths, -1), codes

        def mean_loss(weights):
            return jax.vmap(loss, in_axes=(None, 0, 0, 0))(weights, *parts).mean()

        value, gradient = jax.value_and_grad(mean_loss)(weights)
        weights, moments = _descended(weights, moments, gradient, rate, recipe.weight_decay)
        return weights, moments, value

    return step


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """The mean cross entropy of `[N, classes]` against labels `[N]` smoothed evenly over the classes."""
    logs = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(logs, labels[:, None], axis=1).mean()
    return -(1 - smoothing) * right - smoothing * logs.mean()


def _descended(weights: Weights, moments: Weights, gradient: Weights, rate: Any, decay: float) -> tuple[Any, Any]:
    """SGD with Nesterov momentum, decay of kernels only, and gradients clipped by their norm."""
    norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    factor = jnp.minimum(1.0, GRADIENT_NORM / jnp.maximum(norm, 1e-12))

    def direction(path, g, w):
        return g * factor + (decay * w if "kernel" in jax.tree_util.keystr(path) else 0)

    gradient = jax.tree_util.tree_map_with_path(direction, gradient, weights)
    moments = jax.tree.map(lambda m, g: MOMENTUM * m + g, moments, gradient)
    weights = jax.tree.map(lambda w, m, g: w - rate * (g + MOMENTUM * m), weights, moments, gradient)
    return weights, moments


# ---- scoring -------------------------------------------------------------------------------------------------------


class ResidentScorer:
    """Scores several architectures in a call, in one set of weights or each in its own; compiled once.

    The statistics of the batch norms are those over a fixed set of training images, drawn evenly by class.

    Args:
        space: of the weights.
        data: its training images give the statistics.
        together: architectures in a call.
        shared: whether they share one set of weights.
        calibration_images: for the statistics.
        batch_size: images at a time.
        blocks: batches of images that a call scores.
    """

    def __init__(
        self,
        space: SearchSpace,
        data: DataSet,
        *,
        together: int = 16,
        shared: bool = True,
        calibration_images: int = 2048,
        batch_size: int = 500,
        blocks: int = 10,
        form: Form = ACCELERATOR_FORM,
    ) -> None:
        self.together, self.batch_size, self.blocks = together, min(batch_size, len(data.train)), blocks
        self.calibration = self._blocks(calibration_set(data.train, calibration_images))
        mean, std, graph = data.mean, data.std, _graph(space, form)

        def one(weights, calibration, images, labels, code):
            network = nnx.merge(graph, weights)
            statistics = _statistics(lambda batch: network(normalize(batch, mean, std), code)[1], calibration)

            def count(total, block):
                logits, _ = network(normalize(block[0], mean, std), code, statistics)
                return total + (logits.argmax(-1) == block[1]).sum(), None

            return jax.lax.scan(count, jnp.int32(0), (images, labels))[0]

        self._count = jax.jit(jax.vmap(one, in_axes=(None if shared else 0, None, None, None, 0)))

    def _blocks(self, images: np.ndarray) -> jax.Array:
        whole = len(images) // self.batch_size * self.batch_size
        return jnp.asarray(images[:whole].reshape(-1, self.batch_size, *images.shape[1:]))

    def accuracies(self, weights: Weights, codes: np.ndarray, split: Split) -> np.ndarray:
        """The share of a split's images that each architecture classifies rightly, `[N]`.

        Args:
            weights: one set, or one for each architecture.
            codes: `[N, places]`; any number if they share the weights, else `together`.
            split: whose images.
        """
        images, labels = split.images, split.labels
        assert isinstance(images, np.ndarray)
        size = self.batch_size * self.blocks
        right = np.zeros(len(codes), np.int64)
        for start in range(0, len(labels), size):
            part = images[start : start + size]
            filled = np.zeros((size, *images.shape[1:]), np.uint8)
            filled[: len(part)] = part
            marks = np.full(size, -1, np.int32)
            marks[: len(part)] = labels[start : start + size]
            block = jnp.asarray(filled.reshape(self.blocks, self.batch_size, *images.shape[1:]))
            block_labels = jnp.asarray(marks.reshape(self.blocks, self.batch_size))
            for first in range(0, len(codes), self.together):
                some = codes[first : first + self.together]
                rows = np.concatenate([some, np.repeat(some[-1:], self.together - len(some), axis=0)])
                found = self._count(weights, self.calibration, block, block_labels, jnp.asarray(rows, jnp.int32))
                right[first : first + self.together] += np.asarray(found)[: len(some)]
        return right / len(labels)


def calibration_set(split: TrainSplit, count: int) -> np.ndarray:
    """A fixed set of training images, drawn evenly by class, uint8 `[N, H, W, 3]`."""
    assert isinstance(split.images, np.ndarray)
    if count >= len(split):
        return split.images
    order = np.random.default_rng(0).permutation(stratified_part(split.labels, count, 0)[1])
    return split.images[order]


def _statistics(batch_statistics: Callable[[jax.Array], Statistics], blocks: jax.Array) -> Statistics:
    """Means and variances over all images of the blocks `[B, N, ...]`, from those of each block."""

    def moments(block):
        pairs = batch_statistics(block)
        return jax.tree.map(lambda pair: (pair[0], pair[1] + jnp.square(pair[0])), pairs, is_leaf=_is_pair)

    def add(total, block):
        return jax.tree.map(jnp.add, total, moments(block)), None

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(moments, blocks[0]))
    total, _ = jax.lax.scan(add, zero, blocks)
    count = blocks.shape[0]

    def final(pair):
        mean = pair[0] / count
        return mean, jnp.maximum(pair[1] / count - jnp.square(mean), 0)

    return jax.tree.map(final, total, is_leaf=_is_pair)


def _is_pair(node: Any) -> bool:
    return isinstance(node, tuple)


def steps_of(recipe: Recipe, images: int) -> int:
    """The steps of a recipe's epochs."""
    return math.ceil(recipe.epochs * (images // recipe.batch_size))
