"""Units of a supernet at full width, with zeros where an architecture has no channels: the form for accelerators.

Feature maps are `[slots, N, H, W]`. Slots are as many as matrix units take at a time, or a multiple of that.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hwnas.jax_layers import Array, depthwise_maps
from hwnas.row_layers import norm, spread
from hwnas.space import SearchSpace
from hwnas.unit_places import Choice, Layout, Run, affine, below, joined, taken

MULTIPLE = 8
"""Matrix units of GPUs take bfloat16 in eights; a product of any other size copies its feature maps to one."""


def rounded(channels: int) -> int:
    """So many channels as `aligned` makes of them."""
    return -(-channels // MULTIPLE) * MULTIPLE


def aligned(weights: dict[str, Array]) -> dict[str, Array]:
    """Weights with zeros up to the next multiple in the axes of channels; any leading axes stay as they are."""

    def grown(name: str, value: Array) -> Array:
        channel_axes = 2 if name.endswith(".kernel") and "dw" not in name else 1
        ends = [(0, 0)] * (value.ndim - channel_axes)
        return jnp.pad(value, ends + [(0, rounded(size) - size) for size in value.shape[-channel_axes:]])

    return {name: grown(name, value) for name, value in weights.items()}


def product(kernel: Array, x: Array) -> Array:
    """A pointwise convolution `[in, out]` of x `[in, N, H, W]`."""
    return jnp.einsum("io,inhw->onhw", kernel.astype(x.dtype), x)


def _main_branch(
    space: SearchSpace,
    weights: dict[str, Array],
    x: Array,
    choice: Choice,
    source: tuple[Array, Array],
    target: Array,
    stride: int,
    given: dict[str, Any],
) -> tuple[Array, Array | None, dict[str, Any]]:
    """The main branch up to its last pointwise convolution; with stride 2 the side branch's depthwise one, too.

    Args:
        source: the input channel in each slot of `x`, and how many there are.
        target: the output channel in each slot of the result.

    Returns:
        The convolution's output in slots, the side branch's feature map, and the statistics used.
    """
    used: dict[str, Any] = {}
    unchanged = x
    if "extra_dw.kernel" in weights:
        y = depthwise_maps(x, weights["extra_dw.kernel"], jnp.int32(0), (3,))
        y, mean_and_variance = norm(y, affine(weights, "extra_dw_bn", source[0] >= 0), given.get("extra_dw_bn"))
        nothing = jnp.zeros(x.shape[0])
        without = x, given.get("extra_dw_bn", (nothing, nothing))
        x, used["extra_dw_bn"] = taken(choice.extra_depthwise, (y, mean_and_variance), without)
    # between the pointwise convolutions the channels are counted as they are after the shuffle of the groups
    middle = weights["dw.kernel"].shape[2]
    shuffled = below(choice.main, middle)
    unshuffled = (shuffled % choice.groups) * (choice.main // choice.groups) + shuffled // choice.groups
    unshuffled = jnp.where(shuffled >= 0, unshuffled, -1)
    kernel = jnp.where(joined(*source, unshuffled, choice.main, choice.groups), weights["pw1.kernel"], 0)
    y, used["pw1_bn"] = norm(product(kernel, x), affine(weights, "pw1_bn", shuffled >= 0), given.get("pw1_bn"))
    y, side = jax.nn.relu(y), None
    if stride == 1:
        y = depthwise_maps(y, weights["dw.kernel"], choice.kernel_index, space.choices["kernel"])
    else:  # both branches in one call: it is compiled for each kernel, which takes long
        kernel = jnp.concatenate([weights["dw.kernel"], weights["side_dw.kernel"]], axis=2)
        both = depthwise_maps(jnp.concatenate([y, unchanged]), kernel, choice.kernel_index, space.choices["kernel"], 2)
        y, side = both[:middle], both[middle:]
    y, used["dw_bn"] = norm(y, affine(weights, "dw_bn", shuffled >= 0), given.get("dw_bn"))
    kernel = jnp.where(joined(shuffled, choice.main, target, choice.main, choice.groups), weights["pw2.kernel"], 0)
    return product(kernel, y), side, used


def _squeeze_excite(weights: dict[str, Array], x: Array, choice: Choice, branch: Array) -> Array:
    """Gates the slots of the main branch; the result counts in those slots only."""
    if "se_reduce.kernel" not in weights:
        return x
    hidden = jnp.maximum(1, choice.main // 4)
    mean = jnp.where(branch >= 0, x.mean((2, 3), dtype=jnp.float32).T, 0)
    squeezed = jax.nn.relu(mean @ weights["se_reduce.kernel"] + weights["se_reduce.bias"])
    squeezed = jnp.where(jnp.arange(squeezed.shape[1]) < hidden, squeezed, 0)
    gate = jax.nn.sigmoid(squeezed @ weights["se_expand.kernel"] + weights["se_expand.bias"])
    return jnp.where(choice.squeeze_excite, (x * gate.T[..., None, None]).astype(x.dtype), x)


def later_units(
    space: SearchSpace,
    widths: tuple[int, ...],
    weights: dict[str, Array],
    x: Array,
    layout: Layout,
    depth: Array,
    width_index: Array,
    codes: Array,
    given: dict[str, Any] | None,
) -> Run:
    """The units of a stage after its first, all that there may be; those that are not there leave x as it is.

    Args:
        weights, given: of all of them, stacked.
        depth, width_index, codes: what the architecture chose for the stage; one code a unit, the first one's too.
    """

    def step(carry, of_unit):
        index, code, unit_weights, statistics = of_unit
        choice = Choice.read(space, widths, width_index, code)

        def run(x, layout):
            return _stride_1_unit(space, unit_weights, x, layout, choice, statistics or {})

        def skip(x, layout):
            shapes = jax.eval_shape(run, x, layout)[2]
            return x, layout, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        there = index < depth
        x, layout, used = taken(there, run(*carry), skip(*carry))
        return (x, layout), used

    units = jnp.arange(1, codes.shape[0]), codes[1:], weights, given
    (x, layout), used = lax.scan(step, (x, layout), units)
    return x, layout, used


def _stride_1_unit(
    space: SearchSpace,
    weights: dict[str, Array],
    x: Array,
    layout: Layout,
    choice: Choice,
    given: dict[str, Any],
) -> Run:
    """A unit that keeps the size of the feature map."""
    branch = layout.last(choice.main)
    y, _, used = _main_branch(space, weights, x, choice, (branch, choice.main), branch, 1, given)
    y, used["pw2_bn"] = norm(y, affine(weights, "pw2_bn", branch >= 0), given.get("pw2_bn"))
    y = jnp.where(choice.residual, y, jax.nn.relu(y))
    y = _squeeze_excite(weights, y, choice, branch)
    y = jnp.where(choice.residual, jax.nn.relu(y + x), y)
    return jnp.where(spread(branch) >= 0, y, x), layout.shuffled(), used


def stride_2_unit(
    space: SearchSpace,
    slots: int,
    weights: dict[str, Array],
    x: Array,
    layout: Layout,
    choice: Choice,
    given: dict[str, Any] | None,
) -> Run:
    """The first unit of a stage: the side branch fills the first slots, the main branch those after it."""
    given = given or {}
    side_width, index = choice.width - choice.main, jnp.arange(slots)
    side_branch = below(side_width, slots)
    branch = jnp.where((index >= side_width) & (index < choice.width), index - side_width, -1)
    y, side, used = _main_branch(space, weights, x, choice, (layout.channel, layout.width), branch, 2, given)
    assert side is not None

    pair = affine(weights, "side_dw_bn", layout.channel >= 0)
    side, used["side_dw_bn"] = norm(side, pair, given.get("side_dw_bn"))
    kernel = joined(layout.channel, layout.width, side_branch, side_width, choice.groups)
    y = y + product(jnp.where(kernel, weights["side_pw.kernel"], 0), side)

    # each slot belongs to one branch, so that one batch norm does for both
    pairs = zip(affine(weights, "pw2_bn", branch >= 0), affine(weights, "side_pw_bn", side_branch >= 0), strict=True)
    scale, offset = (main + side for main, side in pairs)
    y, used["concat_bn"] = norm(y, (scale, offset), given.get("concat_bn"))
    y = jax.nn.relu(y)
    gated = _squeeze_excite(weights, y, choice, branch)
    return jnp.where(spread(branch) >= 0, gated, y), Layout.plain(choice.width, slots).shuffled(), used
