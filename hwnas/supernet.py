"""The weight-sharing network of a search space: every architecture at once, compiled once.

An architecture enters as its integer encoding, an array, so that nothing is ever compiled for one architecture. A
smaller choice uses the leading part of the larger choice's weights: the first c' channels, the first units of a stage,
the centre of the depthwise kernel, the diagonal blocks of a pointwise kernel for groups (weight sharing as in
Once-for-All, arXiv 1908.09791, section 3, and single paths as in SPOS, arXiv 1904.00420).

How the channel shuffle costs nothing here: feature maps are never rearranged. A unit of stride 1 writes the output of
its main branch over the input of that branch, and the shuffle only changes an array `order` that tells in which
*slot* of the feature map each *channel* of the network lies. The pointwise kernels, which are small, are rearranged to
fit. Slots beyond the chosen width hold zeros.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hwnas.jax_layers import Array, batch_norm, convolution, depthwise, fixed_norm, he_normal, pool, take
from hwnas.network import weight_shapes
from hwnas.space import CHOICES, Architecture, SearchSpace, lower

Statistics = Any
"""The means and variances of every batch norm for one architecture: a pytree that `Supernet.__call__` made."""

Weights = dict[str, Any]


class Supernet(nnx.Module):
    """All architectures of a space in one set of weights.

    Calling it costs the same whatever the architecture's width, ratio and groups; kernel, squeeze-excite, extra
    depthwise convolution and depth cost only where they are chosen.
    """

    def __init__(self, space: SearchSpace, *, rngs: nnx.Rngs) -> None:
        self.space = space
        channels, head = space.stem_channels, space.head_channels
        self.stem = _parameters({"conv.kernel": (3, 3, 3, channels), "conv_bn": (channels,)}, rngs)
        self.stages = nnx.List([])
        for stage in space.stages:
            width = max(stage.width)
            first = _unit_shapes(space, channels, width, stride=2)
            later = _unit_shapes(space, width, width, stride=1)
            self.stages.append(
                nnx.Dict(
                    first=_parameters(first, rngs),
                    later=_parameters(later, rngs, copies=max(stage.depth) - 1),
                )
            )
            channels = width
        shapes = {"conv.kernel": (channels, head), "conv_bn": (head,), "linear.kernel": (head, space.classes)}
        self.head = _parameters(shapes | {"linear.bias": (space.classes,)}, rngs)

    def __call__(self, images: Array, code: Array, statistics: Statistics | None = None) -> tuple[Array, Statistics]:
        """Runs one architecture on a batch.

        Args:
            images: `[N, H, W, 3]`, normalised.
            code: `[len(space.radices)]` integers, an encoding.
            statistics: of the batch norms for this architecture; without them each batch is normalised by itself.

        Returns:
            The logits `[N, classes]`, and the statistics that were used.
        """
        space, used = self.space, {}
        given = statistics or {}
        code = jnp.asarray(code, jnp.int32)
        x = convolution(images, self.stem["conv.kernel"][...], stride=space.stem_stride, padding=1)
        x, used["stem"] = _norm(x, _affine(_values(self.stem), "conv_bn"), given.get("stem"))
        x = jax.nn.relu(x)
        if space.max_pool:
            x = pool(x, "max", 3, 2, 1)
        layout = _Layout.plain(jnp.int32(space.stem_channels), space.stem_channels)
        position = 0
        for number, (stage, weights) in enumerate(zip(space.stages, self.stages, strict=True), 2):
            depth = jnp.array(stage.depth)[code[position]]
            width_index = code[position + 1]
            size = max(stage.depth) * len(CHOICES)
            units = code[position + 2 : position + 2 + size].reshape(-1, len(CHOICES))
            position += 2 + size
            first, later = f"stage{number}.first", f"stage{number}.later"
            choice = _Choice.read(space, stage.width, width_index, units[0])
            x, layout, used[first] = _stride_2_unit(
                space, max(stage.width), _values(weights["first"]), x, layout, choice, given.get(first)
            )
            if max(stage.depth) > 1:
                x, layout, used[later] = _stride_1_units(
                    space,
                    stage.width,
                    _values(weights["later"]),
                    x,
                    layout,
                    depth,
                    width_index,
                    units,
                    given.get(later),
                )
        weights = _values(self.head)
        x = x @ take(weights["conv.kernel"], layout.channel, layout.slot, axis=0)
        x, used["head"] = _norm(x, _affine(weights, "conv_bn"), given.get("head"))
        x = jax.nn.relu(x).mean((1, 2))
        return x @ weights["linear.kernel"] + weights["linear.bias"], used


# ---- parameters --------------------------------------------------------------------------------------------------


def _unit_shapes(space: SearchSpace, inputs: int, width: int, *, stride: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a unit's weights at the widest choice. A batch norm stands under its name, with its channels."""
    ratios, kernel = space.choices["split_ratio"], max(space.choices["kernel"])
    main = int(width * max(ratios))
    side = width - int(width * min(ratios))
    inputs = main if stride == 1 else inputs
    shapes: dict[str, tuple[int, ...]] = {
        "pw1.kernel": (inputs, main),
        "pw1_bn": (main,),
        "dw.kernel": (kernel, kernel, main),
        "dw_bn": (main,),
        "pw2.kernel": (main, main),
        "pw2_bn": (main,),
    }
    if any(space.choices["extra_depthwise"]):
        shapes |= {"extra_dw.kernel": (3, 3, inputs), "extra_dw_bn": (inputs,)}
    if any(space.choices["squeeze_excite"]):
        hidden = max(1, main // 4)
        shapes |= {"se_reduce.kernel": (main, hidden), "se_reduce.bias": (hidden,)}
        shapes |= {"se_expand.kernel": (hidden, main), "se_expand.bias": (main,)}
    if stride == 2:
        shapes |= {"side_dw.kernel": (kernel, kernel, inputs), "side_dw_bn": (inputs,)}
        shapes |= {"side_pw.kernel": (inputs, side), "side_pw_bn": (side,)}
    return shapes


def _parameters(shapes: dict[str, tuple[int, ...]], rngs: nnx.Rngs, copies: int | None = None) -> nnx.Dict:
    """He-normal kernels, zero biases, batch norms of scale one; `copies` stacks as many of each in a leading axis."""
    lead = () if copies is None else (copies,)
    parameters: dict[str, nnx.Param] = {}
    for name, shape in shapes.items():
        if name.endswith("_bn"):
            parameters[f"{name}.scale"] = nnx.Param(jnp.asarray(np.ones(lead + shape, np.float32)))
            parameters[f"{name}.offset"] = nnx.Param(jnp.asarray(np.zeros(lead + shape, np.float32)))
        elif name.endswith(".bias"):
            parameters[name] = nnx.Param(jnp.asarray(np.zeros(lead + shape, np.float32)))
        else:
            fan_in = math.prod(shape[:2]) if "dw" in name else math.prod(shape[:-1])
            parameters[name] = nnx.Param(he_normal(rngs.params(), lead + shape, fan_in))
    return nnx.Dict(parameters)


def _values(parameters: nnx.Dict) -> dict[str, Array]:
    return {name: parameter[...] for name, parameter in parameters.items()}


# ---- where the channels lie --------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Layout:
    """Which channel of the network lies in which slot of a feature map with `C` slots.

    Attributes:
        width: channels in use, a scalar.
        slot: `[C]`, the slot of each channel, -1 beyond the width.
        channel: `[C]`, the channel in each slot, -1 in empty slots: the inverse of `slot`.
    """

    width: Array
    slot: Array
    channel: Array

    @staticmethod
    def plain(width: Array, slots: int) -> "_Layout":
        """Channel i in slot i."""
        index = _below(width, slots)
        return _Layout(width, index, index)

    def shuffled(self) -> "_Layout":
        """After a channel shuffle of two groups: nothing moves, but the channels are counted in another order."""
        source, target = _shuffle(self.width, jnp.int32(2), self.slot.shape[0])
        slot = jnp.where(source >= 0, self.slot[jnp.maximum(source, 0)], -1)
        channel = jnp.where(self.channel >= 0, target[jnp.maximum(self.channel, 0)], -1)
        return _Layout(self.width, slot, channel)

    def last(self, count: Array, most: int) -> tuple[Array, Array]:
        """Where the last `count` channels, the main branch's input, lie.

        Returns the branch channel of each slot `[C]` and the slot of each branch channel `[most]`, -1 where none.
        """
        start = self.width - count
        branch = jnp.where(self.channel >= start, self.channel - start, -1)
        index = jnp.arange(most)
        slot = jnp.where(index < count, self.slot[jnp.minimum(start + index, self.slot.shape[0] - 1)], -1)
        return jnp.where(self.channel >= 0, branch, -1), slot


def _below(count: Array, size: int) -> Array:
    """`0, 1, ..., count - 1, -1, -1, ...`, `size` long."""
    index = jnp.arange(size)
    return jnp.where(index < count, index, -1)


def _shuffle(channels: Array, groups: Array, size: int) -> tuple[Array, Array]:
    """Channel shuffle of the first `channels` of `size`: where each comes from, and where each goes; -1 beyond."""
    index, per_group = jnp.arange(size), channels // groups
    source = (index % groups) * per_group + index // groups
    target = (index % per_group) * groups + index // per_group
    return jnp.where(index < channels, source, -1), jnp.where(index < channels, target, -1)


# ---- units -------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Choice:
    """A unit's choices as scalars of a traced computation."""

    width: Array
    main: Array
    kernel_index: Array
    squeeze_excite: Array
    residual: Array
    groups: Array
    extra_depthwise: Array

    @staticmethod
    def read(space: SearchSpace, widths: tuple[int, ...], width_index: Array, code: Array) -> "_Choice":
        index = dict(zip(CHOICES, code, strict=True))
        main = jnp.array([[int(width * ratio) for ratio in space.choices["split_ratio"]] for width in widths])
        chosen = {
            name: jnp.array(space.choices[name])[index[name]]
            for name in ("squeeze_excite", "residual", "groups", "extra_depthwise")
        }
        return _Choice(
            width=jnp.array(widths)[width_index],
            main=main[width_index, index["split_ratio"]],
            kernel_index=index["kernel"],
            **chosen,
        )


def _affine(weights: dict[str, Array], name: str, index: Array | None = None, back: Array | None = None):
    """Scale and offset of a batch norm, rearranged by `take` if an index is given."""
    pair = weights[f"{name}.scale"], weights[f"{name}.offset"]
    if index is None or back is None:
        return pair
    return take(pair[0], index, back, 0), take(pair[1], index, back, 0)


def _norm(x: Array, affine: tuple[Array, Array], given: tuple[Array, Array] | None):
    """Batch norm by the given statistics or the batch's own; returns them too."""
    if given is not None:
        return fixed_norm(x, *affine, *given), given
    y, mean, variance = batch_norm(x, *affine)
    return y, (lax.stop_gradient(mean), lax.stop_gradient(variance))


def _block_mask(inputs: Array, outputs: Array, groups: Array, shape: tuple[int, ...]) -> Array:
    """One where a pointwise convolution of that many groups joins input to output, else zero: `[in, out]`."""
    rows, columns = jnp.arange(shape[0]), jnp.arange(shape[1])
    return (rows * groups // inputs)[:, None] == (columns * groups // outputs)[None, :]


def _main_branch(
    space: SearchSpace,
    weights: dict[str, Array],
    x: Array,
    choice: _Choice,
    source: tuple[Array, Array, Array],
    target: tuple[Array, Array],
    stride: int,
    given: dict[str, Any],
) -> tuple[Array, tuple[Array, Array], dict[str, Any]]:
    """The main branch up to its last pointwise convolution.

    Args:
        source: how many channels come in, the channel of each slot of `x`, and the slot of each channel.
        target: the branch channel of each slot of the result, and the slot of each branch channel.

    Returns:
        The convolution's output in slots, the scale and offset of the batch norm to come, and the statistics used.
    """
    used: dict[str, Any] = {}
    inputs, channel_in, slot_in = source
    most = weights["pw2.kernel"].shape[0]
    if "extra_dw.kernel" in weights:

        def extra(x):
            kernel = take(weights["extra_dw.kernel"], channel_in, slot_in, axis=2)
            y = depthwise(x, kernel, jnp.int32(0), (3,))
            return _norm(y, _affine(weights, "extra_dw_bn", channel_in, slot_in), given.get("extra_dw_bn"))

        nothing = jnp.zeros(x.shape[-1])
        x, used["extra_dw_bn"] = lax.cond(
            choice.extra_depthwise, extra, lambda x: (x, given.get("extra_dw_bn", (nothing, nothing))), x
        )
    mixed, unmixed = _shuffle(choice.main, choice.groups, most)
    kernel = weights["pw1.kernel"] * _block_mask(inputs, choice.main, choice.groups, weights["pw1.kernel"].shape)
    kernel = take(take(kernel, channel_in, slot_in, axis=0), mixed, unmixed, axis=1)
    x, used["pw1_bn"] = _norm(x @ kernel, _affine(weights, "pw1_bn", mixed, unmixed), given.get("pw1_bn"))
    x = depthwise(jax.nn.relu(x), weights["dw.kernel"], choice.kernel_index, space.choices["kernel"], stride)
    plain = _below(choice.main, most)
    x, used["dw_bn"] = _norm(x, _affine(weights, "dw_bn", plain, plain), given.get("dw_bn"))
    kernel = weights["pw2.kernel"] * _block_mask(choice.main, choice.main, choice.groups, (most, most))
    return x @ take(kernel, *target, axis=1), _affine(weights, "pw2_bn", *target), used


def _squeeze_excite(weights: dict[str, Array], x: Array, choice: _Choice, branch: Array, slot: Array) -> Array:
    """Gates the slots of the main branch; the result counts in those slots only."""
    if "se_reduce.kernel" not in weights:
        return x
    hidden = jnp.maximum(1, choice.main // 4)

    def gated(x):
        mean = x.mean((1, 2))
        active = jnp.arange(weights["se_reduce.bias"].shape[0]) < hidden
        squeezed = mean @ take(weights["se_reduce.kernel"], branch, slot, axis=0) + weights["se_reduce.bias"]
        squeezed = jnp.where(active, jax.nn.relu(squeezed), 0)
        gate = squeezed @ take(weights["se_expand.kernel"], branch, slot, axis=1)
        gate = jax.nn.sigmoid(gate + take(weights["se_expand.bias"], branch, slot, axis=0))
        return x * gate[:, None, None, :]

    return lax.cond(choice.squeeze_excite, gated, lambda x: x, x)


def _stride_1_units(
    space: SearchSpace,
    widths: tuple[int, ...],
    weights: dict[str, Array],
    x: Array,
    layout: _Layout,
    depth: Array,
    width_index: Array,
    codes: Array,
    given: dict[str, Any] | None,
) -> tuple[Array, _Layout, dict[str, Any]]:
    """The units of a stage after its first. They are alike in shape, so that one is compiled and looped over."""

    def step(carry, unit):
        index, code, unit_weights, statistics = unit
        choice = _Choice.read(space, widths, width_index, code)

        def run(x, layout):
            return _stride_1_unit(space, unit_weights, x, layout, choice, statistics)

        def skip(x, layout):
            shapes = jax.eval_shape(run, x, layout)[2]
            return x, layout, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        x, layout, used = lax.cond(index < depth, run, skip, *carry)
        return (x, layout), used

    indices = jnp.arange(1, codes.shape[0])
    (x, layout), used = lax.scan(step, (x, layout), (indices, codes[1:], weights, given))
    return x, layout, used


def _stride_1_unit(
    space: SearchSpace, weights: dict[str, Array], x: Array, layout: _Layout, choice: _Choice, given: Any
) -> tuple[Array, _Layout, dict[str, Any]]:
    given = given or {}
    branch, slot = layout.last(choice.main, weights["pw2.kernel"].shape[0])
    y, affine, used = _main_branch(space, weights, x, choice, (choice.main, branch, slot), (branch, slot), 1, given)
    y, used["pw2_bn"] = _norm(y, affine, given.get("pw2_bn"))
    y = jnp.where(choice.residual, y, jax.nn.relu(y))
    y = _squeeze_excite(weights, y, choice, branch, slot)
    y = jnp.where(choice.residual, jax.nn.relu(y + x), y)
    return jnp.where(branch >= 0, y, x), layout.shuffled(), used


def _stride_2_unit(
    space: SearchSpace,
    slots: int,
    weights: dict[str, Array],
    x: Array,
    layout: _Layout,
    choice: _Choice,
    given: dict[str, Any] | None,
) -> tuple[Array, _Layout, dict[str, Any]]:
    """The first unit of a stage: the side branch fills the first slots, the main branch those after it."""
    given = given or {}
    main_channels, side_channels = weights["pw2.kernel"].shape[0], weights["side_pw.kernel"].shape[1]
    source = (layout.width, layout.channel, layout.slot)
    side_width = choice.width - choice.main
    index = jnp.arange(slots)
    branch = jnp.where((index >= side_width) & (index < choice.width), index - side_width, -1)
    slot = jnp.where(jnp.arange(main_channels) < choice.main, jnp.arange(main_channels) + side_width, -1)
    y, (scale, offset), used = _main_branch(space, weights, x, choice, source, (branch, slot), 2, given)

    side_target = (_below(side_width, slots), _below(side_width, side_channels))
    side = depthwise(
        x,
        take(weights["side_dw.kernel"], layout.channel, layout.slot, axis=2),
        choice.kernel_index,
        space.choices["kernel"],
        2,
    )
    side, used["side_dw_bn"] = _norm(
        side, _affine(weights, "side_dw_bn", layout.channel, layout.slot), given.get("side_dw_bn")
    )
    kernel = weights["side_pw.kernel"]
    kernel = kernel * _block_mask(layout.width, side_width, choice.groups, kernel.shape)
    kernel = take(take(kernel, layout.channel, layout.slot, axis=0), *side_target, axis=1)
    side_scale, side_offset = _affine(weights, "side_pw_bn", *side_target)

    # each slot belongs to one branch, so that one batch norm does for both
    y, used["concat_bn"] = _norm(y + side @ kernel, (scale + side_scale, offset + side_offset), given.get("concat_bn"))
    y = jax.nn.relu(y)
    gated = _squeeze_excite(weights, y, choice, branch, slot)
    return jnp.where(branch >= 0, gated, y), _Layout.plain(choice.width, slots).shuffled(), used


# ---- from the supernet to one network ----------------------------------------------------------------------------


def slice_weights(supernet: Supernet, architecture: Architecture) -> Weights:
    """The supernet's weights that an architecture uses, named and shaped as those of `lower(space, architecture)`.

    Means and variances of batch norms are not among them: they are estimated anew for each network.
    """
    space = supernet.space
    weights: Weights = {f"stem.{name}": value for name, value in _numpy(supernet.stem).items()}
    inputs = space.stem_channels
    for number, (stage, chosen) in enumerate(zip(supernet.stages, architecture.stages, strict=True), 2):
        first, later = _numpy(stage["first"]), _numpy(stage["later"])
        for index, choice in enumerate(chosen.units):
            shared = first if index == 0 else {name: value[index - 1] for name, value in later.items()}
            main = int(chosen.width * choice.split_ratio)
            source = inputs if index == 0 else main
            sliced = _slice_unit(shared, source, main, chosen.width - main, choice.groups, choice.kernel)
            weights |= {f"stage{number}.{index + 1}.{name}": value for name, value in sliced.items()}
        inputs = chosen.width
    head = _numpy(supernet.head)
    head["conv.kernel"] = head["conv.kernel"][None, None, :inputs]
    weights |= {f"head.{name}": value for name, value in head.items()}
    wanted = {
        f"{node.name}.{suffix}"
        for node in lower(space, architecture).nodes
        for suffix in weight_shapes(node)
        if suffix not in ("mean", "variance")
    }
    return {name: np.ascontiguousarray(weights[name]) for name in wanted}


def _numpy(parameters: nnx.Dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in _values(parameters).items()}


def _slice_unit(
    shared: dict[str, np.ndarray], inputs: int, main: int, side: int, groups: int, kernel: int
) -> dict[str, np.ndarray]:
    """The part of a unit's weights that one choice uses, in the shapes of its `Network`."""
    hidden = max(1, main // 4)
    sides = {"side_dw": inputs, "side_pw": side, "extra_dw": inputs}
    sliced: dict[str, np.ndarray] = {}
    for name, value in shared.items():
        operator, suffix = name.split(".")
        operator = operator.removesuffix("_bn")
        if operator == "se_reduce":
            value = value[None, None, :main, :hidden] if suffix == "kernel" else value[:hidden]
        elif operator == "se_expand":
            value = value[None, None, :hidden, :main] if suffix == "kernel" else value[:main]
        elif suffix != "kernel":
            value = value[: sides.get(operator, main)]
        elif operator.endswith("dw"):
            margin = 0 if operator == "extra_dw" else (value.shape[0] - kernel) // 2
            end = value.shape[0] - margin
            value = value[margin:end, margin:end, None, : sides.get(operator, main)]
        else:
            rows = main if operator == "pw2" else inputs
            value = _diagonal_blocks(value[:rows, : sides.get(operator, main)], groups)
        sliced[name] = value
    return sliced


def _diagonal_blocks(kernel: np.ndarray, groups: int) -> np.ndarray:
    """A dense pointwise kernel `[in, out]` cut to a grouped one, `[1, 1, in / groups, out]`."""
    rows, columns = kernel.shape[0] // groups, kernel.shape[1] // groups
    blocks = [kernel[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
    return np.concatenate(blocks, axis=1)[None, None]
