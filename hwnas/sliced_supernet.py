"""A supernet on a CPU: one architecture after another, piece by piece, in feature maps hardly wider than it is."""

from typing import Any

import jax
import numpy as np
import optax

from hwnas.jax_layers import Array, convolution, pool
from hwnas.pieces import Tape, Value
from hwnas.row_layers import norm_rows, whole_product_rows
from hwnas.sliced_units import Own, pair_names, shuffled, stages_of, stride_1_unit, stride_2_unit
from hwnas.space import Architecture, SearchSpace
from hwnas.supernet import Supernet


def in_pieces(supernet: Supernet) -> bool:
    """Whether it is trained as here."""
    return supernet.form.in_pieces


def named(weights: Any) -> tuple[dict[str, Array], Any]:
    """The weights of a supernet by the names that its pieces know, in order; and the structure that they came in."""
    leaves, tree = jax.tree_util.tree_flatten_with_path(weights)
    words = (tuple(str(getattr(step, "key", "")) for step in path) for path, _ in leaves)
    return {"/".join(filter(None, path)): leaf for path, (_, leaf) in zip(words, leaves, strict=True)}, tree


def logits(tape: Tape, space: SearchSpace, architecture: Architecture, images: Array) -> Value:
    """The logits `[N, classes]` of normalised images `[N, H, W, 3]`; the weights of the tape are those of `named`."""
    x = tape.run(
        _stem,
        ("stem/", None),
        ["conv.kernel", *pair_names("conv_bn")],
        [],
        (images,),
        stride=space.stem_stride,
        max_pool=space.max_pool,
    )
    channel = np.arange(space.stem_channels)
    for stage, chosen in zip(stages_of(space), architecture.stages, strict=True):
        first, *later = chosen.units
        x = stride_2_unit(tape, stage, x, channel, chosen.width, first)
        channel = shuffled(np.arange(chosen.width))
        for index, choice in enumerate(later):
            x = stride_1_unit(tape, stage, index, x, channel, choice)
            channel = shuffled(channel)
    x = tape.run(_widened, ("head/", None), ["conv.kernel"], [x])
    return tape.run(_classified, ("head/", None), [*pair_names("conv_bn"), "linear.kernel", "linear.bias"], [x])


def loss(tape: Tape, of: Value, targets: Array) -> Value:
    """The mean cross-entropy of logits with targets `[N, classes]`."""
    return tape.run(_loss, ("", None), [], [of], (targets,))


def _stem(own: Own, maps: Any, places: Any, *, stride: int, max_pool: bool) -> Array:
    x = convolution(places[0], own["conv.kernel"], stride=stride, padding=1)
    pair = own["conv_bn.scale"], own["conv_bn.offset"]
    x = jax.nn.relu(norm_rows(x.transpose(3, 1, 2, 0), *pair)[0])
    if max_pool:
        x = pool(x.transpose(3, 1, 2, 0), "max", 3, 2, 1).transpose(3, 1, 2, 0)
    return x


def _widened(own: Own, maps: Any, places: Any) -> Array:
    return whole_product_rows(own["conv.kernel"][: len(maps[0])], maps[0])


def _classified(own: Own, maps: Any, places: Any) -> Array:
    x = norm_rows(maps[0], own["conv_bn.scale"], own["conv_bn.offset"])[0]
    x = jax.nn.relu(x).mean((1, 2)).T
    return x @ own["linear.kernel"] + own["linear.bias"]


def _loss(own: Own, maps: Any, places: Any) -> Array:
    return optax.softmax_cross_entropy(maps[0], places[0]).mean()
