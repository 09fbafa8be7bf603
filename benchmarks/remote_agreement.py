"""Whether a latency table by ssh is the table of this machine: two tables measured here and one there, in turn."""

import math
import statistics
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.loopback import running_sshd
from benchmarks.result import Result, this_machine
from hwnas.calibration import Measurement
from hwnas.devices import DEFAULT_TIMING, Device, Timing, entry_of, line_to
from hwnas.latency import Entry, LatencyTable
from hwnas.lines import Line
from hwnas.profiling import profile
from hwnas.space_toml import load_space

STANDARD_ERRORS = 2.0
"""The difference to the table there may exceed the noise floor by so many standard errors of that excess."""


class Turns:
    """Several threads of which one works at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()
        self._changed = threading.Condition()

    def begin(self) -> None:
        with self._changed:
            self._waiting.append(threading.get_ident())
            self._changed.wait_for(lambda: self._waiting[0] == threading.get_ident())

    def end(self) -> None:
        with self._changed:
            self._waiting.popleft()
            self._changed.notify_all()


class InTurn(Device):
    """A device that lets the others have their turn after each group of models."""

    def __init__(self, name: str, line: Line, turns: Turns) -> None:
        super().__init__(name, line)
        self.turns = turns

    def measure(
        self, models: Sequence[bytes | Path], timing: Timing = DEFAULT_TIMING
    ) -> Iterator[tuple[int, Measurement]]:
        found = list(super().measure(models, timing))
        self.turns.end()
        self.turns.begin()
        return iter(found)


def run(name: str) -> Result:
    space, turns = load_space("shufflenet-tiny"), Turns()
    with tempfile.TemporaryDirectory() as place, running_sshd(Path(place)) as board, ThreadPoolExecutor(3) as pool:
        lines = {"here": entry_of("cpu"), "here again": entry_of("cpu"), "there": board.entry()}

        def table(way: str) -> LatencyTable:
            turns.begin()
            try:
                with InTurn(way, line_to(lines[way]), turns) as device:
                    return profile(space, device, folder=Path(place) / "tables")
            finally:
                turns.end()

        here, again, there = pool.map(table, lines)
    keys = [key for key, entry in here.entries.items() if isinstance(entry, Entry)]
    one, other, far = ([table.entries[key].latency_ms for key in keys] for table in (here, again, there))
    noise = [abs(b / a - 1) for a, b in zip(one, other, strict=True)]
    apart = [(abs(c / a - 1) + abs(c / b - 1)) / 2 for a, b, c in zip(one, other, far, strict=True)]
    excess = [difference - floor for difference, floor in zip(apart, noise, strict=True)]
    mean, error = statistics.fmean(excess), statistics.stdev(excess) / math.sqrt(len(excess))
    bias = statistics.median(c / math.sqrt(a * b) for a, b, c in zip(one, other, far, strict=True)) - 1
    floor, difference = statistics.median(noise), statistics.median(apart)
    networks = [[n.latency_ms for n in table.calibration.networks] for table in (here, again, there)]
    return Result(
        name=name,
        value=round(100 * difference, 2),
        unit="% median difference of an entry, there and here",
        target=f"the noise floor, {100 * floor:.2f} % (here and here again), as far as chance lets tell: the mean "
        f"excess over it is at most {STANDARD_ERRORS:g} standard errors, and the bias at most the floor",
        met=mean <= STANDARD_ERRORS * error and abs(bias) <= floor,
        spread=f"mean excess {100 * mean:+.2f} ± {100 * error:.2f} % of {len(keys)} timed entries",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1, fp32",
        details={
            "bias": f"{100 * bias:+.2f} % there",
            "ninety-fifth percentiles": f"{_percentile(apart):.2f} % there, {_percentile(noise):.2f} % here again",
            "whole networks": f"the median one takes {', '.join(f'{statistics.median(ms):.4g}' for ms in networks)} ms "
            f"({', '.join(lines)})",
            "mean absolute error": ", ".join(
                f"{100 * table.calibration.mean_absolute_error:.2f} % {way}"
                for way, table in zip(lines, (here, again, there), strict=True)
            ),
            "cautions": ", ".join(sorted({*here.cautions, *again.cautions, *there.cautions})) or "none",
        },
    )


def _percentile(values: list[float]) -> float:
    return 100 * sorted(values)[int(0.95 * len(values))]
