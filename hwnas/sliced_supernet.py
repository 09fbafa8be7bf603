"""A supernet on a CPU: one architecture after another, piece by piece, in feature maps hardly wider than it is."""

from typing import Any

import jax
import numpy as np
import optax

from hwnas.jax_layers import Array, convolution, pool
from hwnas.pieces import Cut, Norms, Tape, Value, first
from hwnas.sliced_units import Own, of_norm, product, shuffled, stages_of, stride_1_unit, stride_2_unit
from hwnas.space import Architecture, SearchSpace
from hwnas.supernet import Supernet

HEAD = ("head/", None)


def in_pieces(supernet: Supernet) -> bool:
    """Whether it is trained as here."""
    return supernet.form.in_pieces


def named(weights: Any) -> tuple[dict[str, np.ndarray], Any]:
    """A supernet's weights, on the host, by the names that its pieces know, in order; and the structure they had."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(weights)
    words = (tuple(str(getattr(step, "key", "")) for step in path) for path, _ in leaves)
    return {"/".join(filter(None, path)): np.asarray(leaf) for path, (_, leaf) in zip(words, leaves, strict=True)}, tree


def logits(tape: Tape, space: SearchSpace, architecture: Architecture, images: Array) -> Value:
    """The logits `[N, classes]` of normalised images `[N, H, W, 3]`; the weights of the tape are those of `named`."""
    x = tape.run(
        _stem,
        ("stem/", None),
        {"kernel": Cut("conv.kernel"), **of_norm("conv_bn")},
        [],
        (images,),
        stride=space.stem_stride,
        max_pool=space.max_pool,
    )
    channel = np.arange(space.stem_channels)
    for stage, chosen in zip(stages_of(space), architecture.stages, strict=True):
        opening, *later = chosen.units
        x = stride_2_unit(tape, stage, x, channel, chosen.width, opening)
        channel = shuffled(np.arange(chosen.width))
        for index, choice in enumerate(later):
            x = stride_1_unit(tape, stage, index, x, channel, choice)
            channel = shuffled(channel)
    cut = Cut("conv.kernel", (first(len(channel)), first(space.head_channels)))
    x = tape.run(product, HEAD, {"kernel": cut}, [x])
    cuts = {"kernel": Cut("linear.kernel"), "bias": Cut("linear.bias"), **of_norm("conv_bn")}
    return tape.run(_classified, HEAD, cuts, [x])


def loss(tape: Tape, of: Value, targets: Array) -> Value:
    """The mean cross-entropy of logits with targets `[N, classes]`."""
    return tape.run(_loss, ("", None), {}, [of], (targets,))


def _stem(own: Own, maps: Any, places: Any, norm: Norms, *, stride: int, max_pool: bool) -> Array:
    x = convolution(places[0], own["kernel"], stride=stride, padding=1)
    x = jax.nn.relu(norm(x.transpose(3, 1, 2, 0), own))
    if max_pool:
        x = pool(x.transpose(3, 1, 2, 0), "max", 3, 2, 1).transpose(3, 1, 2, 0)
    return x


def _classified(own: Own, maps: Any, places: Any, norm: Norms) -> Array:
    x = jax.nn.relu(norm(maps[0], own)).mean((1, 2)).T
    return x @ own["kernel"] + own["bias"]


def _loss(own: Own, maps: Any, places: Any, norm: Norms) -> Array:
    return optax.softmax_cross_entropy(maps[0], places[0]).mean()
