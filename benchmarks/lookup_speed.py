"""How many architectures of shufflenet-224 the latency table predicts in a second, in one vectorised call."""

import random
import statistics
import time

import numpy as np

from benchmarks.result import Result, this_machine
from hwnas.calibration import Calibration, Measurement
from hwnas.conditions import Conditions
from hwnas.latency import Entry, LatencyTable
from hwnas.line import Line
from hwnas.lookup import array_predictor
from hwnas.network import unit_key
from hwnas.places import label, network_at, places_of
from hwnas.space import SearchSpace
from hwnas.space_toml import load_space

ARCHITECTURES, REPEATS, TARGET = 200_000, 11, 200_000


def made_up_table(space: SearchSpace) -> LatencyTable:
    """A table that covers a space with drawn milliseconds: what they are does not count here."""
    rng = random.Random(0)
    entries: dict[str, Entry] = {}
    for place in places_of(space):
        key = unit_key(network_at(space, [place]).units[0])
        entries[key] = Entry(key, label(space, place), Measurement((rng.uniform(0.01, 1),)))
    conditions = Conditions("made up", "none", 1, "none", "0", 1, 1, "fp32", "none", "none")
    line = Line(0.0, (1e5, 1e6, 1e7), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    when = "2030-01-01T00:00:00+00:00"
    return LatencyTable(conditions, space.name, when, when, dict(entries), Calibration(line, 0, ()), 1.0)


def run(name: str) -> Result:
    space = load_space("shufflenet-224")
    table = made_up_table(space)
    codes = np.random.default_rng(0).integers(0, space.radices, (ARCHITECTURES, len(space.radices)))
    started = time.perf_counter()
    predict = array_predictor(table, space)
    built_s = time.perf_counter() - started
    rates: list[float] = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        predict(codes)
        rates.append(ARCHITECTURES / (time.perf_counter() - started))
    lower, median, upper = statistics.quantiles(rates, n=4)
    return Result(
        name=name,
        value=round(median),
        unit="architectures a second",
        target=f"at least {TARGET}",
        met=median >= TARGET,
        spread=f"quartiles of {REPEATS} calls {lower:.0f} to {upper:.0f}",
        device=this_machine(),
        details={
            "a call": f"{ARCHITECTURES} encodings of {len(space.radices)} places; expected and upper milliseconds",
            "building the arrays": f"{built_s:.1f} s, once, for {len(table.entries)} entries",
        },
    )
