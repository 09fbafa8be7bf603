"""The line to a measuring process: requests go down it, answers come up, both JSON objects, one a line of text."""

import json
import math
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, TypeVar

from hwnas.errors import DeviceError, DeviceLostError, UnfitDeviceError

PAUSE_S = 1.0
"""Between two tries."""

AGAIN = " Run the command again: what was finished is kept."
"""What to do when a device is lost."""

Result = TypeVar("Result")


class Line:
    """A child process that is started when it is needed, and anew after it was lost.

    Attributes:
        name: of the device, for messages.
        tries: how often a request is made of a process that is lost meanwhile.
        deadline: of `time.monotonic()`; nothing is waited for any longer.
        mends: what a person can do about each fault that another try does not mend.
    """

    tries = 1
    mends: Mapping[str, str] = {}
    deadline = math.inf

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._command = tuple(command)
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[bytes] = queue.Queue()
        self._said = ""

    def placed(self, paths: Sequence[Path]) -> list[str]:
        """The names by which the process finds these files."""
        return [str(path) for path in paths]

    def send(self, request: dict[str, Any]) -> None:
        """Starts the process if need be, and hands it a request; `DeviceLostError` if it has died."""
        if self._process is None:
            self._start()
        try:
            self._write(json.dumps(request).encode() + b"\n")
        except OSError:
            self._lose("has died")

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer.

        Raises:
            DeviceLostError: the process died, has said nothing for so many seconds, or what is no answer.
            DeviceError: it refuses the request.
        """
        answer = self._answer(time.monotonic() + timeout_s, f"has not answered for {timeout_s:.3g} s")
        if "error" in answer and "model" not in answer:
            raise self._refusal(answer)
        return answer

    def _refusal(self, answer: dict[str, Any]) -> DeviceError:
        """The error for an answer that refuses a request."""
        return DeviceError(f"The device {self.name} refuses: {one_line(answer['error'])}.")

    @property
    def process_id(self) -> int | None:
        """The process on this machine, if one is running."""
        return self._process and self._process.pid

    def interrupt(self) -> None:
        """Ends the process while another thread waits for its answer; there it is lost, and not tried again."""
        self.deadline = 0.0
        if (number := self.process_id) is not None:
            with suppress(OSError):
                os.killpg(number, signal.SIGKILL)

    def close(self) -> None:
        """Ends the process; a later request starts another."""
        process, self._process = self._process, None
        if process is None:
            return
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
            self._said = complaints.read().decode(errors="replace").strip()

    def _start(self) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=os.environ | self._environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends the child in its own time
        )
        self._answers = queue.Queue()
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True)
        self._reader.start()

    def _write(self, data: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _answer(self, deadline: float, late: str) -> dict[str, Any]:
        """The next line as an object; `late` is what the process did if none comes until the deadline."""
        return self._read(self._line(deadline, late))

    def _read(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._lose(f"has sent {line[:60]!r}, which is no answer")
        if "fault" in answer and "error" not in answer:
            self.close()
            fault, what = answer["fault"], str(answer["what"])
            if fault in self.mends:
                raise self._unfit(fault, what)
            raise DeviceLostError(self._lost_text(f"was lost: {what}"))
        return answer

    def _unfit(self, fault: str, found: str) -> UnfitDeviceError:
        """The error for a fault that a person must mend."""
        return UnfitDeviceError(self.name, fault, found, self.mends[fault])

    def _lost_text(self, what: str) -> str:
        return f"The device {self.name} {what}.{AGAIN}"

    def _line(self, deadline: float, late: str) -> bytes:
        try:
            line = self._answers.get(timeout=max(0.0, min(deadline, self.deadline) - time.monotonic()))
        except queue.Empty:
            self._lose(late)
        if not line:
            self._lose("has died")
        return line

    def _last_words(self) -> str:
        """What the process complained of last, before it was closed."""
        return (self._said.splitlines() or [""])[-1].strip()

    def _lose(self, what: str) -> NoReturn:
        self.close()
        because = f" ({words})" if (words := self._last_words()) else ""
        raise DeviceLostError(f"The measuring process of {self.name} {what}{because}.{AGAIN}")


class Tries:
    """How often a request is made anew of a device that is lost meanwhile, and how long it may keep silent in all."""

    def __init__(self, line: Line, timeout_s: float) -> None:
        self._line, self._timeout_s, self._left = line, timeout_s, line.tries
        self.heard()

    def heard(self) -> None:
        """The device has answered: its time begins anew."""
        self._line.deadline = time.monotonic() + self._timeout_s

    def failed(self, error: DeviceLostError) -> None:
        """Waits a moment before the next try; raises the error if there is none, or no time for one."""
        self._left -= 1
        if not self._left or self._line.deadline < time.monotonic() + PAUSE_S:
            raise error
        time.sleep(PAUSE_S)

    def run(self, call: Callable[[], Result]) -> Result:
        """What the call returns, once the device is not lost in it."""
        while True:
            try:
                return call()
            except DeviceLostError as error:
                self.failed(error)


def one_line(error: str) -> str:
    """A runtime's words as part of a sentence of ours."""
    return " ".join(error.split()).rstrip(".")


def _pump(stream: IO[bytes], lines: "queue.Queue[bytes]") -> None:
    """Moves lines into the queue; an empty one stands for the end of the stream."""
    for line in stream:
        lines.put(line)
    lines.put(b"")
