"""What a search holds to a limit beside the budget: peak memory by its upper estimate, the file by its size."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from hwnas.conditions import profile_command
from hwnas.errors import HwnasError
from hwnas.evolution import Limit
from hwnas.latency import LatencyTable, Prediction
from hwnas.memory import MEGABYTE
from hwnas.model_size import model_bytes
from hwnas.network import Network
from hwnas.runs import Timing
from hwnas.space import Architecture, lower
from hwnas.stages import Job
from hwnas.trained import metadata_of, proof_facts

WIDEST = -1.2345678901234567e-300
"""No number takes more characters as JSON."""


def check_limit_settings(memory_mb: float | None, size_mb: float | None) -> None:
    """Raises `HwnasError` for a limit that makes no sense."""
    for name, most_mb in (("memory", memory_mb), ("size", size_mb)):
        if most_mb is not None and not (math.isfinite(most_mb) and most_mb > 0):
            raise HwnasError(f"--{name}-mb is a number of megabytes above 0. It is {most_mb}.")


def limits_of(
    job: Job,
    table: LatencyTable,
    digest: str,
    memory_mb: float | None,
    size_mb: float | None,
    further: Sequence[str] = (),
) -> tuple[Limit, ...]:
    """The limits that are given, ready for a search.

    Args:
        job: what is searched.
        table: whose memory counts.
        digest: of the table's file, as the model's metadata will have it.
        memory_mb, size_mb: at most; `None` for no limit.
        further: names of the further devices that the model's metadata tells of.

    Raises:
        HwnasError: memory is limited, and the table does not hold it; the message has the command that measures it.
    """
    memory = table.memory
    if memory_mb is not None and memory is None:
        raise HwnasError(
            f"--memory-mb needs to know what whole networks of '{table.space}' add to the memory of a process, and its "
            f"latency table does not hold it. Measure: {profile_command(job.sources[0], table.conditions)}"
        )

    @lru_cache(maxsize=64)
    def network(architecture: Architecture) -> Network:
        return replace(lower(job.space, architecture), name="found")

    def memory_needed(architecture: Architecture) -> float:
        assert memory is not None
        return memory.upper_bytes(network(architecture), job.batch, job.precision) / MEGABYTE

    def size(architecture: Architecture) -> float:
        return file_bytes(job, architecture, network(architecture), digest, memory_mb is not None, further) / MEGABYTE

    given = (("memory", memory_mb, memory_needed), ("size", size_mb, size))
    return tuple(
        Limit(name, most_mb, needs_mb, "MB", f"--{name}-mb") for name, most_mb, needs_mb in given if most_mb is not None
    )


def file_bytes(
    job: Job,
    architecture: Architecture,
    network: Network,
    digest: str,
    with_memory: bool,
    further: Sequence[str] = (),
) -> int:
    """The bytes of the file of a proved model at most: exact but for the digits of the numbers in its metadata."""
    unknown = Prediction(WIDEST, WIDEST), Timing(WIDEST, WIDEST, 1), WIDEST
    elsewhere = dict.fromkeys(further, (WIDEST, WIDEST))
    facts = proof_facts(job, architecture, *unknown, digest, (WIDEST, WIDEST) if with_memory else None, elsewhere)
    return model_bytes(network, batch=job.batch, precision=job.precision, metadata=metadata_of(job, facts))
