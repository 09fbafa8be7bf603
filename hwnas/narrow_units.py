"""Units of a supernet that compute the channels which an architecture has, and hardly more: the form for a CPU.

Feature maps are `[slots, H, W, N]`. The main branch takes its input channels out of their slots, in the order of the
network, runs as many blocks of channels as they fill, and puts its output back where its input was. Numbers of channels
are values of the computation, not shapes, so nothing is compiled for a width.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hwnas.jax_layers import Array
from hwnas.row_layers import (
    Sizes,
    depthwise_rows,
    inverse_of,
    norm,
    over_blocks,
    product_rows,
    take_rows,
)
from hwnas.space import SearchSpace
from hwnas.unit_loop import Loop, over_units
from hwnas.unit_places import Choice, Layout, Run, affine, below, joined

BLOCKS = 18
"""Blocks of channels in the widest main branch: what is done to one stays in a cache of half a megabyte."""
SIZES, SIDE_SIZES = 6, 3
"""Sizes of a product, whole and parts of it: where inputs and outputs are as many, and of each where they are not."""

Weights = dict[str, Array]


def square_sizes(rows: int) -> Sizes:
    """A sixth, two sixths, ... all of the inputs and outputs of a product."""
    parts = (_part(rows, t, SIZES) for t in range(1, SIZES + 1))
    return tuple((part, part) for part in parts)


def square_index(count: Array, rows: int) -> Array:
    """Which of `square_sizes` is the first that holds `count` channels."""
    return _index(count, rows, SIZES)


def sizes(inputs: int, outputs: int) -> Sizes:
    """A third, two thirds and all of the inputs, each with a third, two thirds and all of the outputs."""
    parts = range(1, SIDE_SIZES + 1)
    return tuple((_part(inputs, t, SIDE_SIZES), _part(outputs, s, SIDE_SIZES)) for t in parts for s in parts)


def index_of(in_count: Array, inputs: int, out_count: Array, outputs: int) -> Array:
    """Which of `sizes` is the first that holds so many channels."""
    return _index(in_count, inputs, SIDE_SIZES) * SIDE_SIZES + _index(out_count, outputs, SIDE_SIZES)


def _index(count: Array, whole: int, parts: int) -> Array:
    return (jnp.array([_part(whole, t, parts) for t in range(1, parts)]) < count).sum()


def _part(whole: int, t: int, parts: int) -> int:
    return -(-whole * t // parts)


# ---- functions of a block of channels ------------------------------------------------------------------------------


def _norm_block(maps, parameters, choices):
    return norm(maps, *parameters)


def _output_block(maps, parameters, choices):
    y, used = norm(maps, *parameters)
    return jnp.where(choices, y, jax.nn.relu(y)), used


def _closing_block(maps, parameters, choices):
    """The gate of squeeze-excite, and the sum with what entered the branch where it is chosen."""
    y, entry = maps
    y = y * parameters[:, None, None, :]
    return jnp.where(choices, jax.nn.relu(y + entry), y)


def _extra_block(maps, parameters, choices):
    kernel, *others = parameters
    return norm(depthwise_rows(maps, kernel, choices, (3,)), *others)


def _stride_1_block(sides: tuple[int, ...], maps, parameters, choices):
    kernel, *others = parameters
    y, used = norm(maps, *others)
    return depthwise_rows(jax.nn.relu(y), kernel, choices, sides), used


def _stride_2_block(sides: tuple[int, ...], maps, parameters, choices):
    """Channels that are `plain` enter the convolution as they are: those of the side branch."""
    kernel, plain, *others = parameters
    y, used = norm(maps, *others)
    y = jnp.where(plain[:, None, None, None] > 0, maps, jax.nn.relu(y))
    return depthwise_rows(y, kernel, choices, sides, 2), used


@cache
def _stride_1_function(sides: tuple[int, ...]) -> Any:
    return partial(_stride_1_block, sides)


@cache
def _stride_2_function(sides: tuple[int, ...]) -> Any:
    return partial(_stride_2_block, sides)


# ---- units -------------------------------------------------------------------------------------------------------


def _padded(x: Array, rows: int) -> Array:
    """x with zero rows after its own, `rows` in all."""
    return jnp.pad(x, ((0, rows - x.shape[0]), *[(0, 0)] * (x.ndim - 1)))


def _kernels(weights: Weights, name: str, rows: int) -> Array:
    """The depthwise kernels `[rows, k, k]` of the first channels."""
    return _padded(jnp.moveaxis(weights[f"{name}.kernel"], 2, 0), rows)


def _pair_rows(pair: tuple[Array, Array], order: Array, inverse: Array) -> tuple[Array, Array]:
    return take_rows(pair[0], order, inverse), take_rows(pair[1], order, inverse)


def _pair_padded(pair: tuple[Array, Array], rows: int) -> tuple[Array, Array]:
    return _padded(pair[0], rows), _padded(pair[1], rows)


def _both(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
    """One after the other."""
    return jnp.concatenate([one[0], other[0]]), jnp.concatenate([one[1], other[1]])


class _Blocks:
    """Runs functions of a block on the first channels of feature maps."""

    def __init__(self, block: int, starts: Array, count: Array) -> None:
        self.block, self.starts, self.count = block, starts, count

    @staticmethod
    def of(block: int, rows: int, channels: Array) -> "_Blocks":
        return _Blocks(block, jnp.arange(0, rows, block), (channels + block - 1) // block)

    def and_of(self, rows: int, others: "_Blocks") -> "_Blocks":
        """These blocks, then others of maps that come after the `rows` of these."""
        index = jnp.arange(len(self.starts) + len(others.starts))
        starts = jnp.where(index < self.count, index * self.block, rows + (index - self.count) * self.block)
        return _Blocks(self.block, starts, self.count + others.count)

    def run(self, function: Any, maps: Any, parameters: Any, choices: Any) -> Any:
        return over_blocks(function, self.block, self.starts, self.count, maps, parameters, choices)


def _extra(
    weights: Weights, x: Array, chosen: Array, blocks: _Blocks, places: tuple[Array, Array], given: dict[str, Any]
) -> tuple[Array, Any]:
    """The depthwise convolution before the branches, where it is chosen; `places` as for `take_rows`."""
    kernel = take_rows(jnp.moveaxis(weights["extra_dw.kernel"], 2, 0), *places)
    pair = _pair_rows(affine(weights, "extra_dw_bn"), *places)
    statistics = given.get("extra_dw_bn")

    def run(x):
        return blocks.run(_extra_block, x, (kernel, pair, statistics), jnp.int32(0))

    nothing = jnp.zeros(x.shape[0])
    return lax.cond(chosen, run, lambda x: (x, statistics or (nothing, nothing)), x)


def _mixed(choice: Choice, rows: int) -> Array:
    """Which channel each one of the middle was before the shuffle of the groups, `[rows]`."""
    shuffled = below(choice.main, rows)
    unshuffled = (shuffled % choice.groups) * (choice.main // choice.groups) + shuffled // choice.groups
    return jnp.where(shuffled >= 0, unshuffled, -1)


def _gate(weights: Weights, y: Array, choice: Choice, places: tuple[Array, Array]) -> Array:
    """Factors of squeeze-excite `[rows, N]`, of a main branch that has its channels in order; ones if not chosen."""
    ones = jnp.ones((y.shape[0], y.shape[3]), y.dtype)
    if "se_reduce.kernel" not in weights:
        return ones
    reduce, expand = (
        take_rows(kernel, *places) for kernel in (weights["se_reduce.kernel"], weights["se_expand.kernel"].T)
    )
    bias = take_rows(weights["se_expand.bias"], *places)

    def gate(y):
        squeezed = jax.nn.relu(reduce.T @ y.mean((1, 2)) + weights["se_reduce.bias"][:, None])
        squeezed = jnp.where((jnp.arange(squeezed.shape[0]) < jnp.maximum(1, choice.main // 4))[:, None], squeezed, 0)
        return jax.nn.sigmoid(expand @ squeezed + bias[:, None])

    return lax.cond(choice.squeeze_excite, gate, lambda y: ones, y)


def _normed_product(
    blocks: _Blocks, size: tuple[Sizes, Array], x: Array, parameters: Any, kernel: Array
) -> tuple[Array, Any]:
    """Batch norm, then a pointwise convolution; what is between is computed again for the gradient, not kept."""

    def run(x, parameters, kernel):
        y, used = blocks.run(_norm_block, x, parameters, jnp.int32(0))
        return product_rows(*size, kernel, y), used

    return jax.checkpoint(run)(x, parameters, kernel)


def later_units(
    space: SearchSpace,
    widths: tuple[int, ...],
    weights: Weights,
    x: Array,
    layout: Layout,
    depth: Array,
    width_index: Array,
    codes: Array,
    given: dict[str, Any] | None,
) -> Run:
    """The units of a stage after its first, as many as the architecture has; arguments as in `masked_units`."""
    rows, block = _rows_and_block(weights)

    def choice_of(own):
        return Choice.read(space, widths, own[1], own[0])

    def unit(weights, x, layout, own):
        return _stride_1_unit(space, weights, x, layout, choice_of(own), own[2])

    loop = Loop(unit, rows, block, lambda own: _Blocks.of(block, rows, choice_of(own).main).count)
    own = codes[1:], jnp.full(len(codes) - 1, width_index), given or {}
    return over_units(loop, depth - 1, weights, x, layout, own)


def _rows_and_block(weights: Weights) -> tuple[int, int]:
    """Channels of the widest main branch, a multiple of a block's, and those of a block."""
    main = weights["dw.kernel"].shape[-1]
    block = -(-main // BLOCKS)
    return -(-main // block) * block, block


def _stride_1_unit(
    space: SearchSpace, weights: Weights, x: Array, layout: Layout, choice: Choice, given: dict[str, Any]
) -> Run:
    """A unit that keeps the size of the feature map."""
    (rows, block), used = _rows_and_block(weights), {}
    branch, active = layout.last(choice.main), below(choice.main, rows)
    places = inverse_of(branch, rows), branch
    blocks, square = _Blocks.of(block, rows, choice.main), (square_sizes(rows), square_index(choice.main, rows))

    entry = take_rows(x, *places)
    y = entry
    if "extra_dw.kernel" in weights:
        y, used["extra_dw_bn"] = _extra(weights, y, choice.extra_depthwise, blocks, places, given)
    kernel = _padded(take_rows(weights["pw1.kernel"], *places).T, rows).T
    kernel = jnp.where(joined(active, choice.main, _mixed(choice, rows), choice.main, choice.groups), kernel, 0)
    y = product_rows(*square, kernel, y)

    pair = _pair_padded(affine(weights, "pw1_bn"), rows)
    parameters = _kernels(weights, "dw", rows), _masked(pair, active), given.get("pw1_bn")
    function = _stride_1_function(space.choices["kernel"])
    y, used["pw1_bn"] = blocks.run(function, y, parameters, choice.kernel_index)

    kernel = _padded(take_rows(weights["pw2.kernel"].T, *places).T, rows)
    kernel = jnp.where(joined(active, choice.main, active, choice.main, choice.groups), kernel, 0)
    parameters = _masked(_pair_padded(affine(weights, "dw_bn"), rows), active), given.get("dw_bn")
    y, used["dw_bn"] = _normed_product(blocks, square, y, parameters, kernel)

    parameters = _pair_rows(affine(weights, "pw2_bn"), *places), given.get("pw2_bn")
    y, used["pw2_bn"] = blocks.run(_output_block, y, parameters, choice.residual.astype(jnp.int32))
    parameters = _gate(weights, y, choice, places)
    y = blocks.run(_closing_block, (y, entry), parameters, choice.residual.astype(jnp.int32))
    x = take_rows(y, branch, places[0]) + (branch < 0).astype(x.dtype)[:, None, None, None] * x
    return x, layout.shuffled(), used


def stride_2_unit(
    space: SearchSpace,
    slots: int,
    weights: Weights,
    x: Array,
    layout: Layout,
    choice: Choice,
    given: dict[str, Any] | None,
) -> Run:
    """The first unit of a stage: the side branch fills the first slots, the main branch those after it."""
    given, used = given or {}, {}
    rows, block = _rows_and_block(weights)
    entry_rows, all_slots = (-(-n // block) * block for n in (x.shape[0], slots))
    active, entering = below(choice.main, rows), below(layout.width, entry_rows)
    source = inverse_of(layout.channel, entry_rows), layout.channel
    main_blocks, side_blocks = _Blocks.of(block, rows, choice.main), _Blocks.of(block, entry_rows, layout.width)
    both_blocks = main_blocks.and_of(rows, side_blocks)

    entry = take_rows(x, *source)
    y = entry
    if "extra_dw.kernel" in weights:
        y, used["extra_dw_bn"] = _extra(weights, y, choice.extra_depthwise, side_blocks, source, given)
    kernel = _padded(take_rows(weights["pw1.kernel"], *source).T, rows).T
    kernel = jnp.where(joined(entering, layout.width, _mixed(choice, rows), choice.main, choice.groups), kernel, 0)
    size = index_of(layout.width, entry_rows, choice.main, rows)
    y = product_rows(sizes(entry_rows, rows), size, _padded(kernel.T, rows + entry_rows).T, y)
    y = lax.dynamic_update_slice_in_dim(y, entry, rows, 0)  # behind it, where there is room for it

    # both branches in one call: it is compiled for each kernel, which takes long
    side_kernel = take_rows(jnp.moveaxis(weights["side_dw.kernel"], 2, 0), *source)
    kernels = jnp.concatenate([_kernels(weights, "dw", rows), side_kernel])
    plain = (jnp.arange(rows + entry_rows) >= rows).astype(jnp.float32)
    pair = _pair_padded(_masked(_pair_padded(affine(weights, "pw1_bn"), rows), active), rows + entry_rows)
    function = _stride_2_function(space.choices["kernel"])
    parameters = kernels, plain, pair, given.get("pw1_bn")
    y, used["pw1_bn"] = both_blocks.run(function, y, parameters, choice.kernel_index)

    main_pair = _masked(_pair_padded(affine(weights, "dw_bn"), rows), active)
    pair = _both(main_pair, _pair_rows(affine(weights, "side_dw_bn"), *source))
    y, used["dw_bn"] = both_blocks.run(_norm_block, y, (pair, given.get("dw_bn")), jnp.int32(0))

    side_width, index = choice.width - choice.main, jnp.arange(all_slots)
    side_branch = below(side_width, all_slots)
    branch = jnp.where((index >= side_width) & (index < choice.width), index - side_width, -1)
    target = inverse_of(branch, rows), branch
    kernel = _padded(take_rows(_padded(weights["pw2.kernel"].T, all_slots), *target).T, rows)
    kernel = jnp.where(joined(active, choice.main, active, choice.main, choice.groups), kernel, 0)
    kernel = _padded(kernel, rows + entry_rows)
    main = product_rows(square_sizes(rows), square_index(choice.main, rows), kernel, y)
    kernel = _padded(take_rows(weights["side_pw.kernel"], *source).T, all_slots).T
    kernel = jnp.where(joined(entering, layout.width, side_branch, side_width, choice.groups), kernel, 0)
    size = index_of(layout.width, entry_rows, side_width, all_slots)
    side = product_rows(sizes(entry_rows, all_slots), size, kernel, y[rows:])
    y = take_rows(main, *target[::-1]) + side

    # each slot belongs to one branch, so that one batch norm does for both
    pairs = (affine(weights, "pw2_bn", branch[:slots] >= 0), affine(weights, "side_pw_bn", side_branch[:slots] >= 0))
    pair = _pair_padded((pairs[0][0] + pairs[1][0], pairs[0][1] + pairs[1][1]), all_slots)
    blocks = _Blocks.of(block, all_slots, choice.width)
    y, used["concat_bn"] = blocks.run(_output_block, y, (pair, given.get("concat_bn")), jnp.int32(0))
    y = y[:slots]
    places = jnp.where(branch >= 0, index, -1)[:slots]
    gate = _gate(weights, y, choice, (places, places))
    y = y * jnp.where((places >= 0)[:, None], gate, 1)[:, None, None, :]
    return y, Layout.plain(choice.width, slots).shuffled(), used


def _masked(pair: tuple[Array, Array], active: Array) -> tuple[Array, Array]:
    return jnp.where(active >= 0, pair[0], 0), jnp.where(active >= 0, pair[1], 0)
