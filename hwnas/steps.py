"""One step of training: what it computes, for a supernet and for a single network."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from hwnas import sliced_supernet
from hwnas.data import DataSet, augment
from hwnas.jax_layers import compiled
from hwnas.jax_network import FixedNetwork
from hwnas.optimizer import Vectors, in_vectors, like, sizes, updated
from hwnas.pieces import Tape, Value, add_all
from hwnas.programs import Programs
from hwnas.scoring import run
from hwnas.sliced_supernet import in_pieces
from hwnas.space import SearchSpace
from hwnas.spread import Spread
from hwnas.supernet import Supernet

ONE_DEVICE = Spread()


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


def training_step(
    model: Supernet | FixedNetwork, recipe: Recipe, data: DataSet, *, distils: bool = False, shared: Spread = ONE_DEVICE
) -> Any:
    """The compiled step `(weights, moments, key, rate, images, labels, codes) -> (weights, moments, losses [P])`.

    The gradients of the P paths are averaged. Each trains on its own part of the batch, images `[P, N, H, W, 3]` and
    labels `[P, N]`; with `distils` each trains on all of it, `[1, N, ...]`, the first by the labels and the others by
    what the first predicts. It compiles once: the codes are an array; in pieces, once for each. Where the network has
    control flow, paths are looped over, and parts small enough for the cache make a step on a CPU far quicker; where it
    has none, they are computed together, since the parts would not fill an accelerator. Images and codes are those
    that `shared.images` and `shared.told` made.
    """
    if isinstance(model, Supernet) and in_pieces(model) and shared.mesh is None:
        return _StepInPieces(model.space, recipe, data, distils)
    return _compiled(_step(model, recipe, data, distils, shared), shared)


def training_step_of_many(model: Supernet, recipe: Recipe, data: DataSet, *, shared: Spread = ONE_DEVICE) -> Any:
    """The compiled step of N networks that learn side by side from the same images, each by its own weights.

    As `training_step` without `distils`, but weights and moments have a leading axis of N, the codes are
    `[N, P, places]` and the losses `[N, P]`. It is one program in any form.
    """
    step = _step(model, recipe, data, False, shared)
    return _compiled(jax.vmap(step, (0, 0, None, None, None, None, 0)), shared)


def _compiled(step: Callable[..., Any], shared: Spread) -> Any:
    def on_all_devices(weights, moments, key, rate, images, labels, codes):
        return shared.same(step(weights, moments, key, rate, images, labels, shared.heard(codes)))

    return compiled(on_all_devices, donated=(0, 1))


def _examples(
    recipe: Recipe, data: DataSet, shared: Spread, key: jax.Array, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Augmented images and smoothed targets of all paths."""
    images = augment(key, images, flip=data.flip, mean=data.mean, std=data.std)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, len(data.classes)), recipe.label_smoothing)
    return shared.path_images(images), shared.path_images(targets)


def _updated(recipe: Recipe, old: Vectors, moments: Any, total: Vectors, paths: Any, rate: Any) -> tuple[Vectors, Any]:
    """Weights and moments after a step with a gradient that is a total over the paths."""
    gradient = jax.tree.map(lambda one: one / paths, total)
    return updated(old, moments, gradient, rate, recipe.weight_decay)


def _step(
    model: Supernet | FixedNetwork, recipe: Recipe, data: DataSet, distils: bool, shared: Spread
) -> Callable[..., Any]:
    graph, control_flow = nnx.split(model, nnx.Param)[0], model.form.control_flow  # not its weights: they stay free

    def loss(weights, images, targets, code):
        logits, _ = run(nnx.merge(graph, weights), images, code)
        return optax.softmax_cross_entropy(logits, targets).mean(), logits

    gradient_of = jax.value_and_grad(loss, has_aux=True)

    def in_turn(weights, images, targets, codes):
        """Gradients, summed over the paths, and losses; one path after the other."""
        nothing = jax.tree.map(jnp.zeros_like, weights)

        def one_path(total, images, targets, code):
            (value, logits), gradient = gradient_of(weights, images, targets, code)
            return jax.tree.map(jnp.add, total, gradient), value, logits

        def part_of_batch(total, part):
            return one_path(total, *part)[:2]

        def whole_batch(carry, path):
            index, code = path
            total, value, logits = one_path(carry[0], images[0], carry[1], code)
            return (total, jnp.where(index == 0, jax.nn.softmax(logits), carry[1])), value

        if not distils:
            return jax.lax.scan(part_of_batch, nothing, (images, targets, codes))
        (gradient, _), losses = jax.lax.scan(whole_batch, (nothing, targets[0]), (jnp.arange(len(codes)), codes))
        return gradient, losses

    def at_once(weights, images, targets, codes):
        """The same; all paths side by side, but for the one that teaches the others."""
        if not distils:
            (losses, _), gradients = jax.vmap(gradient_of, (None, 0, 0, 0))(weights, images, targets, codes)
            return jax.tree.map(lambda leaf: leaf.sum(0), gradients), losses
        (loss, logits), gradient = gradient_of(weights, images[0], targets[0], codes[0])
        (losses, _), gradients = jax.vmap(gradient_of, (None, None, None, 0))(
            weights, images[0], jax.nn.softmax(logits), codes[1:]
        )
        return jax.tree.map(lambda one, leaf: one + leaf.sum(0), gradient, gradients), jnp.append(loss, losses)

    def step(weights, moments, key, rate, images, labels, codes):
        images, targets = _examples(recipe, data, shared, key, images, labels)
        of_paths = in_turn if control_flow else at_once
        gradient, losses = of_paths(weights, images, targets, codes)
        total = in_vectors(gradient)
        vectors, moments = _updated(recipe, in_vectors(weights), moments, total, len(codes), rate)
        return like(weights, vectors), moments, losses

    return step


class _StepInPieces:
    """`training_step` of a supernet that is computed in pieces, on one device."""

    def __init__(self, space: SearchSpace, recipe: Recipe, data: DataSet, distils: bool) -> None:
        self.space, self.distils, self.programs = space, distils, Programs()

        @jax.jit
        def begin(key, images, labels):
            return tuple(map(tuple, _examples(recipe, data, ONE_DEVICE, key, images, labels)))

        @partial(jax.jit, donate_argnums=(0, 1))
        def end(old, moments, total, rate, paths):
            return _updated(recipe, old, moments, total, paths, rate)

        self._begin, self._end = begin, end

    def __call__(self, weights, moments, key, rate, images, labels, codes):
        architectures = [self.space.decode(code) for code in np.asarray(codes).tolist()]
        own = sliced_supernet.named(weights)[0]
        total = {which: np.zeros(size, np.float32) for which, size in sizes(weights).items()}
        rate, paths = np.float32(rate), np.float32(len(architectures))
        self.programs.shapes(self._end, total, moments, total, rate, paths)
        part, aim = (of_paths[0] for of_paths in self.programs.shapes(self._begin, key, images, labels))
        for architecture in architectures:
            tape, _, loss = self._taped(own, part, aim, architecture, surveys=True)
            tape.gradients(loss)
        self.programs.wait()
        images, targets = self.programs(self._begin, key, images, labels)
        totals, losses, teacher = dict(zip(own, jax.tree.leaves(like(weights, total)), strict=True)), [], None
        for number, architecture in enumerate(architectures):
            part = 0 if self.distils else number
            aim = targets[part] if teacher is None else teacher
            tape, logits, loss = self._taped(own, images[part], aim, architecture)
            losses.append(loss.array)
            if self.distils and teacher is None:
                teacher = jax.nn.softmax(logits.array)
            add_all(totals, tape.gradients(loss))
        old = in_vectors(jax.tree.map(np.asarray, weights), np)
        vectors, moments = self.programs(self._end, old, moments, total, rate, paths)
        new = like(weights, jax.tree.map(np.asarray, vectors))
        return jax.device_put(new), moments, np.array([float(loss) for loss in losses])

    def _taped(self, own, images, targets, architecture, **options) -> tuple[Tape, Value, Value]:
        """The tape of one path, its logits and its loss."""
        tape = Tape(own, self.programs, **options)
        logits = sliced_supernet.logits(tape, self.space, architecture, images)
        return tape, logits, sliced_supernet.loss(tape, logits, targets)
