"""A processor that exists only in tests: what a model takes on it is known, and so is all that disturbs it.

Its clock moves when a model runs or somebody sleeps, and at no other time, so that hours pass in seconds and every
timing can be repeated to the last digit.
"""

import json
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from hwnas import measure
from hwnas.devices import Device
from hwnas.lines import Line

FACTS = {
    "chip": "Simulated", "cores": 4, "runtime": "scripted clock", "runtime_version": "1", "governor": "performance",
    "system": "tests", "load_average": 0.0,
}  # fmt: skip

WEIGHT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
FULL_MEGAHERTZ = 3000.0
BASE_BYTES, BYTES_A_BYTE = 18_000_000, 3.0
CHANNELS_LAST = {"Concat", "Split", "Gather", "Reshape", "Flatten", "Gemm"}
"""Operators that take and make plain tensors; all others work on blocks of channels, as on x86-64."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model takes: the sum over its nodes and their borders, and, if asked for, something that is no sum.

    Attributes:
        node_us: of every node.
        mac_ns: of a multiply-add.
        byte_ns: of a byte that a node writes.
        weight_byte_ns: of a byte of weights.
        border_us, border_byte_ns: of a tensor that is made in one layout and read in another, and of each of its bytes.
        squared_ms: of a million weights, growing with the square of the weights of the whole model.
    """

    node_us: float = 1.0
    mac_ns: float = 0.02
    byte_ns: float = 0.05
    weight_byte_ns: float = 0.03
    border_us: float = 0.5
    border_byte_ns: float = 0.1
    squared_ms: float = 0.0

    def model_ms(self, content: bytes) -> float:
        """Milliseconds of a serialised model on the undisturbed machine."""
        graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(content)).graph
        weights = {w.name: list(w.dims) for w in graph.initializer if w.data_type in WEIGHT_TYPES}
        sizes = {
            value.name: math.prod(size.dim_value for size in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.output, *graph.value_info)
        }
        blocked = {value.name: False for value in graph.input}
        total_ns = 0.0
        for node in graph.node:
            total_ns += self.node_us * 1e3 + self.byte_ns * 4 * sum(sizes[name] for name in node.output)
            takes_blocks = node.op_type not in CHANNELS_LAST
            for name in node.input:
                if name in blocked and blocked[name] != takes_blocks:
                    total_ns += self.border_us * 1e3 + self.border_byte_ns * 4 * sizes[name]
            if node.op_type == "DequantizeLinear" and node.input[0] in weights:
                weights[node.output[0]] = weights.pop(node.input[0])
            if node.op_type in ("Conv", "Gemm"):
                kernel = weights[node.input[1]]
                positions = sizes[node.output[0]] // kernel[0] if node.op_type == "Conv" else 1
                total_ns += self.mac_ns * positions * math.prod(kernel)
            blocked |= dict.fromkeys(node.output, takes_blocks)
        count = sum(map(math.prod, weights.values()))
        return (total_ns + self.weight_byte_ns * 4 * count) / 1e6 + self.squared_ms * (count / 1e6) ** 2


class Neighbour:
    """Somebody else on the same core, who comes and goes: exponential times, after Markov."""

    def __init__(self, quiet_ms: float, busy_ms: float, pace: float = 1.45, seed: int = 0, *, steals: bool = False):
        self.dwell_ms = {1.0: quiet_ms, pace: busy_ms}
        self.busy_pace, self.steals = pace, steals
        self._rng = random.Random(seed)
        self.pace, self.until_ns = self._rng.choice((1.0, pace)), 0.0

    def at(self, now_ns: float) -> tuple[float, float]:
        """The pace of the machine at this moment, and until when it lasts, in nanoseconds. Time never goes back."""
        while self.until_ns <= now_ns:
            self.pace = 1.0 if self.pace > 1 else self.busy_pace
            self.until_ns += self._rng.expovariate(1 / self.dwell_ms[self.pace]) * 1e6 + 1
        return self.pace, self.until_ns


@dataclass(slots=True)
class Heat:
    """A chip that grows hot from work and cools when left alone, and works slower from `limit` on.

    Attributes:
        celsius: now.
        idle, busy: where the temperature goes without and with work, in degrees Celsius.
        limit: the chip slows down from here on.
        seconds: in which two thirds of the way are done.
        pace: how much slower it is then.
    """

    celsius: float
    idle: float = 40.0
    busy: float = 70.0
    limit: float = 90.0
    seconds: float = 10.0
    pace: float = 1.4

    def pass_s(self, seconds: float, goal: float) -> None:
        self.celsius = goal + (self.celsius - goal) * math.exp(-seconds / self.seconds)

    @property
    def throttled(self) -> bool:
        return self.celsius >= self.limit


class SimulatedMachine(measure.Machine):
    """What `measure.time_group` sees of the world, all of it made up.

    Args:
        costs: of models.
        noise: a run takes longer by the absolute value of a normal number of this relative deviation.
        session_noise: every opened model is slower or faster, as long as it is open, by such a number.
        drift: the machine becomes so much slower and quick again in 60 s, without a break.
        neighbour: who disturbs it.
        throttle: from seconds to how much slower the processor runs; its frequency falls by as much.
        heat: its temperature; without it none is shown.
        outliers: the share of runs in which something takes the processor for 5 ms on average.
        load_average: what it shows.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        costs: Costs = Costs(),
        *,
        noise: float = 0.01,
        session_noise: float = 0.0,
        drift: float = 0.0,
        neighbour: Neighbour | None = None,
        throttle: Callable[[float], float] = lambda second: 1.0,
        heat: Heat | None = None,
        outliers: float = 0.0,
        load_average: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.costs, self.noise, self.session_noise, self.drift = costs, noise, session_noise, drift
        self.neighbour, self.throttle, self.heat, self.outliers = neighbour, throttle, heat, outliers
        self.load_average = load_average
        self.now_ns, self.busy_ns, self.stolen_ns, self.slept_s, self.pinned = 0.0, 0.0, 0.0, 0.0, 0
        self._rng = random.Random(seed)
        self._known_ms: dict[bytes, float] = {}

    def model_ms(self, content: bytes) -> float:
        """The truth: milliseconds of a model when nothing disturbs the machine."""
        if content not in self._known_ms:
            self._known_ms[content] = self.costs.model_ms(content)
        return self._known_ms[content]

    def memory_bytes(self, file_bytes: int) -> int:
        """What a model of so many bytes adds to a process's peak: a truth with a deviation of the session's noise."""
        return round((BASE_BYTES + BYTES_A_BYTE * file_bytes) * (1 + self._rng.gauss(0, 1) * self.session_noise))

    # ---- what `measure` asks for ---------------------------------------------------------------------------------

    def clock(self) -> int:
        return int(self.now_ns)

    def sleep(self, seconds: float) -> None:
        self.now_ns += seconds * 1e9
        self.slept_s += seconds
        if self.heat:
            self.heat.pass_s(seconds, self.heat.idle)

    openers = 1

    def open(self, path: str, threads: int, seed: int) -> tuple[Callable[[], None], int]:
        cost_ns = self.model_ms(Path(path).read_bytes()) * 1e6 * (1 + self._rng.gauss(0, 1) * self.session_noise)
        return (lambda: self._run(cost_ns)), 1

    def cores(self) -> int:
        return FACTS["cores"]

    def pin(self, threads: int) -> None:
        self.pinned = threads

    def celsius(self) -> tuple[float | None, float | None]:
        return (self.heat.celsius, self.heat.limit) if self.heat else (None, None)

    def state(self) -> dict[str, Any]:
        return {
            "load_average": self.load_average,
            "megahertz": FULL_MEGAHERTZ / self.frequency_pace,
            "celsius": self.celsius()[0],
            "ticks": round(self.now_ns / 1e7),
            "stolen_ticks": round(self.stolen_ns / 1e7),
        }

    # ---- how time passes -----------------------------------------------------------------------------------------

    @property
    def frequency_pace(self) -> float:
        """How much slower than at its full frequency the processor runs now."""
        hot = self.heat.pace if self.heat and self.heat.throttled else 1.0
        return hot * self.throttle(self.now_ns / 1e9)

    def _run(self, cost_ns: float) -> None:
        work_ns = cost_ns * (1 + abs(self._rng.gauss(0, self.noise)))
        work_ns *= 1 + self.drift * (1 - math.cos(self.now_ns / 60e9 * 2 * math.pi)) / 2
        work_ns *= self.frequency_pace
        if self._rng.random() < self.outliers:
            work_ns += self._rng.expovariate(1 / 5e6)
        start_ns = self.now_ns
        self._pass(work_ns)
        if self.heat:
            self.heat.pass_s((self.now_ns - start_ns) / 1e9, self.heat.busy)

    def _pass(self, work_ns: float) -> None:
        """Work that takes so long without the neighbour; who may come or go while it is done."""
        self.busy_ns += work_ns
        if self.neighbour is None:
            self.now_ns += work_ns
            return
        while work_ns > 0:
            pace, until_ns = self.neighbour.at(self.now_ns)
            step_ns = min(work_ns * pace, until_ns - self.now_ns)
            self.now_ns += step_ns
            work_ns -= step_ns / pace
            if self.neighbour.steals:
                self.stolen_ns += step_ns * (1 - 1 / pace)
            if work_ns < 1e-3:
                return


class SimulatedLine(Line):
    """A line to a measuring process that is a function call on a simulated machine."""

    def __init__(self, machine: SimulatedMachine, name: str) -> None:
        super().__init__(name, ())
        self.machine = machine
        self.requests: list[dict[str, Any]] = []
        self.pieces: deque[dict[str, Any]] = deque()

    def send(self, request: dict[str, Any]) -> None:
        self.pieces.clear()
        if "conditions" in request:
            self.pieces.append({"conditions": FACTS, "precisions": ["fp32", "int8"]})
            return
        if "memory" in request:
            for index, path in enumerate(request["memory"]):
                found = self.machine.memory_bytes(len(Path(path).read_bytes()))
                self.pieces.append({"model": index, "memory_bytes": found})
            self.pieces.append({"done": len(request["memory"])})
            return
        self.requests.append(request)
        try:
            measure.time_group(request, self.pieces.append, self.machine)
        except ValueError as error:
            self.pieces.append({"error": str(error)})

    def _answer(self, deadline: float, late: str) -> dict[str, Any]:
        return json.loads(json.dumps(self.pieces.popleft()))


class SimulatedDevice(Device):
    """A device whose measuring process is a function call on a simulated machine."""

    def __init__(self, machine: SimulatedMachine, name: str = "simulated") -> None:
        self.line: SimulatedLine
        super().__init__(name, SimulatedLine(machine, name))
        self.machine = machine

    @property
    def requests(self) -> list[dict[str, Any]]:
        return self.line.requests
