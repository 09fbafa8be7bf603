"""One training loop, for the supernet and for a single network, and the scoring of what it trained.

Batch norms carry no running averages. In training each batch is normalised by itself; before anything is scored, the
statistics of just that architecture are estimated anew and exactly, over a fixed set of training images.
"""

import ctypes
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hwnas.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from hwnas.data import DataSet, Split, TrainSplit, augment, normalize
from hwnas.errors import HwnasError
from hwnas.jax_network import FixedNetwork
from hwnas.space import SearchSpace
from hwnas.supernet import Statistics, Supernet

Model = TypeVar("Model", Supernet, FixedNetwork)

PathSampler = Callable[[int], np.ndarray]
"""The encodings that a step trains, `[P, places]`, by the number of the step."""

CHECKPOINT_SECONDS = 30.0
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's `mallopt`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train: SGD with Nesterov momentum 0.9, a linear warm-up, then a cosine to zero.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step.
        learning_rate: the highest one.
        weight_decay: on kernels only, as in the ShuffleNet papers.
        label_smoothing: as in the released ShuffleNet V2 code.
        warm_up: the share of the steps in which the learning rate rises.
    """

    epochs: int
    batch_size: int = 16
    learning_rate: float = 0.05
    weight_decay: float = 4e-5
    label_smoothing: float = 0.1
    warm_up: float = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """What a finished step tells."""

    step: int
    steps: int
    loss: float
    images_per_second: float
    seconds_left: float


def no_progress(progress: Progress) -> None:
    """The listener that does nothing."""


def prepare_process(folder: Path) -> None:
    """Makes training quick to start and to run: call it before the first computation.

    What XLA compiles is kept in `folder` for the next process. On glibc, freed buffers stay with the process: given
    back after each step, as is the default, they cost a page fault for every 4 KiB of the next (measured on two cores:
    a step of the tiny supernet is 10 to 20 % slower).
    """
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)


# ---- paths -------------------------------------------------------------------------------------------------------


def single_path(step: int) -> np.ndarray:
    """For a single network: one path without any choice."""
    return np.zeros((1, 0), np.int32)


def sandwich(space: SearchSpace, seed: int, count: int = 2) -> PathSampler:
    """Uniform single paths with the sandwich rule: each step trains `count` random paths.

    In every fourth step the largest, and two steps later the smallest architecture stands in for one of them; all
    others are drawn by `SearchSpace.sample`. Sources: uniform single paths, SPOS (arXiv 1904.00420, section 3.2); the
    sandwich rule, universally slimmable networks (arXiv 1903.05134, section 3.2), here spread over steps, so that most
    of the work goes into what a search looks at.
    """
    ends = {0: space.encode(space.largest), 2: space.encode(space.smallest)}

    def paths(step: int) -> np.ndarray:
        rng = Random(f"{seed}/{step}")
        drawn = [space.encode(space.sample(rng)) for _ in range(count)]
        return np.array([ends.get(step % 4, drawn[0]), *drawn[1:]], np.int32)

    return paths


# ---- training ----------------------------------------------------------------------------------------------------


def run(model: Supernet | FixedNetwork, images: Any, code: Any, statistics: Statistics | None = None) -> Any:
    """Calls either kind of network; a single one has no use for the code."""
    if isinstance(model, Supernet):
        return model(images, code, statistics)
    return model(images, statistics)


def train(
    model: Model,
    data: DataSet,
    recipe: Recipe,
    folder: Path,
    *,
    paths: PathSampler = single_path,
    seed: int = 0,
    on_step: Callable[[Progress], None] = no_progress,
) -> Model:
    """Trains a network on the training split, from where the newest checkpoint in `folder` left off.

    The same seed, recipe and data give the same weights on the same machine, with or without a kill in between:
    batches, paths and augmentation follow from the seed and the number of the step.

    Args:
        model: where to start; it is not changed.
        data: only the training split is read.
        recipe: how.
        folder: receives the checkpoints, one every half minute and one at the end.
        paths: what each step trains; each path takes an equal part of the batch.
        seed: of batches and augmentation.
        on_step: is told of every step.

    Raises:
        HwnasError: the loss is no longer a number, a checkpoint is damaged, the disk is full.
    """
    per_epoch = len(data.train) // recipe.batch_size
    if per_epoch == 0:
        raise HwnasError(
            f"A batch of {recipe.batch_size} images is larger than the training split of {data.name}, "
            f"{len(data.train)} images. Give a smaller --batch-size."
        )
    if recipe.batch_size % len(paths(0)):
        raise HwnasError(
            f"Each of the {len(paths(0))} paths of a step takes an equal part of the batch; a batch of "
            f"{recipe.batch_size} does not divide. Give a --batch-size that is a multiple of {len(paths(0))}."
        )
    steps = recipe.epochs * per_epoch
    graph, weights = nnx.split(model, nnx.Param)
    weights = jax.tree.map(jnp.copy, weights)  # each step gives its input's memory away
    state = (weights, _optimizer(recipe).init(weights))
    done = 0
    if found := newest_checkpoint(folder):
        done, state = found[0], jax.tree.map(jnp.asarray, load_checkpoint(found[1], state))
    if done < steps:
        step_function = training_step(graph, recipe, data)
        state = _loop(step_function, state, done, steps, per_epoch, data.train, recipe, folder, paths, seed, on_step)
    return nnx.merge(graph, state[0])


def trained_already(model: Model, folder: Path) -> Model | None:
    """A network with the weights of the newest checkpoint that `train` wrote to `folder`, if there is one."""
    found = newest_checkpoint(folder)
    if found is None:
        return None
    graph, weights = nnx.split(model, nnx.Param)
    moments = _optimizer(Recipe(epochs=1)).init(weights)  # their shapes are the same for all recipes
    return nnx.merge(graph, load_checkpoint(found[1], (weights, moments))[0])


def _loop(
    step_function: Callable[..., Any],
    state: Any,
    done: int,
    steps: int,
    per_epoch: int,
    split: TrainSplit,
    recipe: Recipe,
    folder: Path,
    paths: PathSampler,
    seed: int,
    on_step: Callable[[Progress], None],
) -> Any:
    key, rate = jax.random.key(seed), _learning_rate(recipe, steps)
    started = saved = time.monotonic()
    first, step = done, done
    for epoch in range(done // per_epoch, recipe.epochs):
        begin = step - epoch * per_epoch
        for batch in split.batches(recipe.batch_size, seed=seed, epoch=epoch, start_batch=begin):
            codes = paths(step)
            *state, loss = step_function(*state, jax.random.fold_in(key, step), rate(step), *batch, codes)
            step, loss, now = step + 1, float(loss), time.monotonic()
            if not np.isfinite(loss):
                raise HwnasError(
                    f"Training diverged: the loss of step {step} is {loss}, at a learning rate of up to "
                    f"{recipe.learning_rate:g}. Give a lower --learning-rate."
                )
            if step == first + 1:
                started = now  # the first step of a process compiles
            pace = (step - first - 1) / (now - started) if step > first + 1 else 0.0
            left = (steps - step) / pace if pace else float("nan")
            on_step(Progress(step, steps, loss, pace * recipe.batch_size, left))
            if step == steps or now - saved > CHECKPOINT_SECONDS:
                save_checkpoint(folder, step, tuple(state))
                saved = now
    return state


def _learning_rate(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """The learning rate of each step: linear warm-up, then a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, recipe.learning_rate, max(1, round(recipe.warm_up * steps)), max(2, steps)
    )
    return lambda step: float(np.asarray(schedule(step + 1)))


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """SGD without its learning rate, which is an argument of the step, so that no schedule compiles anew."""

    def decays(weights):
        # by name: the norms of a supernet's later units are stacked, and have two axes as kernels have
        return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), weights)

    return optax.chain(
        optax.clip_by_global_norm(5.0),
        optax.add_decayed_weights(recipe.weight_decay, mask=decays),
        optax.trace(0.9, nesterov=True),
    )


def training_step(graph: Any, recipe: Recipe, data: DataSet) -> Any:
    """The compiled step `(weights, moments, key, rate, images, labels, codes) -> (weights, moments, loss)`.

    Each path trains on its own part of the batch; their gradients are averaged. It compiles once: the codes are an
    array, and the paths are looped over. Parts small enough for the cache also make a step on a CPU far quicker.
    """
    optimizer = _optimizer(recipe)

    def loss(weights, images, labels, code):
        logits, _ = run(nnx.merge(graph, weights), images, code)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), recipe.label_smoothing)
        return optax.softmax_cross_entropy(logits, targets).mean()

    def step(weights, moments, key, rate, images, labels, codes):
        images = augment(key, images, flip=data.flip, mean=data.mean, std=data.std)
        paths = codes.shape[0]
        parts = images.reshape(paths, -1, *images.shape[1:]), labels.reshape(paths, -1), codes

        def one_path(total, part):
            value, gradient = jax.value_and_grad(loss)(weights, *part)
            return jax.tree.map(jnp.add, total, gradient), value

        gradient, losses = jax.lax.scan(one_path, jax.tree.map(jnp.zeros_like, weights), parts)
        gradient = jax.tree.map(lambda leaf: leaf / paths, gradient)
        updates, moments = optimizer.update(gradient, moments, weights)
        return jax.tree.map(lambda old, update: old - rate * update, weights, updates), moments, losses.mean()

    return jax.jit(step, donate_argnums=(0, 1))


# ---- scoring -----------------------------------------------------------------------------------------------------


class Scorer:
    """Scores architectures of one trained network; compiled once for all of them.

    Args:
        model: the trained network.
        data: its training images give the statistics.
        calibration_images: how many of them the statistics are estimated over, always the same.
        batch_size: images at a time.
    """

    def __init__(
        self, model: Supernet | FixedNetwork, data: DataSet, *, calibration_images: int = 256, batch_size: int = 64
    ) -> None:
        graph, self.weights = nnx.split(model, nnx.Param)
        self.batch_size = min(batch_size, len(data.train))
        batches = data.train.batches(self.batch_size, seed=0)
        count = max(1, min(calibration_images, len(data.train)) // self.batch_size)
        self.calibration = [jnp.asarray(next(batches).images) for _ in range(count)]

        def statistics(weights, images, code):
            return run(nnx.merge(graph, weights), normalize(images, data.mean, data.std), code)[1]

        def logits(weights, images, code, statistics):
            return run(nnx.merge(graph, weights), normalize(images, data.mean, data.std), code, statistics)[0]

        self._batch_statistics, self._logits = jax.jit(statistics), jax.jit(logits)

    def statistics(self, code: Iterable[int] = ()) -> Statistics:
        """Means and variances of every batch norm for one architecture, cumulative over the calibration images."""
        traced = jnp.asarray(tuple(code), jnp.int32)
        total: Statistics = None
        for count, images in enumerate(self.calibration):
            batch = self._batch_statistics(self.weights, images, traced)
            total = batch if total is None else _merge_statistics(total, batch, float(count))
        return total

    def logits(self, images: np.ndarray, statistics: Statistics, code: Iterable[int] = ()) -> np.ndarray:
        """The logits `[N, classes]` of uint8 images `[N, H, W, 3]`, N at most the batch size."""
        filled = np.pad(images, ((0, self.batch_size - len(images)), (0, 0), (0, 0), (0, 0)))
        traced = jnp.asarray(tuple(code), jnp.int32)
        return np.asarray(self._logits(self.weights, filled, traced, statistics))[: len(images)]

    def accuracy(self, split: Split, code: Iterable[int] = ()) -> float:
        """The share of a split's images that one architecture classifies rightly, its statistics estimated first."""
        code = tuple(code)
        statistics = self.statistics(code)
        correct = sum(
            int((self.logits(batch.images, statistics, code).argmax(-1) == batch.labels).sum())
            for batch in split.batches(self.batch_size, seed=None)
        )
        return correct / len(split)


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
