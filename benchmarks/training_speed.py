"""Training and scoring on this machine's cores against PyTorch, piece by piece in turn."""

import statistics
import time
from random import Random

from benchmarks.contenders import (
    CALIBRATION_IMAGES,
    PATHS,
    SCORE_BATCH,
    SPACE,
    VALIDATION_IMAGES,
    Contender,
    contenders,
    our_scoring,
    our_training,
    pieces_of,
    torch_scoring,
    torch_training,
)
from benchmarks.result import Result, this_machine
from hwnas.space import SearchSpace
from hwnas.space_toml import load_space

TRAIN_BATCH, ROUNDS, LEAST_ROUNDS, LONGEST_S = 128, 12, 4, 120.0
LAYOUTS = {"PyTorch": False, "PyTorch, channels last": True}
IN_PIECES, ONE_PROGRAM, OURS = "in pieces", "one program", "ours"


def run(name: str) -> Result:
    rng, space = Random(0), load_space(SPACE)
    supernet, scoring = name != "train-speed", name == "score-speed"
    drawn = [space.encode(space.sample(rng)) for _ in range(PATHS * (ROUNDS + 1))] if supernet else []
    pieces = [tuple(drawn[i * PATHS : (i + 1) * PATHS]) for i in range(ROUNDS + 1)]
    batch, ours, theirs = (
        (SCORE_BATCH, our_scoring, torch_scoring) if scoring else (TRAIN_BATCH, our_training, torch_training)
    )
    names = {OURS: {}} if name != "supernet-speed" else {IN_PIECES: {"in_pieces": True}, ONE_PROGRAM: {}}
    makers = {which: (ours, options) for which, options in names.items()}
    makers |= {which: (theirs, {"channels_last": last}) for which, last in LAYOUTS.items()}
    seconds: dict[str, list[float]] = {which: [] for which in makers}
    with contenders(makers, SPACE if supernet else None, batch, pieces[0]) as started:
        first = {contender.name: contender.facts()["compilations"] for contender in started}
        warm_s = {contender.name: [contender.work(piece) for piece in pieces[1:]] for contender in started}
        warm = {contender.name: contender.facts()["compilations"] for contender in started}
        begin = time.monotonic()
        for piece in pieces[1:]:
            if len(seconds[started[0].name]) >= LEAST_ROUNDS and time.monotonic() - begin > LONGEST_S:
                break
            for contender in rng.sample(started, len(started)):
                seconds[contender.name].append(contender.work(piece))
        facts = {contender.name: contender.facts() for contender in started}
    best = min(LAYOUTS, key=lambda which: statistics.median(seconds[which]))
    quartiles = {which: statistics.quantiles(ratios_of(seconds[which], seconds[best]), n=4) for which in names}
    fastest, *others = names
    low, value, high = quartiles[fastest]
    count = PATHS if scoring else TRAIN_BATCH
    later = {which: facts[which]["compilations"] - warm[which] for which in names}
    target = 1.2 if scoring else 1.0
    memory = facts[fastest]["peak_mb"] / facts[best]["peak_mb"]
    return Result(
        name=name,
        value=round(value, 3),
        unit=f"times the {'candidates' if scoring else 'images'} a second of {best}",
        target=f"at least {target:g}, first step within 30 s, no more memory, nothing compiled later",
        met=value >= target and started[0].first_s <= 30 and memory <= 1 and not any(later.values()),
        spread=f"quartiles of {len(seconds[best])} interleaved rounds {low:.3f} to {high:.3f}",
        device=this_machine(),
        details={
            "what": what(scoring, supernet),
            **{which: rate(seconds[which], count, "candidates" if scoring else "images") for which in makers},
            "from start to the end of the first step": each(started, lambda c: f"{c.first_s:.1f} s"),
            "peak memory": each(started, lambda c: f"{facts[c.name]['peak_mb']:.0f} MB"),
            **{
                f"{which}, against the same": "{1:.3f} times, quartiles {0:.3f} to {2:.3f}".format(*quartiles[which])
                for which in others
            },
            "compilations": ", ".join(
                f"{which} {first[which]} in the first step, {warm[which] - first[which]} in the first round, "
                f"{later[which]} later"
                for which in names
            ),
            **programs(space, supernet and not scoring),
            "time that compiling took in the first round": ", ".join(
                f"{which} {sum(warm_s[which][: len(seconds[which])]) - sum(seconds[which]):.0f} s" for which in names
            ),
        },
    )


def programs(space: SearchSpace, wanted: bool) -> dict[str, str]:
    if not wanted:
        return {}
    rng = Random(1)
    counts = [pieces_of(space, TRAIN_BATCH // PATHS, (space.sample(rng) for _ in range(n))) for n in (200, 400)]
    return {"programs of pieces, counted for 200 and for 400 random paths": f"{counts[0]}, {counts[1]}"}


def ratios_of(ours: list[float], theirs: list[float]) -> list[float]:
    return [theirs / ours for ours, theirs in zip(ours, theirs, strict=True)]


def what(scoring: bool, supernet: bool) -> str:
    if scoring:
        return f"{SPACE}: norms over {CALIBRATION_IMAGES} images, accuracy over {VALIDATION_IMAGES}"
    if supernet:
        return f"{SPACE}: steps of {TRAIN_BATCH} images in {PATHS} random paths"
    return f"ShuffleNet V2 1x at 32x32, steps of {TRAIN_BATCH} images"


def rate(seconds: list[float], count: int, things: str) -> str:
    low, middle, high = (count / s for s in statistics.quantiles(seconds, n=4)[::-1])
    return f"{middle:.3g} {things}/s (quartiles {low:.3g} to {high:.3g})"


def each(started: list[Contender], text) -> str:
    return ", ".join(f"{contender.name} {text(contender)}" for contender in started)
