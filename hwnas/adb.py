"""The line to a phone: the user's own `adb` reaches it, and `phone.py`, a process on this computer, measures with it.

`adb` itself is used, so that the user's server, keys, and the phones that it has found count.
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hwnas.errors import UnfitDeviceError
from hwnas.lines import Line
from hwnas.registry import FOLDER, Entry

SHELL_S, CONNECT_S, RETURN_S = 30.0, 15.0, 5.0
"""How long a short command on the phone may take, the making of a connection, and the return of a lost phone."""

PUSH_S, PUSH_BYTES_A_S = 30.0, 1 << 20
"""How long files may take on their way, and how many bytes of them a second come on top."""

MENDS = {
    "adb": "Install it: sudo apt-get install adb (or the platform-tools of Android), and see that it is in $PATH.",
    "unauthorised": "Unlock the phone and allow USB debugging from this computer. If it does not ask: "
    "adb kill-server; adb devices",
    "permissions": "Let this user reach USB devices: sudo apt-get install android-sdk-platform-tools-common; then plug "
    "it in again",
    "several": "Name one by the serial number that this shows, as adb:SERIAL: adb devices",
    "disk": "Free some space there, such as that of the models: {adb} shell rm -r {folder}; or allow "
    "the access, or name another folder in the registry.",
    "runner": "Give the runner anew (docs/devices.md tells how to get it): "
    "hwnas devices add {name} {target} --runner FILE",
    "abi": "Build the runner and its libraries for that (docs/devices.md), and add the phone with them: "
    "hwnas devices add {name} {target} --runner FILE",
    "libraries": "Give them too: hwnas devices add {name} {target} --runner {runner} --library libonnxruntime.so",
    "busy": "Wait until that measurement is finished; two at once would disturb each other.",
    "cores": "Correct cores = [...] in the registry; this tells which there are: {adb} shell cat "
    "/sys/devices/system/cpu/present",
}  # fmt: skip
"""What a person can do about each fault that another try does not mend."""

_SIGNS = (
    ("unauthorized", "unauthorised"),
    ("no permissions", "permissions"),
    ("insufficient permissions", "permissions"),
    ("more than one device", "several"),
    ("no space left", "disk"),
    ("read-only file system", "disk"),
    ("file too large", "disk"),
    ("permission denied", "disk"),
    ("mkdir: ", "disk"),
    ("cannot link executable", "libraries"),
    ("error while loading shared libraries", "libraries"),
    ("exec format error", "abi"),
    ("not executable: ", "abi"),
    ("cannot execute binary", "abi"),
    ("syntax error", "abi"),  # of a shell that was given it instead
    ("taskset: ", "cores"),
)
"""What adb, the shell and the linker of Android say when no further try would help."""

LOST = "lost"
"""The fault of a phone that another try may find again."""


class PhoneFault(SystemExit):
    """What keeps a phone from answering ends the process that measures with it, whoever handles a model's failure.

    Attributes:
        fault: one of `MENDS`, or `LOST`.
        what: was seen.
    """

    def __init__(self, fault: str, what: str) -> None:
        super().__init__(f"{fault}: {what}")
        self.fault, self.what = fault, what


def fault_in(text: str) -> PhoneFault:
    """The fault that some words tell of, as far as they are known."""
    known = next((fault for sign, fault in _SIGNS if sign in text.lower()), LOST)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in lines if any(sign in line.lower() for sign, _ in _SIGNS)), lines[-1] if lines else "")
    return PhoneFault(known, told or "adb has ended without a word")


@dataclass(frozen=True, slots=True)
class Adb:
    """The client, one process a command; every one of them ends in time, or raises `PhoneFault`.

    Attributes:
        words: what each command starts with: `adb`, and the phone's serial number, if one was given.
    """

    words: tuple[str, ...]

    def run(self, *words: str, timeout_s: float) -> str:
        """What a command of adb prints."""
        try:
            done = subprocess.run(
                [*self.words, *words], stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
            )
        except FileNotFoundError:
            raise PhoneFault("adb", "there is no program 'adb' here") from None
        except subprocess.TimeoutExpired:
            raise PhoneFault(LOST, f"adb {words[0]} has not ended within {timeout_s:g} s") from None
        if done.returncode:
            raise fault_in((done.stderr + b"\n" + done.stdout).decode(errors="replace"))
        return done.stdout.decode(errors="replace")

    def connect(self) -> None:
        """Makes sure that the phone is reached: one in the network is looked for, and each is waited for a little."""
        if self._is_ready():
            return
        address = self.words[-1] if len(self.words) > 1 else ""
        for verb in ("disconnect", "connect") if ":" in address else ():
            with suppress(PhoneFault):  # the last command tells whether it can be reached
                Adb(self.words[:1]).run(verb, address, timeout_s=CONNECT_S)
        with suppress(PhoneFault):
            self.run("wait-for-device", timeout_s=RETURN_S)
        self.run("get-state", timeout_s=CONNECT_S)

    def _is_ready(self) -> bool:
        try:
            return self.run("get-state", timeout_s=CONNECT_S).strip() == "device"
        except PhoneFault as fault:
            if fault.fault == LOST:
                return False
            raise

    def shell(self, script: str, timeout_s: float = SHELL_S) -> tuple[int, str]:
        """The status of a script for the phone's shell, and what it printed. Its last command must not be `exit`."""
        text = self.run("shell", f"exec 2>&1\n{script}\ns=$?\necho\necho hwnas $s", timeout_s=timeout_s)
        printed, end, status = text.replace("\r\n", "\n").rpartition("\nhwnas ")
        if not end or not status.strip().isdigit():
            raise PhoneFault(LOST, f"its shell was cut off after {text[-60:]!r}")
        return int(status), printed

    def push(self, files: Sequence[Path], folder: str) -> None:
        """Sends files into a folder of the phone, under their own names."""
        size = sum(file.stat().st_size for file in files)
        self.run("push", *map(str, files), f"{folder}/", timeout_s=PUSH_S + size / PUSH_BYTES_A_S)


class AdbLine(Line):
    """A line to a phone of the registry; what is lost meanwhile is tried again."""

    tries = 3
    mends = MENDS

    def __init__(self, entry: Entry) -> None:
        program = Path(__file__).with_name("phone.py")
        super().__init__(entry.name, (sys.executable, str(program), json.dumps(asdict(entry))))
        self.entry = entry

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next answer, as of any line; the phone is alive as long as the runner's starts succeed."""
        while "alive" in (answer := super().receive(timeout_s)):
            self.deadline = time.monotonic() + timeout_s
        return answer

    def _unfit(self, fault: str, found: str) -> UnfitDeviceError:
        entry = self.entry
        mend = MENDS[fault].format(
            adb=shlex.join(entry.adb_words), name=entry.name, target=entry.target, runner=entry.runner,
            folder=phone_folder(entry),
        )  # fmt: skip
        return UnfitDeviceError(self.name, fault, found, mend)


PHONE_FOLDER = "/data/local/tmp/hwnas"
"""Where a phone lets files be kept and run."""


def phone_folder(entry: Entry) -> str:
    """The folder of a phone's models and runner."""
    return PHONE_FOLDER if entry.folder == FOLDER else entry.folder
