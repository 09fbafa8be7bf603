"""Agreement: a candidate scored in ONNX Runtime has the accuracy and statistics of its network computed in numpy."""

from random import Random

import numpy as np
import pytest
from flax import nnx
from numpy_network import run_in_numpy

from hwnas.candidate_scoring import CandidateScorer, scorer_of
from hwnas.data import DataSet, TestSplit, TrainSplit, ValidationSplit, normalize
from hwnas.jax_layers import ACCELERATOR_FORM, LONG_CPU_FORM
from hwnas.jax_network import FixedNetwork
from hwnas.onnx_scoring import IMAGES_A_RUN, NetworkScorer
from hwnas.scoring import Scorer
from hwnas.space import lower
from hwnas.space_toml import parse_space
from hwnas.supernet import Supernet, slice_weights

SPACE = parse_space("""
name = "all choices"
input_size = 12
classes = 3
stem = { channels = 8, stride = 1, max_pool = false }
head = { channels = 8 }
[unit]
split_ratio = ["1/4", "1/2", "3/4"]
kernel = [3, 5]
squeeze_excite = [false, true]
residual = [false, true]
groups = [1, 2]
extra_depthwise = [false, true]
[[stage]]
depth = [1, 2, 3]
width = [16, 8]
[[stage]]
depth = [1, 2]
width = [16, 32]
""")
VALIDATION = IMAGES_A_RUN * 3 + 5


@pytest.fixture(scope="module")
def data() -> DataSet:
    rng = np.random.default_rng(0)

    def split(kind, count):
        return kind(rng.integers(0, 256, (count, 12, 12, 3), np.uint8), rng.integers(0, 3, count).astype(np.int32))

    splits = split(TrainSplit, 200), split(ValidationSplit, VALIDATION), split(TestSplit, 6)
    return DataSet(
        "noise", ("red", "green", "blue"), 12, *splits, flip=True, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)
    )


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return Supernet(SPACE, rngs=nnx.Rngs(0))


def test_accuracies_and_statistics_are_those_of_each_architecture_s_network(data: DataSet, supernet: Supernet):
    scorer, rng = CandidateScorer(supernet, data, calibration_images=90, batch_size=30), Random(0)
    assert [len(images) for images in scorer.calibration] == [30] * 3
    images = np.asarray(normalize(data.validation.images, data.mean, data.std))
    seen = set()
    for architecture in [SPACE.largest, SPACE.smallest, *(SPACE.sample(rng) for _ in range(10))]:
        network, weights = lower(SPACE, architecture), slice_weights(supernet, architecture)
        batches = [
            run_in_numpy(network, weights, np.asarray(normalize(batch, data.mean, data.std)))[1]
            for batch in scorer.calibration
        ]
        found, merged = scorer.statistics_of(network, weights), {}
        for name in batches[0]:
            means, variances = (np.stack([np.asarray(batch[name][i], np.float64) for batch in batches]) for i in (0, 1))
            merged[name] = means.mean(0), variances.mean(0) + means.var(0)
            np.testing.assert_allclose(found[f"{name}.mean"], merged[name][0], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(found[f"{name}.variance"], merged[name][1], rtol=1e-3, atol=1e-5)
        assert len(found) == 2 * len(merged)
        (logits,), _ = run_in_numpy(network, weights, images, merged)
        expected = (logits.argmax(1) == data.validation.labels).mean()
        code = SPACE.encode(architecture)
        assert scorer.accuracy(data.validation, code) == pytest.approx(float(expected))
        parts = [scorer.correct(data.validation, code, part, 2) for part in range(2)]
        assert sum(parts) == round(float(expected) * VALIDATION)
        assert parts[1] > 0
        seen.add(float(expected))
    assert len(seen) > 2


def test_other_weights_of_the_supernet_are_scored_by_the_same_images(data: DataSet, supernet: Supernet):
    other, code = Supernet(SPACE, rngs=nnx.Rngs(1)), SPACE.encode(SPACE.largest)
    scorer = CandidateScorer(supernet, data)
    own, others = (made.accuracy(data.validation, code) for made in (scorer, scorer.of(other)))
    assert (own, others) == (
        CandidateScorer(supernet, data).accuracy(data.validation, code),
        CandidateScorer(other, data).accuracy(data.validation, code),
    )
    assert own != others


@pytest.mark.parametrize(
    ("form", "kind"), [(None, CandidateScorer), (LONG_CPU_FORM, CandidateScorer), (ACCELERATOR_FORM, Scorer)]
)
def test_the_form_of_a_supernet_decides_what_scores_it(data: DataSet, form, kind):
    assert isinstance(scorer_of(Supernet(SPACE, rngs=nnx.Rngs(0), form=form), data), kind)


def test_a_trained_network_has_the_statistics_and_the_accuracy_that_jax_finds(data: DataSet, supernet: Supernet):
    largest = SPACE.largest
    model = FixedNetwork(lower(SPACE, largest), rngs=nnx.Rngs(0), weights=slice_weights(supernet, largest))
    scorer, in_jax = (kind(model, data, calibration_images=120, batch_size=40) for kind in (NetworkScorer, Scorer))
    found, expected = scorer.statistics(), in_jax.statistics()
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        for values, others in zip(found[name], pair, strict=True):
            np.testing.assert_allclose(values, others, rtol=1e-3, atol=1e-4)
    assert scorer.accuracy(data.validation) == pytest.approx(in_jax.accuracy(data.validation))
    np.testing.assert_allclose(
        in_jax.logits(data.validation.images[:20], found),
        in_jax.logits(data.validation.images[:20], expected),
        atol=1e-3,
    )
