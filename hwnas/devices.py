"""Where models are timed: a device hands requests to a measuring process here or on a board, and reads its answers.

A process that dies or stops answering costs the group it was timing, not the session: the next request starts
another.
"""

import base64
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from hwnas.adb import AdbLine
from hwnas.calibration import Measurement
from hwnas.conditions import Conditions, usual_batch
from hwnas.errors import DeviceError, DeviceLostError, HwnasError
from hwnas.lines import Line, Tries, one_line
from hwnas.registry import LOCAL, Entry, registered
from hwnas.relation import Relation
from hwnas.runtimes import GPU_RUNTIMES, RUNTIMES, board_program, command_of, local_name, packages_of
from hwnas.ssh import SshLine

ATTEMPTS = 3
"""How often a model is timed for which the machine was too disturbed."""

CONDITIONS_S = 120.0
"""How long a device may take to start and say what it is."""


class MemoryNotShownError(DeviceError):
    """A device whose system does not tell the peak memory of a process."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How a group of models is timed; docs/measuring.md gives the reasons.

    Attributes:
        threads: threads inside an operator.
        rounds, patience_s: a model that is not done after so many samples and so long is given up.
        agreeing, tolerance: a model is done when so many samples lie so close, relatively, to the least of them.
        sample_ms, least_runs: a sample is the least of so many runs, and of so many milliseconds, at least.
        warm_up_runs, warm_up_ms: runs before the first sample, and how long they take at least.
        cool_down_s: how long to wait at most for a processor that is too hot.
        seed: of the inputs and of the order in each round.
        timeout_s: how long the device may keep silent, in seconds, before it counts as hung.
    """

    threads: int = 1
    rounds: int = 12
    patience_s: float = 5.0
    agreeing: int = 3
    tolerance: float = 0.02
    sample_ms: float = 1.0
    least_runs: int = 10
    warm_up_runs: int = 3
    warm_up_ms: float = 2.0
    cool_down_s: float = 60.0
    seed: int = 0
    timeout_s: float = 300.0

    @property
    def request(self) -> dict[str, Any]:
        """The fields that the device is told."""
        return {name: value for name, value in asdict(self).items() if name != "timeout_s"}


DEFAULT_TIMING = Timing()


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """What was seen of the machine while a group of models was timed; `None` where the system does not show it.

    Attributes:
        models, unsteady: how many were timed, and for how many the machine was too disturbed.
        anchor_ms: samples of the anchor.
        waited_s: how long the group waited for the processor to cool down.
        load_average: how many processes wanted to run, at the end.
        stolen: the share of the processors' time that the host of a virtual machine gave to others.
        megahertz: frequency before and after.
        celsius: the highest temperature at the end.
    """

    models: int
    unsteady: int
    anchor_ms: Measurement
    waited_s: float
    load_average: float
    stolen: float | None
    megahertz: tuple[float | None, float | None]
    celsius: float | None

    @staticmethod
    def read(answer: dict[str, Any], unsteady: int) -> "GroupFacts":
        """From the last answer of `measure.time_group`."""
        before, after = answer["before"], answer["after"]
        ticks = after.get("ticks", 0) - before.get("ticks", 0)
        return GroupFacts(
            models=answer["done"],
            unsteady=unsteady,
            anchor_ms=Measurement(tuple(answer["anchor_samples_ms"])),
            waited_s=answer["waited_s"],
            load_average=after["load_average"],
            stolen=(after["stolen_ticks"] - before["stolen_ticks"]) / ticks if ticks > 0 else None,
            megahertz=(before["megahertz"], after["megahertz"]),
            celsius=after["celsius"],
        )


class Device:
    """A processor and a runtime that time ONNX models, at the other end of a line.

    Attributes:
        anchor_ms: what the anchor takes when nothing disturbs the machine, as far as is known. A samples counts only
            while the anchor takes about as long.
        groups: what was seen of the machine in each group so far.
        at_once: how many groups may be asked for before the first of them is read.
    """

    at_once = 1

    def __init__(self, name: str, line: Line) -> None:
        self.name, self.line = name, line
        self._busy = False
        self._threads: int | None = None
        self.anchor_ms: float | None = None
        self.groups: list[GroupFacts] = []

    @property
    def relations(self) -> tuple[Relation, ...]:
        """How the boards that measured for this device relate to each other; none if it is not a farm."""
        return ()

    def conditions(self, threads: int = 1, batch: int = 1, precision: str = "fp32") -> Conditions:
        """What a measurement with these settings would be measured on.

        Raises:
            HwnasError: more threads than processors, or a precision that this device does not run.
        """
        if batch < 1:
            raise HwnasError(f"A batch has at least one image; {batch} were asked for.")
        answer = self._asked(CONDITIONS_S, lambda: {"conditions": True})
        if precision not in answer["precisions"]:
            raise HwnasError(f"{self.name} runs {' and '.join(answer['precisions'])}; '{precision}' it does not.")
        facts = answer["conditions"]
        if not 1 <= threads <= facts["cores"]:
            raise HwnasError(
                f"{threads} threads cannot be timed on {self.name}, which has {facts['cores']} processors. "
                f"Give --threads 1 to {facts['cores']}."
            )
        return Conditions(device=self.name, threads=threads, batch=batch, precision=precision, **facts)

    def measure(
        self, models: Sequence[bytes | Path], timing: Timing = DEFAULT_TIMING
    ) -> Iterator[tuple[int, Measurement]]:
        """Times models as one group: the request leaves at once, the iterator gives results as they come.

        Args:
            models: serialised models, or files.
            timing: how.

        Yields:
            The index of a model and its samples.

        Raises:
            DeviceError: the device died or hung (it starts anew with the next request), or, after all others were
                given, that models failed.
        """
        folder = tempfile.TemporaryDirectory(prefix="hwnas-models-")
        paths = [_as_file(model, Path(folder.name) / f"{index}.onnx") for index, model in enumerate(models)]

        anchor_path = _as_file(anchor_model(), Path(folder.name) / "anchor.onnx")

        def begin(left: Sequence[Path]) -> None:
            *placed, anchor = self._placed([*left, anchor_path], timing.threads)
            self.line.send({"models": placed, **timing.request, "anchor": anchor, "anchor_ms": self.anchor_ms})

        return self._results(paths, self._answers(paths, begin, timing.timeout_s), folder)

    def _results(
        self,
        paths: list[Path],
        answers: Iterator[tuple[int, dict[str, Any]]],
        folder: tempfile.TemporaryDirectory[str],
    ) -> Iterator[tuple[int, Measurement]]:
        failures: list[str] = []
        unsteady = 0
        with folder:
            for index, answer in answers:
                if "samples_ms" in answer:
                    unsteady += answer["pace"] > 1
                    yield index, Measurement(tuple(answer["samples_ms"]), answer["pace"])
                elif "error" in answer:
                    failures.append(f"{paths[index].name}: {answer['error']}")
                else:
                    self.anchor_ms = answer["anchor_ms"]
                    self.groups.append(GroupFacts.read(answer, unsteady))
        if failures:
            raise DeviceError(f"{len(failures)} of {len(paths)} models do not run on {self.name}: {failures[0]}")

    def _answers(
        self, paths: Sequence[Path], begin: Callable[[Sequence[Path]], None], timeout_s: float
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Begins a request at once; the iterator gives each answer with the index of its file, the last with -1.

        If the device is lost, the request is made again for the files that are not yet answered.
        """
        tries = Tries(self.line, timeout_s)
        tries.run(lambda: begin(paths))
        self._busy = True
        return self._followed(paths, begin, timeout_s, tries)

    def _followed(
        self, paths: Sequence[Path], begin: Callable[[Sequence[Path]], None], timeout_s: float, tries: Tries
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        asked = left = list(range(len(paths)))
        tries.heard()
        while True:
            try:
                answer = self.line.receive(timeout_s)
            except DeviceLostError as error:
                tries.failed(error)
                asked, again = left, [paths[index] for index in left]
                tries.run(lambda again=again: begin(again))
                self._busy = True
                continue
            if "model" not in answer:
                self._busy = False
                yield -1, answer
                return
            index = asked[answer["model"]]
            left = [other for other in left if other != index]
            yield index, answer
            tries.heard()  # what was done with the answer is not the device's time

    def measure_steadily(
        self, models: Sequence[bytes | Path], timing: Timing = DEFAULT_TIMING
    ) -> dict[int, Measurement]:
        """Times models as one group, and those again, a few times, for which the machine was too disturbed.

        Returns:
            The measurement of each model, by index; its pace is above 1 where no attempt found the machine steady.

        Raises:
            DeviceError: as of `measure`.
        """
        found: dict[int, Measurement] = {}
        again = list(range(len(models)))
        for _ in range(ATTEMPTS):
            results = self.measure([models[index] for index in again], timing)
            found |= {again[position]: measurement for position, measurement in results}
            again = [index for index in again if found[index].pace > 1]
            if not again:
                break
        return found

    def peak_memory(self, models: Sequence[bytes | Path], timing: Timing = DEFAULT_TIMING) -> Iterator[tuple[int, int]]:
        """What each model adds to the peak memory of a process, one process a model; see `measure.measure_memory`.

        Args:
            models: serialised models, or files.
            timing: whose threads, seed and time-out count.

        Yields:
            The index of a model and bytes.

        Raises:
            DeviceError: the device died or hung, or a model does not run.
            MemoryNotShownError: the system does not tell the peak memory of a process.
        """
        with tempfile.TemporaryDirectory(prefix="hwnas-models-") as folder:
            paths = [_as_file(model, Path(folder) / f"{index}.onnx") for index, model in enumerate(models)]

            def begin(left: Sequence[Path]) -> None:
                placed = self._placed(left, timing.threads)
                self.line.send({"memory": placed, "threads": timing.threads, "seed": timing.seed})

            for index, answer in self._answers(paths, begin, timing.timeout_s):
                if "not_shown" in answer:
                    raise MemoryNotShownError(f"{self.name} does not show the peak memory of a process.")
                if "error" in answer:
                    name, error = paths[index].name, one_line(answer["error"])
                    raise DeviceError(f"The memory of {name} cannot be measured on {self.name}: {error}.")
                if "memory_bytes" in answer:
                    yield index, answer["memory_bytes"]

    def outputs(self, model: bytes | Path, timing: Timing = DEFAULT_TIMING) -> list[np.ndarray]:
        """What a model computes from random inputs that the seed makes, the same on every device.

        Args:
            model: serialised, or a file.
            timing: whose threads, seed and time-out count.

        Raises:
            DeviceError: the device died or hung, or the model does not run.
        """
        with tempfile.TemporaryDirectory(prefix="hwnas-models-") as folder:
            path = _as_file(model, Path(folder) / "model.onnx")

            def request() -> dict[str, Any]:
                (placed,) = self._placed([path], timing.threads)
                return {"outputs": placed, "threads": timing.threads, "seed": timing.seed}

            answer = self._asked(timing.timeout_s, request)
        if "error" in answer:
            raise DeviceError(f"{path.name} does not run on {self.name}: {one_line(answer['error'])}.")
        coded = [(base64.b64decode(x["float32"]), x["shape"]) for x in answer["outputs"]]
        return [np.frombuffer(content, np.float32).reshape(shape) for content, shape in coded]

    def profile(
        self, model: bytes | Path, timing: Timing, on_round: Callable[[int], None] = lambda number: None
    ) -> dict[str, Any]:
        """Times one model node by node: the last answer of `measure.profile_model`.

        Args:
            model: serialised, or a file.
            timing: how; a round takes samples with and without the runtime's profile.
            on_round: called with the number of each round that is finished.

        Raises:
            DeviceError: the device died or hung, or the model does not run.
        """
        with tempfile.TemporaryDirectory(prefix="hwnas-models-") as folder:
            path = _as_file(model, Path(folder) / "model.onnx")

            def request() -> dict[str, Any]:
                return {"profile": self._placed([path], timing.threads)[0], **timing.request}

            answer = self._asked(timing.timeout_s, request, on_round)
        if "error" in answer:
            error = one_line(answer["error"])
            raise DeviceError(f"{path.name} does not run on {self.name}: {error}. Export it anew, or give another.")
        return answer

    # ---- the line ------------------------------------------------------------------------------------------------

    def _asked(
        self,
        timeout_s: float,
        request: Callable[[], dict[str, Any]],
        on_round: Callable[[int], None] = lambda number: None,
    ) -> dict[str, Any]:
        """The answer to a request, which is made anew if the device is lost meanwhile."""
        tries = Tries(self.line, timeout_s)

        def once() -> dict[str, Any]:
            self._end_if_busy()
            self.line.send(request())
            self._busy = True
            while "round" in (answer := self.line.receive(timeout_s)):
                tries.heard()
                on_round(answer["round"])
            self._busy = False
            return answer

        return tries.run(once)

    def _placed(self, paths: Sequence[Path], threads: int) -> list[str]:
        """The names by which the measuring process finds files, which are sent to where it is."""
        if self._threads not in (None, threads):
            self.close()  # some runtimes cannot change their threads
        self._threads = threads
        self._end_if_busy()
        return self.line.placed(paths)

    def _end_if_busy(self) -> None:
        if self._busy:
            self.close()  # nobody waits for what it is timing

    def close(self) -> None:
        """Ends the measuring process; a later request starts another."""
        self._busy = False
        self.line.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


NO_ARM = """There is no device 'arm' yet, and this machine has another processor. Four ways to go on:
  a board that ssh reaches:    hwnas devices add arm USER@BOARD   (docs/devices.md starts from a bare Debian)
  a phone, by adb:             hwnas devices add arm adb:SERIAL --runner FILE   (docs/devices.md)
  on an ARM machine itself:    install hwnas there and run the same command; its own processor is 'arm'
  with no board at hand:       an emulated one shows that all works, though not how fast (docs/devices.md)"""


def entry_of(name: str) -> Entry:
    """What the registry says of a device, or would say of this machine.

    Raises:
        HwnasError: there is none of that name; the message says how to go on.
    """
    known = {} if name in RUNTIMES else registered()
    if name in known:
        return known[name][0]
    if local := local_name(name):
        return Entry(local, LOCAL, runtime=local)
    if name == "arm":
        raise HwnasError(NO_ARM)
    raise HwnasError(
        f"There is no device '{name}'. The devices are: {', '.join((*RUNTIMES, *known))}. "
        f"Add one: hwnas devices add {name} USER@HOST, or a phone: hwnas devices add {name} adb:SERIAL --runner FILE"
    )


def boards_of(farm: Entry) -> list[Entry]:
    """The boards of a farm, each a device of its own; `HwnasError` if one is not there, or is a farm."""
    boards = [entry_of(name) for name in farm.boards]
    for board in boards:
        if board.boards:
            raise HwnasError(f"The boards of '{farm.name}' are devices, not farms; '{board.name}' has boards itself.")
    return boards


def threads_of(name: str, asked: int | None) -> int:
    """The threads that are asked for, or else those that the registry gives the device, or else one."""
    return asked or entry_of(name).threads


def batch_of(name: str, asked: int | None) -> int:
    """The images a run that are asked for, or else the usual ones of what runs the models."""
    entry = entry_of(name)
    return asked or usual_batch((boards_of(entry) or [entry])[0].runtime in GPU_RUNTIMES)


def line_to(entry: Entry) -> Line:
    """The line to the measuring process of a device."""
    check_runtime(entry)
    if entry.is_phone:
        return AdbLine(entry)
    if not entry.is_local:
        return SshLine(entry, board_program(entry.runtime), packages_of(entry.runtime))
    command = command_of(entry.runtime)
    python = shlex.split(entry.python) or [command[0]]
    cores = {"HWNAS_CORES": json.dumps(entry.cores)} if entry.cores else {}
    return Line(entry.name, (*python, *command[1:]), {**cores, "HWNAS_PYTHON": json.dumps(python)})


def facts_of(entry: Entry) -> dict[str, Any]:
    """What a device is and has: what `machine_facts.facts` sees there, for which nothing but Python need be installed.

    Raises:
        DeviceError: it cannot be reached, or has no Python.
    """
    line = line_to(entry)
    if isinstance(line, SshLine):
        return line.facts()
    if isinstance(line, AdbLine):
        return _facts_down(line)
    program = str(Path(__file__).with_name("machine_facts.py"))
    python = shlex.split(entry.python) or [sys.executable]
    return _facts_down(Line(entry.name, (*python, program, entry.folder, *packages_of(entry.runtime))))


def _facts_down(line: Line) -> dict[str, Any]:
    try:
        line.send({"facts": True})
        return line.receive(CONDITIONS_S)["facts"]
    finally:
        line.close()


def check_runtime(entry: Entry) -> None:
    """Raises `HwnasError` if the runtime of a device is none."""
    if entry.runtime not in RUNTIMES:
        raise HwnasError(
            f"The runtime of the device '{entry.name}' is one of {', '.join(RUNTIMES)}; it is '{entry.runtime}'."
        )
    if entry.is_phone and entry.runtime != "cpu":
        raise HwnasError(f"A phone's runner times cpu; the runtime of the device '{entry.name}' is '{entry.runtime}'.")


@cache
def anchor_model() -> bytes:
    """ShuffleNet V2 0.5x for 32x32 images: it takes less than a millisecond, so that it can be run very often.

    Its time rises with whatever slows networks down: a lower frequency, a hot chip, a busy neighbour.
    """
    from hwnas.onnx_model import random_weights, to_onnx
    from hwnas.reference.shufflenet import shufflenet_v2

    network = shufflenet_v2("0.5x", input_size=32, classes=10, stem_stride=1, max_pool=False)
    return to_onnx(network, random_weights(network, 0)).SerializeToString()


def _as_file(model: bytes | Path, path: Path) -> Path:
    if isinstance(model, Path):
        return model.absolute()
    path.write_bytes(model)
    return path
