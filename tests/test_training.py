"""Property: training resumes bit for bit, compiles once, and scores by exact statistics."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from textwrap import dedent

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from numpy_network import run_in_numpy

from hwnas import training
from hwnas.checkpoints import load_checkpoint, newest_checkpoint
from hwnas.data import DataSet, TestSplit, TrainSplit, ValidationSplit, load_data, normalize
from hwnas.errors import HwnasError
from hwnas.jax_layers import Form
from hwnas.jax_network import FixedNetwork
from hwnas.methods import single_paths
from hwnas.network import Network, NetworkBuilder
from hwnas.optimizer import first_moments, in_vectors, like, updated
from hwnas.scoring import Scorer
from hwnas.space import lower
from hwnas.space_toml import parse_space
from hwnas.steps import Recipe, training_step
from hwnas.supernet import Supernet, slice_weights, with_weights
from hwnas.training import Progress, start_state, train, train_many, trained_already

SPACE = parse_space("""
name = "few choices"
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
residual = [false, true]
groups = [1, 2]
extra_depthwise = [false]
[[stage]]
depth = [1, 2, 3]
width = [16, 8]
[head]
channels = 8
""")

RECIPE = Recipe(epochs=2, batch_size=8, learning_rate=0.05)
STEPS = 2 * 4


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory):
    """What one test compiled another need not compile again; also shows that kept programs compute the same."""
    folder = tmp_path_factory.mktemp("compiled")
    least, folder_option = "jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_dir"
    before = getattr(jax.config, least)
    jax.config.update(least, 0.2)
    jax.config.update(folder_option, str(folder))
    compilation_cache.reset_cache()
    yield folder
    jax.config.update(least, before)
    jax.config.update(folder_option, None)
    compilation_cache.reset_cache()


def made_up_data(train_images: int = 35) -> DataSet:
    """Images of three classes, each brighter in a colour of its own; 35 images make four batches of 8."""
    rng = np.random.default_rng(0)

    def split(kind, count):
        labels = (np.arange(count) % 3).astype(np.int32)
        images = rng.integers(0, 128, (count, 8, 8, 3), np.uint8)
        images[np.arange(count), :, :, labels] += np.uint8(100)
        return kind(images, labels)

    splits = split(TrainSplit, train_images), split(ValidationSplit, 21), split(TestSplit, 6)
    return DataSet("made up", ("red", "green", "blue"), 8, *splits, flip=True)


def small_network(side: int = 8, classes: int = 3) -> Network:
    b = NetworkBuilder("small", (3, side, side))
    with b.unit("stem"):
        x = b.conv_bn(b.input, 16, kernel=3, stride=2, activation="relu")
    with b.unit("body"):
        x = b.conv_bn(x, 32, kernel=3, activation="relu")
    with b.unit("head"):
        x = b.classifier(x, classes)
    return b.build(x)


def new_network() -> FixedNetwork:
    return FixedNetwork(small_network(), rngs=nnx.Rngs(0))


def new_supernet() -> Supernet:
    return Supernet(SPACE, rngs=nnx.Rngs(0))


def arrays(model: nnx.Module) -> list[np.ndarray]:
    return [np.array(leaf) for leaf in jax.tree.leaves(nnx.split(model, nnx.Param)[1])]


def same(ours: nnx.Module, theirs: nnx.Module) -> None:
    for found, expected in zip(arrays(ours), arrays(theirs), strict=True):
        np.testing.assert_array_equal(found, expected)


# ---- resuming ----------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """What Ctrl-C would be."""


def stop_at(step: int):
    def listener(progress: Progress) -> None:
        if progress.step == step:
            raise StoppedError

    return listener


def test_training_that_was_stopped_twice_gives_the_same_weights_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = made_up_data()
    whole = train(new_network(), data, RECIPE, tmp_path / "whole", seed=1)
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    for step in (3, 5):  # in the first epoch, and at the beginning of the second
        with pytest.raises(StoppedError):
            train(new_network(), data, RECIPE, tmp_path / "stopped", seed=1, on_step=stop_at(step))
        assert newest_checkpoint(tmp_path / "stopped") == (step - 1, tmp_path / "stopped" / f"step-{step - 1:08d}")
    seen: list[Progress] = []
    same(train(new_network(), data, RECIPE, tmp_path / "stopped", seed=1, on_step=seen.append), whole)
    assert [progress.step for progress in seen] == [5, 6, 7, 8]


def test_another_seed_gives_other_weights(tmp_path: Path):
    ones, twos = (arrays(train(new_network(), made_up_data(), RECIPE, tmp_path / str(s), seed=s)) for s in (1, 2))
    assert all((one != two).any() for one, two in zip(ones, twos, strict=True))


def test_a_supernet_killed_while_it_writes_a_checkpoint_resumes_bit_for_bit(tmp_path: Path, compiled_programs: Path):
    killed = """
    import os, pathlib, signal, sys
    from hwnas import checkpoints, training
    from hwnas.methods import single_paths
    from test_training import RECIPE, SPACE, made_up_data, new_supernet

    digests, calls = checkpoints._digests, []

    def die_at_the_fourth(folder):
        calls.append(folder)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return digests(folder)

    checkpoints._digests = die_at_the_fourth
    training.CHECKPOINT_SECONDS = -1.0
    training.prepare_process(pathlib.Path(sys.argv[2]))
    paths = single_paths(SPACE, None, 1)
    training.train(new_supernet(), made_up_data(), RECIPE, pathlib.Path(sys.argv[1]), paths=paths, seed=1)
    """
    folder = tmp_path / "killed"
    command = [sys.executable, "-c", dedent(killed), str(folder), str(compiled_programs)]
    child = subprocess.run(command, cwd=Path(__file__).parent, check=False)
    assert child.returncode == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003", "unfinished-00000004"]
    found, whole = (
        train(new_supernet(), made_up_data(), RECIPE, where, paths=single_paths(SPACE, None, 1), seed=1)
        for where in (folder, tmp_path / "whole")
    )
    same(found, whole)
    assert [path.name for path in folder.iterdir() if path.name.startswith("unfinished")] == []


def test_what_is_trained_already_is_not_trained_again(tmp_path: Path):
    trained = train(new_network(), made_up_data(), RECIPE, tmp_path)
    seen: list[Progress] = []
    same(train(new_network(), made_up_data(), RECIPE, tmp_path, on_step=seen.append), trained)
    assert seen == []
    found = trained_already(new_network(), tmp_path)
    assert found is not None
    same(found, trained)
    assert trained_already(new_network(), tmp_path / "empty") is None


def test_the_network_that_is_given_is_not_changed_and_can_be_used_afterwards(tmp_path: Path):
    model = new_network()
    trained = train(model, made_up_data(), RECIPE, tmp_path)
    same(model, new_network())
    assert all((found != before).any() for found, before in zip(arrays(trained), arrays(model), strict=True))


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_training_with_step_architecture_and_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    train(new_supernet(), made_up_data(), RECIPE, tmp_path, paths=single_paths(SPACE, None, 0))
    code = SPACE.encode(SPACE.largest)

    def paths(step: int) -> np.ndarray:
        return np.array([code], np.int32)

    longer = Recipe(epochs=40, batch_size=8, learning_rate=1e38)
    message = rf"the loss of step \d+ is (nan|inf), in which it trained the architecture \[{' '.join(map(str, code))}\]"
    with pytest.raises(HwnasError, match=message) as caught:
        train(new_supernet(), made_up_data(), longer, tmp_path, paths=paths)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert f"The last good checkpoint is {found[1]}. Give a lower --learning-rate." in str(caught.value)
    weights = nnx.split(new_supernet(), nnx.Param)[1]
    stored = load_checkpoint(found[1], (weights, first_moments(weights)))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stored))


def test_a_path_that_diverges_alone_is_the_one_that_is_named():
    guard = training._Guard(RECIPE, Path("nowhere"), 1.1)
    guard.check(1, np.array([1.0, 2.0]), np.array([[1, 1], [2, 2]]))
    with pytest.raises(HwnasError, match=r"the loss of step 2 is inf, .*architecture \[2 2\].*no checkpoint yet"):
        guard.check(2, np.array([1.0, np.inf]), np.array([[1, 1], [2, 2]]))


def test_losses_that_stay_far_above_a_guess_stop_training_and_single_ones_do_not():
    guard, code = training._Guard(RECIPE, Path("nowhere"), 1.0), np.array([[3]])
    for step in range(200):
        guard.check(step, np.array([100.0 if step % 50 == 7 else 1.0]), code)
    with pytest.raises(HwnasError, match=r"the mean loss of the 50 steps up to step 2\d\d is .*a guess has 1"):
        _ = [guard.check(step, np.array([5.0]), code) for step in range(200, 300)]


def test_a_batch_larger_than_the_training_split_is_refused_with_both_sizes(tmp_path: Path):
    with pytest.raises(HwnasError, match=r"A batch of 36 images .* made up, 35 images.*smaller --batch-size"):
        train(new_network(), made_up_data(), Recipe(epochs=1, batch_size=36), tmp_path)


def test_a_batch_that_the_paths_cannot_share_evenly_is_refused_with_both_numbers(tmp_path: Path):
    def two(step: int) -> np.ndarray:
        return np.zeros((2, 0), np.int32)

    with pytest.raises(HwnasError, match=r"Each of the 2 paths .* a batch of 5 does not divide.*multiple of 2"):
        train(new_network(), made_up_data(), Recipe(epochs=1, batch_size=5), tmp_path, paths=two)


def test_the_checkpoint_of_another_network_is_refused(tmp_path: Path):
    train(new_network(), made_up_data(), Recipe(epochs=1, batch_size=35), tmp_path)
    other = FixedNetwork(small_network(classes=4), rngs=nnx.Rngs(0))
    with pytest.raises(HwnasError, match="belongs to another network"):
        train(other, made_up_data(), RECIPE, tmp_path)


# ---- paths and steps ---------------------------------------------------------------------------------------------


def test_the_training_step_of_a_supernet_compiles_once_and_the_loss_falls():
    data, rng = made_up_data(), Random(0)
    model = new_supernet()
    weights, step = nnx.split(model, nnx.Param)[1], training_step(model, RECIPE, data)
    state, losses = (weights, first_moments(weights)), []
    for number in range(40):
        (batch,) = data.train.batches(32, seed=number)
        codes = np.array([SPACE.encode(SPACE.sample(rng)) for _ in range(4)], np.int32)
        *state, loss = step(*state, jax.random.key(number), 0.1, *batch.divided(4), codes)
        losses.append(float(loss.mean()))
    assert step._cache_size() == 1
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_after_the_first_step_and_the_first_score_a_process_compiles_nothing_whatever_architectures_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
):
    data, rng, after_steps = made_up_data(), Random(0), []
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)  # what writes a checkpoint compiles nothing either
    trained = train(
        new_supernet(),
        data,
        replace(RECIPE, epochs=6),
        tmp_path,
        paths=single_paths(SPACE, None, 1),
        on_step=lambda progress: after_steps.append(len(compilations)),
    )
    assert 0 < after_steps[0] <= 10
    assert compilations[after_steps[0] :] == []
    scorer = Scorer(trained, made_up_data(100), calibration_images=64, batch_size=64)
    scorer.accuracy(data.validation, SPACE.encode(SPACE.smallest))
    after_first = len(compilations)
    assert after_steps[-1] < after_first <= after_steps[-1] + 10
    for _ in range(30):
        scorer.accuracy(data.validation, SPACE.encode(SPACE.sample(rng)))
    assert compilations[after_first:] == []


@pytest.mark.parametrize("form", [Form(), Form(control_flow=False)], ids=["in turn", "together"])
def test_each_path_takes_its_part_of_the_batch_and_the_gradients_are_averaged(form: Form):
    model = FixedNetwork(small_network(), rngs=nnx.Rngs(0), form=form)
    weights = jax.tree.map(np.asarray, nnx.split(model, nnx.Param)[1])
    black = np.zeros((8, 8, 8, 3), np.uint8)  # whose augmentation is black, too
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2], np.int32)
    moments = []
    for paths in (1, 2):  # of a single network all paths are alike
        step = training_step(model, Recipe(epochs=1, weight_decay=0), made_up_data())
        state = weights, first_moments(weights), jax.random.key(0), 0.1
        batch = np.stack([black] * paths), np.stack([labels] * paths)
        moments.append(jax.tree.leaves(step(*state, *batch, np.zeros((paths, 0), np.int32))[1]))
    assert max(np.abs(leaf).max() for leaf in moments[0]) > 0.1
    for one, two in zip(*moments, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("quick_compile")
def test_paths_that_are_computed_together_give_the_gradients_of_paths_in_turn_also_when_one_teaches():
    data = made_up_data()
    (batch,), rng, moments = data.train.batches(32, seed=0), Random(2), []
    codes = np.array([SPACE.encode(SPACE.sample(rng)) for _ in range(4)], np.int32)
    for form in (Form(), Form(control_flow=False)):
        model = Supernet(SPACE, rngs=nnx.Rngs(0), form=form)
        step, (_, state) = training_step(model, RECIPE, data, distils=True), start_state(model)
        _, found, losses = step(*state, jax.random.key(0), 0.1, *batch.divided(1), codes)
        moments.append([losses, *jax.tree.leaves(found)])
    for in_turn, at_once in zip(*moments, strict=True):
        np.testing.assert_allclose(at_once, in_turn, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("quick_compile")
def test_networks_that_train_side_by_side_learn_what_each_learns_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, rng, form = made_up_data(), Random(1), Form(control_flow=False)
    architectures = [SPACE.sample(rng) for _ in range(2)]
    codes = [SPACE.encode(architecture) for architecture in architectures]
    alone = [FixedNetwork(lower(SPACE, a), rngs=nnx.Rngs(n), form=form) for n, a in enumerate(architectures)]
    supernet = Supernet(SPACE, rngs=nnx.Rngs(9), form=form)
    starts = [with_weights(supernet, a, weights_of(one)) for a, one in zip(architectures, alone, strict=True)]
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(StoppedError):
        train_many(starts, codes, data, RECIPE, tmp_path / "many", seed=1, on_step=stop_at(4))
    seen: list[Progress] = []
    together = train_many(starts, codes, data, RECIPE, tmp_path / "many", seed=1, on_step=seen.append)
    assert [progress.step for progress in seen] == [4, 5, 6, 7, 8]
    expected = weights_of(train(alone[1], data, RECIPE, tmp_path / "alone", seed=1))
    for name, value in slice_weights(together[1], architectures[1]).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-3, atol=2e-4, err_msg=name)
    first = slice_weights(together[0], architectures[0])
    assert all((value != weights_of(alone[0])[name]).any() for name, value in first.items())


def weights_of(network: FixedNetwork) -> dict[str, np.ndarray]:
    return {name: np.asarray(weight[...]) for name, weight in network.weights.items()}


def test_weight_decay_falls_on_kernels_only_also_where_units_are_stacked():
    _, weights = nnx.split(new_supernet(), nnx.Param)
    ones, zeros = (jax.tree.map(lambda leaf, value=value: np.full(leaf.shape, value), weights) for value in (1.0, 0.0))
    vectors, _ = updated(in_vectors(ones), first_moments(ones), in_vectors(zeros), 1.0, 0.01)
    after = like(ones, vectors)
    for path, weight in jax.tree_util.tree_leaves_with_path(after):
        assert (np.asarray(weight) < 1).all() == ("kernel" in jax.tree_util.keystr(path)), path


def test_the_learning_rate_rises_in_the_warm_up_and_falls_to_zero():
    rate = training._learning_rate(Recipe(epochs=1, learning_rate=0.5, warm_up=0.2), 50)
    rates = [rate(step) for step in range(50)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[29] == pytest.approx(0.25)  # half way down the cosine
    assert rates[-1] == pytest.approx(0, abs=1e-6)


def test_a_network_that_is_trained_for_no_epoch_is_kept_as_it_was_given(tmp_path: Path):
    given = new_network()
    train(given, made_up_data(), Recipe(epochs=0), tmp_path)
    kept = trained_already(new_network(), tmp_path)
    assert kept is not None
    for name, weight in given.weights.items():
        np.testing.assert_array_equal(kept.weights[name][...], weight[...])


def test_progress_counts_steps_and_images(tmp_path: Path):
    seen: list[Progress] = []
    train(new_network(), made_up_data(), RECIPE, tmp_path, on_step=seen.append)
    assert [progress.step for progress in seen] == list(range(1, STEPS + 1))
    assert {progress.steps for progress in seen} == {STEPS}
    assert seen[-1].images_per_second > 0
    assert seen[-1].seconds_left == 0


# ---- scoring -----------------------------------------------------------------------------------------------------


def test_statistics_estimated_batch_by_batch_are_those_of_all_calibration_images_at_once():
    data, model = made_up_data(100), new_network()
    scorer = Scorer(model, data, calibration_images=90, batch_size=16)
    images = np.concatenate([images for images, _ in scorer.calibration])
    assert images.shape == (80, 8, 8, 3)
    inputs = np.asarray(normalize(images, data.mean, data.std))
    weights = {name: np.asarray(value[...]) for name, value in model.weights.items()}
    _, exact = run_in_numpy(model.network, weights, inputs)
    for found, expected in zip(scorer.statistics()["stem.conv_bn"], exact["stem.conv_bn"], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    means = {name: np.asarray(pair[0]) for name, pair in scorer.statistics().items()}
    np.testing.assert_allclose(means["body.conv_bn"], exact["body.conv_bn"][0], rtol=0.2, atol=0.05)


def test_the_accuracy_of_a_supernet_s_architecture_is_that_of_its_single_network_and_compiles_once():
    data, supernet, rng = made_up_data(100), new_supernet(), Random(0)
    scorer = Scorer(supernet, data, calibration_images=64, batch_size=64)
    images = np.asarray(normalize(data.validation.images, data.mean, data.std))
    calibration = np.asarray(normalize(scorer.calibration[0][0], data.mean, data.std))
    seen = set()
    for architecture in [SPACE.largest, SPACE.smallest, *(SPACE.sample(rng) for _ in range(10))]:
        single = lower(SPACE, architecture), slice_weights(supernet, architecture)
        (logits,), _ = run_in_numpy(*single, images, run_in_numpy(*single, calibration)[1])
        expected = (logits.argmax(1) == data.validation.labels).mean()
        assert scorer.accuracy(data.validation, SPACE.encode(architecture)) == pytest.approx(expected)
        seen.add(float(expected))
    assert len(seen) > 2
    assert scorer._logits._cache_size() == 1
    assert scorer._batch_statistics._cache_size() == 1


def test_the_last_short_batch_of_a_split_counts_too():
    data = made_up_data()
    accuracies = {Scorer(new_network(), data, batch_size=8).accuracy(data.validation)}
    scorer = Scorer(new_network(), data, batch_size=8)
    statistics = scorer.statistics()
    logits = np.concatenate([scorer.logits(data.validation.images[i : i + 1], statistics) for i in range(21)])
    accuracies.add(float((logits.argmax(1) == data.validation.labels).mean()))
    assert len(accuracies) == 1


def test_a_tiny_network_learns_the_handwritten_digits(tmp_path: Path):
    data = load_data("digits", image_size=8)
    model = FixedNetwork(small_network(classes=10), rngs=nnx.Rngs(0))
    losses: list[float] = []
    recipe = Recipe(epochs=8, batch_size=64, learning_rate=0.2)
    trained = train(model, data, recipe, tmp_path, on_step=lambda progress: losses.append(progress.loss))
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.3
    assert Scorer(trained, data).accuracy(data.validation) > 0.5
