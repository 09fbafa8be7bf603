"""Why hwnas measures as it does: how well ways to sum up samples repeat, and which way to time a unit predicts best."""

import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.result import Result, this_machine
from hwnas import measure
from hwnas.calibration import WholeNetwork
from hwnas.chains import chain_of, copies_of, host_of, network_of
from hwnas.devices import anchor_model
from hwnas.line import fit_line
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.opening import open_device
from hwnas.places import Place, head_place, network_at, places_of_architecture, stem_place
from hwnas.profiling import GROUP_MODELS
from hwnas.profiling import TIMING as UNIT_TIMING
from hwnas.space import SearchSpace, lower
from hwnas.space_toml import load_space
from hwnas.units import UnitChoice
from hwnas.whole_networks import Setup, measured_networks

NETWORKS, ROUNDS, RUNS = 40, 40, 10
HALF = ROUNDS // 2


def run(name: str) -> Result:
    return {"measuring-protocol": measuring_protocol, "measuring-methods": measuring_methods}[name](name)


# ---- samples -----------------------------------------------------------------------------------------------------


def series(space: SearchSpace) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of single runs `[networks, rounds, runs]`, and of the anchor before and after each `[.., .., 2]`."""
    rng = random.Random(5)
    request = {"warm_up_runs": 3, "warm_up_ms": 2.0, "sample_ms": 0.0, "least_runs": 1}

    def timed(model: bytes) -> measure.TimedModel:
        run, _ = machine.open(model, 1, 0)
        return measure.TimedModel(run, request)

    def drawn() -> bytes:
        network = lower(space, space.sample(rng))
        return to_onnx(network, random_weights(network, 0)).SerializeToString()

    machine = measure.Machine(measure.make_runtime("cpu"))
    machine.pin(1)
    models = [timed(drawn()) for _ in range(NETWORKS)]
    anchor = timed(anchor_model())
    anchor.runs = measure.ANCHOR_RUNS
    runs_ms, anchor_ms = np.zeros((NETWORKS, ROUNDS, RUNS)), np.zeros((NETWORKS, ROUNDS, 2))
    latest = anchor.sample_ms()
    for number in range(ROUNDS):
        for index in rng.sample(range(NETWORKS), NETWORKS):
            anchor_ms[index, number, 0] = latest
            models[index].run()
            for repeat in range(RUNS):
                start = time.perf_counter_ns()
                models[index].run()
                runs_ms[index, number, repeat] = (time.perf_counter_ns() - start) / 1e6
            latest = anchor_ms[index, number, 1] = anchor.sample_ms()
    return runs_ms, anchor_ms


def agreeing(samples_ms: np.ndarray, paces: np.ndarray, count: int, tolerance: float) -> tuple[float, int]:
    """What the protocol makes of a model's samples: the median of those that agree, and how many samples that took."""
    for number in range(count, len(samples_ms) + 1):
        steady = np.sort(samples_ms[:number][paces[:number] <= measure.PACE_TOLERANCE])
        kept = steady[steady <= steady[0] * (1 + tolerance)] if len(steady) else steady
        if len(kept) >= count:
            return float(np.median(kept)), number
    return float(np.sort(samples_ms)[1]), len(samples_ms)


def measuring_protocol(name: str) -> Result:
    """The two halves of interleaved rounds against each other, summed up in several ways."""
    runs_ms, anchor_ms = series(load_space("shufflenet-tiny"))
    usual_ms = np.quantile(anchor_ms, 0.1)
    ways: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "median of single runs": lambda t: np.median(t[:, :, 0], axis=1),
        "median of the least of 5": lambda t: np.median(t[:, :, :5].min(2), axis=1),
        "median of the least of 10": lambda t: np.median(t.min(2), axis=1),
        "lower quartile of the least of 10": lambda t: np.quantile(t.min(2), 0.25, axis=1),
    }
    differences = {
        way: 100 * float(np.mean(np.abs(sum_up(runs_ms[:, :HALF]) / sum_up(runs_ms[:, HALF:]) - 1)))
        for way, sum_up in ways.items()
    }
    samples_ms, paces = runs_ms.min(2), anchor_ms.min(2) / usual_ms
    truth = np.quantile(samples_ms, 0.1, axis=1)
    rules = {
        "3 within 2 %, steady": (3, True),
        "2 within 2 %, steady": (2, True),
        "3 within 2 %, no anchor": (3, False),
    }
    told = {}
    for rule, (count, gated) in rules.items():
        starts = range(0, ROUNDS, 8)
        found = [
            agreeing(np.roll(row, -start), np.roll(pace, -start) if gated else np.ones(ROUNDS), count, 0.02)
            for row, pace in zip(samples_ms, paces, strict=True)
            for start in starts
        ]
        errors = [abs(value / t - 1) for (value, _), t in zip(found, np.repeat(truth, len(starts)), strict=True)]
        told[rule] = (
            f"{100 * statistics.fmean(errors):.2f} % from the lower decile on average, {100 * max(errors):.1f} % at "
            f"worst, after {statistics.fmean(n for _, n in found):.1f} samples"
        )
    chosen = differences["lower quartile of the least of 10"]
    return Result(
        name=name,
        value=round(chosen, 2),
        unit="% between two halves of the rounds, lower quartile of samples that are the least of 10 runs",
        target="less than the median of single runs",
        met=chosen < differences["median of single runs"],
        spread=f"{NETWORKS} networks of shufflenet-tiny, {ROUNDS} interleaved rounds",
        device=f"{this_machine()}; slowed down {100 * np.mean(anchor_ms > 1.1 * usual_ms):.0f} % of the time",
        details={**{way: f"{value:.2f} %" for way, value in differences.items()}, **told},
    )


# ---- units -------------------------------------------------------------------------------------------------------


def whole_chain(space: SearchSpace, place: Place, *, without: bool) -> list[Place]:
    """A whole network of plain units around a place: its unit put in, or left out (stride 2: a plain one instead)."""
    places, channels = [stem_place(space)], space.stem_channels
    for number, stage in enumerate(space.stages, 2):
        width = sorted(stage.width)[len(stage.width) // 2]
        width = place.channels if number == place.stage else width
        width = place.channels_in if number == place.stage - 1 and place.stride == 2 else width
        first = Place(number, channels, width, 2, UnitChoice())
        here = number == place.stage
        places.append(place if here and place.stride == 2 and not without else first)
        places += [place] if here and place.stride == 1 and not without else []
        places.append(Place(number, width, width, 1, UnitChoice()))
        channels = width
    return [*places, head_place(space, channels)]


def measuring_methods(name: str) -> Result:
    """Units timed alone, as differences of short chains, and inside whole networks: error and seconds of each."""
    space, rng = load_space("shufflenet-tiny"), random.Random(4)
    codes = list({space.encode(space.sample(rng)) for _ in range(NETWORKS)})
    architectures = {code: list(places_of_architecture(space, space.decode(code))) for code in codes}
    units = list(dict.fromkeys(itertools.chain.from_iterable(architectures.values())))
    plain = {replace_choice(place) for place in units if place.choice and place.stride == 2}
    units += [place for place in plain if place not in units]
    with open_device("cpu") as cpu:
        setup = Setup(space, cpu, 1, 1, "fp32", 0)
        networks = measured_networks(setup, dict.fromkeys(codes, 0.0), codes, lambda: None)
        seconds: dict[str, float] = {}

        def times(what: str, chains: Sequence[Sequence[Place]]) -> list[float]:
            started, network = time.monotonic(), network_of if what == "in a chain" else network_at
            distinct = list(dict.fromkeys(map(tuple, chains)))
            found: dict[tuple[Place, ...], float] = {}
            for first in range(0, len(distinct), GROUP_MODELS):
                part = distinct[first : first + GROUP_MODELS]
                models = [setup.model(network(space, chain)) for chain in part]
                measured = cpu.measure_steadily(models, setup.timing(UNIT_TIMING))
                found |= {chain: measured[i].at_usual_pace().median_ms for i, chain in enumerate(part)}
            seconds[what] = seconds.get(what, 0.0) + time.monotonic() - started
            return [found[tuple(chain)] for chain in chains]

        alone = dict(zip(units, times("alone", [[place] for place in units]), strict=True))
        with_unit = times("in a chain", [chain_of(space, place) for place in units])
        hosts = [place for place in units if host_of(space, place)]
        host_ms = dict(zip(hosts, times("in a chain", [host_of(space, place) for place in hosts]), strict=True))
        chain = {p: (ms - host_ms.get(p, 0.0)) / copies_of(p) for p, ms in zip(units, with_unit, strict=True)}
        inner = [place for place in units if place.choice]
        put_in = times("in a network", [whole_chain(space, place, without=False) for place in inner])
        left_out = times("in a network", [whole_chain(space, place, without=True) for place in inner])
        gains = {p: a - b for p, a, b in zip(inner, put_in, left_out, strict=True)}
        inside = chain | {p: g + (chain[replace_choice(p)] if p.stride == 2 else 0.0) for p, g in gains.items()}
    noise = statistics.fmean(abs(n.repeated.median_ms / n.measured.median_ms - 1) for n in networks)
    errors = {
        what: left_out_error([replace(n, sum_ms=sum(ms[p] for p in architectures[n.encoding])) for n in networks])
        for what, ms in (("alone", alone), ("in a chain", chain), ("in a network", inside))
    }
    return Result(
        name=name,
        value=round(100 * errors["in a chain"], 2),
        unit="% mean absolute error with units timed as differences of short chains",
        target="the least error for a second of measuring",
        met=errors["in a chain"] * seconds["in a chain"] <= errors["in a network"] * seconds["in a network"]
        and errors["in a chain"] <= errors["alone"],
        spread=f"the same networks measured twice differ by {100 * noise:.2f} %",
        device=f"{this_machine()}; ONNX Runtime, 1 thread, batch 1, fp32",
        details={
            **{what: f"{100 * errors[what]:.2f} % after {seconds[what]:.1f} s" for what in errors},
            "networks": f"{len(networks)} random ones of {space.name}, {len(units)} units",
        },
    )


def replace_choice(place: Place) -> Place:
    """The plain unit at a place."""
    return place._replace(choice=UnitChoice())


def left_out_error(networks: Sequence[WholeNetwork]) -> float:
    """Mean absolute relative error of each network under the line that all others give."""
    errors = []
    for index, network in enumerate(networks):
        others = [*networks[:index], *networks[index + 1 :]]
        line = fit_line([n.sum_ms for n in others], [n.parameters for n in others], [n.latency_ms for n in others])
        errors.append(abs(network.latency_ms / line.latency_ms(network.sum_ms, network.parameters) - 1))
    return statistics.fmean(errors)
