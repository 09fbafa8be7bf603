"""The Python of a board that nothing disturbs: `python tests/steady_board.py FACTOR NUMBER CHIP PAUSE_S ...`.

Everything is done as on any board, by the same processes, and every model runs. Only the clock of the measuring process
is scripted (`steady.py`), and moves FACTOR times as fast. The board has one processor, of that number, so that several
boards can be this machine, and its name is CHIP. Each group of models takes PAUSE_S seconds more of real time.
"""

import os
import runpy
import sys
import time
from pathlib import Path


def main(factor: float, number: int, chip: str, pause_s: float, *words: str) -> None:
    if words[0] == "-c":  # the agent
        os.sched_getaffinity = lambda process: {number}
        exec(compile(words[1], "boot", "exec"), {"__name__": "__main__"})
        return
    sys.argv = [*words]
    if not words[0].endswith(".pyz"):
        runpy.run_path(words[0], run_name="__main__")
        return
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from steady import SteadyMachine

    from hwnas import measure

    class Machine(SteadyMachine):
        def model_ms(self, content: bytes) -> float:
            return factor * super().model_ms(content)

    time_group = measure.time_group

    def slowly(request, answer, machine):
        time.sleep(pause_s)
        time_group(request, answer, Machine(machine))

    measure.time_group, measure.chip = slowly, lambda: chip
    measure.main()


if __name__ == "__main__":
    _, factor, number, chip, pause_s, *words = sys.argv
    main(float(factor), int(number), chip, float(pause_s), *words)
