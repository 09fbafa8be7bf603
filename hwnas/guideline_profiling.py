"""A device -> timings of the paper's four experiments."""

from collections.abc import Callable

from hwnas.devices import Device, Timing
from hwnas.errors import HwnasError
from hwnas.experiments import EXPERIMENTS, WIDTHS, Case, GuidelineTiming, cases
from hwnas.onnx_model import random_weights, to_onnx

AGREEING, SAMPLE_MS, LEAST_RUNS = 5, 3.0, 2
"""The slowest networks take long enough to need few runs a sample."""


def measure_guidelines(
    device: Device,
    *,
    threads: int = 1,
    batch: int = 1,
    precision: str = "fp32",
    widths: str = "arm",
    seed: int = 0,
    on_progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[GuidelineTiming, ...]:
    """Times every network of the four experiments; those of one experiment in the same rounds, in random order.

    Takes about a minute on a core of a server with the ARM's widths, and some ten with the GPU's.

    Args:
        device: where.
        threads, batch, precision: how.
        widths: whose channels the networks have, one of `experiments.WIDTHS`.
        seed: of weights, inputs and orders.
        on_progress: called after each experiment with the number done, the number there are, and the guideline.

    Raises:
        HwnasError: no such widths, or the device cannot do it.
    """
    if widths not in WIDTHS:
        raise HwnasError(f"The widths are {' or '.join(WIDTHS)}. They are '{widths}'.")
    timing = Timing(threads=threads, agreeing=AGREEING, sample_ms=SAMPLE_MS, least_runs=LEAST_RUNS, seed=seed)

    def model(case: Case) -> bytes:
        network = case.network
        weights = random_weights(network, seed)
        return to_onnx(network, weights, batch=batch, precision=precision).SerializeToString()

    timings: list[GuidelineTiming] = []
    for done, guideline in enumerate(EXPERIMENTS, 1):
        group = cases(guideline, widths)
        measured = device.measure_steadily([model(case) for case in group], timing)
        timings += [
            GuidelineTiming(case, measured[index].at_usual_pace().shortened()) for index, case in enumerate(group)
        ]
        on_progress(done, len(EXPERIMENTS), guideline)
    return tuple(timings)
