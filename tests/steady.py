"""hwnas on a machine that nothing disturbs: `python tests/steady.py search ...` is `hwnas search ...`.

All is done as always and by the same processes. Only the clock of the measuring process is scripted (`simulated.py`),
so that no test of what comes after the measuring hangs on how quiet the machine is. Timing is tested elsewhere.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from simulated import SimulatedMachine

from hwnas import cli, devices, measure


class SteadyMachine(SimulatedMachine):
    """Opens and runs every model once for real; then the clock moves by what the model costs."""

    def __init__(self, real: measure.Machine) -> None:
        super().__init__()
        self._real = real

    def open(self, path: str, threads: int, seed: int) -> tuple[Callable[[], None], int]:
        run, _ = self._real.open(path, threads, seed)
        run()
        return super().open(path, threads, seed)

    def cores(self) -> int:
        return self._real.cores()


def command_of(runtime: str) -> tuple[str, ...]:
    """The command that starts the measuring process with a scripted clock."""
    return (sys.executable, __file__, MEASURE, runtime)


MEASURE = "measure"

if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        sys.argv[:2] = [str(Path(measure.__file__))]  # it starts itself anew for each model whose memory it measures
        time_group = measure.time_group
        measure.time_group = lambda request, answer, machine: time_group(request, answer, SteadyMachine(machine))
        measure.main()
    else:
        devices.command_of = command_of
        cli.main()
