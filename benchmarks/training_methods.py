"""Ways to train a supernet at equal images: what the same networks inherit, and how that ranks them.

The networks were trained from scratch already: `docs/measured/nvidia-h200-scores.json` holds their accuracies, of
`rank-correlation` on an H200. So all time goes into supernets. The defaults are cut for minutes on two cores and tell
nothing there; on an accelerator METHODS_IMAGES of 1,500,000 and all training images tell.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from benchmarks.inherited_ranking import from_scratch, within_best_third
from benchmarks.rank_correlation import IMAGES_AT, listener
from benchmarks.result import Result, this_machine
from hwnas.candidate_scoring import scorer_of
from hwnas.data import DataSet, load_data, stratified_subset
from hwnas.methods import METHODS
from hwnas.ranking import rank_correlation
from hwnas.space import SearchSpace
from hwnas.space_toml import load_space
from hwnas.stages import Job, trained_supernet
from hwnas.supernet import Supernet
from hwnas.training import Recipe, prepare_process, start_state, training_step

SPACE = "shufflenet-cifar"
FOLDER = Path("runs/benchmark-training-methods")
IMAGES = int(os.environ.get("METHODS_IMAGES", "2000"))
"""That enter a supernet in its training, over all paths."""
TRAINING, VALIDATION = (int(os.environ.get(f"METHODS_{name}", "1000")) for name in ("TRAINING", "VALIDATION"))
VARIANTS = os.environ.get(
    "METHODS_VARIANTS", "single-path/16/1024/0.4 single-path/16/1024/1.6 single-path/8/512/0.8 sandwich/8/128/0.8"
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A method, how many paths a step trains, images of a batch, and the highest learning rate."""

    method: str
    paths: int
    batch_size: int
    learning_rate: float

    @staticmethod
    def read(text: str) -> "Variant":
        method, paths, batch_size, learning_rate = text.split("/")
        return Variant(method, int(paths), int(batch_size), float(learning_rate))

    @property
    def images(self) -> int:
        """That enter the supernet in a step."""
        return self.batch_size * (self.paths if METHODS[self.method].distils else 1)

    def epochs(self, data: DataSet) -> int:
        return max(1, round(IMAGES / self.images / (len(data.train) // self.batch_size)))

    def __str__(self) -> str:
        return f"{self.method}, {self.paths} paths, batch {self.batch_size}, learning rate {self.learning_rate:g}"


def compile_steps(variants: list[Variant], space: SearchSpace, data: DataSet) -> None:
    """Compiles the step of every variant, side by side, for the compilation cache of this machine."""

    def compile_step(shape: tuple[bool, int, int]) -> None:
        distils, paths, batch_size = shape
        recipe = Recipe(1, batch_size)
        model = Supernet(space, rngs=nnx.Rngs(0))
        _, state = start_state(model)
        images, labels = next(data.train.batches(batch_size, seed=0)).divided(1 if distils else paths)
        codes = np.zeros((paths, len(space.radices)), np.int32)
        rest = jax.random.key(0), 0.1, images, labels, codes
        training_step(model, recipe, data, distils=distils).lower(*state, *rest).compile()

    shapes = dict.fromkeys((METHODS[one.method].distils, one.paths, one.batch_size) for one in variants)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(compile_step, shapes))


def run(name: str) -> Result:
    if not IMAGES_AT.is_dir():
        raise SystemExit(f"Skipped: the Parquet files of CIFAR-10 are not at {IMAGES_AT}.")
    begun = time.monotonic()
    space, data = load_space(SPACE), load_data(IMAGES_AT, image_size=32)
    data = replace(
        data,
        train=stratified_subset(data.train, TRAINING, 0),
        validation=stratified_subset(data.validation, VALIDATION, 0),
    )
    codes = from_scratch(9)
    scratch, variants = list(codes.values()), [Variant.read(text) for text in VARIANTS.split()]
    prepare_process(FOLDER / "compiled")
    compile_steps(variants, space, data)
    print(f"{time.monotonic() - begun:6.1f} s  compiled", flush=True)
    details: dict[str, object] = {}
    best = 0.0
    for variant in variants:
        started = time.monotonic()
        job = Job(
            space, data, (SPACE, str(IMAGES_AT)), runs=FOLDER, epochs=variant.epochs(data), method=variant.method,
            batch_size=variant.batch_size, paths=variant.paths, learning_rate=variant.learning_rate,
            listener=listener(),
        )  # fmt: skip
        _, supernet = trained_supernet(job)
        seconds = time.monotonic() - started
        scorer = scorer_of(supernet, data, calibration_images=1024)
        inherited = [scorer.accuracy(data.validation, code) for code in codes]
        tau = rank_correlation(inherited, scratch)
        top_tau = within_best_third(inherited, scratch)
        seen = variant.epochs(data) * (len(data.train) // variant.batch_size) * variant.images
        details[str(variant)] = (
            f"{seen} images in {seconds:.0f} s, inherited {min(inherited):.1%} to {max(inherited):.1%}, mean "
            f"{sum(inherited) / len(inherited):.1%}; tau {tau.text}, best third {top_tau.tau:.2f}"
        )
        print(f"{variant}: {details[str(variant)]}", flush=True)
        print(" ".join(f"{100 * accuracy:.1f}" for accuracy in inherited), flush=True)
        best = max(best, tau.tau)
    return Result(
        name=name,
        value=round(best, 3),
        unit="the highest Kendall tau of inherited accuracy and accuracy from scratch",
        target="at least 0.7",
        met=best >= 0.7,
        spread="intervals below",
        device=f"{jax.local_devices()[0].device_kind}, JAX {jax.__version__}; {this_machine()}",
        details={"from scratch": " ".join(f"{100 * accuracy:.1f}" for accuracy in scratch)} | details,
    )
