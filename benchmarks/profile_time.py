"""Seconds of a complete latency table from nothing, its check included; and how far two such tables agree."""

import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.prediction import CASES, table_of
from benchmarks.result import Result, this_machine
from hwnas.latency import Entry
from hwnas.opening import open_device
from hwnas.profiling import profile
from hwnas.space_toml import load_space
from hwnas.stages import tables_folder

LIMITS_S = {"profile-time-tiny": 60.0, "profile-time-32": 120.0, "profile-time-224": 300.0}
MEDIAN_PERCENT, P95_PERCENT = 3.0, 10.0


def run(name: str) -> Result:
    if name == "table-repeat":
        return table_repeat(name)
    space, started = load_space(name.replace("profile-time", "shufflenet")), time.monotonic()
    units_s = 0.0

    def on_progress(done: int, total: int, what: str) -> None:
        nonlocal units_s
        if what not in ("whole networks", "memory"):
            units_s = time.monotonic() - started

    with open_device("cpu") as cpu:
        table = profile(space, cpu, folder=tables_folder(), on_progress=on_progress)
        slow = [s > 1.1 * table.anchor_ms for group in cpu.groups for s in group.anchor_ms.samples_ms]
    seconds = time.monotonic() - started
    timed = sum(isinstance(entry, Entry) for entry in table.entries.values())
    return Result(
        name=name,
        value=round(seconds, 1),
        unit="s",
        target=f"at most {LIMITS_S[name]:.0f} s",
        met=seconds <= LIMITS_S[name],
        spread=f"one run; the machine was slowed down {statistics.fmean(slow):.0%} of the time",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1, fp32",
        details={
            "entries": f"{len(table.entries)}, of which {timed} are timed and the others composed",
            "units": f"{units_s:.1f} s",
            "whole networks and memory": f"{seconds - units_s:.1f} s for {len(table.calibration.networks)}, each twice",
            "its own check": table.calibration.failure or "passed",
            "mean absolute error": f"{100 * table.calibration.mean_absolute_error:.2f} %",
            "noise floor": f"{100 * table.calibration.noise_floor:.2f} %",
            "cautions": ", ".join(table.cautions) or "none",
        },
    )


def table_repeat(name: str) -> Result:
    """The default space's table of this user against one measured now."""
    with open_device("cpu") as cpu, tempfile.TemporaryDirectory() as folder:
        space, first = table_of(CASES["prediction-tiny"], cpu)
        second = profile(space, cpu, folder=Path(folder), seed=1)
    timed = [key for key, entry in first.entries.items() if isinstance(entry, Entry)]
    ratios = [second.entries[key].latency_ms / first.entries[key].latency_ms for key in timed]
    percent = sorted(100 * abs(ratio - 1) for ratio in ratios)
    middle, p95 = statistics.median(percent), percent[int(0.95 * len(percent))]
    agree = middle <= MEDIAN_PERCENT and p95 <= P95_PERCENT
    told = [caution for caution in ("noisy", "unsteady", "slowed") if caution in (*first.cautions, *second.cautions)]
    return Result(
        name=name,
        value=round(middle, 2),
        unit="% median difference of an entry",
        target=f"{MEDIAN_PERCENT:g} % at the median and {P95_PERCENT:g} % at the ninety-fifth percentile, or a caution",
        met=agree or bool(told),
        spread=f"ninety-fifth percentile {p95:.2f} %, quartiles "
        f"{percent[len(percent) // 4]:.2f} and {percent[3 * len(percent) // 4]:.2f} %",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1, fp32",
        details={
            "timed entries": len(timed),
            "first table": f"{first.started} to {first.finished}",
            "second table": f"{second.started} to {second.finished}",
            "bias": f"{100 * (statistics.median(ratios) - 1):+.2f} %",
            "cautions": ", ".join(told) or "none",
        },
    )
