"""Networks trained at once on the device learn what they would learn alone, and are scored as alone."""

from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hwnas.data import load_data
from hwnas.jax_layers import Form
from hwnas.jax_network import FixedNetwork
from hwnas.resident import (
    ResidentScorer,
    ResidentTrainer,
    embedded,
    fixed_codes,
    fresh,
    narrowed,
    sandwich_codes,
    smoothed_cross_entropy,
    stacked,
    supernet_of,
    weights_of,
)
from hwnas.space import lower
from hwnas.space_toml import parse_space
from hwnas.supernet import Supernet, slice_weights
from hwnas.training import Recipe, Scorer

SPACE = parse_space("""
name = "resident"
input_size = 8
classes = 10
[stem]
channels = 8
stride = 1
max_pool = false
[unit]
split_ratio = ["1/4", "1/2"]
kernel = [3, 5]
squeeze_excite = [false, true]
residual = [false, true]
groups = [1, 2]
extra_depthwise = [false, true]
[[stage]]
depth = [2, 1, 3]
width = [16, 32]
[head]
channels = 32
""")
PATHS = [SPACE.largest, SPACE.smallest, *(SPACE.sample(Random(seed)) for seed in range(3))]
SMALL = parse_space("""
name = "small"
input_size = 8
classes = 10
[stem]
channels = 8
stride = 1
max_pool = false
[unit]
split_ratio = ["1/2"]
kernel = [3]
squeeze_excite = [false]
residual = [false, true]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [16, 32]
[head]
channels = 32
""")
EXACT = Form(control_flow=False)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="module")
def data():
    return load_data("digits", image_size=8)


def test_embedded_weights_are_cut_out_again_unchanged():
    for number, path in enumerate(PATHS):
        network = FixedNetwork(lower(SPACE, path), rngs=nnx.Rngs(number))
        own = {name: np.asarray(value[...]) for name, value in network.weights.items()}
        again = slice_weights(supernet_of(SPACE, embedded(SPACE, path, own)), path)
        assert own.keys() == again.keys()
        assert all((own[name] == again[name]).all() for name in own)


def test_an_architecture_alone_in_the_masked_graph_has_the_gradient_of_its_single_network():
    """So that training in a supernet's graph from its own weights is training from scratch."""
    path = PATHS[3]
    space = narrowed(SPACE, [path, SPACE.smallest])
    images = np.random.default_rng(1).standard_normal((8, 8, 8, 3), np.float32)
    labels = jnp.arange(8) % 10
    network = FixedNetwork(lower(space, path), rngs=nnx.Rngs(3))
    graph, state = nnx.split(network, nnx.Param)
    supernet_graph, _ = nnx.split(Supernet(space, rngs=nnx.Rngs(0), form=EXACT), nnx.Param)

    def single(state):
        return smoothed_cross_entropy(nnx.merge(graph, state)(images)[0], labels, 0.1)

    def masked(weights):
        return smoothed_cross_entropy(nnx.merge(supernet_graph, weights)(images, code)[0], labels, 0.1)

    code = np.array(space.encode(path), np.int32)
    own = jax.jit(jax.grad(single), compiler_options=QUICK)(state)["weights"]
    there = jax.jit(jax.grad(masked), compiler_options=QUICK)(fresh(space, path, 3))
    expected = embedded(space, path, {name: value[...] for name, value in own.items()})
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(there) if leaf.size)
    for found, wanted in zip(jax.tree.leaves(there), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-5 * scale)


def test_what_a_network_becomes_does_not_depend_on_those_that_are_trained_beside_it(data):
    paths = [SMALL.sample(Random(seed)) for seed in (5, 6, 7)]
    trainer = ResidentTrainer(SMALL, data, Recipe(1, 16, 0.05), networks=2, chunk=3, form=EXACT)

    def trained(*which: int):
        start = stacked([fresh(SMALL, paths[i], seed=i) for i in which])
        weights = trainer.train(start, fixed_codes([SMALL.encode(paths[i]) for i in which]), 6, seeds=which)
        return [jax.tree.map(lambda leaf: leaf[number], weights) for number in range(2)]  # noqa: B023

    first, second = trained(0, 1), trained(2, 0)
    for there, here in zip(jax.tree.leaves(first[0]), jax.tree.leaves(second[1]), strict=True):
        np.testing.assert_allclose(there, here, atol=1e-6)
    assert any(
        np.abs(there - here).max() > 1e-2
        for there, here in zip(jax.tree.leaves(first[0]), jax.tree.leaves(second[0]), strict=True)
    )


def test_a_supernet_trained_on_the_device_learns_and_is_scored_as_the_scorer_scores_it(data):
    trainer = ResidentTrainer(SMALL, data, Recipe(1, 64, 0.1), paths=2, chunk=10, form=EXACT)
    start = jax.tree.map(lambda leaf: leaf[None], weights_of(Supernet(SMALL, rngs=nnx.Rngs(0))))
    losses = []
    trainer.compile()
    weights = trainer.train(
        start, sandwich_codes(SMALL, 0, 2), 200, seeds=[0], on_chunk=lambda c: losses.append(c.losses)
    )
    assert np.mean(losses[-1]) < 0.75 * np.mean(losses[0])
    weights = jax.tree.map(lambda leaf: leaf[0], weights)
    codes = np.array([SMALL.encode(SMALL.smallest), SMALL.encode(SMALL.largest)])
    scorer = ResidentScorer(SMALL, data, together=4, batch_size=64, blocks=2, calibration_images=10_000, form=EXACT)
    found = scorer.accuracies(weights, codes, data.validation)
    other = Scorer(supernet_of(SMALL, weights), data, calibration_images=len(data.train))
    for accuracy, code in zip(found, codes, strict=True):
        assert accuracy > 0.3
        assert accuracy == pytest.approx(other.accuracy(data.validation, code), abs=0.04)  # other images calibrate
