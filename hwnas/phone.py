"""Times ONNX models on a phone, from this computer: the process at the other end of an `adb.AdbLine`.

    python hwnas/phone.py ENTRY < requests.jsonl

`ENTRY` is one of the registry, as a JSON object. Requests and answers are those of `measure.py`, and so is the
protocol: groups, rounds, the anchor. Only a sample is another: a start of `onnxruntime_perf_test` on the phone, which
times its runs itself. `{"facts": true}` is answered by what the phone is, for the doctor; `{"alive": true}` comes after
each start; and the first thing that keeps the phone from answering ends the process with `{"fault": "...", "what":
"..."}`, where the faults are those of `adb.MENDS`.
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the modules of this folder are those of the package
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [os.path.dirname(here), *(path for path in sys.path if path != here)]

from hwnas import measure, perf_test
from hwnas.adb import LOST, SHELL_S, Adb, PhoneFault, fault_in, phone_folder
from hwnas.android import LOOK, Look, look_of
from hwnas.perf_test import Results
from hwnas.registry import Entry

RUN_S = 120.0
"""How long a start of the runner may take."""

SAMPLE_MS, MOST_RUNS = 50.0, 2000
"""A start costs far more than a run, so it is used for so long, in which the processor's frequency rises, too."""

CACHE_BYTES = 512 << 20
"""Models that were not asked for lately make room for new ones beyond this."""

DAY_S = 86400

Answer = Callable[[dict[str, Any]], None]


# ---- a phone -----------------------------------------------------------------------------------------------------


class Phone:
    """A phone with the runner on it, ready when the first models are held.

    Args:
        entry: of the registry.
        alive: called after each command that the phone has answered.

    Attributes:
        once_ms: about what a run takes of each model that was started before.
        bare_bytes: the peak memory of the runner with a model that does nothing, once it was measured.
    """

    def __init__(self, entry: Entry, alive: Callable[[], None]) -> None:
        self.entry, self._alive = entry, alive
        self.adb, self.folder = Adb(entry.adb_words), phone_folder(entry)
        self.files = [Path(name).expanduser() for name in (entry.runner, *entry.libraries)]
        for path in self.files:
            if not path.is_file():
                raise PhoneFault("runner", f"there is no file {path}")
        self.version = perf_test.version_of(self.files)
        self.runner = f"{self.folder}/runner-{self.version.rpartition(' ')[2]}"
        self._mark = secrets.token_hex(4)
        self.once_ms: dict[str, float] = {}
        self.bare_bytes: int | None = None
        self._has_runner = False
        self._claim: socket.socket | None = None
        self.adb.connect()

    def look(self) -> Look:
        """What there is to see now."""
        status, text = self.adb.shell(LOOK.replace("FOLDER", shlex.quote(self.folder)))
        if status:
            raise PhoneFault(LOST, f"its shell ended with status {status}: {text[-200:].strip()}")
        try:
            return look_of(text)
        except ValueError as error:
            raise PhoneFault(LOST, f"it told nonsense of itself: {error}") from None

    def cores(self, look: Look) -> list[int]:
        """The processors to measure on, the fastest first."""
        unknown = sorted(set(self.entry.cores) - set(look.most_mhz))
        if unknown:
            raise PhoneFault("cores", f"processors {unknown} are not among {sorted(look.most_mhz)}, which may be used")
        return [core for core in look.fastest if not self.entry.cores or core in self.entry.cores]

    def check_runner(self, look: Look) -> None:
        """Raises `PhoneFault` if the runner or a library is for another machine."""
        abis = look.properties["ro.product.cpu.abilist"].split(",")
        for path in self.files:
            if (abi := perf_test.abi_of(path)) and abi not in abis:
                raise PhoneFault("abi", f"{path.name} is for {abi}; the phone runs {', '.join(abis)}")

    def claim(self) -> None:
        """Keeps the phone from others on this computer as long as this process lives, where the system is Linux."""
        if self._claim or sys.platform != "linux":
            return
        self._claim = socket.socket(socket.AF_UNIX)
        serial = self.adb.run("get-serialno", timeout_s=SHELL_S).strip()
        try:
            self._claim.bind(f"\0hwnas-phone-{serial}"[:100])
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise PhoneFault("busy", f"the phone {serial} is being measured on by another process here") from None

    def hold(self, models: Sequence[Path]) -> list[str]:
        """Makes sure that the runner and these models are on the phone; the names of the models there."""
        if not self._has_runner:
            self._send({path.name: path for path in self.files}, self.runner)
            self._shell(f"chmod 755 {shlex.quote(self.runner)}/*")
            self._has_runner = True
        sums = {path: f"{hashlib.sha256(path.read_bytes()).hexdigest()}.onnx" for path in models}
        self._make_room(sum(path.stat().st_size for path in sums), sums.values())
        self._send({name: path for path, name in sums.items()}, self.folder)
        return [f"{self.folder}/{sums[path]}" for path in models]

    def _send(self, files: Mapping[str, Path], folder: str) -> None:
        """Files by their names there; those that are there with the same contents are only marked as used."""
        quoted = shlex.quote(folder)
        names = " ".join(map(shlex.quote, files))
        _, text = self.adb.shell(f"mkdir -p {quoted} && cd {quoted} && set -- {names} && touch -c $@ && sha256sum $@")
        there = {name.strip(" *"): found for found, _, name in (line.partition(" ") for line in text.splitlines())}
        wanted = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
        missing = [name for name in files if there.get(name) != wanted[name]]
        if not missing:
            return
        part = f"{folder}/part-{self._mark}"
        self._shell(f"mkdir -p {shlex.quote(part)}")
        with tempfile.TemporaryDirectory(prefix="hwnas-push-") as here:
            copies = [Path(shutil.copyfile(files[name], Path(here) / name)) for name in missing]
            self.adb.push(copies, part)
        self._shell(f"cd {quoted} && mv -f part-{self._mark}/* . && rmdir part-{self._mark}")
        self._alive()

    def _make_room(self, new_bytes: int, keep: Any) -> None:
        """Removes what was left unfinished, and of the models the oldest if there are too many bytes of them."""
        script = f"cd {shlex.quote(self.folder)} && date +%s && stat -c '%Y %s %n' *"
        lines = self._shell(script).split()
        now, triples = int(lines[0]), zip(lines[1::3], lines[2::3], lines[3::3], strict=False)
        files = sorted((int(changed), int(size), name) for changed, size, name in triples)
        stale = [name for at, _, name in files if name.startswith(("part-", "result-")) and at < now - DAY_S]
        models = [(size, name) for _, size, name in files if name.endswith(".onnx") and name not in set(keep)]
        total = new_bytes + sum(size for size, _ in models)
        for size, name in models:
            if total > CACHE_BYTES:
                stale.append(name)
                total -= size
        if stale:
            self._shell(f"cd {shlex.quote(self.folder)} && rm -rf {' '.join(map(shlex.quote, stale))}")

    def run(self, model: str, cores: Sequence[int], threads: int, runs: int, seed: int) -> Results:
        """One start of the runner: a model is run on some of the processors, as often as is said, and once before.

        Raises:
            ValueError: it does not run.
        """
        result = f"{self.folder}/result-{self._mark}"
        words = perf_test.command(model, result, threads=threads, runs=runs, seed=seed)
        program = f"{self.runner}/{self.files[0].name}"
        script = f"""
cd {shlex.quote(self.folder)} && rm -f {result} {result}.log
export LD_LIBRARY_PATH={shlex.quote(self.runner)}
trap 'kill -9 $! 2> /dev/null; exit 1' HUP INT TERM
taskset {mask_of(cores):x} {shlex.quote(program)} {shlex.join(words)} < /dev/null > {result}.log 2>&1 &
wait $!
s=$?
if [ $s = 0 ]; then cat {result}; else tail -c 2000 {result}.log; fi
rm -f {result} {result}.log
(exit $s)"""
        status, text = self.adb.shell(script, RUN_S)
        self._alive()
        if status == 0:
            found = perf_test.results_of(text)
            if len(found.durations_ms) != runs:
                raise ValueError(f"it wrote {len(found.durations_ms)} durations of {runs} runs")
            return found
        fault = fault_in(text)
        if fault.fault != LOST:
            raise fault
        raise ValueError(f"the runner ended with status {status}: {fault.what}")

    def _shell(self, script: str) -> str:
        """What a script prints that must succeed."""
        status, text = self.adb.shell(script)
        if status:
            raise fault_in(text)
        return text


def mask_of(cores: Sequence[int]) -> int:
    """Processors as the bits of a number."""
    return sum(1 << core for core in cores)


# ---- what measure.py needs of a machine --------------------------------------------------------------------------


class StartedModel(measure.TimedModel):
    """One model on the phone. A sample is a start of the runner: the least of at least `least_runs` runs.

    Attributes:
        start: the runner, for so many runs.
        once_ms: about what one takes.
        runs: of a sample, if more than a start is worth.
    """

    def __init__(
        self,
        start: Callable[[int], Results],
        once_ms: float,
        request: Mapping[str, Any],
        clock: Callable[[], int],
    ) -> None:
        self.start, self.once_ms, self.clock, self.runs = start, once_ms, clock, 1
        enough = math.ceil(max(request["sample_ms"], SAMPLE_MS) / once_ms)
        self.least_runs = min(MOST_RUNS, max(request["least_runs"], enough))

    def sample_ms(self) -> float:
        try:
            return min(self.start(max(self.runs, self.least_runs)).durations_ms)
        except ValueError as error:  # it did run before: this is no failure of the model
            raise PhoneFault(LOST, str(error)) from None


class PhoneMachine(measure.Machine):
    """A phone as `measure.time_group` sees a machine."""

    openers = 1

    def __init__(self, phone: Phone) -> None:
        self.phone, self.seen = phone, phone.look()
        self.all_cores = phone.cores(self.seen)

    def open(self, path: str, threads: int, seed: int) -> tuple[str, Callable[[int], Results]]:
        pinned = self.all_cores[:threads]
        return path, lambda runs: self.phone.run(path, pinned, threads, runs, seed)

    def timed(self, opened: tuple[str, Callable[[int], Results]], request: Mapping[str, Any]) -> StartedModel:
        path, start = opened
        if path not in self.phone.once_ms:
            self.phone.once_ms[path] = min(start(max(request["warm_up_runs"], request["least_runs"])).durations_ms)
        return StartedModel(start, self.phone.once_ms[path], request, self.clock)

    def cores(self) -> int:
        return len(self.all_cores)

    def pin(self, threads: int) -> None:
        """Each start of the runner is pinned."""

    def celsius(self) -> tuple[float | None, float | None]:
        self.seen = self.phone.look()
        return self.seen.celsius, self.seen.limit_celsius

    def state(self) -> dict[str, Any]:
        seen = self.phone.look()
        now = [mhz for core in self.all_cores if (mhz := seen.now_mhz.get(core))]
        return {"load_average": seen.load_average, "megahertz": max(now, default=None), "celsius": seen.celsius}


# ---- requests ----------------------------------------------------------------------------------------------------


def conditions(phone: Phone) -> dict[str, Any]:
    """What and where this is; see `hwnas.conditions.Conditions`."""
    seen = phone.look()
    phone.check_runner(seen)
    return {
        "chip": seen.chip,
        "cores": len(phone.cores(seen)),
        "runtime": perf_test.NAME,
        "runtime_version": phone.version,
        "launch_ms": 0.0,
        "governor": seen.governor,
        "system": seen.system,
        "load_average": seen.load_average,
        "origin": "emulated" if seen.emulated else "measured",
    }


def facts(phone: Phone) -> dict[str, Any]:
    """What the phone is and has, as `machine_facts.facts` tells it of a board, but without Python and with its ABIs."""
    seen = phone.look()
    names = (seen.properties["ro.product.manufacturer"], seen.properties["ro.product.model"], seen.chip)
    return {
        "system": seen.system,
        "chip": seen.chip,
        "board": " ".join(filter(None, names)),
        "emulated": seen.emulated,
        "abis": seen.properties["ro.product.cpu.abilist"],
        "packages": {},
        "free_bytes": seen.free_bytes,
        "kinds": seen.kinds,
        "governor": seen.governor,
        "celsius": seen.celsius,
        "slows_down_at_celsius": seen.limit_celsius,
        "throttled": seen.throttled,
        "load_average": seen.load_average,
    }


def measure_memory(request: dict[str, Any], phone: Phone, answer: Answer) -> None:
    """Answers as `measure.measure_memory` does: what each model adds to the peak of the runner's memory.

    It is the peak of a start with the model less that of a start with a model that does nothing.
    """
    threads, seed = request["threads"], request["seed"]
    cores = phone.cores(phone.look())[:threads]
    with tempfile.TemporaryDirectory(prefix="hwnas-nothing-") as folder:
        nothing = Path(folder) / "nothing.onnx"
        nothing.write_bytes(idle_model())
        *models, idle = phone.hold([*map(Path, request["memory"]), nothing])

    def peak_bytes(model: str) -> int:
        return phone.run(model, cores, threads, measure.MEMORY_RUNS, seed).peak_bytes

    if phone.bare_bytes is None:
        phone.bare_bytes = peak_bytes(idle)
    for index, model in enumerate(models):
        try:
            answer({"model": index, "memory_bytes": peak_bytes(model) - phone.bare_bytes})
        except ValueError as error:
            answer({"model": index, "error": str(error)})
    answer({"done": len(models)})


def idle_model() -> bytes:
    """A model that hands one number on."""
    from onnx import TensorProto, helper

    from hwnas.onnx_model import IR_VERSION, OPSET

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "nothing", [x], [y])
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, ir_version=IR_VERSION, opset_imports=opsets).SerializeToString()


def answer_request(request: dict[str, Any], phone: Phone, answer: Answer) -> None:
    """Calls `answer` with each piece of the answer to one request."""
    if "facts" in request:
        answer({"facts": facts(phone)})
    elif "conditions" in request:
        answer({"conditions": conditions(phone), "precisions": perf_test.PRECISIONS})
    elif "memory" in request:
        measure_memory(request, phone, answer)
    elif "models" in request:
        phone.claim()
        machine = PhoneMachine(phone)
        phone.check_runner(machine.seen)
        *models, anchor = phone.hold([Path(path) for path in (*request["models"], request["anchor"])])
        measure.time_group({**request, "models": models, "anchor": anchor}, answer, machine)
    else:
        answer({"error": "onnxruntime_perf_test tells neither what a model computes nor the times of its nodes"})


def main() -> None:
    """Answers requests until standard input ends."""

    def answer(piece: dict[str, Any]) -> None:
        print(json.dumps(piece), flush=True)

    said: dict[str, Any] = json.loads(sys.argv[1])
    said |= {name: tuple(value) for name, value in said.items() if isinstance(value, list)}
    entry = Entry(**said)
    phone = None
    for line in sys.stdin:
        try:
            phone = phone or Phone(entry, lambda: answer({"alive": True}))
            answer_request(json.loads(line), phone, answer)
        except PhoneFault as fault:
            answer({"fault": fault.fault, "what": fault.what})
            return
        except (ValueError, KeyError, TypeError) as error:
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
