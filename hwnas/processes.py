"""Several processes, on one host or many, that work as one: who leads, and what they tell each other.

Process 0 leads: it runs the command, and it alone writes files and speaks with the user. The others lend it their
devices and do what it orders (`following.py`). Orders and answers are JSON in the key-value store of `jax.distributed`:
who waits for one computes nothing, and waits as long as it takes. Weights travel between devices (`spread.py`).
"""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from hwnas.errors import HwnasError

POLL_MS, LINGER_SECONDS = 1000, 5.0
"""How often who waits looks whether somebody failed, and how long who failed waits for the others to hear of it."""

LOST = re.compile(r"gloo|nccl|collective|connection|socket|coordination", re.IGNORECASE)
"""What JAX's errors speak of when another process has gone."""

AGAIN = "Run the same command in all processes again: it goes on from what is finished."


@dataclass(slots=True)
class _Company:
    """This process among all: JAX's client of the store, who it is, and how often they have spoken."""

    client: Any
    index: int
    count: int
    orders: int = 0
    meetings: int = 0


_company: _Company | None = None


def count() -> int:
    """How many processes work together; 1 without `join`."""
    return _company.count if _company else 1


def index() -> int:
    """Which of them this one is."""
    return _company.index if _company else 0


def leads() -> bool:
    """Whether this process runs the command."""
    return index() == 0


def name() -> str:
    """This process in a message."""
    return f"process {index()} of {count()} on {socket.gethostname()}"


def join(where: str) -> None:
    """Finds the other processes; must come before the first computation of JAX.

    Args:
        where: `auto` under a launcher that JAX knows (Slurm, Open MPI, Kubernetes with its Python package), else
            `THIS/ALL@HOST:PORT`: the number of this process from 0 on, how many there are, and where process 0 listens.

    Raises:
        HwnasError: `where` is neither, there is no such launcher, or the others do not come.
    """
    global _company
    import jax
    from jax._src import distributed  # the client of the store has no public name

    found = re.fullmatch(r"(\d+)/(\d+)@(\S+:\d+)", where)
    if where != "auto" and not (found and int(found[1]) < int(found[2])):
        raise HwnasError(
            "--processes is auto, or THIS/ALL@HOST:PORT such as 0/2@node1:9876, where THIS counts from 0 and is less "
            f"than ALL. It is {where!r}."
        )
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself, and then nothing ends
    given: dict[str, Any] = {}
    if found:
        given = {"process_id": int(found[1]), "num_processes": int(found[2]), "coordinator_address": found[3]}
        given["cluster_detection_method"] = "deactivate"
    try:
        jax.distributed.initialize(**given)
        jax.devices()  # where all tell each other what they have, and wait two minutes for it at most
    except ValueError as error:
        raise HwnasError(
            f"--processes auto needs a launcher that JAX knows, such as srun of Slurm, and found none ({error}). "
            "Give THIS/ALL@HOST:PORT, such as 0/2@node1:9876."
        ) from None
    except RuntimeError as error:
        raise HwnasError(
            f"The processes did not meet ({str(error).splitlines()[0]}). Start all of them, and check that every host "
            "reaches process 0 at its address."
        ) from None
    state = distributed.global_state
    _company = _Company(state.client, state.process_id, state.num_processes)


# ---- orders and answers ------------------------------------------------------------------------------------------


def order(do: str, **details: Any) -> None:
    """Tells the others what to do next; without others, or as one of them, it does nothing."""
    if _company and _company.count > 1 and leads():
        _company.orders += 1
        _company.client.key_value_set(f"hwnas/order/{_company.orders}", json.dumps({"do": do, **details}))


def orders() -> Iterator[dict[str, Any]]:
    """What the leading process orders, until it ends; `HwnasError` once a process fails."""
    assert _company
    while True:
        _company.orders += 1
        found = json.loads(_read(f"hwnas/order/{_company.orders}"))
        if found["do"] == "end":
            return
        yield found


def answer(text: str) -> None:
    """Answers the order at hand."""
    assert _company
    _company.client.key_value_set(f"hwnas/answer/{_company.orders}/{_company.index}", text)


def answers() -> list[str]:
    """What the others answered to the last order, by process; `HwnasError` once one fails."""
    if count() == 1:
        return []
    assert _company
    found = [_read(f"hwnas/answer/{_company.orders}/{other}") for other in range(1, _company.count)]
    _company.client.key_value_delete(f"hwnas/order/{_company.orders}")
    _company.client.key_value_delete(f"hwnas/answer/{_company.orders}/")
    return found


def meet() -> None:
    """Returns when all processes have come here; `HwnasError` once one fails."""
    if count() == 1:
        return
    assert _company
    _company.meetings += 1
    place = f"hwnas/meeting/{_company.meetings}"
    _company.client.key_value_set(f"{place}/{_company.index}", "")
    for other in range(_company.count):
        _read(f"{place}/{other}")


def _read(key: str) -> str:
    """The text under a key, once it is there."""
    assert _company
    while True:
        try:
            return _company.client.blocking_key_value_get(key, POLL_MS)
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise _lost(error) from None
        if failure := _failure():
            raise HwnasError(failure)


# ---- when one fails ----------------------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """What the devices of all processes compute; that another has gone becomes a `HwnasError`."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # Gloo's come as the second
        if count() == 1 or not LOST.search(str(error)):
            raise
        raise _lost(error) from None


def _lost(error: Exception) -> HwnasError:
    for _ in range(3):  # who failed may not have said so yet
        with suppress(RuntimeError):
            if failure := _failure():
                return HwnasError(failure)
        time.sleep(0.5)
    return HwnasError(f"Another process ended without a word, or cannot be reached ({_short(error)}). {AGAIN}")


def _short(error: Exception) -> str:
    return str(error).splitlines()[0][:200]


def _failure() -> str | None:
    """What the first process that failed said."""
    assert _company
    found = _company.client.key_value_dir_get("hwnas/failed/")
    return f"{min(found)[1]} {AGAIN}" if found else None


def fail(error: Exception) -> None:
    """Tells the others that this process failed, and gives them the time to hear it."""
    if not _company or _company.count == 1:
        return
    with suppress(RuntimeError):
        if not _failure():
            said = str(error) if isinstance(error, HwnasError) else repr(error)
            _company.client.key_value_set(f"hwnas/failed/{_company.index}", f"It failed in {name()}: {said}")
        _company.client.key_value_set(f"hwnas/left/{_company.index}", "")
        until = time.monotonic() + LINGER_SECONDS
        while leads() and time.monotonic() < until:  # the store ends with this process
            if len(_company.client.key_value_dir_get("hwnas/left/")) == _company.count:
                return
            time.sleep(0.1)


def part() -> None:
    """Takes leave of the others, all at the same time."""
    global _company
    import jax

    jax.distributed.shutdown()
    _company = None


def joined() -> bool:
    """Whether this process has not parted from others yet."""
    return _company is not None


def end_at_once(status: int) -> NoReturn:
    """Ends a process that cannot part: at the end of Python it would wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
