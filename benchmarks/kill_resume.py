"""A supernet that is killed thirty times while it trains, and files in which a bit flips.

After each SIGKILL the training goes on, and every loss must be that of a training which nobody disturbed, bit for bit.
A flipped bit must be told, wherever in a checkpoint or in the file of a supernet it is.
"""

import multiprocessing
import shutil
import signal
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.result import Result, this_machine
from hwnas.checkpoints import newest_checkpoint
from hwnas.errors import HwnasError
from hwnas.space_toml import parse_space

if TYPE_CHECKING:
    from hwnas.supernet import Supernet

KILLS, FLIPS, EPOCHS, BATCH_SIZE, SEED = 30, 200, 6, 16, 0
CHECKPOINT_SECONDS = 0.1
"""As long as writing one takes, so that many kills fall into that, and others do not."""
SPACE = parse_space("""
name = "small"
input_size = 8
classes = 10
[stem]
channels = 8
stride = 1
max_pool = false
[unit]
split_ratio = ["1/2"]
kernel = [3, 5]
squeeze_excite = [false]
residual = [false, true]
groups = [1]
extra_depthwise = [false]
[[stage]]
depth = [1, 2]
width = [16, 32]
[head]
channels = 32
""")


@dataclass(frozen=True, slots=True)
class Life:
    """A process that trained, from its start or the newest checkpoint on, to the end or until it was killed.

    Attributes:
        losses: of the steps that it told, as `float.hex` writes them, by step.
        told_at_s: when it told them.
        killed: whether it was.
        writing: whether that was while it wrote a checkpoint.
    """

    losses: dict[int, str]
    told_at_s: tuple[float, ...]
    killed: bool
    writing: bool

    def moment(self, at_s: float) -> tuple[int, float]:
        """The step that was told last before a time, and the seconds since."""
        index = bisect_right(self.told_at_s, at_s) - 1
        return list(self.losses)[index], at_s - self.told_at_s[index]


# ---- the training ------------------------------------------------------------------------------------------------


def new_supernet() -> "Supernet":
    from flax import nnx

    from hwnas.supernet import Supernet

    return Supernet(SPACE, rngs=nnx.Rngs(SEED))


def train_in(folder: Path, compiled: Path, pipe: Connection) -> None:
    """What the process runs: as `hwnas train` does, but with more checkpoints, and each loss into the pipe."""
    from hwnas import training
    from hwnas.data import load_data
    from hwnas.methods import single_paths

    training.CHECKPOINT_SECONDS = CHECKPOINT_SECONDS
    training.prepare_process(compiled)
    training.train(
        new_supernet(),
        load_data("digits", image_size=SPACE.input_size),
        training.Recipe(EPOCHS, BATCH_SIZE),
        folder,
        paths=single_paths(SPACE, None, SEED),
        seed=SEED,
        on_step=lambda progress: pipe.send((progress.step, progress.loss.hex())),
    )


def live(folder: Path, compiled: Path, kill_at: tuple[int, float] | None = None) -> Life:
    """Trains in a process, which is killed so many seconds after it told a step or a later one."""
    context = multiprocessing.get_context("spawn")
    pipe, other = context.Pipe(duplex=False)
    before, losses, times = _unfinished(folder), {}, []
    process = context.Process(target=train_in, args=(folder, compiled, other), daemon=True)
    process.start()
    other.close()
    with pipe:
        while True:
            try:
                step, loss = pipe.recv()
            except EOFError:
                break
            losses[step] = loss
            times.append(time.monotonic())
            if kill_at and step >= kill_at[0]:
                time.sleep(kill_at[1])
                process.kill()
                kill_at = None
    process.join()
    killed = process.exitcode == -signal.SIGKILL
    if not killed and process.exitcode:
        raise SystemExit(f"The training in {folder} ended with status {process.exitcode}.")
    return Life(losses, tuple(times), killed, bool(_unfinished(folder) - before))


def _unfinished(folder: Path) -> set[tuple[str, int]]:
    return {(path.name, path.stat().st_ctime_ns) for path in folder.glob("unfinished-*")}


def resumes_equal(lives: Sequence[Life], whole: Life) -> int:
    """How many lives after the first went on without a gap, with the losses of the whole training."""
    return sum(
        min(after.losses) <= max(before.losses) + 1
        and list(after.losses) == list(range(min(after.losses), max(after.losses) + 1))
        and all(whole.losses[step] == loss for step, loss in after.losses.items())
        for before, after in pairwise(lives)
    )


# ---- flipped bits ------------------------------------------------------------------------------------------------


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    """A file with one bit flipped."""
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[byte] ^= 1 << bit
    path.write_bytes(broken)
    try:
        yield
    finally:
        path.write_bytes(whole)


def refused(read: Callable[[], Any]) -> bool:
    """Whether reading ends with a message for the user."""
    try:
        read()
    except HwnasError:
        return True
    return False


def checkpoint_flips_found(folder: Path, rng: Random) -> int:
    """How many flips are told that fall into the newest checkpoint: in any of its files, as likely as in another."""
    from hwnas.training import trained_already

    found = newest_checkpoint(folder)
    assert found
    files, model, told = sorted(path for path in found[1].rglob("*") if path.is_file()), new_supernet(), 0
    for _ in range(FLIPS):
        path = rng.choice([path for path in files if path.stat().st_size])
        with flipped(path, rng.randrange(path.stat().st_size), rng.randrange(8)):
            told += refused(lambda: trained_already(model, folder))
    assert not refused(lambda: trained_already(model, folder))
    return told


def supernet_flips_found(path: Path, rng: Random) -> int:
    """The same of the file of a supernet: half of the flips fall into its header, the rest anywhere."""
    from hwnas.supernet_file import read_supernet

    def read() -> Any:
        return read_supernet(path, SPACE, [str(digit) for digit in range(10)])

    size, told = path.stat().st_size, 0
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for number in range(FLIPS):
        with flipped(path, rng.randrange(header if number % 2 else size), rng.randrange(8)):
            told += refused(read)
    assert not refused(read)
    return told


def same_weights(one: Path, other: Path) -> bool:
    """Whether the newest checkpoints of two folders hold the same weights."""
    import jax
    import numpy as np
    from flax import nnx

    from hwnas.training import trained_already

    models = [trained_already(new_supernet(), folder) for folder in (one, other)]
    leaves = [jax.tree.leaves(nnx.split(model, nnx.Param)[1]) for model in models]
    return all(np.array_equal(ours, theirs) for ours, theirs in zip(*leaves, strict=True))


# ---- all of it ---------------------------------------------------------------------------------------------------


def run(name: str) -> Result:
    from hwnas.supernet_file import write_supernet
    from hwnas.training import trained_already

    rng, begun = Random(SEED), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hwnas-kill-resume-") as place:
        compiled, undisturbed, killed = (Path(place) / part for part in ("compiled", "undisturbed", "killed"))
        whole = live(undisturbed, compiled)
        span = whole.told_at_s[0], whole.told_at_s[-1]
        moments = [whole.moment(at_s) for at_s in sorted(rng.uniform(*span) for _ in range(KILLS))]
        lives = [*(live(killed, compiled, moment) for moment in moments), live(killed, compiled)]
        kills, writing = sum(life.killed for life in lives), sum(life.writing for life in lives)
        equal = resumes_equal(lives, whole)
        again = [max(a.losses) + 1 - min(b.losses) for a, b in pairwise(lives)]
        complete = {step for life in lives for step in life.losses} == set(whole.losses)
        weights = same_weights(undisturbed, killed)
        checkpoints_told = checkpoint_flips_found(killed, rng)
        model = trained_already(new_supernet(), killed)
        assert model
        file = Path(place) / "supernet.safetensors"
        write_supernet(file, model, {"classes": [str(digit) for digit in range(10)]})
        files_told = supernet_flips_found(file, rng)
        _, newest = newest_checkpoint(killed) or (0, killed)
        shutil.rmtree(newest)  # as the message on a damaged one advises
        without_newest = resumes_equal([whole, live(killed, compiled)], whole) and same_weights(undisturbed, killed)
    return Result(
        name=name,
        value=equal,
        unit=f"of {KILLS} resumes with the losses of an undisturbed training, bit for bit",
        target=f"{KILLS}, and {FLIPS} of {FLIPS} flipped bits told in checkpoints and in a supernet's file",
        met=equal == kills == KILLS
        and complete
        and weights
        and bool(without_newest)
        and writing > 0
        and checkpoints_told == files_told == FLIPS,
        spread=f"steps done again after a kill: median {statistics.median(again):g}, at most {max(again)}",
        device=this_machine(),
        details={
            "steps": f"{len(whole.losses)}, in {span[1] - span[0]:.1f} s undisturbed; all told: {complete}",
            "kills": f"{kills}, of which {writing} while a checkpoint was written",
            "steps done again": f"{sum(again)} in all",
            "same weights at the end": weights,
            "flipped bits told": f"{checkpoints_told} of {FLIPS} in a checkpoint, {files_told} of {FLIPS} in a "
            "supernet's file",
            "same losses and weights from the checkpoint before, once the newest is removed": bool(without_newest),
            "took": f"{time.monotonic() - begun:.0f} s",
        },
    )
