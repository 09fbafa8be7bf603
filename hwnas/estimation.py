"""The latency table of a new device, estimated from that of a known one and a few whole networks measured on the new.

Measuring every unit takes minutes on a processor of today, and hours on a slow board. But what a unit costs on one
device says much of what it costs on another, and the rest hangs on few things. So a unit of the new device is taken to
cost

    a * its time on the known device + b * multiply-adds + c * values moved + d * parameters + e * operators

and a network the sum of its units and a constant. The factors are fitted on whole networks measured on the new device.
With so few of them they are drawn towards nothing but the first, by how much is chosen by leaving each of the networks
out once.

A third of the networks is not fitted on. Their error is that of the estimate, and stands in the table.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hwnas.calibration import Calibration, Measurement, WholeNetwork, significant
from hwnas.cautions import Seen, cautions_of
from hwnas.devices import Device
from hwnas.errors import HwnasError
from hwnas.journal import now
from hwnas.latency import Entry, LatencyTable, load_table, table_path
from hwnas.line import Line, least_absolute
from hwnas.network import Network, macs, memory_access, parameters, unit_key
from hwnas.places import label, network_at, places_of, places_of_architecture
from hwnas.space import SearchSpace, lower
from hwnas.whole_networks import ProgressCallback, Setup, candidates, measured_networks, spread

ESTIMATED = "estimated"
"""The origin of such a table."""
NETWORKS, LEAST_NETWORKS = 30, 10
HELD_OUT_SHARE = 1 / 3
PULLS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Towards the plain multiple of the known time; see `line.least_absolute`."""
LEAST_SHARE = 0.2
"""A unit keeps so much of that plain multiple at least: none may come out at nothing."""

Floats = NDArray[np.float64]


def estimate(
    known: LatencyTable,
    space: SearchSpace,
    device: Device,
    *,
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    folder: Path,
    networks: int = NETWORKS,
    on_progress: ProgressCallback = lambda done, total, what: None,
    seed: int = 0,
) -> LatencyTable:
    """Measures a few whole networks of a space on a device, and writes its table, marked as estimated.

    Args:
        known: the measured table of another device, or of other settings; covers the space.
        space: what to cover.
        device: the new one.
        threads, batch, precision: how it runs models.
        folder: the folder of latency tables.
        networks: how many are measured, twice each; a third of them tells the error.
        on_progress: called after each timing of a network.
        seed: of weights, inputs, orders and the choice of networks.

    Raises:
        HwnasError: too few networks, a known table that was not measured itself or lacks units, or there is a measured
            table of the device already, which is better.
    """
    if networks < LEAST_NETWORKS:
        raise HwnasError(
            f"An estimate needs at least {LEAST_NETWORKS} measured networks, and 20 to 30 to be of use. It was given "
            f"{networks}."
        )
    if known.conditions.origin != "measured":
        raise HwnasError(
            f"A table is estimated from a measured one. That of {known.conditions.device} is {known.conditions.origin}."
        )
    conditions = device.conditions(threads, batch, precision)
    if conditions.origin == "measured":
        conditions = replace(conditions, origin=ESTIMATED)
    path = table_path(folder, space.name, conditions)
    if path.exists() and load_table(path).conditions.origin == "measured":
        raise HwnasError(
            f"There is a measured table of {space.name} on {conditions.device}, {path}, which is better than an "
            "estimate. Use it, or give another folder with --tables."
        )
    setup, started = Setup(space, device, threads, batch, precision, seed), now()
    known_ms = known.unit_ms(space)
    chosen = spread(candidates(space, known_ms, random.Random(seed)), networks)
    inner = list(chosen)[1:-1]  # the ends are fitted on: the factors are surest between them
    held_out = random.Random(seed).sample(inner, min(round(HELD_OUT_SHARE * len(chosen)), len(inner)))
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        on_progress(done, 2 * len(chosen), f"whole network {done}")

    measured = measured_networks(setup, chosen, held_out, count)
    fitted = [network for network in measured if not network.held_out]
    columns = np.array([_network_columns(space, network) for network in fitted])
    factors = fit_factors(columns, np.array([network.latency_ms for network in fitted]))
    entries, new_ms = {}, {}
    for place in places_of(space):
        network = network_at(space, [place])
        ms = float(np.array(columns_of(network, known_ms[place])) @ factors[:-1])
        new_ms[place] = significant(max(ms, LEAST_SHARE * factors[0] * known_ms[place]))
        key = unit_key(network.units[0])
        entries[key] = Entry(key, label(space, place), Measurement((new_ms[place],)))
    moved = tuple(
        replace(network, sum_ms=sum(new_ms[p] for p in places_of_architecture(space, space.decode(network.encoding))))
        for network in measured
    )
    line = Line(float(factors[-1]), (1.0,), (1.0,), (0.0,))
    calibration = Calibration(line, 0.0, moved).bounded()
    assert device.anchor_ms is not None
    cautions = cautions_of(Seen(conditions, device.groups, calibration))
    facts = (conditions, space.name, started, now(), entries, calibration, device.anchor_ms, cautions)
    table = LatencyTable(*facts, boards=device.relations)
    table.save(path)
    return table


def columns_of(network: Network, known_ms: float) -> tuple[float, ...]:
    """What a unit's or a network's time is made of, `[5]`: the known one, and what is counted, in millions."""
    counted = (macs(network), memory_access(network), parameters(network), len(network.nodes))
    return (known_ms, *(number / 1e6 for number in counted))


def _network_columns(space: SearchSpace, network: WholeNetwork) -> tuple[float, ...]:
    """The same of a whole network, `[6]`, with a one for the constant."""
    return (*columns_of(lower(space, space.decode(network.encoding)), network.sum_ms), 1.0)


def fit_factors(columns: Floats, measured_ms: Floats) -> Floats:
    """The factors of least absolute relative error.

    Args:
        columns: of each network, `[N, K]`; the first is its time on the known device.
        measured_ms: on the new device, `[N]`.
    """
    pull = min(PULLS, key=lambda pull: left_out_error(columns, measured_ms, pull))
    return _pulled_factors(columns, measured_ms, pull)


def left_out_error(columns: Floats, measured_ms: Floats, pull: float) -> float:
    """The mean absolute relative error on each network by the factors that the others give."""
    everyone = np.arange(len(columns))
    errors = [
        abs(columns[index] @ _pulled_factors(columns[others], measured_ms[others], pull) / measured_ms[index] - 1)
        for index in everyone
        for others in (everyone[everyone != index],)
    ]
    return float(np.mean(errors))


def _pulled_factors(columns: Floats, measured_ms: Floats, pull: float) -> Floats:
    common = float(np.median(measured_ms / columns[:, 0]))
    relative = columns / measured_ms[:, None]
    factors = least_absolute(relative, 1 - common * relative[:, 0], pull)
    factors[0] += common
    return factors
