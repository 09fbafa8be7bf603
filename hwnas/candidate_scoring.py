"""Scoring candidates, which are architectures of a supernet, in the way that is quickest where it runs.

On an accelerator the supernet's own program does it, compiled once for all (`scoring.Scorer`). On a CPU a candidate
becomes a network of its own, with its part of the supernet's weights (`onnx_scoring.OnnxScorer`).
"""

from collections.abc import Iterable
from copy import copy

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hwnas import processes
from hwnas.data import DataSet, Split
from hwnas.onnx_scoring import OnnxScorer
from hwnas.scoring import Scorer
from hwnas.space import lower
from hwnas.spread import Spread
from hwnas.supernet import Supernet, slice_weights


class CandidateScorer(OnnxScorer):
    """Scores architectures of one trained supernet, as `scoring.Scorer` does; further arguments as for `OnnxScorer`."""

    def __init__(self, supernet: Supernet, data: DataSet, **settings: int) -> None:
        super().__init__(data, **settings)
        self.supernet = supernet

    def of(self, supernet: Supernet) -> "CandidateScorer":
        """A scorer of other weights of the same supernet."""
        other = copy(self)
        other.supernet = supernet
        return other

    def accuracy(self, split: Split, code: Iterable[int]) -> float:
        """The share of a split's images that one architecture classifies rightly, its statistics estimated first."""
        return self.correct(split, tuple(code)) / len(split)

    def correct(self, split: Split, code: tuple[int, ...], part: int = 0, parts: int = 1) -> int:
        """How many images of a part of a split one architecture classifies rightly; parts are made of whole batches."""
        space = self.supernet.space
        architecture = space.decode(code)
        weights = slice_weights(self.supernet, architecture)
        return self.correct_of(lower(space, architecture), weights, split, part, parts)


SupernetScorer = Scorer | CandidateScorer


def scorer_of(supernet: Supernet, data: DataSet, *, calibration_images: int = 256) -> SupernetScorer:
    """The quickest scorer of a supernet's architectures for the form that it has; arguments as for `Scorer`."""
    kind = CandidateScorer if supernet.form.control_flow else Scorer
    return kind(supernet, data, calibration_images=calibration_images)


# ---- all processes -----------------------------------------------------------------------------------------------


class SharedScorer:
    """Scores architectures of a supernet on the validation split, with the devices of all processes.

    Call it in the leading process; the others must be ready for its orders (`following.follow`).
    """

    def __init__(self, supernet: Supernet, data: DataSet) -> None:
        processes.order("score with")
        self.scorer, self.data = scorer_of(with_weights_of_leader(supernet), data), data

    def __call__(self, code: Iterable[int]) -> float:
        """The accuracy of an architecture by its encoding, as `Scorer.accuracy` tells it."""
        code = tuple(map(int, code))
        processes.order("score", code=code)
        own = self.scorer.correct(self.data.validation, code, 0, processes.count())
        return (own + sum(map(int, processes.answers()))) / len(self.data.validation)


def with_weights_of_leader(supernet: Supernet) -> Supernet:
    """The same network with the weights that the leading process has; all processes call it together."""
    if processes.count() == 1:
        return supernet
    graph, weights = nnx.split(supernet, nnx.Param)
    everyone = Spread(Mesh(np.array(jax.devices()), ("images",)))
    return nnx.merge(graph, everyone.alone(everyone.of_leader(weights)))
