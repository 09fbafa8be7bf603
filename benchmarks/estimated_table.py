"""Latency tables estimated from this processor's and a few measured networks, for other ways to run its models."""

import statistics
import tempfile
from pathlib import Path

from benchmarks.prediction import Case, table_of
from benchmarks.result import Result, this_machine
from hwnas.calibration import Calibration
from hwnas.errors import HwnasError
from hwnas.estimation import NETWORKS, estimate
from hwnas.latency import LatencyTable
from hwnas.network import parameters
from hwnas.opening import open_device
from hwnas.space import SearchSpace, lower
from hwnas.whole_networks import check_table

SPACE, CHECKED, TARGET_PERCENT = "shufflenet-tiny", 40, 6.0
TARGETS: dict[str, tuple[str, dict[str, int | str]]] = {
    "batch 8": ("cpu", {"batch": 8}),
    "2 threads": ("cpu", {"threads": 2}),
    "int8": ("cpu", {"precision": "int8"}),
    "OpenVINO": ("openvino", {}),
}


def run(name: str) -> Result:
    with open_device("cpu") as cpu:
        space, known = table_of(Case(SPACE), cpu)
    errors: list[float] = []
    details: dict[str, object] = {}
    for what, (device_name, settings) in TARGETS.items():
        try:
            with open_device(device_name) as opened, tempfile.TemporaryDirectory() as folder:
                table = estimate(known, space, opened, folder=Path(folder), **settings)  # pyright: ignore[reportArgumentType]
                opened.anchor_ms = table.anchor_ms
                check = check_table(table, space, opened, networks=CHECKED)
        except HwnasError as error:
            details[what] = f"not there: {error}"
            continue
        one_factor = by_one_factor(known, table, check, space)
        errors.append(100 * check.mean_absolute_error)
        details[what] = (
            f"{errors[-1]:.1f} % mean absolute error on {CHECKED} new networks (stated: "
            f"{100 * table.calibration.mean_absolute_error:.1f} %, noise {100 * check.noise_floor:.1f} %, "
            f"Kendall tau {check.kendall_tau:.3f}, under the upper bound {check.coverage:.0%}); by one factor "
            f"{100 * one_factor:.1f} %"
        )
    worst = max(errors)
    return Result(
        name=name,
        value=round(worst, 2),
        unit=f"% mean absolute error of the worst of {len(errors)} tables estimated from {NETWORKS} networks",
        target=f"at most {TARGET_PERCENT:g} %",
        met=worst <= TARGET_PERCENT,
        spread=f"{min(errors):.1f} to {worst:.1f} %",
        device=this_machine(),
        details=details | {"known table": f"{SPACE} on {known.conditions.device}, {known.started}"},
    )


def by_one_factor(known: LatencyTable, table: LatencyTable, check: Calibration, space: SearchSpace) -> float:
    """The error of the known table times the one factor that suits the networks which the estimate was fitted on."""
    predict = known.calibration.line.latency_ms

    def known_ms(encoding: tuple[int, ...]) -> float:
        network = lower(space, space.decode(encoding))
        return float(predict(known.raw_sum_ms(network), parameters(network)))

    fitted = [network for network in table.calibration.networks if not network.held_out]
    factor = statistics.median(network.latency_ms / known_ms(network.encoding) for network in fitted)
    ratios = [network.latency_ms / (factor * known_ms(network.encoding)) for network in check.networks]
    return statistics.fmean(abs(ratio - 1) for ratio in ratios)
