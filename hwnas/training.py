"""One training loop, for the supernet and for a single network.

Batch norms carry no running averages. In training each batch is normalised by itself; before anything is scored, the
statistics of just that architecture are estimated anew and exactly, over a fixed set of training images.
"""

import ctypes
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hwnas import processes
from hwnas.candidate_scoring import SupernetScorer, scorer_of
from hwnas.checkpoints import load_checkpoint, newest_checkpoint, save_checkpoint
from hwnas.data import DataSet
from hwnas.errors import HwnasError
from hwnas.jax_network import FixedNetwork
from hwnas.methods import PathSampler, without_choice
from hwnas.network_json import to_json
from hwnas.optimizer import first_moments
from hwnas.spread import Spread, spread_of
from hwnas.steps import Recipe, training_step, training_step_of_many
from hwnas.supernet import Supernet

Model = TypeVar("Model", Supernet, FixedNetwork)

CHECKPOINT_SECONDS, QUICK_SAVE_S = 30.0, 1.5
"""Between checkpoints; and how long it may take to write one, beyond which they are as many times rarer."""
SCORING_SHARE = 0.03
"""Of the time of training, what the scoring of the watched architectures may take."""
DIVERGED, DIVERGED_STEPS = 3.0, 50
"""Training has diverged when the mean loss of so many steps is so many times that of a guess, `log(classes)`."""
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's `mallopt`."""


@dataclass(frozen=True, slots=True)
class Progress:
    """What a finished step tells.

    Attributes:
        step, steps: how many are done, and how many there are in all.
        loss: the mean over the paths of the step.
        learning_rate: of the step.
        images_per_second: that entered the network, over all steps of this process but the first, which compiles.
        seconds_left: until the last step, at that pace.
        accuracies: of the watched architectures, by name, on the validation split, when they were scored last.
        scored: whether that was after this step.
    """

    step: int
    steps: int
    loss: float
    learning_rate: float
    images_per_second: float
    seconds_left: float
    accuracies: Mapping[str, float]
    scored: bool


def no_progress(progress: Progress) -> None:
    """The listener that does nothing."""


def prepare_process(folder: Path) -> None:
    """Makes training quick to start and to run: call it before the first computation.

    What XLA compiles is kept in `folder` for the next process. On glibc, freed buffers stay with the process: given
    back after each step, as is the default, they cost a page fault for every 4 KiB of the next (measured on two cores:
    a step of the tiny supernet is 10 to 20 % slower).
    """
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)


# ---- training ----------------------------------------------------------------------------------------------------


def train(
    model: Model,
    data: DataSet,
    recipe: Recipe,
    folder: Path,
    *,
    paths: PathSampler = without_choice,
    distils: bool = False,
    watched: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    on_step: Callable[[Progress], None] = no_progress,
) -> Model:
    """Trains a network on the training split, from where the newest checkpoint in `folder` left off.

    The same seed, recipe and data give the same weights on the same machine, with or without a kill in between:
    batches, paths and augmentation follow from the seed and the number of the step.

    Args:
        model: where to start; it is not changed.
        data: the training split is trained on, the validation split scores what is watched.
        recipe: how.
        folder: receives the checkpoints, one every half minute and one at the end.
        paths: what each step trains; each path takes an equal part of the batch.
        distils: all paths of a step take its whole batch instead, and the first teaches the others; `methods.Method`.
        watched: encodings to score from time to time, by name.
        seed: of batches and augmentation.
        on_step: is told of every step.

    Raises:
        HwnasError: the training diverged, a checkpoint is damaged, the disk is full.
    """
    per_epoch, count = len(data.train) // recipe.batch_size, len(paths(0))
    if per_epoch == 0:
        raise HwnasError(
            f"A batch of {recipe.batch_size} images is larger than the training split of {data.name}, "
            f"{len(data.train)} images. Give a smaller --batch-size."
        )
    if recipe.batch_size % count and not distils:
        raise HwnasError(
            f"Each of the {count} paths of a step takes an equal part of the batch; a batch of {recipe.batch_size} "
            f"does not divide. Give a --batch-size that is a multiple of {count}."
        )
    graph, state = start_state(model)
    parts = 1 if distils else count
    shared = spread_of(recipe.batch_size // parts)
    _order("train", model, recipe, folder, seed, paths=paths(0).shape, distils=distils)
    return nnx.merge(
        graph,
        _weights_after(
            training_step(model, recipe, data, distils=distils, shared=shared),
            state,
            data,
            recipe,
            folder,
            paths,
            seed,
            on_step,
            shared,
            parts,
            images=recipe.batch_size * (count if distils else 1),
            score=_Watch(graph, data, watched or {}),
        ),
    )


def _order(do: str, model: Supernet | FixedNetwork, recipe: Recipe, folder: Path, seed: int, **further: Any) -> None:
    """Has the other processes train along; `following.py` reads it."""
    network = to_json(model.network) if isinstance(model, FixedNetwork) else None
    processes.order(do, network=network, recipe=asdict(recipe), folder=str(folder), seed=seed, **further)


def train_many(
    models: Sequence[Supernet],
    codes: Sequence[Sequence[int]],
    data: DataSet,
    recipe: Recipe,
    folder: Path,
    *,
    seed: int = 0,
    on_step: Callable[[Progress], None] = no_progress,
) -> list[Supernet]:
    """Trains several networks side by side, each one architecture of a space, as `train` trains each on its own.

    An accelerator that one small network does not fill takes hardly longer for several. They see the same batches.

    Args:
        models: where each starts, such as `supernet.with_weights` makes them; all of one space.
        codes: the encoding of each.
        data, recipe, folder, seed, on_step: as for `train`; the checkpoints hold all of them.
    """
    starts = [start_state(model) for model in models]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in starts))
    graph, each, shared = starts[0][0], np.array(codes, np.int32)[:, None], spread_of(recipe.batch_size)
    _order("train many", models[0], recipe, folder, seed, codes=each[:, 0].tolist())
    step = training_step_of_many(models[0], recipe, data, shared=shared)
    weights = _weights_after(
        step, state, data, recipe, folder, lambda step: each, seed, on_step, shared, 1,
        images=recipe.batch_size * len(models), score=_Watch(graph, data, {}),
    )  # fmt: skip
    return [nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], weights)) for i in range(len(models))]


def _weights_after(
    take_step: Any,
    state: Any,
    data: DataSet,
    recipe: Recipe,
    folder: Path,
    paths: PathSampler,
    seed: int,
    on_step: Callable[[Progress], None],
    shared: Spread,
    parts: int,
    *,
    images: int,
    score: "_Watch",
) -> Any:
    """The weights after all steps, from the newest checkpoint on.

    Of several processes the leading one alone knows the checkpoints, listens and scores.

    Args:
        shared: the devices that share each of the `parts` of a batch.
        images: how many enter the networks in a step.
    """
    per_epoch = len(data.train) // recipe.batch_size
    step, steps = 0, recipe.epochs * per_epoch
    if processes.leads() and (found := newest_checkpoint(folder)):
        step, state = found[0], load_checkpoint(found[1], state)
    state, step = shared.of_leader(state), int(shared.of_leader(np.int32(step)))
    if step >= steps:
        kept = shared.alone(tuple(state))
        if processes.leads() and not newest_checkpoint(folder):
            save_checkpoint(folder, 0, kept)
        return kept[0]
    guard, pace = _Guard(recipe, folder, math.log(len(data.classes))), _Pace(step, steps, images)
    saved, saving_s, key = time.monotonic(), 0.0, jax.random.key(seed)
    inputs = _inputs(data, recipe, paths, seed, step, shared, parts)
    following = next(inputs)
    while following:
        codes, rate, arrays, told = following
        with processes.together():
            *state, losses = take_step(*state, jax.random.fold_in(key, step), rate, *arrays, told)
            following = next(inputs, None)  # made ready while the device computes
            losses, step = np.asarray(losses).ravel(), step + 1
        guard.check(step, losses, codes)
        if not processes.leads():
            continue
        since = time.monotonic() - saved
        due = step == steps or since > CHECKPOINT_SECONDS * max(1.0, saving_s / QUICK_SAVE_S)
        scored = due and score(shared.alone(state[0]))
        loss, (images_per_second, seconds_left) = float(losses.mean()), pace.after(step, score.seconds)
        on_step(Progress(step, steps, loss, rate, images_per_second, seconds_left, score.accuracies, scored))
        if due:  # what is told of a step is told before it counts as done
            begun, kept = time.monotonic(), shared.alone(tuple(state))
            guard.check_weights(step, kept, codes)
            save_checkpoint(folder, step, kept)
            saved = time.monotonic()
            saving_s = saved - begun
    return shared.alone(state[0])


def _inputs(
    data: DataSet, recipe: Recipe, paths: PathSampler, seed: int, step: int, shared: Spread, parts: int
) -> Iterator[tuple[np.ndarray, float, tuple[Any, ...], Any]]:
    """What the steps from `step` on take: codes, learning rate, images and labels, and the codes for the devices."""
    per_epoch = len(data.train) // recipe.batch_size
    rate, part = _learning_rate(recipe, recipe.epochs * per_epoch), recipe.batch_size // parts
    places = [number * part + place for number in range(parts) for place in shared.share(part)]
    for epoch in range(step // per_epoch, recipe.epochs):
        begin = step - epoch * per_epoch
        for batch in data.train.batches(recipe.batch_size, seed=seed, epoch=epoch, start_batch=begin, places=places):
            codes = paths(step)
            yield codes, rate(step), tuple(map(shared.images, batch.divided(parts))), shared.told(codes)
            step += 1


def start_state(model: Model) -> tuple[Any, Any]:
    """The graph of a network, and `(weights, moments)` to start from; the weights are copies."""
    graph, weights = nnx.split(model, nnx.Param)
    weights = jax.device_put(weights, may_alias=False)  # each step gives its input's memory away
    return graph, (weights, first_moments(weights))


def trained_already(model: Model, folder: Path) -> Model | None:
    """A network with the weights of the newest checkpoint that `train` wrote to `folder`, if there is one."""
    found = newest_checkpoint(folder)
    if found is None:
        return None
    graph, weights = nnx.split(model, nnx.Param)
    return nnx.merge(graph, load_checkpoint(found[1], (weights, first_moments(weights)))[0])


class _Pace:
    """How fast the steps of this process are; the first one compiles and does not count, nor does scoring."""

    def __init__(self, done: int, steps: int, images: int) -> None:
        self.first, self.steps, self.images = done + 1, steps, images
        self.started = 0.0

    def after(self, step: int, scoring_seconds: float) -> tuple[float, float]:
        """Images a second so far and seconds left, once `step` is done and scoring has taken so long."""
        now = time.monotonic() - scoring_seconds
        if step == self.first:
            self.started = now
            return 0.0, float("nan")
        seconds_a_step = (now - self.started) / (step - self.first)
        return self.images / max(seconds_a_step, 1e-9), (self.steps - step) * seconds_a_step


class _Watch:
    """Scores architectures now and then, for `SCORING_SHARE` of the time at most."""

    def __init__(self, graph: Any, data: DataSet, watched: Mapping[str, Sequence[int]]) -> None:
        self.graph, self.data, self.watched = graph, data, watched
        self.scorer: SupernetScorer | None = None
        self.accuracies: dict[str, float] = {}
        self.seconds, self.next = 0.0, 0.0

    def __call__(self, weights: Any) -> bool:
        """Scores the watched architectures with these weights if it is time; tells whether it was."""
        started = time.monotonic()
        if not self.watched or started < self.next:
            return False
        model = nnx.merge(self.graph, weights)
        self.scorer = self.scorer.of(model) if self.scorer else scorer_of(model, self.data)
        scores, times = {}, [started]
        for name, code in self.watched.items():
            scores[name] = self.scorer.accuracy(self.data.validation, code)
            times.append(time.monotonic())
        self.accuracies, self.seconds = scores, self.seconds + times[-1] - started
        self.next = times[-1] + len(scores) * (times[-1] - times[-2]) / SCORING_SHARE  # the first one compiles
        return True


class _Guard:
    """Stops a training that has diverged, with the step, the architecture and the last good checkpoint."""

    def __init__(self, recipe: Recipe, folder: Path, guess: float) -> None:
        self.recipe, self.folder, self.limit = recipe, folder, DIVERGED * guess
        self.recent: deque[float] = deque(maxlen=DIVERGED_STEPS)

    def check(self, step: int, losses: np.ndarray, codes: np.ndarray) -> None:
        """Raises `HwnasError` if a path's loss is no number, or the recent ones are far above that of a guess."""
        codes = codes.reshape(len(losses), -1)
        if not np.isfinite(losses).all():
            path = int(np.flatnonzero(~np.isfinite(losses))[0])
            raise self._error(step, f"the loss of step {step} is {losses[path]}", codes[path])
        self.recent.append(float(losses.mean()))
        mean = sum(self.recent) / len(self.recent)
        if len(self.recent) == DIVERGED_STEPS and mean > self.limit:
            what = f"the mean loss of the {DIVERGED_STEPS} steps up to step {step} is {mean:.3g}"
            raise self._error(step, f"{what}, and a guess has {self.limit / DIVERGED:.3g}", codes[losses.argmax()])

    def check_weights(self, step: int, state: Any, codes: np.ndarray) -> None:
        """Raises `HwnasError` if a weight or a moment is no finite number, so that no such checkpoint is written."""
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
            last = codes.reshape(-1, codes.shape[-1])[-1]
            raise self._error(step, f"step {step} made a weight that is no finite number", last)

    def _error(self, step: int, what: str, code: np.ndarray) -> HwnasError:
        known = len(code) and processes.leads()
        trained = f", in which it trained the architecture [{' '.join(map(str, code))}]" if known else ""
        found = newest_checkpoint(self.folder)
        kept = f"The last good checkpoint is {found[1]}" if found else "There is no checkpoint yet"
        return HwnasError(
            f"Training diverged: {what}{trained}, at a learning rate of up to {self.recipe.learning_rate:g}. "
            f"{kept}. Give a lower --learning-rate."
        )


def _learning_rate(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """The learning rate of each step: linear warm-up, then a cosine to zero.

    Python computes it: optax's schedule would wait for the device at each step, and rounds as XLA compiled it.
    """
    rising = max(1, round(recipe.warm_up * steps))
    falling = max(1, steps - rising)

    def rate(step: int) -> float:
        done = step + 1
        if done < rising:
            return recipe.learning_rate * done / rising
        return recipe.learning_rate * (1 + math.cos(math.pi * min(1.0, (done - rising) / falling))) / 2

    return rate
