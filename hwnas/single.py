"""One network on its own: trained from an architecture file, or exported from the folder of a run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hwnas.errors import HwnasError
from hwnas.network import macs, parameters
from hwnas.runs import Proof, write_text
from hwnas.space import lower
from hwnas.stages import (
    SETTINGS,
    Job,
    Listener,
    file_name,
    latency_table,
    load_settings,
    make_job,
    save_settings,
)
from hwnas.trained import proved, restored, retrained


def retrain_architecture(
    architecture_file: Path, folder: Path | None, space: str | None, make: Callable[[str], Job]
) -> tuple[Path, dict[str, Any]]:
    """Trains the network of an architecture file from new weights, in a run's folder that `export_run` takes.

    Args:
        architecture_file: the `architecture.json` of a run.
        folder: of this run; `runs/retrain-...` by default.
        space: the space's TOML file or name; by default that of the run that found the architecture, if its file lies
            in the run's folder, else the shipped space that it names.
        make: makes the job, given the space.

    Returns:
        The folder, and what was reached.
    """
    text, named = _read_architecture(architecture_file)
    if space is None and architecture_file.with_name("run.json").is_file():
        space = load_settings(architecture_file.parent)["space"]
    job = make(space or named)
    architecture = job.space.from_json(text)
    folder = folder or job.runs / file_name(f"retrain-{architecture_file.resolve().parent.name}-{job.data.name}")
    network = replace(lower(job.space, architecture), name="found")
    trained = retrained(job, network, folder)
    write_text(folder / "architecture.json", architecture.to_json())
    save_settings(folder, job, checkpoints=trained.checkpoints)
    return folder, {
        "validation_accuracy": trained.validation_accuracy,
        "test_accuracy": trained.scorer.accuracy(job.data.test),
        "macs": macs(network),
        "parameters": parameters(network),
    }


def _read_architecture(path: Path) -> tuple[str, str]:
    """The text of an architecture file, and the space that it names."""
    try:
        text = path.read_text(encoding="utf-8")
        return text, json.loads(text)["space"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HwnasError(f"{path} is not an architecture ({error!r}). Give the architecture.json of a run.") from None


def export_run(folder: Path, output: Path, seed: int, listener: Listener) -> Proof:
    """Writes the ONNX model of a run's network, measured and proved now; the work of `hwnas export`.

    Raises:
        HwnasError: the folder holds no trained network, its checkpoint is damaged, or the output cannot be written.
    """
    from hwnas.opening import open_device

    settings = load_settings(folder)
    if "checkpoints" not in settings:
        raise HwnasError(f"The run {folder} is not finished. Run the command that made it again: it goes on.")
    text, _ = _read_architecture(folder / "architecture.json")
    job = make_job(
        settings["space"],
        settings["data"],
        listener=listener,
        force=True,  # the table's own check matters to a search, not to a network that is there
        **{name: settings[name] for name in SETTINGS},
    )
    architecture = job.space.from_json(text)
    network = replace(lower(job.space, architecture), name="found")
    with open_device(job.device, listener.note) as device:
        _, table = latency_table(job, device)
        trained = restored(job, network, folder, settings["checkpoints"])
        return proved(job, trained, architecture, table.predict(network), table.digest, device, output)
