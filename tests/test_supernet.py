"""Property: the supernet at an architecture is the single network of it, and touches no other weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from flax import nnx
from numpy_network import run_in_numpy

from hwnas.jax_layers import ACCELERATOR_FORM, Form
from hwnas.jax_network import FixedNetwork
from hwnas.network import Network, parameters
from hwnas.space import Architecture, SearchSpace, lower
from hwnas.space_toml import load_space, parse_space
from hwnas.supernet import Supernet, slice_weights, with_weights

SMALL = parse_space("""
name = "small"
input_size = 16
classes = 5
[stem]
channels = 8
stride = 2
max_pool = true
[unit]
split_ratio = ["1/4", "1/2", "3/4"]
kernel = [3, 7]
squeeze_excite = [false, true]
residual = [false, true]
groups = [1, 2, 4]
extra_depthwise = [false, true]
[[stage]]
depth = [1, 2, 3]
width = [16, 32]
[[stage]]
depth = [2, 1]
width = [32, 16, 48]
[head]
channels = 16
""")

PLAIN = parse_space("""
name = "plain"
input_size = 8
classes = 3
[stem]
channels = 8
stride = 1
max_pool = false
[unit]
split_ratio = ["1/2"]
kernel = [3]
squeeze_excite = [false]
residual = [false]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1]
width = [16, 8]
[head]
channels = 8
""")

SPACES = {space.name: space for space in (SMALL, PLAIN, load_space("shufflenet-tiny"))}

TOLERANCE = 1e-5


@dataclass
class Trial:
    """A supernet, compiled."""

    space: SearchSpace
    supernet: Supernet
    compiled: Any

    def run(self, images: np.ndarray, code: Sequence[int], statistics: Any = None) -> tuple[Any, Any]:
        weights = nnx.split(self.supernet, nnx.Param)[1]
        return self.compiled(weights, images, np.array(code, np.int32), statistics)

    def single(self, architecture: Architecture) -> tuple[Network, dict[str, np.ndarray]]:
        """The network of an architecture and the weights that are cut out for it."""
        return lower(self.space, architecture), slice_weights(self.supernet, architecture)


@cache
def trial(name: str) -> Trial:
    """A supernet in which no weight hides: scales are not one, offsets and biases are not zero."""
    space, rng = SPACES[name], np.random.default_rng(0)
    graph, weights = nnx.split(Supernet(space, rngs=nnx.Rngs(0)), nnx.Param)

    def values(path, leaf):
        normal = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(1 + 0.2 * normal if ".scale" in jax.tree_util.keystr(path) else 0.3 * normal)

    def call(weights, images, code, statistics):
        return nnx.merge(graph, weights)(images, code, statistics)

    supernet = nnx.merge(graph, jax.tree_util.tree_map_with_path(values, weights))
    return Trial(space, supernet, jax.jit(call, compiler_options=QUICK_COMPILE))


def some_images(space: SearchSpace, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, space.input_size, space.input_size, 3), np.float32)


def architectures(space: SearchSpace, count: int, seed: int) -> list[Architecture]:
    rng = Random(seed)
    return [space.largest, space.smallest, *(space.sample(rng) for _ in range(count - 2))]


def difference(found: Any, expected: Any) -> float:
    """The largest difference between two logits, relative to the largest logit."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ---- agreement ---------------------------------------------------------------------------------------------------


def test_the_supernet_equals_the_single_network_of_three_hundred_architectures():
    small, images = trial("small"), some_images(SMALL, 16)
    before = small.compiled._cache_size()
    for architecture in architectures(SMALL, 300, seed=1):
        found, _ = small.run(images, SMALL.encode(architecture))
        (expected,), _ = run_in_numpy(*small.single(architecture), images)
        assert difference(found, expected) < TOLERANCE, architecture.to_json()
    assert small.compiled._cache_size() <= before + 1


def test_with_statistics_of_other_images_the_supernet_equals_the_single_network_too():
    small, images, others = trial("small"), some_images(SMALL, 16), some_images(SMALL, 16, seed=1)
    before = small.compiled._cache_size()
    for architecture in architectures(SMALL, 60, seed=2):
        code, single = SMALL.encode(architecture), small.single(architecture)
        _, statistics = small.run(others, code)
        found, passed_on = small.run(images, code, statistics)
        (expected,), _ = run_in_numpy(*single, images, run_in_numpy(*single, others)[1])
        assert difference(found, expected) < TOLERANCE, architecture.to_json()
        jax.tree.map(np.testing.assert_array_equal, passed_on, statistics)
    assert small.compiled._cache_size() <= before + 2  # one without statistics, one with them


@pytest.mark.parametrize("seed", range(3))
def test_the_single_network_in_jax_gives_the_same_with_and_without_statistics(seed: int):
    small, architecture = trial("small"), SMALL.sample(Random(f"jax/{seed}"))
    network, weights = small.single(architecture)
    graph, weights = nnx.split(FixedNetwork(network, rngs=nnx.Rngs(0), weights=weights), nnx.Param)
    single = jax.jit(lambda *inputs: nnx.merge(graph, weights)(*inputs), compiler_options=QUICK_COMPILE)
    images, others, code = some_images(SMALL, 16), some_images(SMALL, 16, seed=1), SMALL.encode(architecture)
    (found, ours), (expected, theirs) = small.run(images, code), single(images, None)
    assert difference(found, expected) < TOLERANCE
    assert difference(small.run(others, code, ours)[0], single(others, theirs)[0]) < TOLERANCE


def test_the_supernet_of_the_shipped_default_space_equals_its_single_networks():
    tiny = trial("shufflenet-tiny")
    images = some_images(tiny.space, 8)
    for architecture in architectures(tiny.space, 6, seed=3):
        found, _ = tiny.run(images, tiny.space.encode(architecture))
        (expected,), _ = run_in_numpy(*tiny.single(architecture), images)
        assert difference(found, expected) < TOLERANCE, architecture.to_json()
    assert tiny.compiled._cache_size() == 1


def test_a_space_without_squeeze_excite_extra_convolution_and_later_units_has_no_weights_for_them():
    plain, images = trial("plain"), some_images(PLAIN, 16)
    (stage,) = plain.supernet.stages
    assert not any(name.startswith(("se_", "extra_")) for name in stage["first"])
    for architecture in (PLAIN.largest, PLAIN.smallest):
        found, statistics = plain.run(images, PLAIN.encode(architecture))
        (expected,), _ = run_in_numpy(*plain.single(architecture), images)
        assert difference(found, expected) < TOLERANCE
        assert set(statistics) == {"stem", "stage2.first", "head"}


def test_what_stands_at_the_places_of_units_that_are_not_there_changes_nothing():
    images, rng = some_images(SMALL, 16), Random(5)
    for _ in range(10):
        code = [rng.randrange(radix) for radix in SMALL.radices]
        found, expected = (trial("small").run(images, c)[0] for c in (code, SMALL.canonical(code)))
        np.testing.assert_array_equal(found, expected)


def test_a_new_supernet_starts_with_he_normal_kernels_and_neutral_norms():
    supernet = Supernet(SMALL, rngs=nnx.Rngs(0))
    for name, fan_in in (("pw2.kernel", 36), ("dw.kernel", 49)):
        kernel = np.asarray(supernet.stages[1]["later"][name][...])
        assert kernel.std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
    other = Supernet(SMALL, rngs=nnx.Rngs(1))
    assert (np.asarray(supernet.stem["conv.kernel"][...]) != np.asarray(other.stem["conv.kernel"][...])).all()
    assert (np.asarray(supernet.stem["conv_bn.scale"][...]) == 1).all()
    assert (np.asarray(supernet.stem["conv_bn.offset"][...]) == 0).all()


# ---- which weights an architecture uses --------------------------------------------------------------------------


def numbered(space: SearchSpace) -> Supernet:
    """A supernet whose weights are their own numbers."""
    graph, weights = nnx.split(Supernet(space, rngs=nnx.Rngs(0)), nnx.Param)
    leaves, structure = jax.tree.flatten(weights)
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    numbers = [np.arange(s, s + leaf.size).reshape(leaf.shape) for s, leaf in zip(starts[:-1], leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(structure, numbers))


def test_slicing_takes_every_parameter_of_the_single_network_from_a_place_of_its_own():
    supernet = numbered(SMALL)
    for architecture in architectures(SMALL, 100, seed=6):
        used = np.concatenate([places.ravel() for places in slice_weights(supernet, architecture).values()])
        assert len(used) == len(set(used)) == parameters(lower(SMALL, architecture))


def unused_of(gradient: Any, architecture: Architecture) -> np.ndarray:
    """The gradients of the weights of the small supernet that an architecture does not use."""
    values = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradient)])
    used = slice_weights(numbered(SMALL), architecture)
    return np.delete(values, np.concatenate([places.ravel() for places in used.values()]))


def squares(logits: jax.Array) -> jax.Array:
    return (logits**2).sum()


@cache
def gradient_of_small():
    """`(weights, images, code) -> gradient`, jitted."""
    graph, _ = nnx.split(trial("small").supernet, nnx.Param)

    def loss(weights, images, code):
        return squares(nnx.merge(graph, weights)(images, code)[0])

    return jax.jit(jax.grad(loss), compiler_options=QUICK_COMPILE)


def test_a_supernet_with_the_weights_of_a_network_gives_them_back_and_holds_nothing_else():
    architecture = SMALL.sample(Random(3))
    network = FixedNetwork(lower(SMALL, architecture), rngs=nnx.Rngs(5))
    weights = {name: np.asarray(weight[...]) for name, weight in network.weights.items()}
    supernet = with_weights(Supernet(SMALL, rngs=nnx.Rngs(0)), architecture, weights)
    found = slice_weights(supernet, architecture)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(found[name], value)
    held = sum(np.count_nonzero(leaf) for leaf in jax.tree.leaves(nnx.split(supernet, nnx.Param)[1]))
    assert held == sum(map(np.count_nonzero, weights.values()))


def test_weights_that_an_architecture_does_not_use_get_exactly_zero_gradient():
    _, weights = nnx.split(trial("small").supernet, nnx.Param)
    numbers, images = numbered(SMALL), some_images(SMALL, 8)
    names, reached = set(), set()
    for architecture in architectures(SMALL, 60, seed=7):
        gradient = gradient_of_small()(weights, images, np.array(SMALL.encode(architecture), np.int32))
        assert (unused_of(gradient, architecture) == 0).all(), architecture.to_json()
        values = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(gradient)])
        used = slice_weights(numbers, architecture)
        names |= set(used)
        reached |= {name for name, places in used.items() if (values[places] != 0).any()}
    assert reached == names
    assert gradient_of_small()._cache_size() == 1


def test_weights_that_an_architecture_uses_get_the_gradient_that_the_single_network_gives_them():
    small, architecture, images = trial("small"), SMALL.sample(Random("gradient/1")), some_images(SMALL, 8)
    graph, weights = nnx.split(small.supernet, nnx.Param)
    found = gradient_of_small()(weights, images, np.array(SMALL.encode(architecture), np.int32))
    network, weights = small.single(architecture)
    single_graph, weights = nnx.split(FixedNetwork(network, rngs=nnx.Rngs(0), weights=weights), nnx.Param)
    gradient_of = jax.grad(lambda weights: squares(nnx.merge(single_graph, weights)(images)[0]))
    expected = nnx.merge(single_graph, jax.jit(gradient_of, compiler_options=QUICK_COMPILE)(weights))
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(found))
    for name, values in slice_weights(nnx.merge(graph, found), architecture).items():
        wanted = expected.weights[name][...]
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5 * largest, err_msg=name)


# ---- the form for accelerators -----------------------------------------------------------------------------------


def logits_and_gradient(form: Form):
    """`(images, code) -> (logits, gradient)` of the small supernet in another form."""
    _, weights = nnx.split(trial("small").supernet, nnx.Param)
    graph, _ = nnx.split(Supernet(SMALL, rngs=nnx.Rngs(0), form=form), nnx.Param)

    def loss(weights, images, code):
        logits, _ = nnx.merge(graph, weights)(images, code)
        return squares(logits), logits

    run = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK_COMPILE)
    return lambda images, code: run(weights, images, np.array(code, np.int32))[::-1]


def test_without_control_flow_logits_and_gradients_are_the_same_and_unused_weights_still_get_none():
    _, weights = nnx.split(trial("small").supernet, nnx.Param)
    other, images = logits_and_gradient(Form(control_flow=False)), some_images(SMALL, 8)
    for architecture in architectures(SMALL, 8, seed=8):
        code = SMALL.encode(architecture)
        logits, gradient = other(images, code)
        assert difference(logits, trial("small").run(images, code)[0]) < TOLERANCE
        expected = gradient_of_small()(weights, images, np.array(code, np.int32))
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * largest)
        assert (unused_of(gradient, architecture) == 0).all(), architecture.to_json()


def test_bfloat16_feature_maps_give_float32_logits_near_the_exact_ones_and_float32_gradients():
    low, images = logits_and_gradient(ACCELERATOR_FORM), some_images(SMALL, 16)
    for architecture in architectures(SMALL, 6, seed=9):
        code = SMALL.encode(architecture)
        logits, gradient = low(images, code)
        exact = np.asarray(trial("small").run(images, code)[0])
        assert logits.dtype == np.float32
        assert 1e-4 < difference(logits, exact) < 0.2
        assert np.corrcoef(np.ravel(logits), exact.ravel())[0, 1] > 0.99
        assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype(np.float32)}
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
