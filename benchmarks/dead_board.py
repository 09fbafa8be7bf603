"""How much longer than its time-out a dead board holds up a run: deaf, gone, or stopped in the middle of a group."""

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from benchmarks.loopback import Board, listening_deaf, measuring_there, parent_of, running_sshd
from benchmarks.result import Result, this_machine
from hwnas.devices import Device, Timing, line_to
from hwnas.errors import DeviceLostError
from hwnas.onnx_model import random_weights, to_onnx
from hwnas.reference import shufflenet_v2

TIMEOUT_S, REPEATS, ALLOWED_S = 3.0, 5, 5.0
ENDLESS = Timing(rounds=10**9, patience_s=1e9, agreeing=10**9, timeout_s=TIMEOUT_S)


def run(name: str) -> Result:
    network = shufflenet_v2("0.5x", input_size=32, classes=10, stem_stride=1, max_pool=False)
    model = to_onnx(network, random_weights(network, 0)).SerializeToString()
    over_s: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, running_sshd(Path(folder)) as board, listening_deaf() as deaf:
        for repeat in range(REPEATS):
            for what, port in (("takes the connection and says nothing", deaf), ("is gone", 1)):
                options = board.configure(f"dead-{port}", port=port)
                with Device("board", line_to(board.entry(ssh_options=options))) as device:
                    over_s.setdefault(what, []).append(waited(lambda: device.measure([model], ENDLESS)))
                over_s.setdefault(f"stops in a group, then {what}", []).append(stopped(board, model, port, repeat))
    worst = max(max(values) for values in over_s.values())
    every = [value for values in over_s.values() for value in values]
    return Result(
        name=name,
        value=round(worst, 2),
        unit=f"s longer than its time-out of {TIMEOUT_S:g} s at most",
        target=f"at most {ALLOWED_S:g} s",
        met=worst <= ALLOWED_S,
        spread=f"median {statistics.median(every):.2f} s of {len(every)}",
        device=this_machine(),
        details={what: f"{min(values):+.2f} to {max(values):+.2f} s" for what, values in over_s.items()},
    )


def waited(answers: Callable[[], Iterable[object]]) -> float:
    """How much longer than the time-out it takes until the board counts as lost."""
    began = time.monotonic()
    try:
        list(answers())
    except DeviceLostError:
        return time.monotonic() - began - TIMEOUT_S
    raise RuntimeError("a dead board answered")


def stopped(board: Board, model: bytes, port: int, repeat: int) -> float:
    """The same for a board that stops while it measures; who calls again reaches this port."""
    options = board.configure(f"stops-{port}-{repeat}")
    with Device("board", line_to(board.entry(ssh_options=options))) as device:
        device.conditions()
        (child,) = measuring_there(board)
        processes = [child, parent_of(child)]
        answers = device.measure([model], ENDLESS)
        time.sleep(1.0)  # it is sent, and measured
        try:
            for process in processes:
                os.kill(process, signal.SIGSTOP)
            board.configure(f"stops-{port}-{repeat}", port=port)
            return waited(lambda: answers)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
