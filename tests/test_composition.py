"""Composed entries: exact for what adds up, and for the shipped spaces from a sixth to a quarter of the units."""

import random
from dataclasses import replace

import pytest

from hwnas.composition import is_timed, terms
from hwnas.space_toml import load_space, shipped_spaces

COUNTS = {1: (36, 216), 2: (30, 108)}
COUNTS_OF_FEWER_CHOICES = {1: (15, 24), 2: (9, 12)}


@pytest.mark.parametrize("name", shipped_spaces())
@pytest.mark.parametrize("stride", [1, 2])
def test_every_unit_is_composed_of_timed_ones_and_a_timed_one_of_itself(name, stride):
    space = load_space(name)
    units = list(space.unit_choices(stride))
    timed = {unit for unit in units if is_timed(space, unit)}
    assert (len(timed), len(units)) == (COUNTS_OF_FEWER_CHOICES if name.startswith("shufflenet-cifar") else COUNTS)[
        stride
    ]
    for unit in units:
        factors = terms(space, unit)
        assert timed >= factors.keys()
        assert sum(factors.values()) == 1
        assert 0 not in factors.values()
    assert {term for unit in units for term in terms(space, unit)} == timed


@pytest.mark.parametrize("stride", [1, 2])
def test_costs_that_add_up_are_recovered_exactly(stride):
    space, rng = load_space("shufflenet-tiny"), random.Random(0)
    plain = {(r, g): rng.random() for r in space.choices["split_ratio"] for g in space.choices["groups"]}
    kernel = {(r, k, one): rng.random() for r in space.choices["split_ratio"] for k in (5, 7) for one in (True, False)}
    extra = {(r, one): rng.random() for r in space.choices["split_ratio"] for one in (True, False)}
    added = {(r, se, res): rng.random() for r in space.choices["split_ratio"] for se in (0, 1) for res in (0, 1)}

    def cost(unit):
        ratio, one = unit.split_ratio, unit.groups == 1
        total = plain[ratio, unit.groups] + (kernel[ratio, unit.kernel, one] if unit.kernel > 3 else 0.0)
        total += extra[ratio, one] if unit.extra_depthwise else 0.0
        return total + added[ratio, int(unit.squeeze_excite), int(unit.residual)]

    for unit in space.unit_choices(stride):
        assert sum(factor * cost(term) for term, factor in terms(space, unit).items()) == pytest.approx(cost(unit))


def test_a_space_with_one_value_of_each_choice_times_every_unit():
    space = load_space("shufflenet-tiny")
    choices = {name: values[:1] for name, values in space.choices.items()}
    single = replace(space, choices=choices)
    assert all(is_timed(single, unit) for unit in single.unit_choices(1))


def test_a_space_without_a_single_group_composes_from_its_least_groups():
    space = load_space("shufflenet-tiny")
    grouped = replace(space, choices=space.choices | {"groups": (2, 4)})
    for unit in grouped.unit_choices(1):
        assert all(term.groups in (2, 4) for term in terms(grouped, unit))
