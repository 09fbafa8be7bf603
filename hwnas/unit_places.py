"""Where the channels of a supernet's units lie, and what a unit chooses, as values of a traced computation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from hwnas.jax_layers import Array
from hwnas.space import CHOICES, SearchSpace

# ---- where the channels lie --------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """Which channel of the network lies in which slot of a feature map.

    Attributes:
        width: channels in use, a scalar.
        channel: `[slots]`, the channel in each slot, -1 in empty ones.
    """

    width: Array
    channel: Array

    @staticmethod
    def plain(width: Array, slots: int) -> "Layout":
        """Channel i in slot i."""
        return Layout(width, below(width, slots))

    def shuffled(self) -> "Layout":
        """After a channel shuffle of two groups: nothing moves, but the channels are counted in another order."""
        half = self.width // 2
        moved = (self.channel % half) * 2 + self.channel // half
        return Layout(self.width, jnp.where(self.channel >= 0, moved, -1))

    def last(self, count: Array) -> Array:
        """Counts the last channels, the main branch's input: 0, 1, ... in their slots, -1 in the others."""
        return jnp.maximum(self.channel - (self.width - count), -1)


def below(count: Array, size: int) -> Array:
    """`0, 1, ..., count - 1, -1, -1, ...`, `size` long."""
    index = jnp.arange(size)
    return jnp.where(index < count, index, -1)


def joined(inputs: Array, in_count: Array, outputs: Array, out_count: Array, groups: Array) -> Array:
    """Which inputs a pointwise convolution joins to which outputs: `[in, out]` of true and false.

    Args:
        inputs, outputs: the channel in each slot, -1 where none takes part.
        in_count, out_count: how many channels take part.
        groups: of the convolution.
    """
    same = (inputs * groups // in_count)[:, None] == (outputs * groups // out_count)[None, :]
    return same & (inputs >= 0)[:, None] & (outputs >= 0)[None, :]


# ---- choices -----------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """A unit's choices as scalars of a traced computation."""

    width: Array
    main: Array
    kernel_index: Array
    squeeze_excite: Array
    residual: Array
    groups: Array
    extra_depthwise: Array

    @staticmethod
    def read(space: SearchSpace, widths: tuple[int, ...], width_index: Array, code: Array) -> "Choice":
        index = dict(zip(CHOICES, code, strict=True))
        main = jnp.array([[int(width * ratio) for ratio in space.choices["split_ratio"]] for width in widths])
        chosen = {
            name: jnp.array(space.choices[name])[index[name]]
            for name in ("squeeze_excite", "residual", "groups", "extra_depthwise")
        }
        return Choice(
            width=jnp.array(widths)[width_index],
            main=main[width_index, index["split_ratio"]],
            kernel_index=index["kernel"],
            **chosen,
        )


def affine(weights: dict[str, Array], name: str, active: Array | None = None) -> tuple[Array, Array]:
    """Scale and offset of a batch norm, zero where not active."""
    scale, offset = weights[f"{name}.scale"], weights[f"{name}.offset"]
    if active is None:
        return scale, offset
    return jnp.where(active, scale, 0), jnp.where(active, offset, 0)


def taken(chosen: Array, one: Any, other: Any) -> Any:
    """One of two results that were both computed: trees of arrays of the same shapes."""
    return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), one, other)


Run = tuple[Array, Layout, dict[str, Any]]
"""What a unit gives: the feature map, where its channels lie, and the statistics of batch norms that were used."""
