"""The verb that tells how far a supernet can be trusted."""

from pathlib import Path
from typing import Annotated

import typer

from hwnas.cli_options import Json, Processes
from hwnas.terminal import print_json, print_rows, reported


def trust(
    folder: Annotated[Path, typer.Argument(help="The folder of a supernet or of a run, of hwnas train or search.")],
    architectures: Annotated[
        int, typer.Option("--architectures", help="How many are trained from scratch, spread over latency.")
    ] = 20,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Of each training from scratch.")] = 20,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Trainings from scratch of each architecture.")] = 1,
    budget_ms: Annotated[
        float | None, typer.Option("--budget-ms", help="Of our search and the random one; by default the run's.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Architectures that each search scores; 40, or the run's.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=2, help="Of each training from scratch; by default the supernet's."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Of each training from scratch; by default the supernet's.")
    ] = None,
    table: Annotated[Path | None, typer.Option("--table", help="The latency table, if not that of the run.")] = None,
    processes: Processes = None,
    as_json: Json = False,
) -> None:
    """Trains architectures from scratch and tells how well the supernet ranks them.

    Kendall tau of inherited accuracy and accuracy from scratch, and the same for what our search and a random search
    find on the supernet. Run again, it goes on where it stopped.
    """
    from hwnas.following import gathered
    from hwnas.runs import write_text
    from hwnas.trust import Question
    from hwnas.trust import trust as judge
    from hwnas.trust_report import trust_facts, trust_picture, trust_rows, trust_words

    with gathered(processes), reported(as_json) as listener:
        question = Question(architectures, epochs, seeds, budget_ms, trials, batch_size, learning_rate)
        path, report = judge(folder, question, table_file=table, listener=listener)
    write_text(path / "trust.svg", trust_picture(report) + "\n")
    if as_json:
        print_json({"report": str(path), **trust_facts(report)})
        return
    print_rows(trust_rows(report))
    print("\n".join(["", *trust_words(report), f"Facts: {path / 'trust.json'}\nPlot:  {path / 'trust.svg'}"]))


def add_verbs(app: typer.Typer) -> None:
    """Adds the verb to the command line."""
    app.command(epilog="Example: hwnas trust runs/NAME --architectures 20 --epochs 60")(trust)
