"""Compiles ahead what `gpu-table` with `GPU_AHEAD=1` times, in many processes, into JAX's compilation cache.

    JAX_COMPILATION_CACHE_DIR=FOLDER python -m benchmarks.gpu_compile PROCESSES SPACE...

On a GPU, XLA takes about a second for a few units and several for a network, and the threads of one process hardly
help each other. Nothing is run here, so that the GPU may train meanwhile.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from random import Random

from hwnas.chains import chain_of, host_of, network_of
from hwnas.composition import is_timed
from hwnas.network import Network
from hwnas.places import Place
from hwnas.profiling import keys_of
from hwnas.space import SearchSpace, lower
from hwnas.space_toml import load_space
from hwnas.whole_networks import FITTED, HELD_OUT, Code, Setup, drawn_towards, sums_of

BATCH = 8
CHECKED = 30

Candidates = Callable[[SearchSpace, Mapping[Place, float], Random], dict[Code, float]]
"""As `whole_networks.candidates`."""


def between_ends(space: SearchSpace, count: int, rng: Random) -> list[Code]:
    """The smallest and the largest architecture and others between them, which are known before anything is timed."""
    ends = [space.encode(space.smallest), space.encode(space.largest)]
    codes = dict.fromkeys(ends)
    while len(codes) < count:
        codes[drawn_towards(space, ends, rng)] = None
    return list(codes)


def candidates(count: int) -> Candidates:
    """What takes the place of `whole_networks.candidates`: as many as are timed, so that each of them is."""

    def found(space: SearchSpace, unit_ms: Mapping[Place, float], rng: Random) -> dict[Code, float]:
        return sums_of(space, between_ends(space, count, rng), unit_ms)

    return found


def networks(space: SearchSpace) -> Iterator[Network]:
    """All that `gpu-table` times: chains of units and their hosts, networks to calibrate on, networks to check with."""
    timed = [place for place in keys_of(space).values() if place.choice is None or is_timed(space, place.choice)]
    hosts = dict.fromkeys(filter(None, (host_of(space, place) for place in timed)))
    yield from (network_of(space, host) for host in hosts)
    yield from (network_of(space, chain_of(space, place)) for place in timed)
    for count, seed in ((FITTED + HELD_OUT, 0), (CHECKED, 1)):
        yield from (lower(space, space.decode(code)) for code in between_ends(space, count, Random(seed)))


def compile_share(number: int, of: int, names: list[str]) -> None:
    """Compiles every `of`-th network of all spaces, from `number` on, and prints each."""
    import onnx

    from hwnas.measure import make_runtime
    from hwnas.runtime_xla import GPU_OPTIONS, RUNS, Model

    runtime = make_runtime("xla-gpu")
    assert runtime is not None
    place = 0
    for name in names:
        space = load_space(name)
        setup = Setup(space, None, 1, BATCH, "fp32", 0)  # pyright: ignore[reportArgumentType]
        for network in networks(space):
            place += 1
            if place % of == number:
                Model(onnx.load_model_from_string(setup.model(network)), RUNS, GPU_OPTIONS)
                print(space.name, place, flush=True)


def main(count: int, names: list[str]) -> None:
    begun, spaces = time.monotonic(), [load_space(name) for name in names]
    total = {space.name: sum(1 for _ in networks(space)) for space in spaces}
    command = [sys.executable, "-m", "benchmarks.gpu_compile", "share"]
    reading, writing = os.pipe()
    for number in range(count):
        subprocess.Popen([*command, str(number), str(count), *names], stdout=writing)
    os.close(writing)  # the last worker that ends closes it
    done, shown = dict.fromkeys(total, 0), 0.0
    with os.fdopen(reading) as lines:
        for line in lines:
            done[line.split()[0]] += 1
            if time.monotonic() > shown or done == total:
                shown = time.monotonic() + 10
                words = ", ".join(f"{done[name]}/{total[name]} of {name}" for name in total)
                print(f"{time.monotonic() - begun:6.1f} s  {words}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "share":
        compile_share(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        main(int(sys.argv[1]), sys.argv[2:])
