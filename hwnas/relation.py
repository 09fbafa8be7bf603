"""Boards of a kind, related to each other by the same few networks, timed on all of them.

The reference of a network is its median over the boards. A board's factor is the median, over the networks, of its time
divided by the reference; its scatter is how far the networks' ratios lie from that factor, on average. Boards of a kind
differ by their silicon, their cooling and their supply: by a few percent, the same for every network. A board that
differs by more, or by other amounts for other networks, is not of the kind, or something is wrong with it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hwnas.errors import HwnasError

FACTOR_LIMIT, SCATTER_LIMIT = 1.1, 0.03
"""A board agrees with the others if its factor lies between the one and its reciprocal, and its scatter is at most the
other."""


@dataclass(frozen=True, slots=True)
class Relation:
    """What a board is to the others of its farm.

    Attributes:
        board: its name.
        factor: how many times as long as on the median board networks take; measurements are divided by it.
        scatter: how far the networks' own factors lie from that, relative to it, on average.
        networks_ms: what the networks took, in milliseconds; empty if the board was lost before.
        timed: how many models it has timed since.
        left_out: why it does not measure any more; empty if it does.
    """

    board: str
    factor: float = 1.0
    scatter: float = 0.0
    networks_ms: tuple[float, ...] = ()
    timed: int = 0
    left_out: str = ""

    @property
    def strangeness(self) -> float:
        """How far it is from the others, as a share of what is allowed; above 1 it disagrees with them."""
        return max(abs(math.log(self.factor)) / math.log(FACTOR_LIMIT), self.scatter / SCATTER_LIMIT)

    @property
    def text(self) -> str:
        """The relation in words."""
        if not self.networks_ms:
            return f"left out: {self.left_out}"
        found = f"{self.factor:.3f} ± {self.scatter:.1%} times the median board"
        found += f", {self.timed} models timed" if self.timed else ""
        return f"{found}; left out: {self.left_out}" if self.left_out else found


def references(readings_ms: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    """The median over the boards, in milliseconds, of each network."""
    return tuple(statistics.median(times) for times in zip(*readings_ms.values(), strict=True))


def relation(board: str, networks_ms: Sequence[float], reference_ms: Sequence[float]) -> Relation:
    """What a board is to the median one; if it disagrees with that, `left_out` says how."""
    ratios = [found / usual for found, usual in zip(networks_ms, reference_ms, strict=True)]
    factor = statistics.median(ratios)
    scatter = statistics.fmean(abs(ratio / factor - 1) for ratio in ratios)
    found = Relation(board, factor, scatter, tuple(networks_ms))
    if found.strangeness <= 1:
        return found
    text = (
        f"{len(ratios)} networks take {min(ratios):.3g} to {max(ratios):.3g} times as long there as on the median one: "
        f"{_milliseconds(networks_ms)} ms and not {_milliseconds(reference_ms)} ms. Boards of a kind differ by at most "
        f"{FACTOR_LIMIT - 1:.0%}, and by the same for all networks within {SCATTER_LIMIT:.0%}"
    )
    return replace(found, left_out=text)


def related(readings_ms: Mapping[str, Sequence[float]]) -> dict[str, Relation]:
    """Relates boards to each other; who disagrees with the others is left out, the strangest first.

    Args:
        readings_ms: by board, what each of the same networks takes, in milliseconds.

    Raises:
        HwnasError: no more than half of the boards agree, so that nobody can tell who is right.
    """
    agreeing, left_out = dict(readings_ms), {}
    while True:
        reference_ms = references(agreeing)
        found = {board: relation(board, times, reference_ms) for board, times in agreeing.items()}
        worst = max(found.values(), key=lambda one: one.strangeness)
        if not worst.left_out:
            return found | left_out
        left_out[worst.board] = worst
        del agreeing[worst.board]
        if len(agreeing) <= len(readings_ms) / 2:
            text = "; ".join(f"{board} {_milliseconds(times)} ms" for board, times in readings_ms.items())
            raise HwnasError(
                f"More than half of a farm's boards must agree, within {FACTOR_LIMIT - 1:.0%}; these do not. The same "
                f"networks take: {text}. See what is wrong: hwnas devices check BOARD. Or take a board out of boards."
            )


def _milliseconds(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
