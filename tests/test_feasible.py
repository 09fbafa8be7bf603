"""Property: what is drawn under a budget is feasible, and every feasible architecture is as likely as another."""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
from test_lookup import random_table

from hwnas import feasible as feasible_module
from hwnas.errors import HwnasError
from hwnas.feasible import feasible
from hwnas.latency import load_table
from hwnas.lookup import array_predictor
from hwnas.space import SearchSpace
from hwnas.space_toml import load_space, parse_space

SMALL = parse_space("""
name = "small"
input_size = 16
classes = 4
stem = { channels = 8, stride = 1, max_pool = false }
head = { channels = 16 }
[unit]
split_ratio = ["1/2", "1/4"]
kernel = [3, 5]
squeeze_excite = [false]
residual = [false, true]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [16, 32]
[[stage]]
depth = [2, 1]
width = [32, 16]
""")
SHIPPED = Path(__file__).parents[1] / "latency_tables" / "amd-epyc-2-cores" / "shufflenet-tiny-fp32-t1-b1.json"


def every_code(space: SearchSpace) -> np.ndarray:
    """The canonical encoding of every architecture, each once."""
    codes = {space.canonical(code) for code in product(*(range(radix) for radix in space.radices))}
    assert len(codes) == space.size
    return np.array(sorted(codes))


@pytest.fixture(scope="module")
def small():
    """The predictor of the small space, all its encodings, and their upper estimates in ms."""
    predictor = array_predictor(random_table(SMALL), SMALL)
    codes = every_code(SMALL)
    return predictor, codes, predictor(codes)[1]


def drawn(found, count: int, seed: int = 0) -> Counter:
    rng = Random(seed)
    return Counter(found.draw(rng) for _ in range(count))


@pytest.mark.parametrize("share", [0.01, 0.05])
def test_draws_are_uniform_over_what_brute_force_finds_feasible(small, share: float):
    predictor, codes, upper_ms = small
    budget_ms = float(np.quantile(upper_ms, share))
    expected = set(map(tuple, codes[upper_ms <= budget_ms].tolist()))
    assert len(expected) > 25
    found = feasible(SMALL, predictor, budget_ms)
    counts = drawn(found, each := 40 * len(expected))
    assert set(counts) == expected  # all feasible, and none left out: of e^-40 chance each
    chi_square = sum((counts[code] - 40) ** 2 / 40 for code in expected)
    freedom = len(expected) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    assert sum(abs(counts[code] - 40) for code in expected) / 2 / each < 0.08  # total variation; sqrt(2 / pi / 40) / 2


@pytest.mark.parametrize("bins", [(8, 4), (60, 12), (600, 120)])
def test_the_counted_cells_hold_every_feasible_architecture_however_wide_the_bins_are(
    small, bins: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feasible_module, "BINS", bins)
    predictor, _, upper_ms = small
    for budget_ms in np.quantile(upper_ms, [0.0, 0.001, 0.1, 0.5, 1.0]):
        counted = feasible(SMALL, predictor, float(budget_ms)).chances.sums[-1]
        assert (upper_ms <= budget_ms).sum() <= counted <= SMALL.size
    assert counted == SMALL.size


def test_narrow_bins_throw_few_draws_away_and_wide_ones_change_nothing_else(small, monkeypatch: pytest.MonkeyPatch):
    predictor, codes, upper_ms = small
    budget_ms = float(np.quantile(upper_ms, 0.02))
    few = (upper_ms <= budget_ms).sum()
    assert feasible(SMALL, predictor, budget_ms).chances.sums[-1] < 1.2 * few
    monkeypatch.setattr(feasible_module, "BINS", (8, 4))
    wide = feasible(SMALL, predictor, budget_ms)
    assert wide.chances.sums[-1] > 2 * few
    counts = drawn(wide, 40 * int(few))
    assert set(counts) == set(map(tuple, codes[upper_ms <= budget_ms].tolist()))
    assert sum((count - 40) ** 2 / 40 for count in counts.values()) < few + 4 * (2 * few) ** 0.5


def test_without_a_budget_that_binds_the_count_is_the_size_of_the_space():
    for name in ("shufflenet-tiny", "shufflenet-32"):
        space = load_space(name)
        found = feasible(space, array_predictor(random_table(space), space), 1e6)
        assert found.chances.sums[-1] == pytest.approx(space.size, rel=1e-11)


def test_of_the_shipped_space_a_tight_budget_draws_quickly_and_only_what_the_table_says_keeps_it():
    space, table = load_space("shufflenet-tiny"), load_table(SHIPPED)
    predict = table.predictor(space)
    fastest_ms, slowest_ms = (predict(a).upper_ms for a in (space.smallest, space.largest))
    for budget_ms in (1.2 * fastest_ms, 0.5 * (fastest_ms + slowest_ms)):
        found, rng = feasible(space, array_predictor(table, space), budget_ms), Random(1)
        proposals = [found.propose(rng) for _ in range(200)]
        assert all(code == space.canonical(code) for code in proposals)
        kept = [code for code in proposals if found.keeps(code)]
        assert len(kept) > 60
        assert len(set(kept)) == len(kept)
        upper = [predict(space.decode(code)).upper_ms for code in kept]
        assert max(upper) <= budget_ms
        assert max(upper) > 0.9 * budget_ms  # there are many more of the slower ones


def test_one_architecture_of_very_many_can_be_drawn():
    weights = np.array([0.0, 1e30, 1.0, 1e30, 0.0])

    class Least(Random):
        def getrandbits(self, k: int) -> int:
            return 0

    assert feasible_module._Chances.of(weights).draw(Least()) == 2
    assert {feasible_module._Chances.of(weights).draw(Random(seed)) for seed in range(20)} == {1, 3}


def test_a_budget_that_nothing_keeps_is_refused(small, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(feasible_module, "MOST_THROWN_AWAY", 50)
    predictor, _, upper_ms = small
    with pytest.raises(HwnasError, match=r"No architecture of small is within .* ms .*Raise the budget"):
        feasible(SMALL, predictor, float(upper_ms.min()) / 10)
    with pytest.raises(HwnasError, match="No architecture of small is within"):
        feasible(SMALL, predictor, float(upper_ms.min()) * (1 - 1e-9)).draw(Random(0))


def test_a_line_whose_factors_turn_at_a_knot_is_bounded_from_below():
    rng = np.random.default_rng(0)
    table = random_table(SMALL)
    base = table.calibration.line
    for _ in range(20):
        line = replace(base, slopes=tuple(rng.uniform(0.2, 2, 3)), parameter_ns=tuple(rng.uniform(-50, 50, 3)))
        ms, numbers = np.linspace(0.1, 9, 30), np.geomspace(1e3, 1e7, 40)
        least = feasible_module._least_latency_ms(line, (ms[:-1], ms[1:]), (numbers[:-1], numbers[1:]))
        inside_ms = ms[:-1, None] + np.diff(ms)[:, None] * rng.random((29, 39))
        inside = numbers[None, :-1] + np.diff(numbers)[None] * rng.random((29, 39))
        assert (least <= line.latency_ms(inside_ms, inside) + 1e-12).all()
