"""What it costs to measure over ssh: the same networks in turn, here and over an sshd on the loopback."""

import random
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.loopback import running_sshd
from benchmarks.result import Result, this_machine
from hwnas.devices import Device, line_to
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.space import lower
from hwnas.space_toml import load_space
from hwnas.whole_networks import TIMING

NETWORKS, REPEATS = 16, 8
LATENCY_PERCENT, WALL_PERCENT = 2.0, 15.0


def run(name: str) -> Result:
    space, rng = load_space("shufflenet-tiny"), random.Random(7)
    networks = [lower(space, space.sample(rng)) for _ in range(NETWORKS)]
    with (
        tempfile.TemporaryDirectory() as folder,
        running_sshd(Path(folder)) as board,
        open_device("cpu") as here,
        Device("board", line_to(board.entry())) as there,
    ):
        latency_ms: dict[Device, list[list[float]]] = {here: [], there: []}
        wall_s: dict[Device, list[float]] = {here: [], there: []}
        for device_ in (here, there):
            device_.conditions()
        for repeat in range(REPEATS):
            models = [to_onnx(n, random_weights(n, repeat)).SerializeToString() for n in networks]
            for device_ in (here, there) if repeat % 2 else (there, here):
                start = time.monotonic()
                found = dict(device_.measure(models, TIMING))
                wall_s[device_].append(time.monotonic() - start)
                latency_ms[device_].append([found[index].median_ms for index in range(NETWORKS)])
            there.anchor_ms = here.anchor_ms = min(filter(None, (here.anchor_ms, there.anchor_ms)))
    ratios = [
        there_ms / here_ms
        for there_row, here_row in zip(latency_ms[there], latency_ms[here], strict=True)
        for there_ms, here_ms in zip(there_row, here_row, strict=True)
    ]
    repeated = [
        abs(one / other - 1)
        for first, second in zip(latency_ms[here], latency_ms[here][1:], strict=False)
        for one, other in zip(first, second, strict=True)
    ]
    walls = [there_s / here_s for there_s, here_s in zip(wall_s[there], wall_s[here], strict=True)]
    lower_ratio, middle, upper_ratio = statistics.quantiles(ratios, n=4)
    overhead, wall = 100 * (middle - 1), 100 * (statistics.median(walls) - 1)
    return Result(
        name=name,
        value=round(overhead, 2),
        unit="% more measured latency over ssh than here",
        target=f"at most {LATENCY_PERCENT:g} %, and {WALL_PERCENT:g} % more wall time",
        met=overhead <= LATENCY_PERCENT and wall <= WALL_PERCENT,
        spread=f"quartiles {100 * (lower_ratio - 1):+.2f} and {100 * (upper_ratio - 1):+.2f} % of {len(ratios)} pairs",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1, fp32",
        details={
            "wall time": f"{wall:+.1f} % at the median of {REPEATS} groups of {NETWORKS} networks that had to be sent "
            f"({100 * (min(walls) - 1):+.1f} to {100 * (max(walls) - 1):+.1f} %)",
            "difference of a network there and here": f"{100 * statistics.median(abs(r - 1) for r in ratios):.2f} %",
            "difference of a network here and here again": f"{100 * statistics.median(repeated):.2f} %",
        },
    )
