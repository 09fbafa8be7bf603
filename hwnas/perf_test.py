"""`onnxruntime_perf_test`, the program of ONNX Runtime that times a model: its command line, and what it writes.

It opens a model, runs it once, then as often as it is told, takes the time of each run by itself, and writes a line for
each into a file. `-r`, `-x`, `-I` and what else is used here are the same from ONNX Runtime 1.16 to 1.24; see
onnxruntime/test/perftest/command_args_parser.cc and performance_result.cc there.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NAME = "ONNX Runtime CPU (onnxruntime_perf_test)"
"""The runtime, as tables show it."""

PRECISIONS = ("fp32", "int8")
"""Those of `onnx_model.to_onnx` that it runs."""

ABIS = {183: "arm64-v8a", 40: "armeabi-v7a", 62: "x86_64", 3: "x86", 243: "riscv64"}
"""What Android calls the machines of ELF, by their numbers there."""

_RELEASE = re.compile(rb"VERS_(\d+\.\d+\.\d+)")
"""The version of the symbols in a libonnxruntime.so is that of the release."""


def command(model: str, result: str, *, threads: int, runs: int, seed: int) -> tuple[str, ...]:
    """The words after the program's name.

    Args:
        model: the ONNX file.
        result: where a line for each run is added.
        threads: inside an operator, and they stop to spin when a run ends, as those of `runtime_onnxruntime`.
        runs: after one that is not counted.
        seed: of the inputs.
    """
    return (
        "-e", "cpu", "-I", "-S", str(seed), "-m", "times", "-r", str(runs), "-x", str(threads), "-y", "1", "-o", "99",
        "-Z", model, result,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Results:
    """What one start of the program tells.

    Attributes:
        durations_ms: of each run.
        peak_bytes: of the resident memory of its process, all in all.
    """

    durations_ms: tuple[float, ...]
    peak_bytes: int


def results_of(text: str) -> Results:
    """What stands in the file that it wrote; `ValueError` if this is not such a file.

    A line is `FOLDER,SECONDS,BYTES AT THE PEAK,PER CENT OF A PROCESSOR,NUMBER`.
    """
    found, peak_bytes = list[float](), 0
    for line in filter(None, map(str.strip, text.splitlines())):
        fields = line.rsplit(",", 4)
        if len(fields) != 5 or int(fields[4]) != len(found):
            raise ValueError(f"{line[:60]!r} is no duration of run {len(found)}")
        found.append(float(fields[1]) * 1e3)
        peak_bytes = int(fields[2])
    if not found or not min(found) > 0:
        raise ValueError("it wrote no durations")
    return Results(tuple(found), peak_bytes)


def version_of(files: Sequence[Path]) -> str:
    """What tells builds apart: the release, where a file has it, and a sum of all files."""
    contents = [path.read_bytes() for path in files]
    releases = [found[1].decode() for content in contents if (found := _RELEASE.search(content))]
    build = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()[:8]
    return f"{releases[0]}, build {build}" if releases else f"build {build}"


def abi_of(path: Path) -> str | None:
    """What Android calls the machine that a program or library is for; `None` if it is a script."""
    with path.open("rb") as file:
        head = file.read(20)
    if not head.startswith(b"\x7fELF") or len(head) < 20:
        return None
    machine = int.from_bytes(head[18:20], "little" if head[5] == 1 else "big")
    return ABIS.get(machine, f"machine {machine}")
