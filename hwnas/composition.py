"""Which units of a space are timed, and of which of them the entry of every other unit is composed.

A unit runs its operators one after the other, so what one choice adds to its time hardly depends on the others. With
p(r, g) for the plain unit of split ratio r and g groups (least kernel, nothing added), a unit is taken to cost

    p(r, g) + [kernel] + [extra depthwise] + [squeeze-excite and residual]

where each bracket is the time of the plain unit with just that choice less the time of the plain unit:

| bracket                       | measured for each split ratio, at these groups                              |
|-------------------------------|-----------------------------------------------------------------------------|
| kernel, extra depthwise       | 1 where the unit has 1; for all others the least above 1 (the shuffle of    |
|                               | the groups brings another layout to the depthwise convolution)              |
| squeeze-excite and residual   | the least; both together are measured too, as the residual keeps the ReLU   |
|                               | from being fused                                                            |

Of the 216 stride-1 units of a place of shufflenet-tiny 36 are timed, of the 108 with stride 2 there are 30.
"""

from collections import Counter
from dataclasses import replace

from hwnas.space import SearchSpace
from hwnas.units import UnitChoice


def terms(space: SearchSpace, choice: UnitChoice) -> dict[UnitChoice, int]:
    """The timed units that a unit's time is composed of, with how often each counts; a timed unit is its own only term.

    All terms have the stride, the width and the place of `choice`. The factors add up to 1.
    """
    least = {name: min(values) for name, values in space.choices.items()}
    plain = replace(
        choice, **{name: least[name] for name in ("kernel", "squeeze_excite", "residual", "extra_depthwise")}
    )
    above_one = [groups for groups in space.choices["groups"] if groups > 1]
    same_layout = plain if choice.groups == 1 else replace(plain, groups=min(above_one))
    fewest_groups = replace(plain, groups=least["groups"])
    factors = Counter({plain: 1})
    for at, names in (
        (same_layout, ("kernel",)),
        (same_layout, ("extra_depthwise",)),
        (fewest_groups, ("squeeze_excite", "residual")),
    ):
        changed = replace(at, **{name: getattr(choice, name) for name in names})
        factors[changed] += 1
        factors[at] -= 1
    return {unit: factor for unit, factor in factors.items() if factor}


def is_timed(space: SearchSpace, choice: UnitChoice) -> bool:
    """Whether a unit is timed itself, being a term of others or of no other."""
    return terms(space, choice) == {choice: 1}
