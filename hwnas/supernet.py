"""The weight-sharing network of a search space: every architecture at once, compiled once.

An architecture enters as its integer encoding, an array, so that nothing is ever compiled for one architecture. A
smaller choice uses a part of the larger choice's weights: some of the channels, the first units of a stage, the centre
of the depthwise kernel, the diagonal blocks of a pointwise kernel for groups (weight sharing as in Once-for-All, arXiv
1908.09791, section 3, and single paths as in SPOS, arXiv 1904.00420).

Feature maps are never rearranged. They have *slots*: a stride-2 unit fills the first ones, a stride-1 unit writes the
output of its main branch over the input of that branch, and a channel shuffle only changes the array that tells which
*channel* of the network lies in which slot. Weights belong to slots, not to channels. So the shuffle costs nothing, and
what a slot holds means the same in every architecture, whatever widths and split ratios have shuffled its channels to.
Slots beyond the chosen width hold zeros.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from hwnas.jax_layers import (
    Array,
    Form,
    batch_norm,
    convolution,
    depthwise,
    fixed_norm,
    he_normal,
    native_form,
    pool,
    product,
)
from hwnas.network import shuffle_order, weight_shapes
from hwnas.space import CHOICES, Architecture, SearchSpace, lower

Statistics = Any
"""The means and variances of every batch norm for one architecture: a pytree that `Supernet.__call__` made."""

Weights = dict[str, Any]


class Supernet(nnx.Module):
    """All architectures of a space in one set of weights.

    Args:
        space: of the architectures.
        rngs: draws the kernels.
        form: how it is computed; without it the fastest for the device.

    Calling it costs the same whatever the architecture's width, ratio and groups; in a form with control flow, kernel,
    squeeze-excite, extra depthwise convolution and depth cost only where they are chosen.
    """

    def __init__(self, space: SearchSpace, *, rngs: nnx.Rngs, form: Form | None = None) -> None:
        self.space, self.form = space, form or native_form()
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
        space, form, used = self.space, self.form, {}
        given = statistics or {}
        code = jnp.asarray(code, jnp.int32)
        x = images.astype(form.dtype)
        x = convolution(x, self.stem["conv.kernel"][...], stride=space.stem_stride, padding=1, form=form)
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
                space, form, max(stage.width), _values(weights["first"]), x, layout, choice, given.get(first)
            )
            if max(stage.depth) > 1:
                x, layout, used[later] = _stride_1_units(
                    space,
                    form,
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
        x = product(x, weights["conv.kernel"], form)
        x, used["head"] = _norm(x, _affine(weights, "conv_bn"), given.get("head"))
        x = jax.nn.relu(x).mean((1, 2), dtype=jnp.float32)
        return x @ weights["linear.kernel"] + weights["linear.bias"], used


# ---- parameters --------------------------------------------------------------------------------------------------


def _unit_shapes(space: SearchSpace, inputs: int, width: int, *, stride: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a unit's weights at the widest choice. A batch norm stands under its name, with its channels."""
    main, kernel = int(width * max(space.choices["split_ratio"])), max(space.choices["kernel"])
    shapes: dict[str, tuple[int, ...]] = {
        "pw1.kernel": (inputs, main),
        "pw1_bn": (main,),
        "dw.kernel": (kernel, kernel, main),
        "dw_bn": (main,),
        "pw2.kernel": (main, width),
        "pw2_bn": (width,),
    }
    if any(space.choices["extra_depthwise"]):
        shapes |= {"extra_dw.kernel": (3, 3, inputs), "extra_dw_bn": (inputs,)}
    if any(space.choices["squeeze_excite"]):
        hidden = max(1, main // 4)
        shapes |= {"se_reduce.kernel": (width, hidden), "se_reduce.bias": (hidden,)}
        shapes |= {"se_expand.kernel": (hidden, width), "se_expand.bias": (width,)}
    if stride == 2:
        shapes |= {"side_dw.kernel": (kernel, kernel, inputs), "side_dw_bn": (inputs,)}
        shapes |= {"side_pw.kernel": (inputs, width), "side_pw_bn": (width,)}
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
    """Which channel of the network lies in which slot of a feature map.

    Attributes:
        width: channels in use, a scalar.
        channel: `[slots]`, the channel in each slot, -1 in empty ones.
    """

    width: Array
    channel: Array

    @staticmethod
    def plain(width: Array, slots: int) -> "_Layout":
        """Channel i in slot i."""
        return _Layout(width, _below(width, slots))

    def shuffled(self) -> "_Layout":
        """After a channel shuffle of two groups: nothing moves, but the channels are counted in another order."""
        half = self.width // 2
        moved = (self.channel % half) * 2 + self.channel // half
        return _Layout(self.width, jnp.where(self.channel >= 0, moved, -1))

    def last(self, count: Array) -> Array:
        """Counts the last channels, the main branch's input: 0, 1, ... in their slots, -1 in the others."""
        return jnp.maximum(self.channel - (self.width - count), -1)


def _below(count: Array, size: int) -> Array:
    """`0, 1, ..., count - 1, -1, -1, ...`, `size` long."""
    index = jnp.arange(size)
    return jnp.where(index < count, index, -1)


def _joined(inputs: Array, in_count: Array, outputs: Array, out_count: Array, groups: Array) -> Array:
    """Which inputs a pointwise convolution joins to which outputs: `[in, out]` of true and false.

    Args:
        inputs, outputs: the channel in each slot, -1 where none takes part.
        in_count, out_count: how many channels take part.
        groups: of the convolution.
    """
    same = (inputs * groups // in_count)[:, None] == (outputs * groups // out_count)[None, :]
    return same & (inputs >= 0)[:, None] & (outputs >= 0)[None, :]


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


def _affine(weights: dict[str, Array], name: str, active: Array | None = None) -> tuple[Array, Array]:
    """Scale and offset of a batch norm, zero where not active."""
    scale, offset = weights[f"{name}.scale"], weights[f"{name}.offset"]
    if active is None:
        return scale, offset
    return jnp.where(active, scale, 0), jnp.where(active, offset, 0)


def _norm(x: Array, affine: tuple[Array, Array], given: tuple[Array, Array] | None):
    """Batch norm by the given statistics or the batch's own; returns them too."""
    if given is not None:
        return fixed_norm(x, *affine, *given), given
    y, mean, variance = batch_norm(x, *affine)
    return y, (lax.stop_gradient(mean), lax.stop_gradient(variance))


def _either(form: Form, chosen: Array, run: Callable[..., Any], otherwise: Callable[..., Any], *inputs: Any) -> Any:
    """The result of one of two functions; of both, in a form without control flow, one result is taken."""
    if form.control_flow:
        return lax.cond(chosen, run, otherwise, *inputs)
    return jax.tree.map(lambda one, other: jnp.where(chosen, one, other), run(*inputs), otherwise(*inputs))


def _main_branch(
    space: SearchSpace,
    form: Form,
    weights: dict[str, Array],
    x: Array,
    choice: _Choice,
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

        def extra(x):
            y = depthwise(x, weights["extra_dw.kernel"], jnp.int32(0), (3,), 1, form)
            return _norm(y, _affine(weights, "extra_dw_bn", source[0] >= 0), given.get("extra_dw_bn"))

        nothing = jnp.zeros(x.shape[-1])
        x, used["extra_dw_bn"] = _either(
            form, choice.extra_depthwise, extra, lambda x: (x, given.get("extra_dw_bn", (nothing, nothing))), x
        )
    # between the pointwise convolutions the channels are counted as they are after the shuffle of the groups
    middle = weights["dw.kernel"].shape[2]
    shuffled = _below(choice.main, middle)
    unshuffled = (shuffled % choice.groups) * (choice.main // choice.groups) + shuffled // choice.groups
    unshuffled = jnp.where(shuffled >= 0, unshuffled, -1)
    kernel = jnp.where(_joined(*source, unshuffled, choice.main, choice.groups), weights["pw1.kernel"], 0)
    y, used["pw1_bn"] = _norm(product(x, kernel, form), _affine(weights, "pw1_bn", shuffled >= 0), given.get("pw1_bn"))
    y, side = jax.nn.relu(y), None
    if stride == 1:
        y = depthwise(y, weights["dw.kernel"], choice.kernel_index, space.choices["kernel"], 1, form)
    else:  # both branches in one call: it is compiled for each kernel, which takes long
        kernel = jnp.concatenate([weights["dw.kernel"], weights["side_dw.kernel"]], axis=2)
        both = depthwise(
            jnp.concatenate([y, unchanged], axis=3), kernel, choice.kernel_index, space.choices["kernel"], 2, form
        )
        y, side = both[..., :middle], both[..., middle:]
    y, used["dw_bn"] = _norm(y, _affine(weights, "dw_bn", shuffled >= 0), given.get("dw_bn"))
    joined = _joined(shuffled, choice.main, target, choice.main, choice.groups)
    return product(y, jnp.where(joined, weights["pw2.kernel"], 0), form), side, used


def _squeeze_excite(form: Form, weights: dict[str, Array], x: Array, choice: _Choice, branch: Array) -> Array:
    """Gates the slots of the main branch; the result counts in those slots only."""
    if "se_reduce.kernel" not in weights:
        return x
    hidden = jnp.maximum(1, choice.main // 4)

    def gated(x):
        mean = jnp.where(branch >= 0, x.mean((1, 2), dtype=jnp.float32), 0)
        squeezed = jax.nn.relu(mean @ weights["se_reduce.kernel"] + weights["se_reduce.bias"])
        squeezed = jnp.where(jnp.arange(squeezed.shape[1]) < hidden, squeezed, 0)
        gate = jax.nn.sigmoid(squeezed @ weights["se_expand.kernel"] + weights["se_expand.bias"])
        return (x * gate[:, None, None, :]).astype(x.dtype)

    return _either(form, choice.squeeze_excite, gated, lambda x: x, x)


def _stride_1_units(
    space: SearchSpace,
    form: Form,
    widths: tuple[int, ...],
    weights: dict[str, Array],
    x: Array,
    layout: _Layout,
    depth: Array,
    width_index: Array,
    codes: Array,
    given: dict[str, Any] | None,
) -> tuple[Array, _Layout, dict[str, Any]]:
    """The units of a stage after its first. They are alike in shape, so that one may be compiled and looped over."""

    def step(carry, unit):
        index, code, unit_weights, statistics = unit
        choice = _Choice.read(space, widths, width_index, code)

        def run(x, layout):
            return _stride_1_unit(space, form, unit_weights, x, layout, choice, statistics)

        def skip(x, layout):
            shapes = jax.eval_shape(run, x, layout)[2]
            return x, layout, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        x, layout, used = _either(form, index < depth, run, skip, *carry)
        return (x, layout), used

    units = jnp.arange(1, codes.shape[0]), codes[1:], weights, given
    (x, layout), used = lax.scan(step, (x, layout), units, unroll=1 if form.control_flow else len(codes) - 1)
    return x, layout, used


def _stride_1_unit(
    space: SearchSpace, form: Form, weights: dict[str, Array], x: Array, layout: _Layout, choice: _Choice, given: Any
) -> tuple[Array, _Layout, dict[str, Any]]:
    given = given or {}
    branch = layout.last(choice.main)
    y, _, used = _main_branch(space, form, weights, x, choice, (branch, choice.main), branch, 1, given)
    y, used["pw2_bn"] = _norm(y, _affine(weights, "pw2_bn", branch >= 0), given.get("pw2_bn"))
    y = jnp.where(choice.residual, y, jax.nn.relu(y))
    y = _squeeze_excite(form, weights, y, choice, branch)
    y = jnp.where(choice.residual, jax.nn.relu(y + x), y)
    return jnp.where(branch >= 0, y, x), layout.shuffled(), used


def _stride_2_unit(
    space: SearchSpace,
    form: Form,
    slots: int,
    weights: dict[str, Array],
    x: Array,
    layout: _Layout,
    choice: _Choice,
    given: dict[str, Any] | None,
) -> tuple[Array, _Layout, dict[str, Any]]:
    """The first unit of a stage: the side branch fills the first slots, the main branch those after it."""
    given = given or {}
    side_width, index = choice.width - choice.main, jnp.arange(slots)
    side_branch = _below(side_width, slots)
    branch = jnp.where((index >= side_width) & (index < choice.width), index - side_width, -1)
    y, side, used = _main_branch(space, form, weights, x, choice, (layout.channel, layout.width), branch, 2, given)
    assert side is not None

    affine = _affine(weights, "side_dw_bn", layout.channel >= 0)
    side, used["side_dw_bn"] = _norm(side, affine, given.get("side_dw_bn"))
    joined = _joined(layout.channel, layout.width, side_branch, side_width, choice.groups)
    y = y + product(side, jnp.where(joined, weights["side_pw.kernel"], 0), form)

    # each slot belongs to one branch, so that one batch norm does for both
    pairs = zip(_affine(weights, "pw2_bn", branch >= 0), _affine(weights, "side_pw_bn", side_branch >= 0), strict=True)
    scale, offset = (main + side for main, side in pairs)
    y, used["concat_bn"] = _norm(y, (scale, offset), given.get("concat_bn"))
    y = jax.nn.relu(y)
    gated = _squeeze_excite(form, weights, y, choice, branch)
    return jnp.where(branch >= 0, gated, y), _Layout.plain(choice.width, slots).shuffled(), used


# ---- from the supernet to one network ----------------------------------------------------------------------------


def slice_weights(supernet: Supernet, architecture: Architecture) -> Weights:
    """The supernet's weights that an architecture uses, named and shaped as those of `lower(space, architecture)`.

    Means and variances of batch norms are not among them: they are estimated anew for each network.
    """
    space = supernet.space
    weights: Weights = {f"stem.{name}": value for name, value in _numpy(supernet.stem).items()}
    slots = np.arange(space.stem_channels)
    for number, (stage, chosen) in enumerate(zip(supernet.stages, architecture.stages, strict=True), 2):
        first, later = _numpy(stage["first"]), _numpy(stage["later"])
        for index, choice in enumerate(chosen.units):
            side_width = chosen.width - int(chosen.width * choice.split_ratio)
            if index == 0:
                shared, source, slots = first, slots, np.arange(chosen.width)
            else:
                shared, source = {name: value[index - 1] for name, value in later.items()}, slots[side_width:]
            unit = _slice_unit(shared, source, slots[:side_width], slots[side_width:], choice.groups, choice.kernel)
            weights |= {f"stage{number}.{index + 1}.{name}": value for name, value in unit.items()}
            slots = slots[list(shuffle_order(chosen.width, 2))]
    head = _numpy(supernet.head)
    head["conv.kernel"] = head["conv.kernel"][None, None, slots]
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
    shared: dict[str, np.ndarray], source: np.ndarray, side: np.ndarray, target: np.ndarray, groups: int, kernel: int
) -> dict[str, np.ndarray]:
    """The part of a unit's weights that one choice uses, in the shapes of its `Network`.

    Args:
        source, side, target: the slots of the main branch's input, of the side branch's output and of the main
            branch's output, in the order of the network's channels.
    """
    middle = np.arange(len(target))
    mixed = np.argsort(shuffle_order(len(target), groups))  # where each channel goes in the shuffle of the groups
    hidden = np.arange(max(1, len(target) // 4))
    rows = {"pw1": source, "pw2": middle, "side_pw": source, "se_reduce": target, "se_expand": hidden}
    columns = {"pw1": mixed, "pw2": target, "dw": middle, "extra_dw": source, "side_dw": source, "side_pw": side}
    columns |= {"se_reduce": hidden, "se_expand": target}
    sliced: dict[str, np.ndarray] = {}
    for name, value in shared.items():
        operator, suffix = name.split(".")
        operator = operator.removesuffix("_bn")
        value = value[..., columns[operator]]
        if suffix == "kernel" and operator.endswith("dw"):
            margin = 0 if operator == "extra_dw" else (value.shape[0] - kernel) // 2
            value = value[margin : value.shape[0] - margin, margin : value.shape[1] - margin, None]
        elif suffix == "kernel":
            value = _diagonal_blocks(value[rows[operator]], 1 if operator.startswith("se") else groups)
        sliced[name] = value
    return sliced


def _diagonal_blocks(kernel: np.ndarray, groups: int) -> np.ndarray:
    """A dense pointwise kernel `[in, out]` cut to a grouped one, `[1, 1, in / groups, out]`."""
    rows, columns = kernel.shape[0] // groups, kernel.shape[1] // groups
    blocks = [kernel[g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] for g in range(groups)]
    return np.concatenate(blocks, axis=1)[None, None]
