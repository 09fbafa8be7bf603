"""A loop over units that are alike in shape, as many as there are: the form for a CPU.

`lax.scan` would go on over the units that are not there, and keep whole feature maps for the gradient. This loop ends
with the last unit, and keeps of each map the blocks of channels that the unit has.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hwnas.row_layers import one_of, rows_from, with_one, with_rows

Array = jax.Array

Unit = Callable[[Any, Array, Any, Any], tuple[Array, Any, Any]]
"""`(weights, x, state, own) -> (x, state, told)`, differentiable by weights and x only."""


@dataclass(frozen=True, eq=False)
class Loop:
    """What is known of a loop when it is traced.

    Attributes:
        unit: computes one.
        rows: the channels of a unit's feature maps, blocks of which it may not have; `blocks` tells how many it has.
        block: the channels of a block.
        blocks: of the unit's own choices.
    """

    unit: Unit
    rows: int
    block: int
    blocks: Callable[[Any], Array]


def over_units(loop: Loop, count: Array, weights: Any, x: Array, state: Any, own: Any) -> tuple[Array, Any, Any]:
    """The units 0, 1, ..., `count - 1` one after another; what each told is stacked, zeros for those not there.

    Args:
        loop: the unit and the shape of its feature maps.
        count: how many there are.
        weights, own: of all of them, stacked.
        x, state: what the first one takes.
    """
    return _over_units(loop, count, weights, x, state, own)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _over_units(loop, count, weights, x, state, own):
    told = _stacks(jax.eval_shape(loop.unit, one_of(weights, 0), x, state, one_of(own, 0))[2], _length(own))

    def step(i, carry):
        x, state, told = carry
        x, state, new = loop.unit(one_of(weights, i), x, state, one_of(own, i))
        return x, state, with_one(told, i, new)

    return lax.fori_loop(0, count, step, (x, state, told))


def _pulled(loop: Loop, weights: Any, x: Array, state: Any, own: Any) -> tuple[Any, list[Array], Any]:
    """A unit's results, what to keep for its gradient, and how `_pull` makes the gradient's function of that."""

    def run(weights, x):
        x, state_after, told = loop.unit(weights, x, state, own)
        return x, (state_after, told)

    x, pull, others = jax.vjp(run, weights, x, has_aux=True)
    residuals, tree = jax.tree.flatten(pull)
    known = jax.tree.leaves(weights)  # are at hand, so that they need not be kept
    places = [next((k for k, leaf in enumerate(known) if leaf is residual), None) for residual in residuals]
    kept = [residual for residual, place in zip(residuals, places, strict=True) if place is None]
    return (x, *others), kept, (tree, places)


def _pull(how: Any, weights: Any, kept: list[Array]) -> Any:
    (tree, places), known, rest = how, jax.tree.leaves(weights), iter(kept)
    return jax.tree.unflatten(tree, [next(rest) if place is None else known[place] for place in places])


def _forward(loop, count, weights, x, state, own):
    shapes = jax.eval_shape(lambda *inputs: _pulled(loop, *inputs)[:2], one_of(weights, 0), x, state, one_of(own, 0))
    told, stacks = _stacks(shapes[0][2], _length(own)), _stacks(shapes[1], _length(own))

    def step(i, carry):
        x, state, told, stacks = carry
        of_unit = one_of(own, i)
        (x, state, new), kept, _ = _pulled(loop, one_of(weights, i), x, state, of_unit)
        blocks = loop.blocks(of_unit)
        stacks = [_kept(loop, stack, leaf, i, blocks) for stack, leaf in zip(stacks, kept, strict=True)]
        return x, state, with_one(told, i, new), stacks

    *results, stacks = lax.fori_loop(0, count, step, (x, state, told, stacks))
    return tuple(results), (count, weights, x, state, own, stacks)


def _backward(loop, saved, cotangents):
    count, weights, x, state, own, stacks = saved
    how: list[Any] = []
    jax.eval_shape(lambda *inputs: how.append(_pulled(loop, *inputs)[2]), one_of(weights, 0), x, state, one_of(own, 0))
    maps = [jnp.zeros(stack.shape[1:], stack.dtype) if _is_map(loop, stack.shape[1:]) else None for stack in stacks]

    def step(n, carry):
        g_x, g_weights, maps = carry
        i = count - 1 - n
        blocks, of_unit = loop.blocks(one_of(own, i)), one_of(weights, i)
        maps = [m if m is None else _found(loop, m, stack, i, blocks) for m, stack in zip(maps, stacks, strict=True)]
        kept = [one_of(stack, i) if m is None else m for m, stack in zip(maps, stacks, strict=True)]
        g_of_unit, g_x = _pull(how[0], of_unit, kept)(g_x)
        return g_x, with_one(g_weights, i, g_of_unit), maps

    zeros = jax.tree.map(jnp.zeros_like, weights)
    g_x, g_weights, _ = lax.fori_loop(0, count, step, (cotangents[0], zeros, maps))
    return None, g_weights, g_x, None, None


_over_units.defvjp(_forward, _backward)


# ---- stacks ------------------------------------------------------------------------------------------------------


def _length(stacked: Any) -> int:
    return jax.tree.leaves(stacked)[0].shape[0]


def _stacks(shapes: Any, length: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), shapes)


def _is_map(loop: Loop, shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[0] == loop.rows


def _kept(loop: Loop, stack: Array, residual: Array, i: Array, blocks: Array) -> Array:
    """A stack with a unit's residual: of a feature map the blocks that the unit has, of all else the whole."""
    if not _is_map(loop, residual.shape):
        return with_one(stack, i, residual)

    def step(n, stack):
        start = n * loop.block
        block = rows_from(residual, start, loop.block)[None]
        return lax.dynamic_update_slice(stack, block, (i, start, 0, 0, 0), allow_negative_indices=False)

    return lax.fori_loop(0, blocks, step, stack)


def _found(loop: Loop, target: Array, stack: Array, i: Array, blocks: Array) -> Array:
    """A unit's feature map out of its stack. Blocks that the unit does not have stay those of another unit."""

    def step(n, target):
        start = n * loop.block
        size = 1, loop.block, *target.shape[1:]
        block = lax.dynamic_slice(stack, (i, start, 0, 0, 0), size, allow_negative_indices=False)
        return with_rows(target, block[0], start)

    return lax.fori_loop(0, blocks, step, target)
