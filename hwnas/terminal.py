"""What the command line prints: facts, tables, JSON, and the progress of a job."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hwnas.stages import Listener


def print_json(facts: dict[str, Any]) -> None:
    print(json.dumps(facts, indent=1))


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Prints facts as JSON, or as a table with a line a fact."""
    if as_json:
        print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(_words(value)))
    Console().print(table, highlight=False)


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Prints a table; the first row is its header, and all columns but the first are numbers."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for index, title in enumerate(rows[0]):
        table.add_column(title, justify="right" if index else "left", no_wrap=not index)
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table, highlight=False)


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return "\n".join(_words(part) for part in value)
    return str(value)


@contextmanager
def reported(quiet: bool) -> Iterator["Listener"]:
    """Shows stages, notes and progress on standard error, if it is not to be quiet."""
    from hwnas.stages import Listener

    if quiet:
        yield Listener()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (
        BarColumn(30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)

        def say(text: str) -> None:
            console.print(text, markup=False, soft_wrap=True)

        def stage(text: str) -> None:
            bar.reset(task, total=None, visible=False, description="")
            say(text)

        def progress(done: int, total: int, words: str) -> None:
            bar.update(task, completed=done, total=total, description=words, visible=True)

        yield Listener(stage, lambda text: say(f"Note: {text}"), progress)
