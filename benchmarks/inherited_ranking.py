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
from hwnas.candidate_scoring import scorer_of
from hwnas.data import load_data
from hwnas.network import macs
from hwnas.ranking import RankCorrelation, best_third, rank_correlation
from hwnas.runs import write_text
from hwnas.side_by_side import accuracies_from_scratch
from hwnas.space import lower
from hwnas.space_toml import load_space
from hwnas.stages import Job
from hwnas.supernet_file import read_supernet, supernet_path
from hwnas.training import prepare_process

SCORES = ROOT / "docs" / "measured" / "nvidia-h200-scores.json"
FOLDER = Path("runs/benchmark-inherited-ranking")
EPOCHS = int(os.environ.get("INHERITED_EPOCHS", "20"))


def from_scratch(epochs: int = EPOCHS, scores: Path = SCORES) -> dict[tuple[int, ...], float]:
    """The encodings of the networks, with their accuracies on the validation split; empty if they are not known."""
    known = json.loads(scores.read_text()) if scores.exists() else {}
    return {
        tuple(map(int, key.split(": ")[1].split())): score
        for key, score in known.items()
        if key.startswith(recipe(epochs))
    }


def recipe(epochs: int) -> str:
    """That of the trainings from scratch, as the trust report words it."""
    return f"from scratch, {epochs} epochs, batch 128, learning rate 0.1, seed 0"


def trained(job: Job) -> dict[tuple[int, ...], float]:
    """Accuracies after the job's epochs, of networks that are trained first if need be."""
    kept = FOLDER / "scores.json"
    if known := from_scratch(job.retrain_epochs) or from_scratch(job.retrain_epochs, kept):
        return known
    codes = list(from_scratch(9))
    accuracies, _ = accuracies_from_scratch(job, [job.space.decode(code) for code in codes], FOLDER)
    found = dict(zip(codes, accuracies, strict=True))
    named = {f"{recipe(job.retrain_epochs)}: {' '.join(map(str, code))}": score for code, score in found.items()}
    write_text(kept, json.dumps(named, indent=1) + "\n")
    return found


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
    known = trained(
        Job(
            space,
            data,
            ("shufflenet-cifar", str(IMAGES_AT)),
            retrain_epochs=EPOCHS,
            batch_size=128,
            learning_rate=0.1,
            listener=listener(),
        )
    )
    which = os.environ.get("INHERITED_SUPERNET", "cifar10")
    calibration = int(os.environ.get("INHERITED_CALIBRATION", "256"))
    supernet = read_supernet(supernet_path(which), space, data.classes)
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
