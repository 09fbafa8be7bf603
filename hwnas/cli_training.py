"""The verbs that train: the supernet alone, and one architecture."""

from pathlib import Path
from typing import Annotated

import typer

from hwnas.cli_options import (
    DEFAULT_DATA,
    DEFAULT_METHOD,
    DEFAULT_SPACE,
    BatchImages,
    BatchSize,
    Data,
    DeviceName,
    Epochs,
    Json,
    LearningRate,
    Method,
    Paths,
    Processes,
    Runs,
    Seed,
    Space,
    Start,
    Threads,
    WithinMs,
)
from hwnas.terminal import print_facts, reported


def train(
    space: Space = DEFAULT_SPACE,
    data: Data = DEFAULT_DATA,
    method: Method = DEFAULT_METHOD,
    paths: Paths = None,
    within_ms: WithinMs = None,
    start: Start = None,
    device: DeviceName = "cpu",
    epochs: Epochs = 10,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 0.05,
    runs: Runs = Path("runs"),
    processes: Processes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Trains the supernet alone; a search with the same settings then finds it ready."""
    from hwnas.following import gathered
    from hwnas.stages import make_job, supernet_facts, trained_supernet

    with gathered(processes), reported(as_json) as listener:
        job = make_job(
            space, data, listener=listener, method=method, paths=paths, within_ms=within_ms, start=start, device=device,
            epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, runs=runs, seed=seed,
        )  # fmt: skip
        folder, model = trained_supernet(job)
        facts = {"supernet": str(folder), **supernet_facts(job, model)}
    print_facts(facts, as_json)


def retrain(
    architecture: Annotated[Path, typer.Argument(help="The architecture.json of a run.")],
    data: Data = DEFAULT_DATA,
    space: Annotated[
        str | None, typer.Option("--space", help="The space's TOML file, if it is not a shipped one.")
    ] = None,
    epochs: Epochs = 20,
    batch_size: BatchSize = 16,
    learning_rate: LearningRate = 0.05,
    device: DeviceName = "cpu",
    threads: Threads = None,
    batch: BatchImages = None,
    run: Annotated[Path | None, typer.Option("--run", help="The folder of this run.")] = None,
    processes: Processes = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Trains one architecture from new weights; `hwnas export` makes the model of it."""
    from hwnas.devices import batch_of, threads_of
    from hwnas.following import gathered
    from hwnas.single import retrain_architecture
    from hwnas.stages import make_job

    with gathered(processes), reported(as_json) as listener:
        folder, facts = retrain_architecture(
            architecture, run, space,
            lambda name: make_job(
                name, data, listener=listener, retrain_epochs=epochs, batch_size=batch_size,
                learning_rate=learning_rate, device=device, threads=threads_of(device, threads),
                batch=batch_of(device, batch), seed=seed,
            ),
        )  # fmt: skip
    print_facts({"run": str(folder), **facts}, as_json)


def add_verbs(app: typer.Typer) -> None:
    """Adds the verbs to the command line."""
    app.command(epilog="Example: hwnas train --data cifar10 --space shufflenet-32 --epochs 60")(train)
    app.command(epilog="Example: hwnas retrain runs/NAME/architecture.json --data cifar10 --epochs 60")(retrain)
