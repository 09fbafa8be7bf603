"""Whole networks of a space -> what they add to the peak memory of a process, and the plane that predicts it."""

import random
from collections.abc import Callable, Iterable

from hwnas.devices import MemoryNotShownError
from hwnas.memory import Memory, MemoryNetwork, fit_memory
from hwnas.model_size import model_bytes
from hwnas.network import Network
from hwnas.space import lower
from hwnas.whole_networks import TIMING, Code, Setup, spread
from hwnas.working_set import working_bytes

FITTED, HELD_OUT = 10, 20
"""Each costs about a third of a second; nineteen held out are the fewest that give a bound of 95 %."""


def profile_memory(setup: Setup, codes: Iterable[Code], on_network: Callable[[], None] = lambda: None) -> Memory | None:
    """Measures some networks, evenly spread over the sizes of their files, the smallest and the largest included.

    `None` where the system does not tell the peak memory of a process.

    Args:
        setup: where and how.
        codes: encodings of networks of the setup's space, of which up to `FITTED + HELD_OUT` are measured, once each.
        on_network: called after each.
    """
    networks = {code: lower(setup.space, setup.space.decode(code)) for code in codes}

    def size(network: Network) -> int:
        return model_bytes(network, batch=setup.batch, precision=setup.precision)

    chosen = list(spread({code: size(network) for code, network in networks.items()}, FITTED + HELD_OUT))
    inner = chosen[1:-1]
    count = min(len(chosen) * HELD_OUT // (FITTED + HELD_OUT), max(0, len(chosen) - 3))
    held_out = set(random.Random(setup.seed).sample(inner, count))
    measured = []
    for code in chosen:  # one by one: a model is built, measured and forgotten
        try:
            ((_, memory_bytes),) = setup.device.peak_memory([setup.model(networks[code])], setup.timing(TIMING))
        except MemoryNotShownError:
            return None
        working = working_bytes(networks[code], batch=setup.batch, precision=setup.precision)
        measured.append(MemoryNetwork(code, int(size(networks[code])), working, (memory_bytes,), code in held_out))
        on_network()
    return fit_memory(measured)
