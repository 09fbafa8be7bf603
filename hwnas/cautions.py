"""What made a measurement less sure than it could be: a closed list of cautions, each with a hint."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hwnas.calibration import ERROR_LIMIT, Calibration
from hwnas.conditions import Conditions
from hwnas.devices import GroupFacts


@dataclass(frozen=True, slots=True)
class Seen:
    """What the cautions are drawn from."""

    conditions: Conditions
    groups: Sequence[GroupFacts]
    calibration: Calibration

    @property
    def unsteady_share(self) -> float:
        """The share of timings for which the machine was too disturbed."""
        return sum(group.unsteady for group in self.groups) / max(1, sum(group.models for group in self.groups))

    @property
    def slow_share(self) -> float:
        """The share of the anchor's samples that took longer than usual."""
        samples_ms = [sample for group in self.groups for sample in group.anchor_ms.samples_ms]
        usual_ms = statistics.quantiles(samples_ms, n=10)[0] if len(samples_ms) > 1 else 0.0
        return statistics.fmean([sample > SLOW * usual_ms for sample in samples_ms] or [False])

    @property
    def load_average(self) -> float:
        return statistics.median([group.load_average for group in self.groups] or [0.0])

    @property
    def stolen(self) -> float:
        shares = [group.stolen for group in self.groups if group.stolen is not None]
        return statistics.fmean(shares or [0.0])

    @property
    def slowest_megahertz(self) -> float:
        """The least frequency seen, as a share of the greatest; 1 where none is shown."""
        shown = [megahertz for group in self.groups for megahertz in group.megahertz if megahertz]
        return min(shown) / max(shown) if shown else 1.0


SLOW = 1.1


@dataclass(frozen=True, slots=True)
class Caution:
    """One entry of the list.

    Attributes:
        name: as a latency table stores it.
        applies: whether what was seen calls for it.
        text: what was seen, and a hint.
    """

    name: str
    applies: Callable[[Seen], bool]
    text: str


CAUTIONS = (
    Caution(
        "emulated",
        lambda seen: seen.conditions.origin == "emulated",
        "The device is emulated: its milliseconds mean nothing. A search takes the table with --force only.",
    ),
    Caution(
        "estimated",
        lambda seen: seen.conditions.origin == "estimated",
        "Whole networks alone were measured, the units follow from another device's table. A search takes this table "
        "with --force only.",
    ),
    Caution(
        "busy",
        lambda seen: seen.load_average > seen.conditions.threads + 1.0,
        "Other programs were running. Close them and profile again.",
    ),
    Caution(
        "slowed",
        lambda seen: seen.slow_share > 0.25,
        "The machine was slowed down more than a quarter of the time, as by a neighbour on the same core or chip. Only "
        "samples of undisturbed moments were kept; in use the model will at times be as much slower.",
    ),
    Caution(
        "unsteady",
        lambda seen: seen.unsteady_share > 0.02,
        "Some timings had to be repeated, as they found no undisturbed moment. Profile again at a quieter time.",
    ),
    Caution(
        "stolen",
        lambda seen: seen.stolen > 0.02,
        "The host of this virtual machine gave its processors to others. Take a dedicated machine.",
    ),
    Caution(
        "throttled",
        lambda seen: seen.slowest_megahertz < 0.9,
        "The processor lowered its frequency meanwhile. Cool it, or fix its frequency below the limit.",
    ),
    Caution(
        "cooled down",
        lambda seen: any(group.waited_s > 0 for group in seen.groups),
        "The processor was so hot that measuring had to wait. In long use the model will be slower: cool it better.",
    ),
    Caution(
        "governor",
        lambda seen: seen.conditions.governor not in ("performance", "not shown"),
        "The frequency governor is not 'performance', so the frequency follows the load. Set it with: cpupower "
        "frequency-set -g performance",
    ),
    Caution(
        "all cores",
        lambda seen: 1 < seen.conditions.cores == seen.conditions.threads,
        "The model uses every processor, so that whatever else runs delays it. Leave one free: give fewer --threads.",
    ),
    Caution(
        "noisy",
        lambda seen: seen.calibration.noise_floor > 0.03,
        "The same networks measured twice differ by more than 3 %. No table can predict better than that here.",
    ),
    Caution(
        "not additive",
        lambda seen: seen.calibration.mean_absolute_error > max(ERROR_LIMIT, 2 * seen.calibration.noise_floor),
        "Whole networks take other times than their units tell. Widen the budget by the error that is shown.",
    ),
)


def cautions_of(seen: Seen) -> tuple[str, ...]:
    """The names of the cautions that what was seen calls for."""
    return tuple(caution.name for caution in CAUTIONS if caution.applies(seen))


def texts_of(names: Sequence[str]) -> list[str]:
    """The texts of cautions, by name."""
    return [f"{caution.name}: {caution.text}" for caution in CAUTIONS if caution.name in names]
