"""Whole networks of a space, measured: to calibrate a latency table on, and to check it with.

They are spread evenly over the range of latencies, the fastest and the slowest architecture included: errors of the
table grow with what a search looks for, and a random draw would hold little of it.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwnas.calibration import Calibration, Measurement, WholeNetwork
from hwnas.devices import Device, Timing
from hwnas.latency import LatencyTable
from hwnas.network import Network, parameters
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.places import Place, extreme_architecture, places_of_architecture
from hwnas.space import SearchSpace, lower

TIMING = Timing(tolerance=0.03, sample_ms=3.0, least_runs=4)
"""A sample of several milliseconds holds some undisturbed runs, even on a busy machine."""

FITTED, HELD_OUT = 30, 30
"""Whole networks that the line is fitted on, and others that tell its error and its upper bound."""

TIMINGS = 2
"""How often each is timed, all of them once before any is timed again."""

CHECKED = 60
"""Whole networks of a later check."""

CANDIDATES = 800

GROUP_BYTES = 256 << 20
"""Models of a group are all in memory at once."""

Code = tuple[int, ...]
"""The integer encoding of an architecture."""

ProgressCallback = Callable[[int, int, str], None]
"""Called with the number done, the number there are, and what was done: the label of a unit, or a network."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured where, and how."""

    space: SearchSpace
    device: Device
    threads: int
    batch: int
    precision: str
    seed: int

    def model(self, network: Network) -> bytes:
        """The network as ONNX with random weights, as it is timed."""
        weights = random_weights(network, self.seed)
        return to_onnx(network, weights, batch=self.batch, precision=self.precision).SerializeToString()

    def timing(self, timing: Timing) -> Timing:
        """Another timing with this setup's threads and seed."""
        return replace(timing, threads=self.threads, seed=self.seed)


def calibration_networks(
    setup: Setup, unit_ms: Mapping[Place, float], on_network: Callable[[], None] = lambda: None
) -> list[WholeNetwork]:
    """Networks of the whole range of latencies, measured twice.

    The fastest and the slowest are among the fitted ones, since a line is surest between its ends.
    """
    rng = random.Random(setup.seed)
    chosen = spread(candidates(setup.space, unit_ms, rng), FITTED + HELD_OUT)
    inner = list(chosen)[1:-1]
    held_out = rng.sample(inner, min(len(chosen) * HELD_OUT // (FITTED + HELD_OUT), len(inner)))
    return measured_networks(setup, chosen, held_out, on_network)


def check_table(
    table: LatencyTable,
    space: SearchSpace,
    device: Device,
    *,
    networks: int = CHECKED,
    seed: int = 1,
    on_progress: ProgressCallback = lambda done, total, what: None,
) -> Calibration:
    """Measures networks of the space that the table has not seen, twice, under the table's conditions.

    Args:
        table: covers the space.
        space: where the networks come from: spread over the range of latencies.
        device: where the table was measured.
        networks: how many; a small space may have fewer.
        seed: of the choice, the weights and the inputs.
        on_progress: called after each timing of a network.

    Returns:
        The table's own line and ratio with the new networks, all held out: see `Calibration.mean_absolute_error`,
        `noise_floor`, `spearman`, `bias` and `coverage`.

    Raises:
        HwnasError: the table lacks units of the networks, or the device's conditions are others than the table's.
    """
    here = table.conditions
    conditions = device.conditions(here.threads, here.batch, here.precision)
    table.check_device(replace(conditions, origin=here.origin))  # an estimate can be checked by measuring
    setup = Setup(space, device, here.threads, here.batch, here.precision, seed)
    seen = {network.encoding for network in table.calibration.networks}
    found = candidates(space, table.unit_ms(space), random.Random(seed))
    unseen = {code: ms for code, ms in found.items() if code not in seen}
    chosen = spread(unseen or found, networks)  # of a space so small that all were seen, those same networks
    done = 0

    def on_network() -> None:
        nonlocal done
        done += 1
        on_progress(done, 2 * len(chosen), f"whole network {done}")

    measured = measured_networks(setup, chosen, list(chosen), on_network)
    return replace(table.calibration, networks=tuple(measured))


def measured_networks(
    setup: Setup, sum_ms: Mapping[Code, float], held_out: Sequence[Code], on_network: Callable[[], None]
) -> list[WholeNetwork]:
    """The networks that `sum_ms` holds, each timed, and once more when all have been."""
    first, again = (_timed(setup, list(sum_ms), on_network) for _ in range(TIMINGS))
    return [
        WholeNetwork(
            code,
            ms,
            parameters(lower(setup.space, setup.space.decode(code))),
            first[code],
            again[code],
            held_out=code in held_out,
        )
        for code, ms in sum_ms.items()
    ]


def _timed(setup: Setup, codes: Sequence[Code], on_network: Callable[[], None]) -> dict[Code, Measurement]:
    """Networks in random order, in groups that fit into memory."""
    shuffled = list(codes)
    random.Random(setup.seed).shuffle(shuffled)
    timed: dict[Code, Measurement] = {}
    for group, models in _groups(setup, shuffled):
        for index, measurement in setup.device.measure_steadily(models, setup.timing(TIMING)).items():
            timed[group[index]] = measurement.at_usual_pace().shortened()
            on_network()
    return timed


def _groups(setup: Setup, codes: Sequence[Code]) -> Iterator[tuple[list[Code], list[bytes]]]:
    group: list[Code] = []
    models: list[bytes] = []
    for code in codes:
        group.append(code)
        models.append(setup.model(lower(setup.space, setup.space.decode(code))))
        if sum(map(len, models)) > GROUP_BYTES or code == codes[-1]:
            yield group, models
            group, models = [], []


def candidates(space: SearchSpace, unit_ms: Mapping[Place, float], rng: random.Random) -> dict[Code, float]:
    """The fastest and the slowest architecture, and random ones drawn more or less towards one of the two.

    Returns:
        The sum of the units' milliseconds by encoding.
    """
    extremes = [space.encode(extreme_architecture(space, unit_ms, slowest=slowest)) for slowest in (False, True)]
    codes = [*extremes, *(drawn_towards(space, extremes, rng) for _ in range(CANDIDATES))]
    return sums_of(space, codes, unit_ms)


def drawn_towards(space: SearchSpace, extremes: Sequence[Code], rng: random.Random) -> Code:
    """A random architecture, drawn more or less towards one of the extremes."""
    extreme, share = rng.choice(extremes), rng.random()
    code = [e if rng.random() < share else rng.randrange(r) for e, r in zip(extreme, space.radices, strict=True)]
    return space.canonical(code)


def sums_of(space: SearchSpace, codes: Iterable[Code], unit_ms: Mapping[Place, float]) -> dict[Code, float]:
    """The sum of the units' milliseconds by encoding."""
    return {code: sum(unit_ms[p] for p in places_of_architecture(space, space.decode(code))) for code in codes}


def spread(sum_ms: Mapping[Code, float], count: int) -> dict[Code, float]:
    """Up to `count` codes whose sums lie as evenly as may be, in ratio, from the least to the greatest, in order."""
    remaining = sorted(sum_ms, key=lambda code: sum_ms[code])
    if len(remaining) <= count:
        return {code: sum_ms[code] for code in remaining}
    targets = np.geomspace(sum_ms[remaining[0]], sum_ms[remaining[-1]], count)
    chosen = {remaining.pop(0), remaining.pop()}
    for target in targets[1:-1]:
        nearest = min(remaining, key=lambda code: abs(sum_ms[code] - target))
        remaining.remove(nearest)
        chosen.add(nearest)
    return {code: sum_ms[code] for code in sorted(chosen, key=lambda code: sum_ms[code])}
