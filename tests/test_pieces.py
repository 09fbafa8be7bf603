"""A supernet in pieces: it computes what one program computes, and compiles a fixed number of them."""

from concurrent.futures import CancelledError
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILE
from flax import nnx
from numpy_network import run_in_numpy
from test_supernet import SMALL, TOLERANCE, architectures, difference, some_images, trial, unused_of
from test_training import RECIPE, SPACE, StoppedError, made_up_data, stop_at

from benchmarks.contenders import pieces_of
from hwnas import sliced_supernet, training
from hwnas.jax_layers import CPU_FORM, LONG_CPU_FORM, LONG_WORK_IMAGES, native_form
from hwnas.methods import single_paths
from hwnas.pieces import Axis, Cut, Tape, add_all, centre, first
from hwnas.programs import Programs
from hwnas.row_layers import norm_again, norm_once, norm_rows
from hwnas.sliced_units import SIZES, few_sizes
from hwnas.space import Architecture
from hwnas.steps import training_step
from hwnas.supernet import Supernet
from hwnas.training import start_state, train


def weights_of_small() -> tuple[dict[str, Any], Any]:
    return sliced_supernet.named(nnx.split(trial("small").supernet, nnx.Param)[1])


def taped(architecture: Architecture, images: Any) -> tuple[Tape, Any]:
    """The small supernet, piece by piece: the tape and the logits."""
    tape = Tape(weights_of_small()[0], Programs())
    return tape, sliced_supernet.logits(tape, SMALL, architecture, jnp.asarray(images))


# ---- agreement ---------------------------------------------------------------------------------------------------


def test_pieces_give_the_logits_of_the_single_network():
    images = some_images(SMALL, 16)
    for architecture in architectures(SMALL, 4, seed=11):
        (expected,), _ = run_in_numpy(*trial("small").single(architecture), images)
        assert difference(taped(architecture, images)[1].array, expected) < TOLERANCE, architecture.to_json()


def test_pieces_give_the_gradients_of_one_program_and_none_to_weights_that_an_architecture_does_not_use():
    graph, weights = nnx.split(trial("small").supernet, nnx.Param)
    images, targets = some_images(SMALL, 8), jax.nn.one_hot(np.arange(8) % 5, 5)

    def loss(weights, code):
        return -(jax.nn.log_softmax(nnx.merge(graph, weights)(images, code)[0]) * targets).sum(-1).mean()

    whole = jax.jit(jax.grad(loss), compiler_options=QUICK_COMPILE)
    for architecture in architectures(SMALL, 2, seed=12):
        tape, logits = taped(architecture, images)
        own, tree = weights_of_small()
        totals = {name: np.ones(weight.shape, np.float32) for name, weight in own.items()}  # it stays in the sum
        add_all(totals, tape.gradients(sliced_supernet.loss(tape, logits, targets)))
        found = tree.unflatten([totals[name] - 1 for name in own])
        expected = whole(weights, np.array(SMALL.encode(architecture), np.int32))
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
        for one, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(
                one, wanted, rtol=1e-3, atol=1e-5 * max(1, largest), err_msg=architecture.to_json()
            )
        assert (unused_of(found, architecture) == 0).all(), architecture.to_json()


@pytest.mark.parametrize("distils", [False, True], ids=["labels", "a teacher"])
def test_a_step_in_pieces_is_the_step_of_one_program(distils: bool):
    data, rng, results = made_up_data(), Random(2), []
    (batch,) = data.train.batches(32, seed=0)
    codes = np.array([SPACE.encode(SPACE.sample(rng)) for _ in range(4)], np.int32)
    for form in (CPU_FORM, LONG_CPU_FORM):
        model = Supernet(SPACE, rngs=nnx.Rngs(0), form=form)
        _, state = start_state(model)
        step = training_step(model, RECIPE, data, distils=distils)
        results.append(
            jax.tree.leaves(step(*state, jax.random.key(0), 0.1, *batch.divided(1 if distils else 4), codes))
        )
    for found, expected in zip(results[1], results[0], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_a_training_in_pieces_that_was_stopped_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    paths = single_paths(SPACE, None, 0, 4)

    def trained(folder: str, **options: Any) -> list[np.ndarray]:
        start = Supernet(SPACE, rngs=nnx.Rngs(0), form=LONG_CPU_FORM)
        model = train(start, made_up_data(), RECIPE, tmp_path / folder, paths=paths, seed=1, **options)
        assert sliced_supernet.in_pieces(model)
        return jax.tree.leaves(nnx.split(model, nnx.Param)[1])

    with pytest.raises(StoppedError):
        trained("stopped", on_step=stop_at(3))
    for found, expected in zip(trained("stopped"), trained("whole"), strict=True):
        np.testing.assert_array_equal(found, expected)


# ---- weights and norms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cut",
    [
        Cut("w"),
        Cut("w", (first(4, 6), Axis(np.array([5, 0, 3], np.int32), 4))),
        Cut("w", (centre(3, 5), first(7)), joined=np.arange(3)[:, None] % 2 == np.arange(7) % 2),
    ],
    ids=["whole", "places and zeros", "groups"],
)
def test_what_is_added_to_a_gradient_is_what_was_cut_from_the_weight(cut: Cut):
    rng = np.random.default_rng(0)
    weight, total = rng.normal(size=(5, 7)).astype(np.float32), np.zeros((5, 7), np.float32)
    part = cut.of(weight)
    assert part.shape == cut.shape_of(weight).shape
    gradient = rng.normal(size=part.shape).astype(np.float32)
    cut.add(total, gradient)  # a linear map and its transpose
    np.testing.assert_allclose((part * gradient).sum(), (weight * total).sum(), rtol=1e-5)
    cut.add(total, gradient)
    np.testing.assert_allclose(2 * (part * gradient).sum(), (weight * total).sum(), rtol=1e-5)


def test_a_cut_has_the_places_in_their_order_and_zeros_behind_them():
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    taken = Cut("w", (first(2, 3), Axis(np.array([3, 1]), 3))).of(weight)
    np.testing.assert_array_equal(taken, [[3, 1, 0], [7, 5, 0], [0, 0, 0]])


def test_a_norm_that_knows_its_statistics_has_the_values_and_gradients_of_one_that_finds_them():
    rng = np.random.default_rng(1)
    x, g = (jnp.asarray(rng.normal(2, 3, (3, 4, 4, 8)).astype(np.float32)) for _ in range(2))
    pair = jnp.array([0.5, 1, 2]), jnp.array([-1.0, 0, 1])
    expected, pull = jax.vjp(lambda *inputs: norm_rows(*inputs)[0], x, *pair)
    y, known = norm_once(x, *pair)
    again, pull_again = jax.vjp(lambda *inputs: norm_again(*inputs, known), x, *pair)
    for found, wanted in ((y, expected), (again, expected), *zip(pull_again(g), pull(g), strict=True)):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


# ---- compiling ---------------------------------------------------------------------------------------------------


def test_what_a_survey_has_compiled_is_all_that_a_step_compiles(compilations: list[str]):
    data, programs, rng = made_up_data(), Programs(), Random(4)
    model = Supernet(SPACE, rngs=nnx.Rngs(0), form=LONG_CPU_FORM)
    own, _ = sliced_supernet.named(nnx.split(model, nnx.Param)[1])
    images, targets = some_images(SPACE, 8), np.eye(3, dtype=np.float32)[data.train.labels[:8]]
    code = SPACE.sample(rng)

    def run(**options):
        tape = Tape(own, programs, **options)
        return tape.gradients(sliced_supernet.loss(tape, sliced_supernet.logits(tape, SPACE, code, images), targets))

    compilations.clear()
    run(surveys=True)
    programs.wait()
    assert len(compilations) == len(programs) > 20
    add_all({name: np.zeros(weight.shape, np.float32) for name, weight in own.items()}, run())
    programs.wait()
    assert len(compilations) == len(programs)


def test_a_program_is_compiled_once_for_its_shapes_and_functions_and_jax_keeps_nothing_of_it(compilations: list[str]):
    programs, traced = Programs(), []

    def scale_it(scale, x):
        traced.append(x.shape)
        return scale(x)

    scaled = jax.jit(scale_it, static_argnums=0)
    compilations.clear()
    for _ in range(2):
        assert float(programs(scaled, jnp.negative, np.float32(3))) == -3
        np.testing.assert_array_equal(programs(scaled, jnp.negative, np.ones(2, np.float32)), [-1, -1])
    assert float(programs(scaled, jnp.abs, np.float32(-3))) == 3
    assert len(compilations) == len(programs) == 3
    assert scaled._cache_size() == 0
    assert len(traced) == 3
    scaled.trace(jnp.negative, np.float32(3))
    assert len(traced) == 4  # anew: it was forgotten
    counted = Programs(compiles=False)
    assert counted.shapes(scaled, jnp.negative, np.float32(3)).shape == ()
    assert (len(counted), len(compilations)) == (1, 3)
    with pytest.raises(CancelledError):
        counted(scaled, jnp.negative, np.float32(3))


def test_a_space_has_a_fixed_number_of_pieces_however_many_architectures_come():
    rng = Random(5)
    drawn = [SMALL.sample(rng) for _ in range(1600)]
    assert pieces_of(SMALL, 8, drawn) == pieces_of(SMALL, 8, drawn[:800])


def test_few_sizes_hold_every_count_and_merge_those_that_cost_least():
    assert few_sizes([5, 3, 3]) == (3, 5)
    counts = [12, 24, 36, 28, 56, 84, 44, 88, 132, 60, 120, 180]
    sizes = few_sizes(counts)
    assert len(sizes) == SIZES
    assert set(sizes) <= set(counts)
    rounded = [next(size for size in sizes if size >= count) for count in counts]
    assert sum(rounded) <= 1.06 * sum(counts)


def test_long_trainings_on_one_cpu_take_pieces(monkeypatch: pytest.MonkeyPatch):
    assert native_form(LONG_WORK_IMAGES - 1) == native_form() == CPU_FORM
    assert native_form(LONG_WORK_IMAGES) == LONG_CPU_FORM
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert native_form(LONG_WORK_IMAGES) == CPU_FORM
