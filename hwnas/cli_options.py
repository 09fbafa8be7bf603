"""The options that several verbs of the command line share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hwnas.errors import HwnasError

SPACE_HELP = "A search space: a name that comes with hwnas, or a TOML file."
DATA_HELP = "Images: digits, cifar10, fashion-mnist, eurosat, a folder by class, Parquet or .npz file."
DEFAULT_SPACE, DEFAULT_DATA, DEFAULT_METHOD = "shufflenet-tiny", "digits", "single-path"

Space = Annotated[str, typer.Option("--space", help=SPACE_HELP)]
Data = Annotated[str, typer.Option("--data", help=DATA_HELP)]
SearchedSpace = Annotated[
    str | None,
    typer.Option("--space", help=SPACE_HELP, show_default=f"that of --supernet, or {DEFAULT_SPACE}"),
]
SearchedData = Annotated[
    str | None, typer.Option("--data", help=DATA_HELP, show_default=f"that of --supernet, or {DEFAULT_DATA}")
]
DeviceName = Annotated[str, typer.Option("--device", help="Where the model will run: hwnas devices.")]
SearchedDevice = Annotated[
    str | None, typer.Option("--device", help="Where the model will run.", show_default="cpu, or those of --budget")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Threads that a run may use.", show_default="1, or those of the device"),
]
BatchImages = Annotated[
    int | None,
    typer.Option("--batch", min=1, help="Images a run of the model takes.", show_default="1, or 8 on a GPU"),
]
Precision = Annotated[str, typer.Option("--precision", help="Arithmetic of the model on the device: fp32 or int8.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn.")]
Runs = Annotated[Path, typer.Option("--runs", help="The folder of results.")]
Epochs = Annotated[int, typer.Option("--epochs", min=1, help="Passes over the training images for the supernet.")]
RetrainEpochs = Annotated[
    int, typer.Option("--retrain-epochs", min=0, help="Passes over the training images for the found network.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=2, help="Images a training step.")]
Method = Annotated[str, typer.Option("--method", help="How the supernet is trained: single-path, fair or sandwich.")]
Paths = Annotated[
    int | None,
    typer.Option("--paths", min=1, help="Architectures a step of the supernet trains; by default the method's."),
]
WithinMs = Annotated[
    float | None,
    typer.Option("--within-ms", help="The supernet trains only architectures of at most so many ms (upper estimate)."),
]
SupernetFile = Annotated[
    str | None,
    typer.Option(
        "--supernet", help="A trained one, cifar10 or the supernet.safetensors of hwnas train: none is trained."
    ),
]
Start = Annotated[
    str | None,
    typer.Option("--from", help="A trained supernet whose weights the training starts from, as for search --supernet."),
]
LearningRate = Annotated[float, typer.Option("--learning-rate", help="The highest one of the schedule.")]
Processes = Annotated[
    str | None,
    typer.Option(
        "--processes",
        help="Several processes work together: auto (Slurm, Open MPI), or THIS/ALL@HOST:PORT, as 0/2@node1:9876.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


def budgets(budget_ms: float | None, device: str | None, given: Sequence[str]) -> list[tuple[str, float]]:
    """Devices and milliseconds, from `--budget-ms` and `--device`, or from one `--budget DEVICE=MS` for each.

    Raises:
        HwnasError: neither is given, or both are, or a budget is written otherwise.
    """
    if (budget_ms is None) == (not given):
        raise HwnasError(
            "Give the budget as --budget-ms 10 for one device, or as --budget cpu=10 --budget gpu=1.5 for several. "
            f"{'Both are' if given else 'Neither is'} given."
        )
    if budget_ms is not None:
        return [(device or "cpu", budget_ms)]
    if device is not None:
        raise HwnasError(f"--budget names the devices; --device {device} is given besides. Leave it out.")
    found = []
    for text in given:
        name, _, number = text.rpartition("=")
        try:
            found.append((name.strip(), float(number)))
        except ValueError:
            name = ""
        if not name.strip():
            raise HwnasError(f"A budget of several devices is DEVICE=MS, such as --budget cpu=10. It is '{text}'.")
    return found
