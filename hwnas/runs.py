"""What a run found, as values that are written to its folder and read back by `show`, `export` and the report."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hwnas.errors import HwnasError


@dataclass(frozen=True, slots=True)
class Timing:
    """A measured latency: median of the samples, half their inter-quartile range, both in ms, and their number."""

    median_ms: float
    spread_ms: float
    samples: int


@dataclass(frozen=True, slots=True)
class Requirement:
    """A limit beside the budget, what was promised, and what was measured.

    Attributes:
        name: `memory`, what the model adds to the peak memory of a process; `size`, that of its file; or the latency on
            a further device, such as `latency on gpu`.
        promised: the upper estimate that the search held to the limit.
        unit: of all three, ms or MB (of 1,000,000 bytes).
    """

    name: str
    limit: float
    promised: float
    measured: float
    unit: str

    @property
    def kept(self) -> bool:
        return self.measured <= self.limit

    @property
    def text(self) -> str:
        unit = self.unit
        return f"{self.name} {self.measured:.4g} {unit} of {self.limit:g} {unit} (promised {self.promised:.4g} {unit})"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An architecture that the search scored with inherited weights on the validation split.

    Attributes:
        architecture: as `Architecture.to_json` writes it, parsed.
        accuracy: share of the validation images, 0 to 1.
        latency_ms, upper_ms: the table's estimate and its upper bound.
        measured: of the whole network on the device; only finalists have it.
        kept: whether a measured one was within the budget and the limits.
        requirements: the limits that were measured too; a latency on a further device with its spread.
        elsewhere_ms: the estimates of the tables of further devices, by their names.
    """

    architecture: dict[str, Any]
    accuracy: float
    latency_ms: float
    upper_ms: float
    measured: Timing | None = None
    kept: bool | None = None
    requirements: tuple[Requirement, ...] = ()
    elsewhere_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Proof:
    """What was checked about the exported model.

    Attributes:
        images: how many real images went through both JAX and the runtime.
        agreement: the share of them with the same arg-max, 0 to 1.
        largest_difference: between the logits of the two, over all images.
        operators: how many of each ONNX operator the model has.
        opset: version of the ONNX operator set.
        predicted_ms, upper_ms: the promise of the latency table, after the correction by the finalists.
        measured: of the exported file on the device.
        table_sha256: of the latency table's file.
        model_sha256: of the model's file.
        requirements: of the limits that the search was given beside the budget.
    """

    images: int
    agreement: float
    largest_difference: float
    operators: dict[str, int]
    opset: int
    predicted_ms: float
    upper_ms: float
    measured: Timing
    table_sha256: str
    model_sha256: str
    requirements: tuple[Requirement, ...] = ()


@dataclass(frozen=True, slots=True)
class Compared:
    """A network in the table of comparison: the winner or a baseline, trained by the same recipe.

    `measured` was taken in the same minutes for all rows.
    """

    name: str
    macs: int
    parameters: int
    validation_accuracy: float
    test_accuracy: float
    measured: Timing


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How well a predictor of accuracy did on scored architectures that it was not fitted on.

    Attributes:
        count: architectures, each of them held out once.
        error: root of the mean squared error, as a share of the images.
        spread: standard deviation of their accuracies: the error of one who always says the mean.
        tau, low, high: Kendall's tau between predicted and scored accuracy, and the ends of its 95 % interval.
    """

    count: int
    error: float
    spread: float
    tau: float
    low: float
    high: float

    @property
    def text(self) -> str:
        return (
            f"On {self.count} architectures, each held out, the predictor errs by {100 * self.error:.2g} points of "
            f"accuracy (their spread: {100 * self.spread:.2g}) and ranks them with a Kendall tau of {self.tau:.2f} "
            f"(95 % interval {self.low:.2f} to {self.high:.2f})."
        )


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything that the report of a run shows.

    Attributes:
        space, data, device, chip, runtime: names.
        budget_ms: the promise asked for.
        binds: whether some architecture of the space needs more than the budget.
        fastest_ms: the least upper estimate that was found in the space.
        scored: every architecture that the search scored, best first.
        finalists: the best few, measured whole.
        winner: its row of the comparison.
        proof: of the exported model.
        baselines: further rows of the comparison; empty without `--baselines`.
        seconds: wall time of each stage that ran, by name.
        held_out: how well the predictor did that guided the search; without one there is none.
        origin: of the latency table, see `conditions.Conditions`.
    """

    space: str
    data: str
    device: str
    chip: str
    runtime: str
    threads: int
    batch: int
    precision: str
    budget_ms: float
    binds: bool
    fastest_ms: float
    scored: tuple[Candidate, ...]
    finalists: tuple[Candidate, ...]
    winner: Compared
    proof: Proof
    baselines: tuple[Compared, ...]
    seconds: dict[str, float]
    held_out: HeldOut | None = None
    origin: str = "measured"

    def save(self, folder: Path) -> None:
        write_text(folder / "result.json", json.dumps(asdict(self), indent=1))


def load_result(folder: Path) -> RunResult:
    """The result of a finished run; `HwnasError` if there is none or it is broken."""
    path = folder / "result.json"
    if not path.is_file():
        raise HwnasError(
            f"{folder} holds no finished search: result.json is missing. If a search there was stopped, run it again "
            "to finish it; else give the folder that hwnas search printed."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        data["scored"] = tuple(Candidate(**_timed(row)) for row in data["scored"])
        data["finalists"] = tuple(Candidate(**_timed(row)) for row in data["finalists"])
        data["winner"] = Compared(**_timed(data["winner"]))
        data["baselines"] = tuple(Compared(**_timed(row)) for row in data["baselines"])
        data["proof"] = Proof(**_timed(data["proof"]))
        data["held_out"] = HeldOut(**data["held_out"]) if data.get("held_out") else None
        return RunResult(**data)
    except (ValueError, KeyError, TypeError) as error:
        raise HwnasError(
            f"{path} is not the result of a run: {error!r}. Remove it and run hwnas search again."
        ) from None


def _timed(row: dict[str, Any]) -> dict[str, Any]:
    parsed = {**row, "measured": Timing(**row["measured"]) if row["measured"] else None}
    if "requirements" in row:
        parsed["requirements"] = tuple(Requirement(**requirement) for requirement in row["requirements"])
    return parsed


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all; `HwnasError` if it cannot be written."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise HwnasError(f"{path} could not be written: {error}. Free some space, or give another folder.") from None
