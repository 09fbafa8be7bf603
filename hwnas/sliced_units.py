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
from hwnas.pieces import Axis, Cut, Norms, Tape, Unit, Value, centre, first
from hwnas.row_layers import depthwise_rows, take_rows, whole_product_rows
from hwnas.space import SearchSpace
from hwnas.units import UnitChoice

SIZES = 6
"""Numbers of rows for all main branches of a stage; those of `shufflenet-32` are rounded up by 6 % on average."""

Own = dict[str, Array]


# ---- pieces ------------------------------------------------------------------------------------------------------


def product(own: Own, maps: Any, places: Any, norm: Norms) -> Array:
    """A batch norm, if there is one, and a pointwise convolution."""
    return whole_product_rows(own["kernel"], norm(maps[0], own) if "scale" in own else maps[0])


def depthwise(own: Own, maps: Any, places: Any, norm: Norms, *, stride: int) -> Array:
    """A batch norm with ReLU, if there is one, and a depthwise convolution."""
    x = jax.nn.relu(norm(maps[0], own)) if "scale" in own else maps[0]
    return depthwise_rows(x, jnp.moveaxis(own["kernel"], 2, 0), jnp.int32(0), (len(own["kernel"]),), stride)


def closing(own: Own, maps: Any, places: Any, norm: Norms) -> Array:
    """A batch norm, ReLU, squeeze-excite if there is one, and the sum with a second map if there is one."""
    y, *entry = maps
    y = norm(y, own)
    y = y if entry else jax.nn.relu(y)
    if "reduce" in own:
        squeezed = jax.nn.relu(own["reduce"].T @ y.mean((1, 2)) + own["reduce_bias"][:, None])
        gate = jax.nn.sigmoid(own["expand"].T @ squeezed + own["expand_bias"][:, None])
        y = y * gate[:, None, None, :]
    return jax.nn.relu(y + entry[0]) if entry else y


def _both(own: Own, maps: Any, places: Any, norm: Norms) -> Array:
    """The channels of two branches behind each other."""
    return take_rows(jnp.concatenate(maps), *places)


# ---- where channels are --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stage:
    """The weights of a stage: under which prefix, of how many inputs and outputs, and how large its maps may be.

    Attributes:
        prefix: of the names of its weights.
        kernel: the largest side of a depthwise one.
        main_rows, side_rows: numbers of rows of its main and side branches, in ascending order.
    """

    prefix: str
    kernel: int
    main_rows: tuple[int, ...]
    side_rows: tuple[int, ...]


def stages_of(space: SearchSpace) -> tuple[Stage, ...]:
    """The stages of a space in order."""
    found = []
    for number, stage in enumerate(space.stages):
        mains = [int(width * ratio) for width in stage.width for ratio in space.choices["split_ratio"]]
        sides = [width - int(width * ratio) for width in stage.width for ratio in space.choices["split_ratio"]]
        found.append(Stage(f"stages/{number}/", max(space.choices["kernel"]), few_sizes(mains), few_sizes(sides)))
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


def _order(sources: np.ndarray, rows: int) -> np.ndarray:
    """Rows `sources` of a map, and up to `rows` zeros."""
    found = np.full(rows, -1, np.int32)
    found[: len(sources)] = sources
    return found


def _joined(inputs: np.ndarray, outputs: np.ndarray, groups: int) -> np.ndarray | None:
    """Which elements of a kernel `[in, out]` join channels of the same group."""
    if groups == 1:
        return None
    of_inputs, of_outputs = (channels * groups // len(channels) for channels in (inputs, outputs))
    return of_inputs[:, None] == of_outputs


def of_norm(name: str, channels: Axis | None = None) -> dict[str, Cut]:
    """Scale and offset of a batch norm, all of them if no channels are given."""
    axes = () if channels is None else (channels,)
    return {which: Cut(f"{name}.{which}", axes) for which in ("scale", "offset")}


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
    rows = _fitting(main, stage.main_rows)
    order, axis = _order(slots, rows), Axis(slots, rows)
    rest, entry = tape.enter(x, order)
    y = _main_branch(tape, stage, unit, entry, choice, axis, np.arange(main), axis, 1)
    return tape.leave(rest, order, y)


def stride_2_unit(tape: Tape, stage: Stage, x: Value, channel: np.ndarray, width: int, choice: UnitChoice) -> Value:
    """The first unit of a stage: the side branch fills the first slots, the main branch those after it."""
    unit, source, main = (f"{stage.prefix}first/", None), first(len(channel)), int(width * choice.split_ratio)
    rows, beside = _fitting(main, stage.main_rows), first(width - main, _fitting(width - main, stage.side_rows))
    y = _main_branch(tape, stage, unit, x, choice, source, channel, Axis(slice(beside.count, width), rows), 2)
    middle = centre(choice.kernel, stage.kernel)
    side = tape.run(depthwise, unit, {"kernel": Cut("side_dw.kernel", (middle, middle, source))}, [x], stride=2)
    joined = _joined(channel, np.arange(beside.count), choice.groups)
    cuts = {"kernel": Cut("side_pw.kernel", (source, beside), joined), **of_norm("side_dw_bn", source)}
    side = tape.run(closing, unit, of_norm("side_pw_bn", beside), [tape.run(product, unit, cuts, [side])])
    both = np.concatenate([np.arange(beside.count), beside.size + np.arange(main)])
    inverse = np.full(beside.size + rows, -1, np.int32)
    inverse[both] = np.arange(width)
    return tape.run(_both, unit, {}, [side, y], (_order(both, width), inverse))


def _main_branch(
    tape: Tape,
    stage: Stage,
    unit: Unit,
    entry: Value,
    choice: UnitChoice,
    source: Axis,
    channel: np.ndarray,
    target: Axis,
    stride: int,
) -> Value:
    """The main branch, in as many rows as the target has.

    Args:
        entry: its input.
        source, target: the slots of its inputs and outputs among the weights.
        channel: the channel in each row of the entry.
    """
    y, main, groups, cuts = entry, np.arange(target.count), choice.groups, {}
    inner, side = first(target.count, target.size), centre(choice.kernel, stage.kernel)
    if choice.extra_depthwise:
        cut = Cut("extra_dw.kernel", (first(3), first(3), source))
        y, cuts = tape.run(depthwise, unit, {"kernel": cut}, [y], stride=1), of_norm("extra_dw_bn", source)
    # between the pointwise convolutions the channels are counted as they are after the shuffle of the groups
    unshuffled = (main % groups) * (len(main) // groups) + main // groups
    cuts["kernel"] = Cut("pw1.kernel", (source, inner), _joined(channel, unshuffled, groups))
    y = tape.run(product, unit, cuts, [y])
    cuts = {"kernel": Cut("dw.kernel", (side, side, inner)), **of_norm("pw1_bn", inner)}
    y = tape.run(depthwise, unit, cuts, [y], stride=stride)
    cuts = {"kernel": Cut("pw2.kernel", (inner, target), _joined(main, main, groups)), **of_norm("dw_bn", inner)}
    y = tape.run(product, unit, cuts, [y])
    cuts = of_norm("pw2_bn", target)
    if choice.squeeze_excite:
        hidden = first(max(1, target.count // 4), max(1, target.size // 4))
        cuts |= {"reduce": Cut("se_reduce.kernel", (target, hidden)), "reduce_bias": Cut("se_reduce.bias", (hidden,))}
        cuts |= {"expand": Cut("se_expand.kernel", (hidden, target)), "expand_bias": Cut("se_expand.bias", (target,))}
    return tape.run(closing, unit, cuts, [y, entry] if choice.residual and stride == 1 else [y])
