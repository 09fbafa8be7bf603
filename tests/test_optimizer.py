"""The update on two vectors is the update array by array."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hwnas.optimizer import LARGEST_NORM, first_moments, in_vectors, like, sizes, updated


def some_weights(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    shapes = {"norm": {"scale": (3, 5), "offset": (3, 5)}, "product": {"kernel": (3, 5, 7)}, "last": {"kernel": (7, 2)}}
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), shapes, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


@pytest.mark.parametrize("numpy", [np, jnp])
def test_weights_in_vectors_come_back_as_they_were(numpy):
    weights = some_weights(0)
    vectors = in_vectors(weights, numpy)
    assert {which: vector.shape for which, vector in vectors.items()} == {"kernels": (119,), "others": (30,)}
    assert sizes(weights) == {"kernels": 119, "others": 30}
    jax.tree.map(np.testing.assert_array_equal, like(weights, vectors), weights)


@pytest.mark.parametrize("scale", [0.01, 10.0])  # below the largest norm and above
def test_steps_on_vectors_are_those_array_by_array(scale: float):
    weights, rate, decay = some_weights(1), 0.3, 0.02
    rule = optax.chain(
        optax.clip_by_global_norm(LARGEST_NORM),
        optax.add_decayed_weights(
            decay, mask=jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in str(path), weights)
        ),
        optax.sgd(rate, momentum=0.9, nesterov=True),
    )
    state, moments, vectors = rule.init(weights), first_moments(weights), in_vectors(weights)
    for number in range(3):
        gradient = jax.tree.map(lambda leaf: scale * leaf, some_weights(number + 2))
        updates, state = rule.update(gradient, state, weights)
        weights = optax.apply_updates(weights, updates)
        vectors, moments = updated(vectors, moments, in_vectors(gradient), rate, decay)
        jax.tree.map(
            lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5),
            like(weights, vectors),
            weights,
        )
