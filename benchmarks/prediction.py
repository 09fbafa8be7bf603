"""How far the latency table's predictions lie from measured whole networks that it has not seen, and its bound."""

from dataclasses import dataclass

from benchmarks.result import Result, this_machine
from hwnas.calibration import Calibration
from hwnas.devices import Device
from hwnas.latency import LatencyTable, load_table, table_path
from hwnas.opening import open_device
from hwnas.profiling import covers, profile
from hwnas.space import SearchSpace
from hwnas.space_toml import load_space
from hwnas.stages import tables_folder
from hwnas.whole_networks import check_table


@dataclass(frozen=True, slots=True)
class Case:
    """A space, how its models run, and what the error, in percent, may be where the noise does not exceed it."""

    space: str
    threads: int = 1
    batch: int = 1
    precision: str = "fp32"
    error_percent: float = 1.5
    within_percent: float = 5.0
    within_share: float = 0.98
    device: str = "cpu"


def loose(threads: int = 1, batch: int = 1, precision: str = "fp32") -> Case:
    """A case of the default space under harder settings."""
    return Case("shufflenet-tiny", threads, batch, precision, 3.0, 10.0, 0.95)


CASES = {
    "prediction-tiny": Case("shufflenet-tiny"),
    "prediction-32": Case("shufflenet-32"),
    "prediction-224": Case("shufflenet-224"),
    "prediction-2-threads": loose(threads=2),
    "prediction-batch-8": loose(batch=8),
    "prediction-int8": loose(precision="int8"),
    "prediction-openvino": Case("shufflenet-tiny", device="openvino"),
}
NOISE_FACTOR, BIAS_PERCENT, SPEARMAN = 1.3, 1.0, 0.99
BOUND_NETWORKS, BOUND_COVERAGE = 200, (0.93, 1.0)


def table_of(case: Case, opened: Device) -> tuple[SearchSpace, LatencyTable]:
    """The table of this user, measured if it is missing."""
    space = load_space(case.space)
    path = table_path(tables_folder(), space.name, opened.conditions(case.threads, case.batch, case.precision))
    table = load_table(path) if path.exists() else None
    if table is None or not covers(table, space):
        settings = {"threads": case.threads, "batch": case.batch, "precision": case.precision}
        table = profile(space, opened, folder=tables_folder(), **settings)  # pyright: ignore[reportArgumentType]
    opened.anchor_ms = table.anchor_ms
    return space, table


def details(check: Calibration, table: LatencyTable) -> dict[str, object]:
    """What is worth telling of a check."""
    return {
        "root-mean-square error": f"{100 * check.rms_error:.2f} %",
        "bias": f"{100 * check.bias:+.2f} %",
        "within 5 %": f"{100 * check.share_within(0.05):.0f} %",
        "within 10 %": f"{100 * check.share_within(0.10):.0f} %",
        "Spearman": round(check.spearman, 4),
        "Kendall tau": round(check.kendall_tau, 3),
        "under the upper bound": f"{100 * check.coverage:.0f} %",
        "upper bound": f"{100 * check.upper_ratio:.1f} % above the prediction",
        "networks": len(check.networks),
        "table": f"{len(table.entries)} entries, {table.started} to {table.finished}",
        "cautions": ", ".join(table.cautions) or "none",
    }


def run(name: str) -> Result:
    if name == "bound-coverage":
        return bound_coverage(name)
    case = CASES[name]
    with open_device(case.device) as opened:
        conditions = opened.conditions()
        space, table = table_of(case, opened)
        check = check_table(table, space, opened)
    error, noise = 100 * check.mean_absolute_error, 100 * check.noise_floor
    limit = max(case.error_percent, NOISE_FACTOR * noise)
    strict = case.within_percent == 5.0
    met = error <= limit and check.share_within(case.within_percent / 100) >= case.within_share
    if strict:
        met = met and abs(100 * check.bias) <= BIAS_PERCENT and check.spearman >= SPEARMAN
    return Result(
        name=name,
        value=round(error, 2),
        unit="% mean absolute error",
        target=f"at most {case.error_percent:g} % or {NOISE_FACTOR:g} times the noise ({limit:.2f} %), "
        f"{100 * case.within_share:.0f} % within {case.within_percent:g} %"
        + (f", bias within {BIAS_PERCENT:g} %, Spearman {SPEARMAN:g}" if strict else ""),
        met=met,
        spread=f"noise floor: the same networks measured twice differ by {noise:.2f} %",
        device=f"{this_machine()}; {conditions.runtime}, {case.threads} thread{'s' if case.threads > 1 else ''}, "
        f"batch {case.batch}, {case.precision}",
        details=details(check, table),
    )


def bound_coverage(name: str) -> Result:
    """The share of fresh networks, spread over the range of latencies, that stay under their upper estimate."""
    with open_device("cpu") as cpu:
        space, table = table_of(CASES["prediction-tiny"], cpu)
        check = check_table(table, space, cpu, networks=BOUND_NETWORKS, seed=2)
    low, high = BOUND_COVERAGE
    return Result(
        name=name,
        value=round(100 * check.coverage, 1),
        unit="% of fresh networks under their 95 % upper bound",
        target=f"{100 * low:.0f} to {100 * high:.0f} %",
        met=low <= check.coverage <= high,
        spread=f"{len(check.networks)} networks; measured twice they differ by {100 * check.noise_floor:.2f} %",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1, fp32",
        details=details(check, table),
    )
