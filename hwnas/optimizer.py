"""The update of a network's weights: SGD with Nesterov momentum, on two long vectors.

Array by array it would take six kernels for each of the hundred and more that a network has: a sixth of all that a step
compiles and, on an accelerator, of all that it launches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hwnas.jax_layers import Array

Vectors = dict[str, Array]
"""All weights of a network, or what belongs to each: `KERNELS` and `OTHERS`, either a vector."""

KERNELS, OTHERS = "kernels", "others"
LARGEST_NORM = 5.0


def in_vectors(weights: Any, numpy: Any = jnp) -> Any:
    """A pytree of weights as `Vectors`; with numpy itself on the host, where nothing is compiled for it."""
    parts: dict[str, list[Any]] = {KERNELS: [], OTHERS: []}
    for which, leaf in _parts(weights):
        parts[which].append(numpy.ravel(leaf))
    return {which: numpy.concatenate([numpy.zeros(0, np.float32), *leaves]) for which, leaves in parts.items()}


def sizes(weights: Any) -> dict[str, int]:
    """How long each of the two vectors of these weights is."""
    found = {KERNELS: 0, OTHERS: 0}
    for which, leaf in _parts(weights):
        found[which] += leaf.size
    return found


def like(weights: Any, vectors: Any) -> Any:
    """The inverse of `in_vectors`: a pytree like the weights; of numpy's arrays it has views."""
    leaves, begin = [], {KERNELS: 0, OTHERS: 0}
    for which, leaf in _parts(weights):
        end = begin[which] + leaf.size
        leaves.append(vectors[which][begin[which] : end].reshape(leaf.shape))
        begin[which] = end
    return jax.tree.unflatten(jax.tree.structure(weights), leaves)


def _parts(weights: Any) -> list[tuple[str, Any]]:
    # by name: the norms of a supernet's later units are stacked, and have two axes as kernels have
    found = jax.tree_util.tree_leaves_with_path(weights)
    return [(KERNELS if "kernel" in jax.tree_util.keystr(path) else OTHERS, leaf) for path, leaf in found]


def _rule(weight_decay: float) -> optax.GradientTransformation:
    """SGD without its learning rate, which is an argument of the step, so that no schedule compiles anew."""
    return optax.chain(
        optax.clip_by_global_norm(LARGEST_NORM),
        optax.add_decayed_weights(weight_decay, mask={KERNELS: True, OTHERS: False}),
        optax.trace(0.9, nesterov=True),
    )


def first_moments(weights: Any) -> Any:
    """The moments before the first step, in vectors."""
    vectors = {which: jax.ShapeDtypeStruct((size,), np.float32) for which, size in sizes(weights).items()}
    shapes = jax.eval_shape(_rule(0.0).init, vectors)
    return jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), shapes)


def updated(old: Vectors, moments: Any, gradient: Vectors, rate: Any, weight_decay: float) -> tuple[Vectors, Any]:
    """Weights and moments after a step along a gradient; kernels alone decay, as in the ShuffleNet papers."""
    updates, moments = _rule(weight_decay).update(gradient, moments, old)
    return jax.tree.map(lambda one, update: one - rate * update, old, updates), moments
