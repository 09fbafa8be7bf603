"""What a GPU makes of the guidelines and of a space, within the seconds that there are.

Settings, from the environment: `GPU_DEVICE` (gpu), `GPU_SPACE` (shufflenet-tiny), `GPU_GUIDELINES` (1; 0 leaves the
experiments out), `GPU_AHEAD` (0; 1 takes the networks that `gpu_compile.py` compiled ahead, which lie between the
smallest and the largest architecture, where a table takes those between the fastest and the slowest), and
`HWNAS_TABLES`, the folder in which everything is kept as soon as it is measured: each experiment, each group of units,
the table. Run again with the same folder, it goes on where it was stopped.
"""

import os
import time
from dataclasses import replace

from benchmarks.gpu_compile import BATCH, CHECKED, candidates
from benchmarks.result import Result
from hwnas import whole_networks
from hwnas.guideline_profiling import measure_guidelines
from hwnas.latency import table_path
from hwnas.opening import open_device
from hwnas.profiling import profile
from hwnas.space_toml import load_space
from hwnas.stages import tables_folder
from hwnas.whole_networks import FITTED, HELD_OUT, check_table


def run(name: str) -> Result:
    where, ahead = os.environ.get("GPU_DEVICE", "gpu"), os.environ.get("GPU_AHEAD") == "1"
    space = load_space(os.environ.get("GPU_SPACE", "shufflenet-tiny"))
    start, shown = time.monotonic(), [0.0]
    seconds: dict[str, float] = {}

    def say(done: int, total: int, what: str) -> None:
        if done == total or len(what) > 60 or time.monotonic() > shown[0]:
            shown[0] = time.monotonic() + 10
            print(f"{time.monotonic() - start:6.1f} s  {done}/{total} {what}", flush=True)

    with open_device(where) as opened:
        conditions = opened.conditions(1, BATCH)
        print(conditions, flush=True)
        path = table_path(tables_folder(), space.name, conditions)
        kept = path.with_suffix(".guidelines")
        timings = ()
        if os.environ.get("GPU_GUIDELINES") != "0":
            timings = measure_guidelines(opened, kept, batch=BATCH, widths="gpu", on_progress=say)
        seconds["guidelines"] = time.monotonic() - start
        if ahead:
            whole_networks.candidates = candidates(FITTED + HELD_OUT)
        table = profile(space, opened, batch=BATCH, folder=tables_folder(), on_progress=say)
        table = replace(table, guidelines=timings)
        table.save(path)
        kept.unlink(missing_ok=True)
        seconds["table"] = time.monotonic() - start - seconds["guidelines"]
        print(f"{time.monotonic() - start:6.1f} s  {path}", flush=True)
        if ahead:
            whole_networks.candidates = candidates(CHECKED)
        found = check_table(table, space, opened, networks=CHECKED, on_progress=say)
        seconds["check"] = time.monotonic() - start - sum(seconds.values())
    error, noise = found.mean_absolute_error, found.noise_floor
    own = table.calibration
    return Result(
        name,
        100 * error,
        "% mean absolute error on new networks",
        "3 or 1.3 times the noise",
        error <= max(0.03, 1.3 * noise),
        f"noise {noise:.2%}, bias {found.bias:+.2%}, Spearman {found.spearman:.4f}, coverage {found.coverage:.0%}",
        f"{conditions.chip}, {conditions.runtime} {conditions.runtime_version}, batch {BATCH}",
        {
            "held-out error of the table": f"{own.mean_absolute_error:.2%}, noise {own.noise_floor:.2%}",
            "launch": f"{conditions.launch_ms} ms",
            "fastest and slowest network": f"{min(n.latency_ms for n in own.networks):.4g} and "
            f"{max(n.latency_ms for n in own.networks):.4g} ms",
            "cautions": table.cautions,
            "seconds": {what: round(took, 1) for what, took in seconds.items()},
        },
    )
