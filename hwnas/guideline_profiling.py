"""A device -> timings of the paper's four experiments."""

from collections.abc import Callable
from pathlib import Path

from hwnas.devices import Device, Timing
from hwnas.errors import HwnasError
from hwnas.experiments import EXPERIMENTS, WIDTHS, Case, GuidelineTiming, cases, verdict
from hwnas.journal import GUIDELINES, Journal
from hwnas.onnx_model import random_weights, to_onnx

AGREEING, SAMPLE_MS, LEAST_RUNS = 5, 3.0, 2
"""The slowest networks take long enough to need few runs a sample."""


def measure_guidelines(
    device: Device,
    path: Path,
    *,
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    widths: str = "arm",
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[GuidelineTiming, ...]:
    """Times every network of the four experiments; those of one experiment in the same rounds, in random order.

    Takes about a minute on a core of a server with the ARM's widths, and some ten with the GPU's. An experiment that is
    finished is kept in a journal; a killed measurement goes on with the next. Who has stored what is returned removes
    the journal: `path.unlink()`.

    Args:
        device: where.
        path: of the journal.
        threads, batch, precision: how.
        widths: whose channels the networks have, one of `experiments.WIDTHS`.
        seed: of weights, inputs and orders.
        on_progress: called after each experiment with the number done, the number there are, and its verdict.

    Raises:
        HwnasError: no such widths, the device cannot do it, or the journal is of other conditions.
    """
    if widths not in WIDTHS:
        raise HwnasError(f"The widths are {' or '.join(WIDTHS)}. They are '{widths}'.")
    timing = Timing(threads=threads, agreeing=AGREEING, sample_ms=SAMPLE_MS, least_runs=LEAST_RUNS, seed=seed)
    journal = Journal(path, f"guidelines-{widths}", device.conditions(threads, batch, precision), GUIDELINES)

    def model(case: Case) -> bytes:
        network = case.network
        weights = random_weights(network, seed)
        return to_onnx(network, weights, batch=batch, precision=precision).SerializeToString()

    for done, guideline in enumerate(EXPERIMENTS, 1):
        group = cases(guideline, widths)
        if any(case not in journal.items for case in group):
            measured = device.measure_steadily([model(case) for case in group], timing)
            journal.add(
                GuidelineTiming(case, measured[index].at_usual_pace().shortened()) for index, case in enumerate(group)
            )
        on_progress(done, len(EXPERIMENTS), verdict(guideline, [journal.items[case] for case in group]))
    return tuple(journal.items[case] for guideline in EXPERIMENTS for case in cases(guideline, widths))
