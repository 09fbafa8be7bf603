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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hwnas import masked_units, narrow_units
from hwnas.jax_layers import Array, Form, convolution, he_normal, native_form, pool
from hwnas.network import shuffle_order, weight_shapes
from hwnas.row_layers import norm, product_rows
from hwnas.space import CHOICES, Architecture, SearchSpace, lower
from hwnas.unit_places import Choice, Layout, affine

Statistics = Any
"""The means and variances of every batch norm for one architecture: a pytree that `Supernet.__call__` made."""

Weights = dict[str, Any]


class Supernet(nnx.Module):
    """All architectures of a space in one set of weights.

    Args:
        space: of the architectures.
        rngs: draws the kernels.
        form: how it is computed; without it the fastest for the device.

    In a form with control flow, an architecture costs what it uses, main branches rounded up to an eighteenth of
    the widest one and products to a sixth; groups save nothing. In a form without, all cost the same.
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
        x, used["stem"] = norm(x.transpose(3, 1, 2, 0), affine(_values(self.stem), "conv_bn"), given.get("stem"))
        x = jax.nn.relu(x)
        if space.max_pool:
            x = pool(x.transpose(3, 1, 2, 0), "max", 3, 2, 1).transpose(3, 1, 2, 0)
        if form.control_flow:
            aligned, rounded = dict, int  # as they are
        else:
            aligned, rounded = masked_units.aligned, masked_units.rounded
            spare = rounded(space.stem_channels) - space.stem_channels
            x = jnp.pad(x.transpose(0, 3, 1, 2), ((0, spare), (0, 0), (0, 0), (0, 0)))
        layout = Layout.plain(jnp.int32(space.stem_channels), x.shape[0])
        position = 0
        for number, (stage, weights) in enumerate(zip(space.stages, self.stages, strict=True), 2):
            depth = jnp.array(stage.depth)[code[position]]
            width_index = code[position + 1]
            size = max(stage.depth) * len(CHOICES)
            units = code[position + 2 : position + 2 + size].reshape(-1, len(CHOICES))
            position += 2 + size
            first, later = f"stage{number}.first", f"stage{number}.later"
            choice, slots = Choice.read(space, stage.width, width_index, units[0]), rounded(max(stage.width))
            inputs = aligned(_values(weights["first"])), x, layout, choice, given.get(first)
            x, layout, used[first] = (
                narrow_units.stride_2_unit(space, slots, *inputs)
                if form.control_flow
                else masked_units.stride_2_unit(space, slots, *inputs)
            )
            if max(stage.depth) > 1:
                inputs = aligned(_values(weights["later"])), x, layout, depth, width_index, units, given.get(later)
                x, layout, used[later] = (
                    narrow_units.later_units(space, stage.width, *inputs)
                    if form.control_flow
                    else masked_units.later_units(space, stage.width, *inputs)
                )
        weights = _values(self.head)
        pair = affine(weights, "conv_bn")
        if form.control_flow:
            sizes = tuple((inputs, space.head_channels) for inputs, _ in narrow_units.square_sizes(x.shape[0]))
            index = narrow_units.square_index(layout.width, x.shape[0])
            x = product_rows(sizes, index, weights["conv.kernel"], x)
            places = (1, 2)
        else:
            kernel = aligned({"conv.kernel": weights["conv.kernel"]})["conv.kernel"]
            x, places = masked_units.product(kernel, x)[: space.head_channels], (2, 3)
        x, used["head"] = norm(x, pair, given.get("head"))
        x = jax.nn.relu(x).mean(places, dtype=jnp.float32).T
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
            parameters[f"{name}.scale"] = nnx.Param(jax.device_put(np.ones(lead + shape, np.float32)))
            parameters[f"{name}.offset"] = nnx.Param(jax.device_put(np.zeros(lead + shape, np.float32)))
        elif name.endswith(".bias"):
            parameters[name] = nnx.Param(jax.device_put(np.zeros(lead + shape, np.float32)))
        else:
            fan_in = math.prod(shape[:2]) if "dw" in name else math.prod(shape[:-1])
            parameters[name] = nnx.Param(he_normal(rngs.params(), lead + shape, fan_in))
    return nnx.Dict(parameters)


def _values(parameters: nnx.Dict) -> dict[str, Array]:
    return {name: parameter[...] for name, parameter in parameters.items()}


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


def with_weights(supernet: Supernet, architecture: Architecture, weights: Weights) -> Supernet:
    """A supernet of the same space that computes for one architecture what a network with these weights computes.

    It is the inverse of `slice_weights`: `weights` are those of `lower(space, architecture)`. All others are zero, and
    training with that architecture alone leaves them so.
    """
    graph, state = nnx.split(supernet, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    places = [
        np.arange(start, start + leaf.size).reshape(leaf.shape) for start, leaf in zip(starts, leaves, strict=False)
    ]
    found = np.zeros(starts[-1], np.float32)
    for name, where in slice_weights(nnx.merge(graph, tree.unflatten(places)), architecture).items():
        found[where] = weights[name]
    parts = [jax.device_put(found[place]) for place in places]
    return nnx.merge(graph, tree.unflatten(parts))


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
