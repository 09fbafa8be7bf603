"""How far the latency table's predictions lie from measured whole networks that the table has not seen."""

import os
from pathlib import Path

from benchmarks.result import Result, this_machine
from hwnas.devices import device
from hwnas.latency import load_table, table_path
from hwnas.profiling import check_table, covers, profile
from hwnas.space_toml import load_space
from hwnas.stages import tables_folder

SPACES = {"prediction-tiny": "shufflenet-tiny", "prediction-224": "shufflenet-224"}
NETWORKS, RMS_LIMIT_PERCENT, TAU_LIMIT = 40, 3.0, 0.9
SEED = int(os.environ.get("PREDICTION_SEED", "1"))


def run(name: str) -> Result:
    space = load_space(SPACES[name])
    with device("cpu") as cpu:
        path: Path = table_path(tables_folder(), space.name, cpu.conditions())
        table = load_table(path) if path.exists() else None
        if table is None or not covers(table, space):
            table = profile(space, cpu, folder=tables_folder(), on_progress=_show)
        check = check_table(table, space, cpu, networks=NETWORKS, seed=SEED)
    rms, tau = 100 * check.rms_error, check.kendall_tau
    return Result(
        name=name,
        value=round(rms, 2),
        unit="% root-mean-square error",
        target=f"at most {RMS_LIMIT_PERCENT:g} %, Kendall tau at least {TAU_LIMIT:g}",
        met=rms <= RMS_LIMIT_PERCENT and tau >= TAU_LIMIT,
        spread=f"the same networks measured twice differ by {100 * check.noise_floor:.2f} %",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1, fp32",
        details={
            "Kendall tau": round(tau, 3),
            "bias": f"{100 * check.bias:+.2f} %",
            "within the upper bound": f"{100 * check.coverage:.0f} %",
            "held-out networks": NETWORKS,
            "table": f"{len(table.entries)} entries, {table.started} to {table.finished}",
        },
    )


def _show(done: int, total: int, what: str) -> None:
    if done % 500 == 0:
        print(f"{done} of {total}", flush=True)
