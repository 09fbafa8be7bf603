"""Where the network of a search is to run: the device of its budget, what limits it there, and further devices.

A further device has a latency table and a budget of its own. To the search its budget is one more limit, held to the
upper estimate of that table; to the proof it is one more thing to be measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hwnas.errors import HwnasError
from hwnas.evolution import Limit
from hwnas.latency import LatencyTable, Measurement
from hwnas.network import Network
from hwnas.space import SearchSpace
from hwnas.stages import Budget, Job, latency_table

if TYPE_CHECKING:
    from hwnas.devices import Device


@dataclass(frozen=True, slots=True)
class Further:
    """A further device on which the network must keep a budget.

    Attributes:
        device: open.
        table: its latency table, corrected by what was measured since.
        digest: of the table's file.
        budget_ms: what a run may take there, in milliseconds.
        threads: that a run may use.
    """

    name: str
    device: "Device"
    table: LatencyTable
    digest: str
    budget_ms: float
    threads: int

    @property
    def what(self) -> str:
        """The name of its limit."""
        return f"latency on {self.name}"

    def limit(self, space: SearchSpace) -> Limit:
        predict = self.table.predictor(space)
        option = f"--budget {self.name}"
        return Limit(self.what, self.budget_ms, lambda architecture: predict(architecture).upper_ms, "ms", option)

    def measured(self, models: Sequence[bytes]) -> list[Measurement]:
        """Times of whole models there."""
        from hwnas.export import measure_models

        return measure_models(self.device, list(models), threads=self.threads)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a network is to run.

    Attributes:
        device: of the budget, open.
        table: its latency table, corrected by what was measured since.
        digest: of the table's file.
        own_limits: on memory and size there.
        further: the other devices.
    """

    device: "Device"
    table: LatencyTable
    digest: str
    own_limits: tuple[Limit, ...] = ()
    further: tuple[Further, ...] = ()

    def limits(self, space: SearchSpace) -> tuple[Limit, ...]:
        """All that an architecture must keep beside the budget."""
        return self.own_limits + tuple(one.limit(space) for one in self.further)

    def keeps_elsewhere(self, network: Network) -> bool:
        """Whether its upper estimates keep the budgets of the further devices."""
        return all(one.table.predict(network).upper_ms <= one.budget_ms for one in self.further)

    def corrected(
        self, networks: Sequence[Network], timings: Sequence[Measurement], elsewhere: Sequence[Sequence[Measurement]]
    ) -> "Target":
        """With what whole networks taught that were measured on the device, and on each of the further ones."""
        further = tuple(
            replace(one, table=one.table.corrected(zip(networks, found, strict=True)))
            for one, found in zip(self.further, elsewhere, strict=True)
        )
        return replace(self, table=self.table.corrected(zip(networks, timings, strict=True)), further=further)


def check_further(device: str, further: Sequence[Budget]) -> None:
    """Raises `HwnasError` for budgets of further devices that make no sense."""
    for one in further:
        if not (math.isfinite(one.budget_ms) and one.budget_ms > 0):
            raise HwnasError(f"The budget is a number of milliseconds above 0. On {one.device} it is {one.budget_ms}.")
    names = [device, *(one.device for one in further)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise HwnasError(f"A device has one budget. {twice[0]} was given more than one.")


def further_of(job: Job, further: Sequence[Budget], devices: "Sequence[Device]") -> tuple[Further, ...]:
    """Open devices with their latency tables, which are measured if they are missing.

    Args:
        job: batch and precision are the same everywhere.
        further: the budgets.
        devices: in the same order.

    Raises:
        HwnasError: a table is not to be relied on.
    """
    found = []
    for one, device in zip(further, devices, strict=True):
        _, table = latency_table(replace(job, device=one.device, threads=one.threads), device)
        found.append(Further(one.device, device, table, table.digest, one.budget_ms, one.threads))
    return tuple(found)
