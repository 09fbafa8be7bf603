"""The line to a board: OpenSSH starts `agent.py` there, which keeps models by their sums and runs what measures.

OpenSSH itself is used, so that the user's configuration, keys, agent and jump hosts count; the board's host key must be
known. Nothing but numpy and onnxruntime need be installed on the board, and nothing is left running when the line ends.
"""

import hashlib
import json
import math
import queue
import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hwnas.errors import DeviceError, DeviceLostError, UnfitDeviceError
from hwnas.lines import Line
from hwnas.registry import Entry

HERE = Path(__file__).parent

CONNECT_S, START_S, STEP_S = 10, 60.0, 60.0
"""How long a connection may take, then Python with numpy and onnxruntime, then the answer to each file."""

ALIVE_S, SILENCE_S = 10.0, 60.0
"""How often an empty line tells the board that this side is alive, and after how long without one it gives up."""

OPTIONS = (
    "-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", f"ConnectTimeout={CONNECT_S}",
    "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", "-o", "ClearAllForwardings=yes",
)  # fmt: skip

FIRST_WORDS = (b'{"hwnas agent ready"', b'{"fault"')
"""What comes before these is not of the agent."""

LEAST_PYTHON = (3, 10)
_BOOT = (
    'import os, sys; sys.version_info >= {least} or sys.exit("hwnas needs Python {text} or newer; this is " + '
    'sys.version.split()[0]); n, d = {size}, b""; '
    'exec("while len(d) < n: d += os.read(0, n - len(d)) or sys.exit(1)"); '
    'exec(compile(d, "agent.py", "exec")); main({folder})'
)
"""One line without single quotes, as any shell takes it between such; it reads the agent and nothing that follows."""

MENDS = {
    "unreachable": "See that it is on and in the network, and try: ssh {ssh}",
    "host key": "See whether it is the right host, and accept its key: ssh {ssh}",
    "login": "Make this log in without a question: ssh {ssh} (as with: ssh-copy-id {ssh})",
    "python": 'Install Python 3.10 or newer there, or name it in the registry, as in: python = "hwnas/bin/python"',
    "packages": "Install what is missing: ssh {ssh} {install}",
    "disk": 'Free some space or allow the access there, or name another folder: folder = "/media/large/hwnas"',
    "memory": "Free some memory there, or take a smaller space.",
    "cores": "Correct cores = [...] in the registry.",
    "busy": "Wait until that measurement is finished; two at once would disturb each other.",
}
"""What a person can do about each fault that another try does not mend."""

_REFUSALS = (
    ("host key verification failed", "host key"),
    ("host identification has changed", "host key"),
    ("permission denied", "login"),
    ("too many authentication failures", "login"),
    ("hwnas needs python", "python"),
    ("command not found", "python"),
    (": not found", "python"),
    ("no such file or directory", "python"),
    ("exec format error", "python"),
    ("could not resolve hostname", "unreachable"),
)
"""What ssh, the shell and Python say when no further try would help."""


class SshLine(Line):
    """A line to a board of the registry; what is lost meanwhile is tried again.

    Args:
        entry: of the registry, with an address.
        program: the measuring program, as one file.
        packages: what `pip install` must be given for it there.
    """

    tries = 3
    mends = MENDS

    def __init__(self, entry: Entry, program: bytes, packages: Sequence[str]) -> None:
        self.entry, self._program, self._packages = entry, program, packages
        python = entry.python or "python3"
        self._agent = HERE.joinpath("agent.py").read_bytes()
        boot = _BOOT.format(
            least=LEAST_PYTHON,
            text=".".join(map(str, LEAST_PYTHON)),
            size=len(self._agent),
            folder=json.dumps(entry.folder),
        )
        words = ("ssh", *OPTIONS, *entry.ssh_words, f"exec {python} -c {shlex.quote(boot)}")
        super().__init__(entry.name, words)
        self._folder = ""
        self._started = False
        self._outgoing: queue.Queue[bytes | None] = queue.Queue()

    # ---- the conversation with the agent -------------------------------------------------------------------------

    def placed(self, paths: Sequence[Path]) -> list[str]:
        """Sends the files that the board does not have; the names by which it has them all.

        A file that cannot be read is named as it is here: the board will say that it has none such.
        """
        contents = {path: path.read_bytes() for path in paths if path.is_file()}
        names = {path: _name_of(content, path.suffix) for path, content in contents.items()}
        self._hold({names[path]: content for path, content in contents.items()})
        return [f"{self._folder}/{names[path]}" if path in names else str(path) for path in paths]

    def facts(self) -> dict[str, Any]:
        """What the board is and has: what `machine_facts.facts` sees, which needs no package; then the line is closed.

        Raises:
            DeviceError: as of `receive`.
        """
        self.deadline = math.inf
        if self._process is None:
            self._connect()
        self._run(HERE.joinpath("machine_facts.py").read_bytes(), ".py", (self._folder, *self._packages), cores=None)
        answer = self._ask({"facts": True})
        self.close()
        return answer["facts"]

    def send(self, request: dict[str, Any]) -> None:
        if self._process is None:
            self._connect()
        if not self._started:
            self._run(self._program, ".pyz", (self.entry.runtime,), self.entry.cores)
        super().send(request)

    def _connect(self) -> None:
        """Starts ssh and, through it, the agent."""
        self._start()
        self._started, self._outgoing = False, queue.Queue()
        threading.Thread(target=self._carry, args=(self._outgoing, self._process), daemon=True).start()
        self._write(self._agent)
        deadline, talk = time.monotonic() + CONNECT_S + START_S, 0
        while not (line := self._line(deadline, "has not started Python in time")).startswith(FIRST_WORDS):
            talk += len(line)  # of a login shell
            if talk > 1 << 16:
                self._lose(f"sends {line[:60]!r} and no end of it instead of starting Python")
        self._folder = self._read(line)["hwnas agent ready"]

    def _hold(self, files: Mapping[str, bytes]) -> None:
        """Makes sure that the board has these files, by name."""
        if self._process is None:
            self._connect()
        missing = self._ask({"missing": {name: len(content) for name, content in files.items()}})["missing"]
        for name in missing:
            self._write(json.dumps({"hold": name, "bytes": len(files[name])}).encode() + b"\n" + files[name])
        for _ in missing:
            self._answer(time.monotonic() + STEP_S, f"has not taken a file for {STEP_S:g} s")

    def _run(self, program: bytes, suffix: str, words: Sequence[str], cores: Sequence[int] | None) -> None:
        """Makes the agent start a program."""
        name = _name_of(program, suffix)
        self._hold({name: program})
        python = shlex.split(self.entry.python)
        message = {"start": name, "words": words, "cores": cores, "silence_s": SILENCE_S}
        self._ask({**message, "python": python if len(python) > 1 else []})
        self._started = True

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        self._write(json.dumps(message).encode() + b"\n")
        return self._answer(time.monotonic() + STEP_S, f"has not answered for {STEP_S:g} s")

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def _write(self, data: bytes) -> None:
        self._outgoing.put(data)

    def _carry(self, outgoing: "queue.Queue[bytes | None]", process: Any) -> None:
        """Writes in a thread, so that a board that takes nothing does not block; empty lines when there is nothing."""
        try:
            while True:
                try:
                    data = outgoing.get(timeout=ALIVE_S)
                except queue.Empty:
                    data = b"\n"
                if data is None:
                    return
                process.stdin.write(data)
                process.stdin.flush()
        except (OSError, ValueError):
            return  # the line has ended; the reader tells

    def close(self) -> None:
        self._outgoing.put(None)
        self._started = False
        super().close()

    def _lose(self, what: str) -> NoReturn:
        self.close()
        words = self._said.lower()
        for sign, fault in _REFUSALS:
            if sign in words:
                raise self._unfit(fault, self._last_words())
        raise DeviceLostError(self._lost_text(f"{what} ({last})" if (last := self._last_words()) else what))

    def _refusal(self, answer: dict[str, Any]) -> DeviceError:
        if "fault" not in answer:
            return super()._refusal(answer)
        return self._unfit(answer["fault"], answer["error"].partition(": pip install")[0])

    def _unfit(self, fault: str, found: str) -> UnfitDeviceError:
        ssh = shlex.join(self.entry.ssh_words)
        python = shlex.split(self.entry.python or "python3")[-1]
        install = shlex.quote(f"{python} -m pip install {' '.join(self._packages)}")
        return UnfitDeviceError(self.name, fault, found, MENDS[fault].format(ssh=ssh, install=install))


def _name_of(content: bytes, suffix: str) -> str:
    """The name by which a board keeps a file: the sum of what is in it, and a suffix."""
    return hashlib.sha256(content).hexdigest() + suffix
