"""Several boards of a kind as one device: each group of models goes to a board that is free.

The boards are first related to each other (`relation.py`) by a few networks that are timed on all of them. From then on
the milliseconds of a board are divided by its factor, so that all are those of the median board. What a group holds is
timed on one board, since its models are compared with each other. A board that is lost costs the groups that it was
timing: they go to the others, and it is named; so is a board that disagrees.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hwnas.calibration import Measurement
from hwnas.conditions import Conditions
from hwnas.devices import DEFAULT_TIMING, Device, Timing, anchor_model
from hwnas.errors import DeviceError, DeviceLostError, HwnasError, UnfitDeviceError
from hwnas.lines import AGAIN
from hwnas.relation import Relation, references, related, relation

RELATING = Timing(tolerance=0.03, sample_ms=3.0, least_runs=4)
"""As whole networks are timed."""

STALE = 0.95
"""A board whose anchor takes so much less than when it was related was slow then, and is related again."""

LEAST_PART = 15
"""Models that are timed steadily are shared out in parts of so many at least: fewer are compared with each other."""

LOST = (DeviceLostError, UnfitDeviceError)

Result = TypeVar("Result")
Found = tuple[dict[int, Measurement], DeviceError | None]
"""Timings by index, and what was wrong with the other models."""


class Farm(Device):
    """Boards of a kind that measure together. A farm has no line of its own; its boards have theirs.

    Attributes:
        anchor_ms, groups: as those of a `Device`, on the scale of the median board.
        at_once: how many groups keep all boards busy.
    """

    def __init__(self, name: str, boards: Sequence[Device], on_note: Callable[[str], None] = lambda text: None) -> None:
        self.name, self._on_note = name, on_note
        self.anchor_ms, self.groups = None, []
        self.at_once = len(boards) + 1
        self._boards = {board.name: board for board in boards}
        """Those that measure; those that are free are in `_free`."""
        self._names, self._free = [*self._boards], list(boards)
        self._turn = threading.Condition()
        self._closing = False
        self._pool, self._running = self._new_pool(), list[Future[Any]]()
        self._relations: dict[str, Relation] = {}
        self._related_threads = 0
        self._references_ms: tuple[float, ...] = ()
        self._anchors_ms: dict[str, float] = {}
        """What each board's anchor took when it was related."""

    @property
    def relations(self) -> tuple[Relation, ...]:
        return tuple(self._relations[name] for name in self._names if name in self._relations)

    def conditions(self, threads: int = 1, batch: int = 1, precision: str = "fp32") -> Conditions:
        """What all boards have in common.

        Raises:
            HwnasError: as of `Device`, or the boards are not of a kind: it names two and the difference.
        """
        found = self._everywhere(lambda board: board.conditions(threads, batch, precision))
        (one, ours), *others = found.items()
        for other, theirs in others:
            if differences := ours.differences(replace(theirs, device=ours.device)):
                text = "; ".join(f"{name}: {mine!r} and {yours!r}" for name, mine, yours in differences)
                raise HwnasError(
                    f"The boards of a farm are of a kind; {one} and {other} of {self.name} differ ({text}). Make them "
                    "alike, or take one out of boards."
                )
        return replace(
            ours,
            device=self.name,
            governor=" and ".join(sorted({conditions.governor for conditions in found.values()})),
            load_average=max(conditions.load_average for conditions in found.values()),
        )

    def relate(self, threads: int = 1) -> tuple[Relation, ...]:
        """Relates the boards to each other, if they are not related yet for so many threads.

        Raises:
            HwnasError: no more than half of them agree.
        """
        if self._related_threads != threads:
            readings_ms = self._everywhere(lambda board: _networks_ms(board, threads))
            found = related(readings_ms)
            self._references_ms = references({n: readings_ms[n] for n, one in found.items() if not one.left_out})
            self._related_threads = threads
            for name, one in found.items():
                if one.left_out:
                    self._leave_out(self._boards[name], one.left_out, one)
                else:
                    self._relate_one(self._boards[name], one)
        return self.relations

    def measure(
        self, models: Sequence[bytes | Path], timing: Timing = DEFAULT_TIMING
    ) -> Iterator[tuple[int, Measurement]]:
        """As of `Device`; several calls, up to `at_once`, are worked on at the same time."""
        self.relate(timing.threads)
        return _results(self._begin(lambda: self._anywhere(lambda board: self._timed(board, models, timing))))

    def measure_steadily(
        self, models: Sequence[bytes | Path], timing: Timing = DEFAULT_TIMING
    ) -> dict[int, Measurement]:
        self.relate(timing.threads)
        count = max(1, min(len(self._boards), len(models) // LEAST_PART))
        parts = [range(first, len(models), count) for first in range(count)]

        def timed(part: Sequence[int]) -> Found:
            return self._anywhere(lambda board: self._steadily(board, [models[index] for index in part], timing))

        running = [(part, self._begin(partial(timed, part))) for part in parts]
        return {part[index]: found for part, future in running for index, found in _results(future)}

    def peak_memory(self, models: Sequence[bytes | Path], timing: Timing = DEFAULT_TIMING) -> Iterator[tuple[int, int]]:
        return iter(self._anywhere(lambda board: list(board.peak_memory(models, timing))))

    def outputs(self, model: bytes | Path, timing: Timing = DEFAULT_TIMING) -> list[np.ndarray]:
        return self._anywhere(lambda board: board.outputs(model, timing))

    def profile(
        self, model: bytes | Path, timing: Timing, on_round: Callable[[int], None] = lambda number: None
    ) -> dict[str, Any]:
        """As of `Device`; the milliseconds are those of one board, as it takes them."""
        return self._anywhere(lambda board: board.profile(model, timing, on_round))

    def close(self) -> None:
        """Ends what the boards are doing, with an error for whoever waits for it; a later request starts anew."""
        self._closing = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._turn:
            while any(not future.done() for future in self._running):
                for board in self._boards.values():
                    board.line.interrupt()
                self._turn.notify_all()
                self._turn.wait(0.1)
            self._free = [*self._boards.values()]
        self._pool, self._closing = self._new_pool(), False
        for board in self._free:
            board.close()

    def _new_pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(len(self._boards) or 1, thread_name_prefix=f"hwnas-{self.name}")

    def _begin(self, call: Callable[[], Result]) -> "Future[Result]":
        future = self._pool.submit(call)
        self._running = [other for other in self._running if not other.done()] + [future]
        return future

    # ---- one board -----------------------------------------------------------------------------------------------

    def _timed(self, board: Device, models: Sequence[bytes | Path], timing: Timing) -> Found:
        """What a board measures, as the median board would."""
        known, found, failure = len(board.groups), {}, None
        try:
            found.update(board.measure(models, timing))
        except LOST:
            raise
        except DeviceError as error:  # models that do not run; the others count
            failure = error
        return self._scaled(board, found, known), failure

    def _steadily(self, board: Device, models: Sequence[bytes | Path], timing: Timing) -> Found:
        known = len(board.groups)
        return self._scaled(board, board.measure_steadily(models, timing), known), None

    def _scaled(self, board: Device, found: dict[int, Measurement], known: int) -> dict[int, Measurement]:
        """Timings of a board, and what it saw in all groups but the first `known`, as of the median board."""
        groups = board.groups[known:]
        if board.anchor_ms is not None and board.anchor_ms < STALE * self._anchors_ms[board.name]:
            again = relation(board.name, _networks_ms(board, self._related_threads), self._references_ms)
            self._relate_one(board, replace(again, timed=self._relations[board.name].timed))
            if again.left_out:
                raise DeviceLostError(again.left_out)
        with self._turn:
            one = self._relations[board.name]
            self._relations[board.name] = replace(one, timed=one.timed + len(found))
            for group in groups:
                self.groups.append(replace(group, anchor_ms=_divided(group.anchor_ms, one.factor)))
            assert board.anchor_ms is not None
            self.anchor_ms = min(self.anchor_ms or math.inf, board.anchor_ms / one.factor)
        return {index: _divided(measurement, one.factor) for index, measurement in found.items()}

    def _relate_one(self, board: Device, found: Relation) -> None:
        """A board counts its samples only while its anchor takes what it took now, or for the farm's table before."""
        assert board.anchor_ms is not None
        board.anchor_ms = min(board.anchor_ms, (self.anchor_ms or math.inf) * found.factor)
        with self._turn:
            self._relations[board.name], self._anchors_ms[board.name] = found, board.anchor_ms

    def _leave_out(self, board: Device, why: str, found: Relation | None = None) -> None:
        """A board measures no more in this session."""
        board.close()
        with self._turn:
            if self._boards.pop(board.name, None) is None:
                return
            known = found or self._relations.get(board.name) or Relation(board.name)
            self._relations[board.name] = replace(known, left_out=why)
            if board in self._free:
                self._free.remove(board)
            self._turn.notify_all()
        self._on_note(f"{self.name} goes on without its board {board.name}: {why}.")

    # ---- whose turn it is ----------------------------------------------------------------------------------------

    def _anywhere(self, call: Callable[[Device], Result]) -> Result:
        """What the call gives on a board that is free; if that is lost meanwhile, on another."""
        while True:
            if (result := self._on(self._free_board(), call)) is not None:
                return result

    def _everywhere(self, call: Callable[[Device], Result]) -> dict[str, Result]:
        """What the call gives on each board, all at the same time; those that are lost are left out."""
        with self._turn:
            self._turn.wait_for(lambda: len(self._free) == len(self._boards))
            boards, self._free = self._free, []
        running = {board.name: self._begin(partial(self._on, board, call)) for board in boards}
        wait(running.values())
        found = {name: result for name, future in running.items() if (result := future.result()) is not None}
        self._check_boards()
        return found

    def _on(self, board: Device, call: Callable[[Device], Result]) -> Result | None:
        """What the call gives on a board that was taken, which is given back; `None` if it was lost and is left out."""
        try:
            return call(board)
        except LOST as error:
            if self._closing:
                raise
            self._leave_out(board, str(error).removesuffix(AGAIN).rstrip("."))
            return None
        finally:
            with self._turn:
                if board.name in self._boards:
                    self._free.append(board)
                self._turn.notify_all()

    def _free_board(self) -> Device:
        """Waits for a board, and takes it."""
        with self._turn:
            self._turn.wait_for(lambda: self._free or self._closing or not self._boards)
            if self._closing:
                raise DeviceLostError(f"{self.name} was closed meanwhile.")
            self._check_boards()
            return self._free.pop(0)

    def _check_boards(self) -> None:
        if not self._boards:
            text = "; ".join(f"{one.board}: {one.left_out}" for one in self.relations)
            raise DeviceLostError(f"{self.name} has no board left. {text}.{AGAIN}")


def _results(future: "Future[Found]") -> Iterator[tuple[int, Measurement]]:
    try:
        found, failure = future.result()
    except CancelledError:
        raise DeviceLostError("The farm was closed before these models were timed.") from None
    yield from found.items()
    if failure:
        raise failure


def _divided(measurement: Measurement, factor: float) -> Measurement:
    return Measurement(tuple(sample / factor for sample in measurement.samples_ms), measurement.pace)


def _networks_ms(board: Device, threads: int) -> tuple[float, ...]:
    """What the networks that relate boards take on one of them."""
    found = board.measure_steadily(relating_models(), replace(RELATING, threads=threads))
    return tuple(found[index].at_usual_pace().median_ms for index in sorted(found))


@cache
def relating_models() -> tuple[bytes, ...]:
    """The anchor and four more networks, each with its own share of arithmetic, memory and small operators."""
    from hwnas.onnx_model import random_weights, to_onnx
    from hwnas.reference.mobilenet import mobilenet_v2
    from hwnas.reference.shufflenet import shufflenet_v1, shufflenet_v2

    networks = (
        shufflenet_v2("1x", input_size=32, stem_stride=1, max_pool=False),
        shufflenet_v2("2x", input_size=64),
        shufflenet_v1(3, "1x", input_size=64),
        mobilenet_v2(1.0, input_size=64),
    )
    return anchor_model(), *(to_onnx(network, random_weights(network, 0)).SerializeToString() for network in networks)
