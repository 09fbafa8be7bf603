"""What a network adds to the peak memory of the process that runs it, predicted: a plane fitted on whole networks.

The peak mostly comes from making the session: the runtime reads the file, copies the weights, and lays out anew those
of one node after the other. So it is `intercept + a * bytes of the file + b * bytes worked on at a time`. On other
networks of the space, which the plane has not seen, its error is told and its split conformal upper ratio is found, as
for milliseconds in `calibration.py`.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hwnas.calibration import upper_ratio_of
from hwnas.model_size import model_bytes
from hwnas.network import Network
from hwnas.working_set import working_bytes

MEGABYTE = 1_000_000


@dataclass(frozen=True, slots=True)
class MemoryNetwork:
    """A whole network of the space, measured.

    Attributes:
        encoding: the architecture, as `SearchSpace.encode` gives it.
        model_bytes, working_bytes: what its memory is predicted from.
        samples_bytes: what it added to the peak memory of a fresh process, each time.
        held_out: whether the plane was fitted without it.
    """

    encoding: tuple[int, ...]
    model_bytes: int
    working_bytes: int
    samples_bytes: tuple[int, ...]
    held_out: bool

    @property
    def measured_bytes(self) -> int:
        """The greatest: a limit holds for every start of the process."""
        return max(self.samples_bytes)


@dataclass(frozen=True, slots=True)
class Memory:
    """The plane, and how well it holds.

    Attributes:
        intercept_bytes, per_model_byte, per_working_byte: its factors.
        upper_ratio: by how much a network may need more than the plane says, relative to it, with 95 % confidence.
        networks: those that it was fitted on and those that it was checked on.
    """

    intercept_bytes: float
    per_model_byte: float
    per_working_byte: float
    upper_ratio: float
    networks: tuple[MemoryNetwork, ...]

    def expected_bytes(self, model: float, working: float) -> float:
        """Of a model of so many bytes that works on so many at a time."""
        return self.intercept_bytes + self.per_model_byte * model + self.per_working_byte * working

    def upper_bytes(self, network: Network, batch: int, precision: str) -> float:
        """What a network stays under with 95 % confidence."""
        sizes = (rule(network, batch=batch, precision=precision) for rule in (model_bytes, working_bytes))
        return self.expected_bytes(*sizes) * (1 + self.upper_ratio)

    @property
    def relative_errors(self) -> tuple[float, ...]:
        """Measured over predicted, less one, of the networks that the plane has not seen."""
        return _errors(self, [network for network in self.networks if network.held_out])

    @property
    def mean_absolute_error(self) -> float:
        return statistics.fmean(map(abs, self.relative_errors or (0.0,)))


def fit_memory(networks: Sequence[MemoryNetwork]) -> Memory:
    """The plane of least squared relative error over the networks that are not held out, and its upper ratio.

    Of a space so small that none can be held out, the fitted networks themselves give the ratio.
    """
    fitted = [network for network in networks if not network.held_out]
    columns = np.array([[1.0, n.model_bytes, n.working_bytes] for n in fitted])
    columns /= np.array([[n.measured_bytes] for n in fitted])
    factors = np.linalg.lstsq(columns, np.ones(len(fitted)), rcond=None)[0]
    if factors[2] < 0:  # what is worked on saves no memory: here it cannot be told from the rest
        factors = np.append(np.linalg.lstsq(columns[:, :2], np.ones(len(fitted)), rcond=None)[0], 0.0)
    intercept, per_model_byte, per_working_byte = map(float, factors)
    memory = Memory(intercept, per_model_byte, per_working_byte, 0.0, tuple(networks))
    return replace(memory, upper_ratio=upper_ratio_of(memory.relative_errors or _errors(memory, networks)))


def _errors(memory: Memory, networks: Sequence[MemoryNetwork]) -> tuple[float, ...]:
    return tuple(n.measured_bytes / memory.expected_bytes(n.model_bytes, n.working_bytes) - 1 for n in networks)
