"""Searches with budgets over the whole range of a space: do the winners keep their budgets, and use them?

The searches have no supernet: what they take for the accuracy of an architecture is the logarithm of its multiply-adds
with a fixed random preference for each choice, which pulls every search up to its budget.
"""

import math
import random
import statistics
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.prediction import CASES, table_of
from benchmarks.result import Result, this_machine
from hwnas.evolution import fastest, upper_ms_of
from hwnas.export import measure_models
from hwnas.network import macs
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.search import check_budget, search
from hwnas.space import Architecture, lower

SEARCHES, TRIALS = 40, 40
KEPT_SHARE, USED_SHARE = 0.95, 0.95


def run(name: str) -> Result:
    with open_device("cpu") as cpu:
        space, table = table_of(CASES["prediction-tiny"], cpu)
        latency = table.predictor(space)
        upper_ms = upper_ms_of(space, latency)
        least_ms = upper_ms(fastest(space, upper_ms, 0.0))
        most_ms = check_budget(space, latency, math.inf, "cpu")
        taste = random.Random(0)
        likes = [[taste.gauss(0, 0.02) for _ in range(radix)] for radix in space.radices]

        def made_up(architecture: Architecture) -> float:
            code = space.encode(architecture)
            return math.log(macs(lower(space, architecture))) + sum(likes[i][c] for i, c in enumerate(code))

        budgets = np.geomspace(1.05 * least_ms, 0.95 * most_ms, SEARCHES)
        winners = []
        with tempfile.TemporaryDirectory() as folder:
            for index, budget_ms in enumerate(map(float, budgets)):
                found = search(
                    space, made_up, latency, budget_ms=budget_ms, device="cpu", trials=TRIALS,
                    storage=Path(folder) / "study.db", name=str(index), seed=index,
                )  # fmt: skip
                winners.append(lower(space, found.best.architecture))
        models = [to_onnx(network, random_weights(network, 0)).SerializeToString() for network in winners]
        timings = measure_models(cpu, models, threads=1)
    used = [timing.median_ms / budget_ms for timing, budget_ms in zip(timings, budgets, strict=True)]
    kept = statistics.fmean(share <= 1 for share in used)
    quartiles = statistics.quantiles(used, n=4)
    return Result(
        name=name,
        value=round(100 * kept, 1),
        unit=f"% of {SEARCHES} winners within their budget as measured, before any is dropped",
        target=f"at least {100 * KEPT_SHARE:.0f} %, and they use at least {100 * USED_SHARE:.0f} % of it on average",
        met=kept >= KEPT_SHARE and statistics.fmean(used) >= USED_SHARE,
        spread=f"measured over budget: quartiles {quartiles[0]:.3f}, {quartiles[1]:.3f}, {quartiles[2]:.3f}",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1, fp32",
        details={
            "used on average": f"{100 * statistics.fmean(used):.1f} %",
            "largest excess": f"{100 * (max(used) - 1):+.1f} %",
            "budgets": f"{budgets[0]:.3g} to {budgets[-1]:.3g} ms",
            "upper bound": f"{100 * table.calibration.upper_ratio:.1f} % above the prediction",
        },
    )
