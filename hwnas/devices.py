"""Where models are timed: a device runs `measure.py` as a child process and speaks JSON lines with it.

A child that dies or stops answering costs the group it was timing, not the session: the next request starts a new one.
"""

import base64
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

import numpy as np

from hwnas.calibration import Measurement
from hwnas.errors import HwnasError
from hwnas.latency import Conditions
from hwnas.runtimes import RUNTIMES, command_of, local_name

ATTEMPTS = 3
"""How often a model is timed for which the machine was too disturbed."""


class DeviceError(HwnasError):
    """A device that died, stopped answering, or could not run a model."""


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
    """A processor and a runtime that time ONNX models, behind a child process that is started when it is needed.

    Attributes:
        anchor_ms: what the anchor takes when nothing disturbs the machine, as far as is known. A samples counts only
            while the anchor takes about as long.
        groups: what was seen of the machine in each group so far.
    """

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._command = tuple(command)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._busy = False
        self._threads: int | None = None
        self.anchor_ms: float | None = None
        self.groups: list[GroupFacts] = []

    def conditions(self, threads: int = 1, batch: int = 1, precision: str = "fp32") -> Conditions:
        """What a measurement with these settings would be measured on.

        Raises:
            HwnasError: more threads than processors, or a precision that this device does not run.
        """
        if batch < 1:
            raise HwnasError(f"A batch has at least one image; {batch} were asked for.")
        self._send({"conditions": True})
        answer = self._receive(timeout_s=120)
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
        anchor = {"anchor": str(anchor_path), "anchor_ms": self.anchor_ms}
        request = {"models": [str(path) for path in paths], **timing.request, **anchor}
        self._send(request)
        self._busy = True
        return self._results(paths, timing, folder)

    def _results(
        self, paths: list[Path], timing: Timing, folder: tempfile.TemporaryDirectory[str]
    ) -> Iterator[tuple[int, Measurement]]:
        failures: list[str] = []
        unsteady = 0
        with folder:
            while "done" not in (answer := self._receive(timing.timeout_s)):
                if "samples_ms" in answer:
                    unsteady += answer["pace"] > 1
                    yield answer["model"], Measurement(tuple(answer["samples_ms"]), answer["pace"])
                else:
                    failures.append(f"{paths[answer['model']].name}: {answer['error']}")
        self._busy = False
        self.anchor_ms = answer["anchor_ms"]
        self.groups.append(GroupFacts.read(answer, unsteady))
        if failures:
            raise DeviceError(f"{len(failures)} of {len(paths)} models do not run on {self.name}: {failures[0]}")

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
            self._send({"memory": list(map(str, paths)), "threads": timing.threads, "seed": timing.seed})
            self._busy = True
            while "done" not in (answer := self._receive(timing.timeout_s)):
                if "not_shown" in answer:
                    raise MemoryNotShownError(f"{self.name} does not show the peak memory of a process.")
                if "error" in answer:
                    name, error = paths[answer["model"]].name, _one_line(answer["error"])
                    raise DeviceError(f"The memory of {name} cannot be measured on {self.name}: {error}.")
                yield answer["model"], answer["memory_bytes"]
            self._busy = False

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
            self._send({"outputs": str(path), "threads": timing.threads, "seed": timing.seed})
            self._busy = True
            answer = self._receive(timing.timeout_s)
            self._busy = False
        if "error" in answer:
            raise DeviceError(f"{path.name} does not run on {self.name}: {_one_line(answer['error'])}.")
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
            self._send({"profile": str(path), **timing.request})
            self._busy = True
            while "round" in (answer := self._receive(timing.timeout_s)):
                on_round(answer["round"])
            self._busy = False
        if "error" in answer:
            error = _one_line(answer["error"])
            raise DeviceError(f"{path.name} does not run on {self.name}: {error}. Export it anew, or give another.")
        return answer

    # ---- the child process ---------------------------------------------------------------------------------------

    def _send(self, request: dict[str, Any]) -> None:
        threads = request.get("threads", self._threads)
        if self._busy or self._threads not in (None, threads):
            self.close()  # nobody waits for what it is timing; and some runtimes cannot change their threads
        self._threads = threads
        process = self._process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        except OSError:
            self._fail("has died")

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            self._fail(f"has not answered for {timeout_s:g} s")
        if not line:
            self._fail("has died")
        answer = json.loads(line)
        if "error" in answer and "model" not in answer:
            raise DeviceError(f"The device {self.name} refuses: {_one_line(answer['error'])}.")
        return answer

    def _start(self) -> subprocess.Popen[str]:
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the process
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child in its own time
        )
        self._process, self._answers = process, queue.Queue()
        assert process.stdout is not None
        self._reader = threading.Thread(target=_pump, args=(process.stdout, self._answers), daemon=True)
        self._reader.start()
        return process

    def _fail(self, what: str) -> NoReturn:
        last_words = self._end_process()
        because = f" ({last_words})" if last_words else ""
        raise DeviceError(
            f"The measuring process of {self.name} {what}{because}. Run the command again: what was finished is kept."
        )

    @property
    def process_id(self) -> int | None:
        """The child process, if one is running."""
        return self._process and self._process.pid

    def close(self) -> None:
        """Ends the child process; a later request starts another."""
        self._end_process()

    def _end_process(self) -> str:
        """Ends the child process, if there is one; returns the last line that it wrote to its standard error."""
        process, self._process, self._busy = self._process, None, False
        if process is None:
            return ""
        with suppress(OSError):  # with the process in which it measures memory, if one hangs
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        self._reader.join()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        with self._complaints as complaints:
            complaints.seek(0)
            return (complaints.read().strip().splitlines() or [""])[-1]

    def __enter__(self) -> "Device":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def device(name: str) -> Device:
    """The device of that name, such as those of `runtimes.RUNTIMES`; `HwnasError` if there is none."""
    local = local_name(name)
    if local is None:
        raise HwnasError(f"There is no device '{name}'. The devices are: {', '.join(RUNTIMES)}.")
    return Device(local, command_of(local))


def _one_line(error: str) -> str:
    """A runtime's words as part of a sentence of ours."""
    return " ".join(error.split()).rstrip(".")


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


def _pump(stream: IO[str], lines: "queue.Queue[str]") -> None:
    """Moves lines into the queue; an empty one stands for the end of the stream."""
    for line in stream:
        lines.put(line)
    lines.put("")
