"""Property: what each method trains, step by step."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from hwnas.errors import HwnasError
from hwnas.methods import METHODS, check_paths, cycle_length, fair_cycle, method, without_choice
from hwnas.space import CHOICES, SearchSpace
from hwnas.space_toml import load_space, parse_space

UNEVEN = parse_space("""
name = "uneven"
input_size = 16
classes = 5
[stem]
channels = 8
stride = 1
max_pool = false
[unit]
split_ratio = ["1/4", "1/2", "3/4"]
kernel = [3, 5, 7]
squeeze_excite = [false, true]
residual = [false, true]
groups = [1, 2]
extra_depthwise = [false]
[[stage]]
depth = [2, 4]
width = [16, 32, 48, 64]
[[stage]]
depth = [3, 1, 2]
width = [32]
[head]
channels = 16
""")


@pytest.mark.parametrize("name", METHODS)
def test_a_step_follows_from_the_seed_and_its_number_alone(name: str):
    paths, again, other = (METHODS[name].sampler(UNEVEN, None, seed) for seed in (0, 0, 1))
    backwards = {step: again(step) for step in reversed(range(40))}
    seen = set()
    for step in range(40):
        codes = paths(step)
        np.testing.assert_array_equal(codes, backwards[step])
        assert codes.dtype == np.int32
        assert all(tuple(code) == UNEVEN.canonical(code) for code in codes.tolist())
        seen |= set(map(tuple, codes.tolist()))
    assert len(seen) > 35
    assert any((paths(step) != other(step)).any() for step in range(3))


def test_a_single_path_is_drawn_as_the_space_draws():
    paths = METHODS["single-path"].sampler(UNEVEN, None, 0)
    assert all(paths(step).shape == (1, len(UNEVEN.radices)) for step in range(3))
    firsts = Counter((int(paths(step)[0][0]), int(paths(step)[0][1])) for step in range(1600))
    assert len(firsts) == 8
    assert all(140 < count < 260 for count in firsts.values())  # 200 each, standard deviation 13


def test_the_sandwich_has_the_largest_as_the_first_which_teaches_and_the_smallest_as_the_last():
    how = METHODS["sandwich"]
    codes = how.sampler(UNEVEN, None, 0)(7)
    assert how.distils
    assert tuple(codes[0]) == UNEVEN.encode(UNEVEN.largest)
    assert tuple(codes[-1]) == UNEVEN.encode(UNEVEN.smallest)
    assert len({tuple(code) for code in codes.tolist()}) == 4


@pytest.mark.parametrize("name", ["single-path", "sandwich"])
def test_paths_are_drawn_by_the_way_to_draw_that_is_given(name: str):
    only = UNEVEN.encode(UNEVEN.sample(Random(5)))
    codes = METHODS[name].sampler(UNEVEN, lambda rng: only, 0)(3).tolist()
    assert tuple(codes[len(codes) // 2]) == only


@pytest.mark.parametrize("name", METHODS)
def test_a_step_trains_as_many_paths_as_asked(name: str):
    how = METHODS[name]
    several = how.sampler(UNEVEN, None, 0, 6)
    assert all(several(step).shape == (6, len(UNEVEN.radices)) for step in range(3))
    assert len({tuple(code) for step in range(3) for code in several(step).tolist()}) > 10
    assert how.sampler(UNEVEN, None, 0, how.paths)(5).shape[0] == how.paths == check_paths(how, None)


def test_fair_paths_go_on_from_step_to_step_and_from_cycle_to_cycle():
    one, five = (METHODS["fair"].sampler(UNEVEN, None, 0, paths) for paths in (1, 5))
    taken = np.concatenate([five(step) for step in range(16)])  # 80 paths: two cycles of 36, and a part
    np.testing.assert_array_equal(taken, np.concatenate([one(step) for step in range(80)]))


def test_fewer_paths_than_a_method_needs_are_refused():
    with pytest.raises(HwnasError, match=r"sandwich trains at least 4 architectures\. --paths is 2"):
        check_paths(METHODS["sandwich"], 2)


def values_taken(space: SearchSpace, codes: np.ndarray) -> dict[str, Counter]:
    """How often each value of each place stands in the encodings; units that are not there do not count."""
    taken: dict[str, Counter] = {}
    for code in codes:
        start = 0
        for number, stage in enumerate(space.stages, 2):
            depth = stage.depth[code[start]]
            there = [start, start + 1, *range(start + 2, start + 2 + depth * len(CHOICES))]
            for place in there:
                taken.setdefault(space.places[place], Counter())[int(code[place])] += 1
            start += 2 + max(stage.depth) * len(CHOICES)
            assert number <= 9
    return taken


@pytest.mark.parametrize("space", [UNEVEN, load_space("shufflenet-tiny")], ids=lambda space: space.name)
def test_in_a_fair_cycle_every_value_of_every_choice_is_taken_equally_often(space: SearchSpace):
    length = cycle_length(space)
    paths = METHODS["fair"].sampler(space, None, 3)
    cycle = np.concatenate([paths(step) for step in range(2 * length, 3 * length)])
    assert cycle.shape == (length, len(space.radices))
    taken = values_taken(space, cycle)
    assert set(taken) == set(space.places)
    for place, radix in zip(space.places, space.radices, strict=True):
        assert len(taken[place]) == radix, place
        assert len(set(taken[place].values())) == 1, place
    assert len({tuple(code) for code in cycle.tolist()}) == length


def test_no_shorter_cycle_could_be_fair():
    assert (
        cycle_length(UNEVEN) == 36
    )  # the third unit of the second stage is in a third of the paths, of 2 and 3 values
    assert cycle_length(load_space("shufflenet-tiny")) == 18


def test_fair_cycles_differ_from_one_another_and_pair_values_anew():
    one, two = (fair_cycle(UNEVEN, 36, Random(seed)) for seed in (0, 1))
    assert (one != two).mean() > 0.2


def test_fair_sampling_under_a_budget_is_refused_with_what_to_take_instead():
    with pytest.raises(HwnasError, match=r"to draw architectures does not allow.*single-path"):
        METHODS["fair"].sampler(UNEVEN, lambda rng: UNEVEN.radices, 0)


def test_a_method_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(HwnasError, match=r"one of single-path, fair, sandwich. It is 'darts'"):
        method("darts")


def test_a_single_network_has_one_path_without_a_choice():
    assert without_choice(3).shape == (1, 0)
