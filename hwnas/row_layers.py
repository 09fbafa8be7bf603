"""Layers on feature maps that are stacks of channels: batch norm for any, `[C, ...]`, and the layers of a CPU.

These are on `[C, H, W, N]`, and work on as many channels as there are, known only when they run.

A feature map is a stack of channels, and a channel one contiguous piece of memory. So the first channels of a map, or
any choice of them, are as quick to get at as the whole; and a loop over blocks of channels, whose number is a value of
the computation, is compiled once for all widths. The batch is the innermost axis: whatever the number of channels and
the side of the kernel, the vector units find long rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hwnas.jax_layers import EPSILON, Array

# ---- channels ----------------------------------------------------------------------------------------------------


def rows_at(x: Array, order: Array) -> Array:
    """Row `order[i]` of x `[R, ...]` as row i, zeros where `order[i]` is -1: `[len(order), ...]`."""
    taken = jnp.take(x, jnp.maximum(order, 0), axis=0, mode="clip")
    return jnp.where((order >= 0).reshape(-1, *[1] * (x.ndim - 1)), taken, 0)


@jax.custom_vjp
def take_rows(x: Array, order: Array, inverse: Array) -> Array:
    """`rows_at`, differentiable.

    `inverse` says where each row of x goes, -1 for those that go nowhere, so that the gradient is a choice of rows too.
    """
    return rows_at(x, order)


take_rows.defvjp(
    lambda x, order, inverse: (take_rows(x, order, inverse), (order, inverse)),
    lambda saved, g: (take_rows(g, saved[1], saved[0]), None, None),
)


def inverse_of(places: Array, count: int) -> Array:
    """For places `[S]` of 0, 1, ... and -1: where each of `count` numbers stands, -1 for those that do not."""
    target = jnp.where(places >= 0, places, count)
    return jnp.full(count, -1).at[target].set(jnp.arange(places.shape[0]), mode="drop")


def rows_from(x: Array, start: Array | int, count: int) -> Array:
    """`count` rows of x from `start` on, which is not negative: to allow for that would take a kernel more."""
    return lax.dynamic_slice_in_dim(x, start, count, allow_negative_indices=False)


def with_rows(x: Array, rows: Array, start: Array | int) -> Array:
    """x with other rows from `start` on."""
    return lax.dynamic_update_slice_in_dim(x, rows, start, 0, allow_negative_indices=False)


def one_of(stacked: Any, index: Array | int) -> Any:
    """Number `index` of a pytree of stacked arrays."""
    return jax.tree.map(lambda leaf: rows_from(leaf, index, 1)[0], stacked)


def with_one(stacked: Any, index: Array | int, new: Any) -> Any:
    """Stacked arrays with another number `index`."""
    return jax.tree.map(lambda leaf, one: with_rows(leaf, one[None], index), stacked, new)


def row_sum(x: Array) -> Array:
    """The sum of each channel: `[C, H, W, N] -> [C]`; the innermost axis last, which no vector unit can sum."""
    return x.sum((1, 2)).sum(1)


def spread(values: Array) -> Array:
    """A value for each channel, `[C] -> [C, 1, 1, 1]`."""
    return values[:, None, None, None]


# ---- batch norm --------------------------------------------------------------------------------------------------


def norm_rows(x: Array, scale: Array, offset: Array) -> tuple[Array, Array, Array]:
    """Batch norm by this batch's statistics: `(y, mean [C], variance [C])`. No gradient flows to the statistics."""
    return _norm_rows(x, scale, offset)


@jax.custom_vjp
def _norm_rows(x: Array, scale: Array, offset: Array) -> tuple[Array, Array, Array]:
    mean, variance = _statistics(x)
    return _normalised(x, scale, offset, mean, _inverse(variance)), mean, variance


def _statistics(x: Array) -> tuple[Array, Array]:
    """Mean and variance of each channel, in float32."""
    count, wide = x[0].size, x.astype(jnp.float32)
    mean = row_sum(wide) / count
    if x.dtype == jnp.bfloat16:  # both sums in one pass: in float32 they keep more than the map ever had
        return mean, jnp.maximum(row_sum(wide * wide) / count - mean * mean, 0)
    centred = wide - spread(mean)
    return mean, row_sum(centred * centred) / count


def _inverse(variance: Array) -> Array:
    return lax.rsqrt(variance + EPSILON)


def _normalised(x: Array, scale: Array, offset: Array, mean: Array, inverse: Array) -> Array:
    centred = x.astype(jnp.float32) - spread(mean)
    return (centred * spread(inverse * scale) + spread(offset)).astype(x.dtype)


def _norm_forward(x, scale, offset):
    y, mean, variance = _norm_rows(x, scale, offset)
    return (y, mean, variance), (x, scale, mean, _inverse(variance))


def _norm_backward(saved, cotangents):
    x, scale, mean, inverse = saved
    g, count = cotangents[0].astype(jnp.float32), x[0].size
    centred = x.astype(jnp.float32) - spread(mean)  # as the forward pass has it: where both are one program, once
    g_offset, g_scale = row_sum(g), row_sum(g * centred) * inverse
    g_x = (g - spread(g_offset / count) - centred * spread(g_scale * inverse / count)) * spread(inverse * scale)
    return g_x.astype(x.dtype), g_scale, g_offset


_norm_rows.defvjp(_norm_forward, _norm_backward)


def norm_once(x: Array, scale: Array, offset: Array) -> tuple[Array, tuple[Array, Array]]:
    """Batch norm by this batch's statistics, not differentiable; and what `norm_again` wants to know of them."""
    mean, variance = _statistics(x)
    known = mean, _inverse(variance)
    return _normalised(x, scale, offset, *known), known


def norm_again(x: Array, scale: Array, offset: Array, known: tuple[Array, Array]) -> Array:
    """The same, differentiable as `norm_rows` is, without the two passes over x that find the statistics."""
    return _norm_again(x, scale, offset, *known)


_norm_again = jax.custom_vjp(_normalised)
_norm_again.defvjp(
    lambda x, scale, offset, *known: (_normalised(x, scale, offset, *known), (x, scale, *known)),
    lambda saved, g: (*_norm_backward(saved, (g,)), None, None),
)


def fixed_norm_rows(x: Array, scale: Array, offset: Array, mean: Array, variance: Array) -> Array:
    """Batch norm by given statistics."""
    factor = lax.rsqrt(variance + EPSILON) * scale
    return (x * spread(factor) + spread(offset - mean * factor)).astype(x.dtype)


def norm(x: Array, pair: tuple[Array, Array], given: tuple[Array, Array] | None):
    """Batch norm of scale and offset by the given statistics or the batch's own; returns them too."""
    if given is not None:
        return fixed_norm_rows(x, *pair, *given), given
    y, mean, variance = norm_rows(x, *pair)
    return y, (lax.stop_gradient(mean), lax.stop_gradient(variance))


# ---- depthwise convolution ---------------------------------------------------------------------------------------


def _pad(x: Array, margin: int) -> Array:
    return jnp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))


def _windows(padded: Array, i: int, j: int, size: tuple[int, int], stride: int) -> Array:
    """What tap (i, j) of a kernel sees: `[C, height, width * N]` of a padded `[C, H, W, N]`."""
    channels, tall, _, count = padded.shape
    height, width = size
    rows = slice(i, i + stride * (height - 1) + 1, stride)
    if stride == 1:
        return padded.reshape(channels, tall, -1)[:, rows, j * count : (j + width) * count]
    return padded[:, rows, j : j + stride * (width - 1) + 1 : stride].reshape(channels, height, -1)


def _centre(kernel: Array, side: int) -> Array:
    margin = (kernel.shape[1] - side) // 2
    return kernel[:, margin : margin + side, margin : margin + side]


def _gather_sum(x: Array, kernel: Array, stride: int) -> Array:
    side, size = kernel.shape[1], (x.shape[1] // stride, x.shape[2] // stride)
    padded = _pad(x, side // 2)
    taps = [
        _windows(padded, i, j, size, stride) * kernel[:, i, j, None, None] for i in range(side) for j in range(side)
    ]
    return sum(taps[1:], start=taps[0]).reshape(x.shape[0], *size, x.shape[3])


def _scatter_sum(g: Array, kernel: Array, stride: int) -> Array:
    """The gradient of `_gather_sum` by its input."""
    if stride == 1:
        return _gather_sum(g, kernel[:, ::-1, ::-1], 1)
    # An input row 2m + a meets the taps i = 2i' + a only, at output row m - i': four small sums, then interleaved.
    side, margin, (channels, height, width, count) = kernel.shape[1], kernel.shape[1] // 2, g.shape
    tall, wide = height + margin, width + margin
    padded = _pad(g, margin)

    def phase(a: int, b: int) -> Array:
        taps = [
            padded[:, margin - i // 2 : margin - i // 2 + tall, margin - j // 2 : margin - j // 2 + wide]
            * spread(kernel[:, i, j])
            for i in range(a, side, 2)
            for j in range(b, side, 2)
        ]
        return sum(taps[1:], start=taps[0])

    rows = [jnp.stack([phase(a, 0), phase(a, 1)], axis=3) for a in (0, 1)]
    whole = jnp.stack(rows, axis=2).reshape(channels, 2 * tall, 2 * wide, count)
    return whole[:, margin : margin + 2 * height, margin : margin + 2 * width]


def _kernel_gradient(x: Array, g: Array, side: int, stride: int) -> Array:
    """The gradient of `_gather_sum` by its kernel: all taps of a row in one pass over the feature map.

    Columns are summed first: rows may lie 4 KiB apart, and such addresses drive each other out of the cache.
    """
    height, width = g.shape[1:3]
    padded, down, across = _pad(x, side // 2), stride * (height - 1) + 1, stride * (width - 1) + 1

    def add(sums, products):
        return tuple(total + product for total, product in zip(sums, products, strict=True))

    rows = []
    for i in range(side):
        taps = [padded[:, i : i + down : stride, j : j + across : stride] for j in range(side)]
        sums = lax.reduce(tuple(tap * g for tap in taps), (0.0,) * side, add, (2,))
        rows.append(jnp.stack([total.sum(1).sum(1) for total in sums], axis=1))
    return jnp.stack(rows, axis=1)


def depthwise_rows(x: Array, kernel: Array, choice: Array, sides: tuple[int, ...], stride: int = 1) -> Array:
    """A depthwise convolution by the centre of `kernel` `[C, k, k]`, `sides[choice]` wide, padded by half of that.

    Every side is compiled once and only the chosen one runs.
    """
    return _depthwise(sides, stride, x, kernel, choice)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _depthwise(sides: tuple[int, ...], stride: int, x: Array, kernel: Array, choice: Array) -> Array:
    branches = [lambda x, kernel, side=side: _gather_sum(x, _centre(kernel, side), stride) for side in sides]
    return lax.switch(choice, branches, x, kernel)


def _depthwise_backward(sides, stride, saved, g):
    x, kernel, choice = saved

    def branch(side):
        def gradients(x, kernel, g):
            margin = (kernel.shape[1] - side) // 2
            g_kernel = jnp.pad(_kernel_gradient(x, g, side, stride), ((0, 0), (margin, margin), (margin, margin)))
            return _scatter_sum(g, _centre(kernel, side), stride), g_kernel

        return gradients

    return *lax.switch(choice, [branch(side) for side in sides], x, kernel, g), None


def _depthwise_forward(sides, stride, x, kernel, choice):
    return _depthwise(sides, stride, x, kernel, choice), (x, kernel, choice)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


# ---- as many channels as there are -------------------------------------------------------------------------------

Sizes = tuple[tuple[int, int], ...]
"""Inputs and outputs of a product, from the least to the whole."""


def product_rows(sizes: Sizes, index: Array, kernel: Array, x: Array) -> Array:
    """A 1x1 convolution `[in, out]` of x `[in, H, W, N]`: of the first `sizes[index]` inputs and outputs only.

    The other rows of the result are zero. What lies beyond those sizes in the kernel must be zero.
    """
    return _product(sizes, kernel, x, index)


def whole_product_rows(kernel: Array, x: Array) -> Array:
    """A 1x1 convolution `[in, out]` of x `[in, H, W, N]`: of all inputs and outputs."""
    return product_rows(((kernel.shape[0], kernel.shape[1]),), jnp.int32(0), kernel, x)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(sizes: Sizes, kernel: Array, x: Array, index: Array) -> Array:
    def branch(size):
        inputs, outputs = size
        return lambda kernel, flat: _grown(kernel[:outputs, :inputs] @ flat[:inputs], kernel.shape[0])

    kernel = lax.optimization_barrier(kernel.T)  # a product that transposes it takes twice as long
    y = lax.switch(index, [branch(size) for size in sizes], kernel, x.reshape(x.shape[0], -1))
    return y.reshape(-1, *x.shape[1:])


def _grown(x: Array, rows: int) -> Array:
    return x if x.shape[0] == rows else jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))


def _product_backward(sizes: Sizes, saved, g: Array):
    kernel, x, index = saved
    flat, g = x.reshape(x.shape[0], -1), g.reshape(g.shape[0], -1)

    def branch(size):
        inputs, outputs = size

        def gradients(kernel, flat, g):
            g_kernel = flat[:inputs] @ g[:outputs].T
            g_kernel = jnp.pad(g_kernel, ((0, kernel.shape[0] - inputs), (0, kernel.shape[1] - outputs)))
            return g_kernel, _grown(kernel[:inputs, :outputs] @ g[:outputs], kernel.shape[0])

        return gradients

    g_kernel, g_x = lax.switch(index, [branch(size) for size in sizes], kernel, flat, g)
    return g_kernel, g_x.reshape(x.shape), None


def _product_forward(sizes, kernel, x, index):
    return _product(sizes, kernel, x, index), (kernel, x, index)


_product.defvjp(_product_forward, _product_backward)


BlockFunction = Callable[[Any, Any, Any], Any]
"""`(maps, parameters, choices) -> results`: all but the choices have channels as their first axis, and none mix."""


def over_blocks(
    run: BlockFunction, block: int, starts: Array, count: Array, maps: Any, parameters: Any, choices: Any
) -> Any:
    """`run` on `count` blocks of channels, each `block` long. Maps and gradients are zero in all other channels, too.

    Args:
        run: a function of the module (it is compared to know whether something was compiled), differentiable by maps
            and parameters, but not by choices.
        block: how many channels are run at once.
        starts: the first channel of each block, as many as there may be.
        count: how many blocks there are.
        maps, parameters: pytrees of arrays with channels first.
        choices: a pytree of integers.
    """
    return _over_blocks(run, block, starts, count, maps, parameters, choices)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_blocks(run, block, starts, count, maps, parameters, choices) -> Any:
    return _results(run, block, starts, count, maps, parameters, choices, in_place=True)


def _results(run, block, starts, count, maps, parameters, choices, *, in_place: bool) -> Any:
    """Results of all blocks; `in_place` the first one takes the memory of the first map, if it has the same shape."""
    maps, tree = jax.tree.flatten(maps)
    shapes = jax.eval_shape(run, *(_cut((tree.unflatten(maps), parameters), starts[0], block)), choices)
    shapes, of_results = jax.tree.flatten(shapes)
    whole = [jax.ShapeDtypeStruct((maps[0].shape[0], *leaf.shape[1:]), leaf.dtype) for leaf in shapes]
    results = [jnp.zeros(leaf.shape, leaf.dtype) for leaf in whole]
    in_place = in_place and _alike(whole[0], maps[0])
    if in_place:
        results[0] = maps[0]

    def step(i, results):
        start, own = starts[i], [results[0], *maps[1:]] if in_place else maps
        new = run(*_cut((tree.unflatten(own), parameters), start, block), choices)
        return _put(results, jax.tree.leaves(new), start)

    return of_results.unflatten(lax.fori_loop(0, count, step, results))


def _alike(one: Any, other: Any) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype


def _cut(tree: Any, start: Array, block: int) -> Any:
    return jax.tree.map(lambda leaf: rows_from(leaf, start, block), tree)


def _put(tree: Any, part: Any, start: Array) -> Any:
    return jax.tree.map(lambda leaf, new: with_rows(leaf, new, start), tree, part)


def _blocks_forward(run, block, starts, count, maps, parameters, choices):
    saved = starts, count, maps, parameters, choices
    return _results(run, block, *saved, in_place=False), saved


def _blocks_backward(run, block, saved, g):
    starts, count, maps, parameters, choices = saved
    (g_first, *g_others), of_results = jax.tree.flatten(g)
    gradients, tree = jax.tree.flatten(jax.tree.map(jnp.zeros_like, (maps, parameters)))
    in_place = _alike(g_first, gradients[0])  # the gradient by the first map takes the memory of that by the result
    if in_place:
        gradients[0] = g_first

    def step(i, gradients):
        start = starts[i]
        _, pull = jax.vjp(lambda *inputs: run(*inputs, choices), *_cut((maps, parameters), start, block))
        own = of_results.unflatten([gradients[0] if in_place else g_first, *g_others])
        return _put(gradients, jax.tree.leaves(pull(_cut(own, start, block))), start)

    return None, None, *tree.unflatten(lax.fori_loop(0, count, step, gradients)), None


_over_blocks.defvjp(_blocks_forward, _blocks_backward)
