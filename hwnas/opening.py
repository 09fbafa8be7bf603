"""A device by its name: a board or a runtime of this machine, or a farm of boards."""

from collections.abc import Callable

from hwnas.devices import Device, boards_of, entry_of, line_to
from hwnas.farm import Farm


def open_device(name: str, on_note: Callable[[str], None] = lambda text: None) -> Device:
    """The device of that name: one of the registry, or one of this machine's, such as those of `runtimes.RUNTIMES`.

    Args:
        name: what `--device` takes.
        on_note: called, in any thread, with a sentence for the user: a farm goes on without one of its boards.

    Raises:
        HwnasError: there is none of that name; the message says how to go on.
    """
    entry = entry_of(name)
    if entry.boards:
        return Farm(name, [Device(board.name, line_to(board)) for board in boards_of(entry)], on_note)
    return Device(entry.name, line_to(entry))
