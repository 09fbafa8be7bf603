"""The idea of estimated tables on published numbers of real ARM processors: fitted on some, tested on others.

Two files, which are not part of this repository, lie in a folder that `ARM_NUMBERS_AT` names: Paddle-Lite's table of
whole networks on a Snapdragon 855 with 1, 2 and 4 threads (`arm_paddlelite_sd855.csv`), and ncnn's of twelve networks
on sixty devices (`arm_ncnn_shufflenet.csv`). What is fitted is what `hwnas.estimation` fits, as far as the files tell
the counts; no network is fitted on and tested on at once.
"""

import csv
import os
import random
import statistics
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np

from benchmarks.result import Result
from hwnas.estimation import Floats, fit_factors

NUMBERS_AT = Path(os.environ.get("ARM_NUMBERS_AT") or Path(__file__).parents[2] / "shared" / "reference")
PADDLE, NCNN = "arm_paddlelite_sd855.csv", "arm_ncnn_shufflenet.csv"
SPLITS, PAIRS = 100, 400
FITTED_OF_NCNN, TARGET_PERCENT = 8, 10.0


def run(name: str) -> Result:
    missing = [file for file in (PADDLE, NCNN) if not (NUMBERS_AT / file).exists()]
    if missing:
        raise SystemExit(f"{NUMBERS_AT} has no {' and no '.join(missing)}: name their folder in ARM_NUMBERS_AT.")
    rng, details = random.Random(0), {}
    names, counts, times = snapdragon()
    for threads in (2, 4):
        for fitted in (10, 20):
            found = [
                errors(np.column_stack([times[1], counts, np.ones(len(names))]), times[threads], fitted, rng)
                for _ in range(SPLITS)
            ]
            details[f"Snapdragon 855, {threads} threads from 1, {fitted} networks fitted on"] = text(found, "splits")
    between = [
        errors(np.column_stack([known, np.ones(len(known))]), new, FITTED_OF_NCNN, rng) for known, new in pairs(rng)
    ]
    details[f"two ARM devices in ncnn, 1 thread, {FITTED_OF_NCNN} networks fitted on"] = text(between, "pairs")
    value, by_one = (100 * statistics.median(column) for column in zip(*between, strict=True))
    low, _, high = (100 * q for q in statistics.quantiles([ours for ours, _ in between], n=4))
    return Result(
        name=name,
        value=round(value, 1),
        unit=f"% error on networks not fitted on, between two ARM devices (by one factor {by_one:.1f} %)",
        target=f"at most {TARGET_PERCENT:g} %",
        met=value <= TARGET_PERCENT,
        spread=f"quartiles of {len(between)} pairs {low:.1f} and {high:.1f} %",
        device="as reported by Paddle-Lite and ncnn; nothing was measured here",
        details=details,
    )


def errors(columns: Floats, measured: Floats, fitted: int, rng: random.Random) -> tuple[float, float]:
    """The mean absolute relative error on networks that were not fitted on: by the factors, and by one factor."""
    order = rng.sample(range(len(measured)), len(measured))
    fit, test = order[:fitted], order[fitted:]
    one = float(np.median(measured[fit] / columns[fit, 0]))
    predicted = (columns[test] @ fit_factors(columns[fit], measured[fit]), one * columns[test, 0])
    ours, by_one = (float(np.mean(np.abs(values / measured[test] - 1))) for values in predicted)
    return ours, by_one


def text(found: Sequence[tuple[float, float]], of: str) -> str:
    ours, by_one = ([100 * value for value in column] for column in zip(*found, strict=True))
    low, middle, high = statistics.quantiles(ours, n=4)
    return (
        f"{middle:.1f} % mean absolute error (quartiles of {len(found)} {of} {low:.1f} and {high:.1f} %); "
        f"by one factor {statistics.median(by_one):.1f} %"
    )


def snapdragon() -> tuple[list[str], Floats, dict[int, Floats]]:
    """Names, counts `[N, 2]` in millions (multiply-adds, parameters), and milliseconds by threads."""
    with open(NUMBERS_AT / PADDLE, encoding="utf-8") as file:
        rows = {row["sd855_ms_t1"] + row["flops_m"]: row for row in csv.DictReader(file)}.values()
    counts = np.array([[float(row["flops_m"]), float(row["params_m"])] for row in rows])
    times = {n: np.array([float(row[f"sd855_ms_t{n}"]) for row in rows]) for n in (1, 2, 4)}
    return [row["model"] for row in rows], counts, times


def pairs(rng: random.Random) -> Iterator[tuple[Floats, Floats]]:
    """Milliseconds of the same networks on two devices of different names, one thread each."""
    devices: dict[str, dict[str, float]] = {}
    with open(NUMBERS_AT / NCNN, encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if (row["kind"], row["threads"]) == ("cpu", "1"):
                found = {key: float(ms) for key, ms in row.items() if key.endswith("_min_ms") and ms and float(ms) > 0}
                devices.setdefault(row["device"], found)
    possible = list(permutations(devices.values(), 2))
    for known, new in rng.sample(possible, min(PAIRS, len(possible))):
        common = sorted(known.keys() & new.keys())
        if len(common) > FITTED_OF_NCNN + 2:
            yield np.array([known[key] for key in common]), np.array([new[key] for key in common])
