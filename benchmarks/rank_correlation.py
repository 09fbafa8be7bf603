"""How well a supernet ranks architectures on real images: its trust report on CIFAR-10.

The images lie in Parquet files beside the checkout. Everything is kept in `runs/benchmark-rank-correlation`, so that a
run that was stopped goes on. How much is trained is set by the environment variables below; the defaults are cut for
some 25 minutes on two quiet cores, on a small part of the images.
"""

import os
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.result import Result, this_machine
from hwnas.data import DataSet, load_data, stratified_subset
from hwnas.latency import LatencyTable, load_table
from hwnas.ranking import RankCorrelation
from hwnas.runs import write_text
from hwnas.space_toml import load_space
from hwnas.stages import Job, Listener, measured_table
from hwnas.training import prepare_process
from hwnas.trust import Question, judge
from hwnas.trust_report import trust_picture, trust_rows, trust_words

ROOT = Path(__file__).parents[1]
IMAGES_AT = Path(os.environ.get("RANK_IMAGES_AT") or ROOT.parent / "shared" / "data" / "cifar10")
FOLDER = Path("runs/benchmark-rank-correlation")
TARGET = 0.7


def setting(name: str, default: str) -> str:
    return os.environ.get(f"RANK_{name}", default)


SPACE, METHOD = setting("SPACE", "shufflenet-tiny"), setting("METHOD", "single-path")
IMAGES, VALIDATION = int(setting("IMAGES", "4000")), int(setting("VALIDATION", "2000"))
SUPERNET_EPOCHS, EPOCHS = int(setting("SUPERNET_EPOCHS", "30")), int(setting("EPOCHS", "8"))
ARCHITECTURES, SEEDS, TRIALS = (
    int(setting(name, default)) for name, default in (("ARCHITECTURES", "20"), ("SEEDS", "1"), ("TRIALS", "20"))
)
BATCH_SIZE, LEARNING_RATE = int(setting("BATCH_SIZE", "32")), float(setting("LEARNING_RATE", "0.1"))
PATHS = int(setting("PATHS", "0")) or None
SCRATCH_BATCH_SIZE = int(setting("SCRATCH_BATCH_SIZE", str(BATCH_SIZE)))
SCRATCH_LEARNING_RATE = float(setting("SCRATCH_LEARNING_RATE", str(LEARNING_RATE)))


def images() -> DataSet:
    """CIFAR-10 with as many training and validation images as asked, evenly by class."""
    if not IMAGES_AT.is_dir():
        raise SystemExit(f"Skipped: the Parquet files of CIFAR-10 are not at {IMAGES_AT}.")
    data = load_data(IMAGES_AT, image_size=32)
    return replace(
        data,
        train=stratified_subset(data.train, IMAGES, 0),
        validation=stratified_subset(data.validation, VALIDATION, 0),
    )


def latency_table(job: Job) -> LatencyTable:
    """`RANK_TABLE`, or a table that ships, since it only spreads the architectures, or this machine's."""
    if given := setting("TABLE", ""):
        return load_table(Path(given))
    shipped = sorted((ROOT / "latency_tables").glob(f"*/{job.space.name}-fp32-t1-b1.json"))
    return load_table(shipped[0]) if shipped else measured_table(job)[1]


def listener() -> Listener:
    """Prints what happens, progress every ten seconds."""
    begun, shown = time.monotonic(), [0.0]

    def say(text: str) -> None:
        print(f"{time.monotonic() - begun:6.1f} s  {text}", flush=True)

    def progress(done: int, total: int, words: str) -> None:
        if done == total or time.monotonic() - shown[0] > 10:
            shown[0] = time.monotonic()
            say(f"{done}/{total} {words}")

    return Listener(say, lambda text: say(f"Note: {text}"), progress)


def result_of(name: str, tau: RankCorrelation, details: dict[str, object]) -> Result:
    """How inherited accuracies rank what was trained from scratch."""
    return Result(
        name=name,
        value=round(tau.tau, 3),
        unit="Kendall tau of inherited accuracy and accuracy from scratch",
        target=f"at least {TARGET:g}",
        met=tau.tau >= TARGET,
        spread=f"95 % interval {tau.low:.2f} to {tau.high:.2f} over {tau.count} architectures",
        device=this_machine(),
        details=details,
    )


def run(name: str) -> Result:
    data = images()
    prepare_process(FOLDER / "compiled")
    job = Job(
        load_space(SPACE),
        data,
        (SPACE, str(IMAGES_AT)),
        runs=FOLDER,
        epochs=SUPERNET_EPOCHS,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        method=METHOD,
        paths=PATHS,
        listener=listener(),
    )
    question = Question(
        ARCHITECTURES,
        EPOCHS,
        SEEDS,
        trials=TRIALS,
        batch_size=SCRATCH_BATCH_SIZE,
        learning_rate=SCRATCH_LEARNING_RATE,
    )
    folder, report = judge(job, latency_table(job), question)
    write_text(folder / "trust.svg", trust_picture(report) + "\n")
    return result_of(
        name,
        report.correlation,
        {
            "report": " ".join(trust_words(report)),
            "supernet": f"{SPACE} by {METHOD}, paths {PATHS or 'as usual'}, {SUPERNET_EPOCHS} epochs, "
            f"batch {BATCH_SIZE}, rate {LEARNING_RATE:g}",
            "images": f"{len(data.train)} training, {len(data.validation)} validation",
            "latency from the table of": f"{report.device} ({report.chip})",
            **{f"{number:2}. {row[0]}": ", ".join(row[1:]) for number, row in enumerate(trust_rows(report)[1:], 1)},
        },
    )
