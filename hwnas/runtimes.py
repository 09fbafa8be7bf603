"""The runtimes that run on this machine, and what a runtime is.

`measure.py` is the program that times; a runtime tells it how to make a session of an ONNX file and to run it. It is a
class `Runtime` in a file `runtime_NAME.py` beside it, which imports nothing of ours, so that `board_program` can go to
a machine where hwnas is not. `tests/test_runtimes.py` is what every runtime must pass.
"""

import io
import platform
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from hwnas.errors import HwnasError
from hwnas.measure import GPU, file_of

Feed = Mapping[str, np.ndarray]
"""Values of a model's inputs, by name."""


class Model(Protocol):
    """A model that is ready to run.

    Attributes:
        inputs: name, numpy type and shape of each.
    """

    inputs: Sequence[tuple[str, type, Sequence[int]]]

    def outputs(self, feed: Feed) -> Sequence[np.ndarray]:
        """What the model computes, in the order of its outputs, laid out as the ONNX file says."""
        ...

    def repeated(self, feed: Feed) -> tuple[Callable[[], object], int]:
        """A call that runs the model, and how often it does so; it returns when all the work is done.

        The inputs lie where the model runs before the call. On a processor one run a call is right; on a GPU so many
        that it never waits for the processor.
        """
        ...


class Runtime(Protocol):
    """A way to run ONNX files. `Runtime(where)` raises an exception with a text for the user where it cannot work.

    Attributes:
        name, version: as tables show them; all that decides on milliseconds belongs to one of the two.
        chip: the name of what it runs on; empty for the processor.
        precisions: those of `onnx_model.to_onnx` that it runs.
        on_processor: whether the processor runs the models: then the process is pinned to as many cores as threads.
        shows_memory: whether the peak memory of its process tells what a model needs.
        openers: how many models may be opened at once.
        launch_ms: what a run that does nothing takes, where that is no part of the milliseconds of a model.
    """

    name: str
    version: str
    chip: str
    precisions: Sequence[str]
    on_processor: bool
    shows_memory: bool
    openers: int
    launch_ms: float

    def open(self, path: str, threads: int) -> Model:
        """The model of an ONNX file, for so many threads; any exception counts as the model's failure."""
        ...


RUNTIMES = {
    "cpu": "this machine's processor, in ONNX Runtime",
    "xla-cpu": "this machine's processor, in XLA through JAX",
    "openvino": "this machine's processor, in OpenVINO",
    "gpu": "this machine's GPU: in XLA through JAX, else in ONNX Runtime with CUDA",
    "xla-gpu": "this machine's GPU, in XLA through JAX",
    "cuda": "this machine's GPU, in ONNX Runtime with CUDA",
    "tensorrt": "this machine's GPU, in ONNX Runtime with TensorRT",
}
"""What each name of a local device stands for."""

GPU_RUNTIMES = ("gpu", "xla-gpu", "cuda", "tensorrt")
"""Those of `RUNTIMES` that run on a GPU."""

PACKAGES = {"onnxruntime": ("numpy", "onnxruntime"), "openvino": ("numpy", "openvino"), "xla": ("numpy", "onnx", "jax")}
"""What a `runtime_NAME.py` needs, by its name."""

PROCESSORS = {"x86": ("x86_64", "AMD64", "i686"), "arm": ("aarch64", "arm64", "armv7l")}
"""Names of `cpu` that hold on processors of one kind only, and what the system calls that kind."""


HERE = Path(__file__).parent


def board_files(runtime: str) -> dict[str, bytes]:
    """What times in a runtime, or a name of `gpu`'s kind: the contents of a package's few files, by name."""
    choices = GPU if runtime == "gpu" else (runtime,)
    names = ("measure", "machine_facts", "node_profile", *(f"runtime_{file_of(choice)[0]}" for choice in choices))
    return {"hwnas/__init__.py": b""} | {f"hwnas/{name}.py": (HERE / f"{name}.py").read_bytes() for name in names}


def board_program(runtime: str) -> bytes:
    """`board_files` as one file that Python runs, as in `python program.pyz RUNTIME`: the same bytes every time."""
    file, start = io.BytesIO(), {"__main__.py": b"from hwnas.measure import main\n\nmain()\n"}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (start | board_files(runtime)).items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


def packages_of(runtime: str) -> tuple[str, ...]:
    """What `pip install` must be given for a runtime."""
    return PACKAGES[file_of(GPU[0] if runtime == "gpu" else runtime)[0]]


def command_of(runtime: str) -> tuple[str, ...]:
    """The command that starts `measure.py` with a runtime, or a name of `gpu`'s kind, on this machine."""
    return (sys.executable, str(HERE / "measure.py"), runtime)


def local_name(name: str) -> str | None:
    """The name in `RUNTIMES` that a device's name stands for here; `None` if it is none of this machine.

    Raises:
        HwnasError: it names a processor of another kind than this machine's.
    """
    if name not in PROCESSORS:
        return name if name in RUNTIMES else None
    if platform.machine() in PROCESSORS[name]:
        return "cpu"
    if name == "arm":
        return None
    raise HwnasError(f"This machine's processor is no {name}: the system calls it {platform.machine()}. Give another.")
