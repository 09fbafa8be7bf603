"""How a trained supernet of `shufflenet-cifar` ranks 22 networks that were trained from scratch on an H200.

`docs/measured/nvidia-h200-scores.json` holds their accuracies after so many epochs on all training images of CIFAR-10,
and so this takes minutes on two cores. After as many as it does not hold, they are trained first, side by side where
that is faster, and kept in `runs/benchmark-inherited-ranking`; a training that was stopped goes on.
`INHERITED_EPOCHS` (20) says after how many, `INHERITED_SUPERNET` (cifar10) names the supernet or its file,
`INHERITED_CALIBRATION` (256) how many images the statistics are estimated over.
"""

import json
import os
from pathlib import Path

from benchmarks.rank_correlation import IMAGES_AT, ROOT, listener, result_of
from benchmarks.result import Result
from hwnas.candidate_scoring import SharedScorer, scorer_of
from hwnas.data import load_data
from hwnas.network import macs
from hwnas.ranking import RankCorrelation, best_third, rank_correlation
from hwnas.space import lower
from hwnas.space_toml import load_space
from hwnas.stages import Job
from hwnas.supernet_file import read_supernet, supernet_path
from hwnas.training import prepare_process
from hwnas.trust import Scores

SCORES = ROOT / "docs" / "measured" / "nvidia-h200-scores.json"
FOLDER = Path("runs/benchmark-inherited-ranking")
EPOCHS = int(os.environ.get("INHERITED_EPOCHS", "20"))


def from_scratch(epochs: int) -> dict[tuple[int, ...], float]:
    """The encodings of the networks, with their accuracies on the validation split as measured on the H200."""
    return {
        tuple(map(int, key.split(": ")[1].split())): score
        for key, score in json.loads(SCORES.read_text()).items()
        if key.startswith(f"from scratch, {epochs} epochs,")
    }


def between_trainings(known: dict[tuple[int, ...], float]) -> dict[str, str]:
    """How the networks' accuracies after other numbers of epochs rank against these, a measure of the judge."""
    lengths = {int(key.split()[2]) for key in json.loads(SCORES.read_text()) if key.startswith("from scratch")}
    others = {epochs: from_scratch(epochs) for epochs in sorted(lengths - {EPOCHS})}
    return {
        f"from scratch, {epochs} epochs and {EPOCHS}": rank_correlation(
            [other[code] for code in known], list(known.values())
        ).text
        for epochs, other in others.items()
    }


def within_best_third(inherited: list[float], scratch: list[float]) -> RankCorrelation:
    """The rank correlation of the networks that are best from scratch."""
    best = best_third(scratch)
    return rank_correlation([inherited[i] for i in best], [scratch[i] for i in best])


def run(name: str) -> Result:
    if not IMAGES_AT.is_dir():
        raise SystemExit(f"Skipped: the Parquet files of CIFAR-10 are not at {IMAGES_AT}.")
    prepare_process(FOLDER / "compiled")
    space, data = load_space("shufflenet-cifar"), load_data(str(IMAGES_AT), image_size=32)
    job = Job(
        space,
        data,
        ("shufflenet-cifar", str(IMAGES_AT)),
        retrain_epochs=EPOCHS,
        batch_size=128,
        learning_rate=0.1,
        listener=listener(),
    )
    which = os.environ.get("INHERITED_SUPERNET", "cifar10")
    calibration = int(os.environ.get("INHERITED_CALIBRATION", "256"))
    supernet = read_supernet(supernet_path(which), space, data.classes)
    FOLDER.mkdir(parents=True, exist_ok=True)
    scores = Scores(job, FOLDER, which, SharedScorer(supernet, data))
    scores.known |= json.loads(SCORES.read_text())
    trained = scores.from_scratch([space.decode(code) for code in from_scratch(9)], seed=0)
    known = {space.encode(architecture): score for architecture, score in trained.items()}
    scorer = scorer_of(supernet, data, calibration_images=calibration)
    inherited = []
    for code in known:
        inherited.append(scorer.accuracy(data.validation, code))
        print(f"{len(inherited)}/{len(known)} {inherited[-1]:.1%}", flush=True)
    scratch = list(known.values())
    size = rank_correlation([macs(lower(space, space.decode(code))) for code in known], scratch)
    return result_of(
        name,
        rank_correlation(inherited, scratch),
        {
            "supernet": f"{which}, statistics over {calibration} images, accuracy over {len(data.validation)}",
            "from scratch for": f"{EPOCHS} epochs",
            "within the best third": within_best_third(inherited, scratch).text,
            "multiply-adds and accuracy from scratch": size.text,
            **between_trainings(known),
            "inherited": " ".join(f"{100 * accuracy:.1f}" for accuracy in inherited),
            "from scratch": " ".join(f"{100 * accuracy:.1f}" for accuracy in scratch),
        },
    )
