"""`Conditions`: where and how something was timed, as every table and every measurement tells it."""

from dataclasses import dataclass, fields
from typing import Any

from hwnas.errors import HwnasError

GPU_ENDINGS = ("GPU", "CUDA", "TensorRT")
"""How the names of runtimes end that run on a GPU."""


@dataclass(frozen=True, slots=True)
class Conditions:
    """Where and how something was timed.

    Attributes:
        device: the name hwnas knows the device by, such as `cpu`.
        chip: the processor's own name.
        cores: processors that the process may use.
        runtime, runtime_version: what ran the model.
        threads, batch, precision: the settings of the run.
        governor: the frequency governor, or `not shown`.
        system: operating system and architecture.
        origin: `measured`, `estimated` from another device's table (`estimation.py`), or `emulated`, where the
            milliseconds mean nothing.
        load_average: how many processes wanted to run when the measurement began.
        launch_ms: what it takes to start a run that does nothing, where that is no part of the timings: on a GPU.
    """

    device: str
    chip: str
    cores: int
    runtime: str
    runtime_version: str
    threads: int
    batch: int
    precision: str
    governor: str
    system: str
    origin: str = "measured"
    load_average: float = 0.0
    launch_ms: float = 0.0

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU runs the models, as the runtime's name tells."""
        return self.runtime.endswith(GPU_ENDINGS)

    def differences(self, other: "Conditions") -> tuple[tuple[str, object, object], ...]:
        """The fields in which timings of `other` cannot stand for timings of `self`: name, own value, other's."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in _DECISIVE)
        return tuple(pair for pair in pairs if pair[1] != pair[2])


_DECISIVE = tuple(
    field.name for field in fields(Conditions) if field.name not in ("governor", "system", "load_average", "launch_ms")
)


def check_origin(conditions: Conditions) -> None:
    """Raises `HwnasError` if milliseconds of these conditions are not those of a real device."""
    if conditions.origin != "measured":
        raise HwnasError(
            f"The device {conditions.device} is {conditions.origin}: what it is timed at means nothing. "
            "Name a real device, or take it as it is: --force."
        )


def usual_batch(on_gpu: bool) -> int:
    """The images a run where none are asked for: those of the ShuffleNet V2 paper, 8 on a GPU, 1 on a processor."""
    return 8 if on_gpu else 1


def profile_command(space: str, conditions: Conditions) -> str:
    """The command that measures a space under these conditions; settings at their defaults are left out."""
    command = f"hwnas profile --device {conditions.device} --space {space}"
    for name, default in (("threads", 1), ("batch", usual_batch(conditions.on_gpu)), ("precision", "fp32")):
        if (value := getattr(conditions, name)) != default:
            command += f" --{name} {value}"
    return command


def parse_conditions(data: dict[str, Any]) -> Conditions:
    """Conditions from JSON; `ValueError`, `KeyError` or `TypeError` if a field is missing or of another type.

    The time of a launch may be missing, as it is nought on a processor.
    """
    data = {"launch_ms": 0.0} | data
    if unknown := set(data) - {field.name for field in fields(Conditions)}:
        raise ValueError(f"the conditions have unknown fields {sorted(unknown)}")
    return Conditions(**{f.name: checked(data[f.name], f.name, f.type) for f in fields(Conditions)})


def checked(value: Any, name: str, kind: Any) -> Any:
    """A value of JSON, if it is of this type; `ValueError` if not."""
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name} is {value!r}, which is no {kind.__name__}")
    return value
