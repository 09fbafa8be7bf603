"""The stages of the main job, each on its own: data and settings, latency table, supernet.

Each stage keeps its result in a folder and does nothing where that result is there already, so that what was killed
goes on where it stopped.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwnas import processes
from hwnas.conditions import check_origin
from hwnas.errors import HwnasError
from hwnas.event_log import EventLog
from hwnas.latency import LatencyTable, load_table, table_path
from hwnas.methods import Draw, check_paths, method
from hwnas.runs import write_text
from hwnas.space import SearchSpace
from hwnas.space_toml import load_space
from hwnas.supernet_file import stated_digest, supernet_path

if TYPE_CHECKING:
    from hwnas.data import DataSet
    from hwnas.devices import Device
    from hwnas.supernet import Supernet
    from hwnas.training import Progress, Recipe


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a job tells what it does.

    Attributes:
        stage: called with a sentence when a stage begins.
        note: called with a sentence that the user should read.
        progress: called with done, total and a few words during a stage.
    """

    stage: Callable[[str], None] = lambda text: None
    note: Callable[[str], None] = lambda text: None
    progress: Callable[[int, int, str], None] = lambda done, total, words: None


@dataclass(frozen=True, slots=True)
class Budget:
    """What a run of the model may take on a device beside the first, in milliseconds, and the threads of the run."""

    device: str
    budget_ms: float
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Job:
    """What is searched for, on what, and how.

    Attributes:
        space: the search space, its classes already those of the data.
        data: the images.
        sources: what space and data were read from.
        device: the device's name.
        threads, batch, precision: how the device runs models.
        seed: of everything that is drawn.
        runs: the folder that holds supernets and runs.
        tables: the folder of latency tables.
        epochs, retrain_epochs: passes over the training images for the supernet and for the winner.
        batch_size, learning_rate: of both trainings.
        method: how the supernet is trained, one of `methods.METHODS`.
        paths: architectures that a step of it trains; without it as many as the method does by default.
        within_ms: only architectures whose upper latency estimate keeps this are drawn for it; without it all are.
        supernet: a file of a trained one (`supernet_file.py`), in place of training.
        start: a file of a trained one, from whose weights the supernet's training starts; without it from new ones.
        force: takes a latency table that failed its own check, or is estimated, or of an emulated device.
        listener: is told what happens.
    """

    space: SearchSpace
    data: "DataSet"
    sources: tuple[str, str]
    device: str = "cpu"
    threads: int = 1
    batch: int = 1
    precision: str = "fp32"
    seed: int = 0
    runs: Path = Path("runs")
    tables: Path = field(default_factory=lambda: tables_folder())
    epochs: int = 10
    retrain_epochs: int = 5
    batch_size: int = 16
    learning_rate: float = 0.05
    method: str = "single-path"
    paths: int | None = None
    within_ms: float | None = None
    supernet: str | None = None
    start: str | None = None
    force: bool = False
    listener: Listener = Listener()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise HwnasError(f"The learning rate is a number above 0, such as 0.05. It is {self.learning_rate}.")
        if self.within_ms is not None and not (math.isfinite(self.within_ms) and self.within_ms > 0):
            raise HwnasError(f"--within-ms is a number of milliseconds above 0. It is {self.within_ms}.")
        how = method(self.method)
        paths = check_paths(how, self.paths)
        if self.within_ms is not None:  # not every method takes a limit, and that is said before anything is measured
            how.sampler(self.space, lambda _: (), self.seed, paths)


def tables_folder() -> Path:
    """Where the latency tables of this user lie: `$HWNAS_TABLES`, else beside the cache of data sets."""
    from hwnas.datasets import cache_folder

    return Path(os.environ.get("HWNAS_TABLES") or cache_folder() / "latency_tables")


def make_job(space_source: str, data_source: str, **settings: Any) -> Job:
    """A job on a space and a data source; the space's classifier gets the classes of the data.

    Other processes that work with this one make the same job before it returns.

    Args:
        space_source: a space's name or TOML file.
        data_source: whatever `data.load_data` takes.
        settings: further fields of `Job`.
    """
    from hwnas.data import load_data
    from hwnas.datasets import cache_folder
    from hwnas.training import prepare_process

    prepare_process(cache_folder() / "compiled")
    space = load_space(space_source)
    data = load_data(data_source, image_size=space.input_size, seed=settings.get("seed", 0))
    space = replace(space, classes=len(data.classes))
    job = Job(space, data, sources=(space_source, data_source), **settings)
    if processes.count() > 1 and processes.leads():
        facts = {"space_digest": space.digest, "data_fingerprint": data.fingerprint}
        processes.order("work on", settings=settings_of(replace(job, supernet=None, start=None)), **facts)
        processes.answers()
    return job


SETTINGS = (
    "device",
    "threads",
    "batch",
    "precision",
    "seed",
    "epochs",
    "retrain_epochs",
    "batch_size",
    "learning_rate",
    "method",
    "paths",
    "within_ms",
    "supernet",
    "start",
)
"""The fields of a job that a run's folder remembers."""


def save_settings(folder: Path, job: Job, **further: Any) -> None:
    """Writes `run.json`: all that `show` and `export` need to know of how a run was made."""
    write_text(folder / "run.json", json.dumps(settings_of(job) | further, indent=1))


def settings_of(job: Job) -> dict[str, Any]:
    """What makes a job again."""
    settings = {name: getattr(job, name) for name in SETTINGS}
    given = {"space": job.sources[0], "data": job.sources[1], "supernet": job.supernet, "start": job.start}
    return settings | {name: source and _absolute(source) for name, source in given.items()}


def load_settings(folder: Path) -> dict[str, Any]:
    """What `save_settings` wrote; `HwnasError` if the folder is not that of a run."""
    path = folder / "run.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if missing := [name for name in ("space", "data", *SETTINGS) if name not in settings]:
            raise ValueError(f"'{missing[0]}' is missing")
    except (OSError, ValueError, TypeError) as error:
        raise HwnasError(
            f"{folder} is not the folder of a run: {path.name} cannot be read ({error}). "
            "Give the folder that hwnas search or hwnas retrain printed."
        ) from None
    return settings


def _absolute(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).exists() else source


# ---- latency table -----------------------------------------------------------------------------------------------


def latency_table(job: Job, device: "Device") -> tuple[Path, LatencyTable]:
    """The table of the job's space on its device; measured if it is missing or does not cover the space.

    From then on the device counts only what it measures at the pace that it had for the table.

    Raises:
        HwnasError: the table was measured under other conditions, or failed its own check or is
            estimated, or the device is emulated.
    """
    from hwnas.cautions import texts_of
    from hwnas.profiling import covers, profile
    from hwnas.slow_tables import warned

    conditions = device.conditions(job.threads, job.batch, job.precision)
    if not job.force:
        check_origin(conditions)
    path = table_path(job.tables, job.space.name, conditions)
    table = load_table(path) if path.exists() else None
    if table:
        table.check_device(replace(conditions, origin=table.conditions.origin), job.sources[0])
        if not job.force:
            table.check_origin()
    if table is None or not covers(table, job.space):
        job.listener.stage(f"Measuring the units of {job.space.name} on {job.device} ({conditions.chip})")
        table = profile(
            job.space,
            device,
            threads=job.threads,
            batch=job.batch,
            precision=job.precision,
            folder=job.tables,
            on_progress=warned(job.listener.progress, job.listener.note, job.space, conditions, job.tables),
            seed=job.seed,
        )
        for caution in texts_of(table.cautions):
            job.listener.note(caution)
    if not job.force:
        table.check_error()
    device.anchor_ms = table.anchor_ms
    return path, table


def measured_table(job: Job) -> tuple[Path, LatencyTable]:
    """`latency_table` with the job's own device."""
    from hwnas.opening import open_device

    with open_device(job.device, job.listener.note) as opened:
        return latency_table(job, opened)


# ---- supernet ----------------------------------------------------------------------------------------------------


def supernet_folder(job: Job, recipe: "Recipe") -> Path:
    """The folder of a supernet, whose name tells space, data, and, in eight digits, everything else that made it."""
    trained = [asdict(recipe), job.method, job.paths, job.seed]
    trained += [stated_digest(supernet_path(job.start))] if job.start else []
    how = stated_digest(supernet_path(job.supernet)) if job.supernet else trained
    facts = json.dumps([job.space.digest, job.data.fingerprint, how, *_limit_of(job)])
    digits = hashlib.sha256(facts.encode()).hexdigest()[:8]
    return job.runs / f"supernet-{job.space.name}-{file_name(job.data.name)}-{digits}"


def _limit_of(job: Job) -> list[Any]:
    """What decides which architectures are drawn for the supernet, if not all are."""
    return [] if job.within_ms is None else [job.within_ms, job.device, job.threads, job.batch, job.precision]


def draw_within(job: Job, table: LatencyTable | None) -> Draw | None:
    """Draws from the architectures within the job's limit, each as likely as another; `None` if it has no limit."""
    if job.within_ms is None:
        return None
    from hwnas.feasible import feasible
    from hwnas.lookup import array_predictor

    return feasible(job.space, array_predictor(table or measured_table(job)[1], job.space), job.within_ms).draw


def supernet_recipe(job: Job) -> "Recipe":
    """How the supernet of a job is trained."""
    from hwnas.training import Recipe

    return Recipe(job.epochs, job.batch_size, job.learning_rate)


def trained_supernet(job: Job, table: LatencyTable | None = None) -> tuple[Path, "Supernet"]:
    """The supernet of a job, read from its file if it has one, else trained if it is not yet.

    `table` is that of the job's device, for a job with `within_ms`; without it `measured_table` is asked.
    """
    from flax import nnx

    from hwnas.jax_layers import native_form
    from hwnas.supernet import Supernet
    from hwnas.supernet_file import file_facts, read_supernet, supernet_path, write_supernet
    from hwnas.training import train

    recipe, how = supernet_recipe(job), method(job.method)
    folder = supernet_folder(job, recipe)
    if job.supernet:
        return folder, read_supernet(Path(job.supernet), job.space, job.data.classes)
    count = check_paths(how, job.paths)
    form = native_form(recipe.epochs * len(job.data.train) * (count if how.distils else 1))
    start = read_supernet(supernet_path(job.start), job.space, job.data.classes, form) if job.start else None
    paths = how.sampler(job.space, draw_within(job, table), job.seed, count)
    limit = "" if job.within_ms is None else f" within {job.within_ms:g} ms"
    job.listener.stage(
        f"Training the supernet of {job.space.name}{limit} on {job.data.name} by {how.name}, {recipe.epochs} epochs"
    )
    facts = {"space": job.space.name, "data": job.data.name, "data_fingerprint": job.data.fingerprint}
    facts |= {"recipe": asdict(recipe), "seed": job.seed, "method": how.name, "source": how.source}
    facts |= {"paths": count, "within_ms": job.within_ms}
    if job.start:
        begun = file_facts(supernet_path(job.start)) | {"supernet": Path(job.start).name}
        facts |= {"start": begun | {"sha256": stated_digest(supernet_path(job.start))}}
    write_text(folder / "supernet.json", json.dumps(facts | {"settings": settings_of(job)}, indent=1))
    with step_listener(job, folder / "events") as on_step:
        model = train(
            start or Supernet(job.space, rngs=nnx.Rngs(job.seed), form=form),
            job.data,
            recipe,
            folder / "checkpoints",
            paths=paths,
            distils=how.distils,
            watched=watched(job),
            seed=job.seed,
            on_step=on_step,
        )
    kept = folder / "supernet.safetensors"
    if not kept.exists():
        write_supernet(kept, model, facts | {"classes": job.data.classes, "mean": job.data.mean, "std": job.data.std})
    return folder, model


def watched(job: Job) -> dict[str, tuple[int, ...]]:
    """The architectures whose accuracy tells how a supernet is doing: its two ends, and a random one."""
    from random import Random

    space = job.space
    found = {"smallest": space.smallest, "largest": space.largest, "random": space.sample(Random(job.seed))}
    return {name: space.encode(architecture) for name, architecture in found.items()}


def supernet_facts(job: Job, model: "Supernet") -> dict[str, Any]:
    """Accuracy of the watched architectures of a trained supernet on the validation split."""
    from hwnas.candidate_scoring import scorer_of

    scorer = scorer_of(model, job.data)
    return {
        f"{name}_validation_accuracy": scorer.accuracy(job.data.validation, code) for name, code in watched(job).items()
    }


def file_name(text: str) -> str:
    """Letters, digits, dots and hyphens of a text, to stand in the name of a folder."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


@contextmanager
def step_listener(job: Job, events: Path) -> Iterator[Callable[["Progress"], None]]:
    """Tells a job's listener of every step of a training, and writes it to a folder that TensorBoard reads."""
    opened, log = ExitStack(), None

    def on_step(progress: "Progress") -> None:
        nonlocal log
        log = log or opened.enter_context(EventLog(events, progress.step))
        values = {"loss": progress.loss, "learning rate": progress.learning_rate}
        values |= {"images a second": progress.images_per_second} if progress.images_per_second else {}
        accuracies = progress.accuracies if progress.scored else {}
        log.scalars(progress.step, values | {f"accuracy/{name}": value for name, value in accuracies.items()})
        words = f"loss {progress.loss:.3f}, {progress.images_per_second:.0f} images/s"
        words += "".join(f", {name} {accuracy:.1%}" for name, accuracy in progress.accuracies.items())
        job.listener.progress(progress.step, progress.steps, words)

    with opened:
        yield on_step
