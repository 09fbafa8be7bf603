"""Seconds from scored architectures to 100,000 ranked feasible candidates: the fit, breeding, latencies, ranking."""

import statistics
import time
from pathlib import Path
from random import Random

import numpy as np

from benchmarks.lookup_speed import made_up_table
from benchmarks.result import Result, this_machine
from hwnas.feasible import feasible
from hwnas.latency import LatencyTable, load_table
from hwnas.lookup import array_predictor
from hwnas.predictor import CANDIDATES, best_predicted, fitted
from hwnas.space import SearchSpace
from hwnas.space_toml import load_space

FIRST, REPEATS, TARGET_S = 100, 7, 10
SHIPPED = Path(__file__).parents[1] / "latency_tables" / "amd-epyc-2-cores" / "shufflenet-32-fp32-t1-b1.json"


def seconds(space: SearchSpace, table: LatencyTable) -> tuple[list[float], float]:
    """Seconds of each repeat, and those of counting and of drawing the first architectures."""
    predict = array_predictor(table, space)
    rng = np.random.default_rng(0)
    fastest_ms, slowest_ms = np.quantile(predict(rng.integers(0, space.radices, (2000, len(space.radices))))[1], [0, 1])
    started = time.perf_counter()
    within = feasible(space, predict, (fastest_ms + slowest_ms) / 2)
    codes = np.array([within.draw(Random(seed)) for seed in range(FIRST)])
    drawn_s = time.perf_counter() - started
    accuracies = codes @ rng.normal(0, 0.01, codes.shape[1]) + rng.normal(0, 0.005, FIRST)
    times: list[float] = []
    for repeat in range(REPEATS):
        started = time.perf_counter()
        best = best_predicted(within, fitted(space, codes, accuracies), codes, repeat)
        times.append(time.perf_counter() - started)
        assert len(best) == CANDIDATES
    return times, drawn_s


def run(name: str) -> Result:
    small, large = load_space("shufflenet-32"), load_space("shufflenet-224")
    times, drawn_s = seconds(small, load_table(SHIPPED))
    large_times, large_drawn_s = seconds(large, made_up_table(large))
    lower, median, upper = statistics.quantiles(times, n=4)
    return Result(
        name=name,
        value=round(median, 2),
        unit=f"seconds for {CANDIDATES:,} candidates of {small.name}",
        target=f"at most {TARGET_S}",
        met=median <= TARGET_S,
        spread=f"quartiles of {REPEATS} rankings {lower:.2f} to {upper:.2f} s",
        device=this_machine(),
        details={
            "latency table": f"{SHIPPED.parent.name}/{SHIPPED.name}; accuracies are drawn",
            "counting, and drawing the first": f"{drawn_s:.1f} s, once, for {FIRST} architectures",
            "shufflenet-224, drawn table": f"{statistics.median(large_times):.2f} s; first {large_drawn_s:.1f} s",
        },
    )
