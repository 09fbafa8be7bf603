"""How a trained supernet of `shufflenet-cifar` ranks 22 networks that were trained from scratch already, on an H200.

`docs/measured/nvidia-h200-scores.json` holds their accuracies: 9 epochs on all training images of CIFAR-10, as
`rank-correlation` trained them. So this takes minutes on two cores. `INHERITED_SUPERNET` (cifar10) names the supernet
or its file, `INHERITED_CALIBRATION` (256) how many images the statistics are estimated over.
"""

import json
import os

from benchmarks.rank_correlation import IMAGES_AT, ROOT, result_of
from benchmarks.result import Result
from hwnas.candidate_scoring import scorer_of
from hwnas.data import load_data
from hwnas.network import macs
from hwnas.ranking import RankCorrelation, best_third, rank_correlation
from hwnas.space import lower
from hwnas.space_toml import load_space
from hwnas.supernet_file import read_supernet, supernet_path

SCORES = ROOT / "docs" / "measured" / "nvidia-h200-scores.json"


def from_scratch() -> dict[tuple[int, ...], float]:
    """The encodings of the networks, with their accuracies on the validation split."""
    known = json.loads(SCORES.read_text())
    return {
        tuple(map(int, key.split(": ")[1].split())): score
        for key, score in known.items()
        if key.startswith("from scratch")
    }


def within_best_third(inherited: list[float], scratch: list[float]) -> RankCorrelation:
    """The rank correlation of the networks that are best from scratch."""
    best = best_third(scratch)
    return rank_correlation([inherited[i] for i in best], [scratch[i] for i in best])


def run(name: str) -> Result:
    if not IMAGES_AT.is_dir():
        raise SystemExit(f"Skipped: the Parquet files of CIFAR-10 are not at {IMAGES_AT}.")
    space, data, known = load_space("shufflenet-cifar"), load_data(str(IMAGES_AT), image_size=32), from_scratch()
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
            "within the best third": within_best_third(inherited, scratch).text,
            "multiply-adds and accuracy from scratch": size.text,
            "inherited": " ".join(f"{100 * accuracy:.1f}" for accuracy in inherited),
            "from scratch": " ".join(f"{100 * accuracy:.1f}" for accuracy in scratch),
        },
    )
