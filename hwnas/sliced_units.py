"""The pieces of a supernet's units, for `pieces.Tape`.

Feature maps are `[C, H, W, N]`. Those between units have the channels of the architecture, in slots as `supernet.py`
tells; those in a main branch have them in the order of the network, and a few rows of zeros behind them: so few numbers
of rows are enough for all widths and split ratios of a stage.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hwnas.jax_layers import Array
from hwnas.pieces import Tape, Unit, Value
from hwnas.row_layers import depthwise_rows, norm_rows, take_rows, whole_product_rows
from hwnas.space import SearchSpace
from hwnas.units import UnitChoice

SIZES = 6
"""Numbers of rows for all main branches of a stage; those of `shufflenet-32` are rounded up by 6 % on average."""

Own = dict[str, Array]
Order = tuple[np.ndarray, np.ndarray]
"""As `take_rows` takes it: the row that each one comes from, and where each one goes."""


# ---- pieces ------------------------------------------------------------------------------------------------------


def pair_names(*norms: str) -> list[str]:
    """The names of scale and offset of batch norms."""
    return [f"{name}.{which}" for name in norms for which in ("scale", "offset")]


def _ordered_pair(own: Own, name: str, order: Any) -> tuple[Array, Array]:
    return take_rows(own[f"{name}.scale"], *order), take_rows(own[f"{name}.offset"], *order)


def _first_pair(own: Own, name: str, rows: int, count: Array) -> tuple[Array, Array]:
    """Scale and offset of the first channels, zeros behind them."""
    there = jnp.arange(rows) < count
    return jnp.where(there, own[f"{name}.scale"][:rows], 0), jnp.where(there, own[f"{name}.offset"][:rows], 0)


def _joined(kernel: Array, in_group: Array, out_group: Array) -> Array:
    """A kernel `[in, out]` without what would join channels of different groups; -1 and -2 are in no group."""
    return jnp.where(in_group[:, None] == out_group[None, :], kernel, 0)


def _extra(own: Own, maps: Any, places: Any) -> Array:
    """The depthwise convolution before the branches, with its norm."""
    kernel = take_rows(jnp.moveaxis(own["extra_dw.kernel"], 2, 0), *places)
    y = depthwise_rows(maps[0], kernel, jnp.int32(0), (3,))
    return norm_rows(y, *_ordered_pair(own, "extra_dw_bn", places))[0]


def _first_product(own: Own, maps: Any, places: Any, *, rows: int) -> Array:
    order, inverse, in_group, out_group = places
    kernel = take_rows(own["pw1.kernel"], order, inverse)[:, :rows]
    return whole_product_rows(_joined(kernel, in_group, out_group), maps[0])


def _middle(own: Own, maps: Any, places: Any, *, side: int, stride: int) -> Array:
    """Norm, ReLU, depthwise convolution."""
    (x,), (count,) = maps, places
    y = norm_rows(x, *_first_pair(own, "pw1_bn", len(x), count))[0]
    kernel = jnp.moveaxis(own["dw.kernel"][..., : len(x)], 2, 0)
    return depthwise_rows(jax.nn.relu(y), kernel, jnp.int32(0), (side,), stride)


def _second_product(own: Own, maps: Any, places: Any) -> Array:
    """Norm, pointwise convolution."""
    (x,), (count, order, inverse, in_group, out_group) = maps, places
    y = norm_rows(x, *_first_pair(own, "dw_bn", len(x), count))[0]
    kernel = take_rows(own["pw2.kernel"][: len(x)].T, order, inverse).T
    return whole_product_rows(_joined(kernel, in_group, out_group), y)


def _closing(own: Own, maps: Any, places: Any, *, residual: bool) -> Array:
    """Norm, ReLU, the gate of squeeze-excite if its weights are there, and the sum with the entry of the branch."""
    y, (count, *order) = maps[0], places
    y = norm_rows(y, *_ordered_pair(own, "pw2_bn", order))[0]
    y = y if residual else jax.nn.relu(y)
    if "se_reduce.kernel" in own:
        reduce, expand = take_rows(own["se_reduce.kernel"], *order), take_rows(own["se_expand.kernel"].T, *order)
        squeezed = jax.nn.relu(reduce.T @ y.mean((1, 2)) + own["se_reduce.bias"][:, None])
        squeezed = jnp.where(jnp.arange(len(squeezed))[:, None] < jnp.maximum(1, count // 4), squeezed, 0)
        gate = jax.nn.sigmoid(expand @ squeezed + take_rows(own["se_expand.bias"], *order)[:, None])
        y = y * gate[:, None, None, :]
    return jax.nn.relu(y + maps[1]) if residual else y


def _aside(own: Own, maps: Any, places: Any, *, side: int) -> Array:
    """The depthwise convolution of the side branch."""
    kernel = jnp.moveaxis(own["side_dw.kernel"][..., : len(maps[0])], 2, 0)
    return depthwise_rows(maps[0], kernel, jnp.int32(0), (side,), 2)


def _side_product(own: Own, maps: Any, places: Any, *, rows: int) -> Array:
    """Norm, pointwise convolution of the side branch."""
    (x,) = maps
    pair = own["side_dw_bn.scale"][: len(x)], own["side_dw_bn.offset"][: len(x)]
    y = norm_rows(x, *pair)[0]
    return whole_product_rows(_joined(own["side_pw.kernel"][: len(x), :rows], *places), y)


def _side_closing(own: Own, maps: Any, places: Any) -> Array:
    (x,), (count,) = maps, places
    y = norm_rows(x, *_first_pair(own, "side_pw_bn", len(x), count))[0]
    return jax.nn.relu(y)


def _both(own: Own, maps: Any, places: Any) -> Array:
    """The channels of two branches behind each other."""
    return take_rows(jnp.concatenate(maps), *places)


SQUEEZE_EXCITE = ("se_reduce.kernel", "se_reduce.bias", "se_expand.kernel", "se_expand.bias")


# ---- where channels are --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """The weights of a stage: under which prefix, of how many inputs and outputs, and how large its maps may be.

    Attributes:
        prefix: of the names of its weights.
        inputs, width: at most.
        main_rows, side_rows: numbers of rows of its main and side branches, in ascending order.
    """

    prefix: str
    inputs: int
    width: int
    main_rows: tuple[int, ...]
    side_rows: tuple[int, ...]


def stages_of(space: SearchSpace) -> tuple[Stage, ...]:
    """The stages of a space in order."""
    found, inputs = [], space.stem_channels
    for number, stage in enumerate(space.stages):
        mains = [int(width * ratio) for width in stage.width for ratio in space.choices["split_ratio"]]
        sides = [width - int(width * ratio) for width in stage.width for ratio in space.choices["split_ratio"]]
        width = max(stage.width)
        found.append(Stage(f"stages/{number}/", inputs, width, few_sizes(mains), few_sizes(sides)))
        inputs = width
    return tuple(found)


def few_sizes(counts: Iterable[int]) -> tuple[int, ...]:
    """At most `SIZES` numbers that the counts can be rounded up to; those that cost least are merged first."""
    times = Counter(counts)
    sizes = sorted(times)
    while len(sizes) > SIZES:
        least = min(range(len(sizes) - 1), key=lambda i: times[sizes[i]] * (sizes[i + 1] - sizes[i]))
        times[sizes[least + 1]] += times[sizes[least]]
        del sizes[least]
    return tuple(sizes)


def _fitting(count: int, sizes: Sequence[int]) -> int:
    return next(size for size in sizes if size >= count)


def _filled(values: np.ndarray, rows: int, rest: int = -1) -> np.ndarray:
    found = np.full(rows, rest, np.int32)
    found[: len(values)] = values
    return found


def _order(sources: np.ndarray, rows: int, of: int) -> Order:
    """Rows `sources` of a map or weight of so many, and up to `rows` zeros."""
    inverse = np.full(of, -1, np.int32)
    inverse[sources] = np.arange(len(sources))
    return _filled(sources, rows), inverse


def _groups(channels: np.ndarray, groups: int, rows: int, rest: int = -1) -> np.ndarray:
    """The group of each channel, of as many channels as are given, and of no group up to `rows`."""
    return _filled(channels * groups // len(channels), rows, rest)


def shuffled(channel: np.ndarray) -> np.ndarray:
    """Which channel lies in each slot after a channel shuffle of two groups."""
    half = len(channel) // 2
    return (channel % half) * 2 + channel // half


# ---- units -------------------------------------------------------------------------------------------------------


def stride_1_unit(tape: Tape, stage: Stage, index: int, x: Value, channel: np.ndarray, choice: UnitChoice) -> Value:
    """A unit that keeps the size of the feature map.

    Args:
        index: of its weights among those of the later units.
        channel: the channel in each slot of x.
    """
    unit, width = (f"{stage.prefix}later/", index), len(channel)
    main = int(width * choice.split_ratio)
    slots = np.argsort(channel)[width - main :]
    order = _order(slots, _fitting(main, stage.main_rows), stage.width)
    rest, entry = tape.enter(x, order[0])
    y = _main_branch(tape, unit, entry, choice, order, np.arange(main), order, 1)
    return tape.leave(rest, order[0], y)


def stride_2_unit(tape: Tape, stage: Stage, x: Value, channel: np.ndarray, width: int, choice: UnitChoice) -> Value:
    """The first unit of a stage: the side branch fills the first slots, the main branch those after it."""
    unit, inputs, main = (f"{stage.prefix}first/", None), len(channel), int(width * choice.split_ratio)
    side_width, rows = width - main, _fitting(main, stage.main_rows)
    side_rows = _fitting(side_width, stage.side_rows)
    source, target = (np.arange(inputs), inputs, stage.inputs), (np.arange(side_width, width), rows, stage.width)
    y = _main_branch(tape, unit, x, choice, _order(*source), channel, _order(*target), 2)
    side = tape.run(_aside, unit, ["side_dw.kernel"], [x], side=choice.kernel)
    places = _groups(channel, choice.groups, inputs), _groups(np.arange(side_width), choice.groups, side_rows, -2)
    names = ["side_pw.kernel", *pair_names("side_dw_bn")]
    side = tape.run(_side_product, unit, names, [side], places, rows=side_rows)
    side = tape.run(_side_closing, unit, pair_names("side_pw_bn"), [side], (np.int32(side_width),))
    both = np.concatenate([np.arange(side_width), side_rows + np.arange(main)])
    return tape.run(_both, unit, [], [side, y], _order(both, width, side_rows + rows))


def _main_branch(
    tape: Tape,
    unit: Unit,
    entry: Value,
    choice: UnitChoice,
    source: Order,
    channel: np.ndarray,
    target: Order,
    stride: int,
) -> Value:
    """The main branch, in as many rows as the target has.

    Args:
        entry: its input.
        source, target: the slots of its inputs and outputs among the weights.
        channel: the channel in each row of the entry.
    """
    y, main, rows = entry, np.arange(np.count_nonzero(target[0] >= 0)), len(target[0])
    count, groups = np.int32(len(main)), choice.groups
    if choice.extra_depthwise:
        y = tape.run(_extra, unit, ["extra_dw.kernel", *pair_names("extra_dw_bn")], [y], source)
    # between the pointwise convolutions the channels are counted as they are after the shuffle of the groups
    unshuffled = (main % groups) * (len(main) // groups) + main // groups
    places = *source, _groups(channel, groups, len(source[0])), _groups(unshuffled, groups, rows, -2)
    y = tape.run(_first_product, unit, ["pw1.kernel"], [y], places, rows=rows)
    names = ["dw.kernel", *pair_names("pw1_bn")]
    y = tape.run(_middle, unit, names, [y], (count,), side=choice.kernel, stride=stride)
    places = count, *target, _groups(main, groups, rows), _groups(main, groups, rows, -2)
    y = tape.run(_second_product, unit, ["pw2.kernel", *pair_names("dw_bn")], [y], places)
    names = [*pair_names("pw2_bn"), *(SQUEEZE_EXCITE if choice.squeeze_excite else ())]
    added = [entry] if choice.residual and stride == 1 else []
    return tape.run(_closing, unit, names, [y, *added], (count, *target), residual=bool(added))
