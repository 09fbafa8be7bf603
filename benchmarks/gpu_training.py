"""Training on a GPU in bfloat16: images a second, against PyTorch, against the two floors, and how long the GPU idles.

Everything is compiled first, side by side in threads, then timed in turn: each step as training takes it, which waits
for its losses. What is finished is printed at once, so that a run that is cut off has told something.
"""

# pyright: reportMissingImports=false
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.contenders import network_1x, noise_images, torch_images
from benchmarks.result import Result
from hwnas.network import Conv, Linear, Network, macs
from hwnas.space_toml import load_space

SPACE, BATCH, PATHS, MANY, MANY_BATCH, SECONDS = "shufflenet-cifar", 512, 8, 20, 128, 2.0
LEAST_STEPS = 5
"""Each new path has PyTorch try out the kernels of its shapes, which takes seconds."""
WAYS: dict[str, dict[str, Any]] = {
    "": {},
    ", graphs": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,WHILE",
        "xla_gpu_graph_min_graph_size": 1,
    },
    ", products not tried out": {"xla_gpu_autotune_level": 0},
}
"""Options of XLA: those of training; as many kernels as can be in CUDA graphs; what cuBLAS names first."""
PASSES = 3
"""Forward, and twice as much backward: the gradients of inputs and of kernels."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is trained: a name, images a step, and a step that waits for its losses."""

    name: str
    images: int
    take_step: Callable[[], Any]


def our_cases() -> dict[str, tuple[int, Callable[[], Any]]]:
    """Images a step and a function that compiles, by name."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hwnas.jax_network import FixedNetwork
    from hwnas.supernet import Supernet
    from hwnas.training import Recipe, start_state, training_step, training_step_of_many

    space, data, rng = load_space(SPACE), noise_images(), Random(0)

    def case(model: Any, batch: int, paths: int, many: int, options: dict[str, Any] | None = None) -> Callable[[], Any]:
        recipe = Recipe(epochs=1, batch_size=batch)
        _, state = start_state(model)
        codes = np.array([space.encode(space.sample(rng)) for _ in range(max(paths, many))], np.int32)
        if many:
            state = jax.tree.map(lambda leaf: jnp.stack([leaf] * many), state)
            step, codes = training_step_of_many(model, recipe, data), codes[:, None]
        else:
            step, codes = training_step(model, recipe, data), codes if paths else np.zeros((1, 0), np.int32)
        images, labels = next(data.train.batches(batch, seed=0)).divided(max(paths, 1))
        rest = jax.random.key(0), jnp.float32(0.01), images, labels, codes

        def compiled() -> Callable[[], Any]:
            program = step.lower(*state, *rest).compile(compiler_options=options)
            memory = program.memory_analysis()
            print(f"  {memory.temp_size_in_bytes / 1e9:.2f} GB of temporary memory", flush=True)

            def take_step() -> float:
                nonlocal state
                *state, losses = program(*state, *rest)
                return float(np.asarray(losses).mean())

            return take_step

        return compiled

    supernet, single = Supernet(space, rngs=nnx.Rngs(0)), FixedNetwork(network_1x(), rngs=nnx.Rngs(0))
    return {
        **{f"ShuffleNet V2 1x{how}": (BATCH, case(single, BATCH, 0, 0, options)) for how, options in WAYS.items()},
        **{
            f"supernet, {PATHS} paths{how}": (BATCH, case(supernet, BATCH, PATHS, 0, options))
            for how, options in WAYS.items()
        },
        f"{MANY} networks of the supernet side by side": (MANY * MANY_BATCH, case(supernet, MANY_BATCH, 0, MANY)),
    }


def rate(images: int, take_step: Callable[[], Any]) -> str:
    """Images a second with quartiles, and milliseconds a step."""
    for _ in range(3):
        take_step()
    times, begun = [], time.perf_counter()
    while len(times) < LEAST_STEPS or time.perf_counter() - begun < SECONDS:
        started = time.perf_counter()
        take_step()
        times.append(time.perf_counter() - started)
    slow, middle, fast = statistics.quantiles(times, n=4)[::-1]
    return (
        f"{images / middle:.0f} images/s (quartiles {images / slow:.0f} to {images / fast:.0f}), "
        f"{1000 * middle:.2f} ms a step of {images}"
    )


def idle_share(take_step: Callable[[], Any], steps: int = 10) -> float:
    """The share of the time of some steps in which no kernel ran, by the profiler of JAX."""
    import jax

    folder = tempfile.mkdtemp()
    with jax.profiler.trace(folder):
        for _ in range(steps):
            take_step()
    (file,) = Path(folder).rglob("*.xplane.pb")
    spans = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes
        if "GPU" in plane.name
        for line in plane.lines
        if "Stream" in line.name
        for event in line.events
    )
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - spans[0][0])


def floors(network: Network) -> dict[str, float]:
    """Images a second if nothing but bytes, or nothing but arithmetic, took time; both rates are measured here."""
    import jax
    import jax.numpy as jnp

    def seconds(function: Any, *arrays: Any) -> float:
        jitted = jax.jit(function)
        times, found = [], jitted(*arrays).block_until_ready()
        for _ in range(10):
            started = time.perf_counter()
            for _ in range(5):
                found = jitted(*arrays)
            found.block_until_ready()
            times.append((time.perf_counter() - started) / 5)
        return min(times)

    side, count = 8192, 2**30
    matrix = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    arithmetic = 2 * side**3 / seconds(lambda a: a @ a, matrix)
    bandwidth = 2 * 2 * count / seconds(lambda a: a + 1, jnp.zeros(count, jnp.bfloat16))
    values = sum(
        int(np.prod(tensor.shape))
        for node in network.nodes
        if isinstance(node.operator, Conv | Linear)
        for tensor in (*node.inputs, *node.outputs)
    )
    print(f"  {bandwidth / 1e12:.2f} TB/s, {arithmetic / 1e12:.0f} TFLOP/s", flush=True)
    return {
        "bytes of the convolutions' inputs and outputs": bandwidth / (PASSES * 2 * values),
        "arithmetic": arithmetic / (PASSES * 2 * macs(network)),
    }


def torch_rates(waits: bool) -> None:
    """Prints what PyTorch reaches with channels last, a line a way; if it waits, once a line comes in."""
    import torch
    from torch.nn import functional

    from benchmarks.torch_shufflenet import ShuffleNetV2
    from benchmarks.torch_supernet import TorchSupernet

    torch.backends.cudnn.benchmark = True
    space, rng = load_space(SPACE), Random(0)
    images = torch.randint(0, 256, (BATCH, 32, 32, 3), dtype=torch.uint8, device="cuda")
    labels = torch.randint(0, 10, (BATCH,), device="cuda")

    def training(model: Any, drawn: bool, compiled: str | None) -> Callable[[], float]:
        model = model.cuda().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=not drawn)
        forward = torch.compile(model, mode=compiled) if compiled else model

        def take_step() -> float:
            path = (space.sample(rng),) if drawn else ()
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = functional.cross_entropy(forward(torch_images(images, True), *path), labels, label_smoothing=0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            return loss.item()

        return take_step

    def steps() -> dict[str, Callable[[], float]]:
        def single() -> Any:
            return ShuffleNetV2("1x", classes=10, small_images=True)

        return {
            "ShuffleNet V2 1x, eager": training(single(), False, None),
            "supernet, 1 path, eager": training(TorchSupernet(space), True, None),
            "ShuffleNet V2 1x, compiled with graphs": training(single(), False, "reduce-overhead"),
        }

    ready = {}
    for what, step in steps().items():
        try:
            for _ in range(3):
                step()
            ready[what] = step
        except Exception as error:  # one way that a GPU cannot go must not hide the others
            print(f"PyTorch, {what}: failed, {error}"[:300].replace("\n", " "), flush=True)
        if not waits and what in ready:
            print(f"PyTorch, {what}: {rate(BATCH, step)}", flush=True)
    if waits:
        print("ready", flush=True)
        sys.stdin.readline()
        for what, step in ready.items():
            print(f"PyTorch, {what}: {rate(BATCH, step)}", flush=True)


def run(name: str) -> Result:
    import jax

    begun, details = time.monotonic(), {}

    def tell(what: str, words: object) -> None:
        details[what] = words
        print(f"{time.monotonic() - begun:6.1f} s  {what}: {words}", flush=True)

    device = jax.local_devices()[0].device_kind

    def compiled(item: Any) -> Case | None:
        what, (images, compile_it) = item
        started = time.monotonic()
        try:
            case = Case(what, images, compile_it())
        except Exception as error:  # one way that a GPU cannot go must not hide the others
            print(f"{what}: {error}"[:600], flush=True)
            return None
        print(f"{time.monotonic() - begun:6.1f} s  compiled {what} in {time.monotonic() - started:.0f} s", flush=True)
        return case

    torch = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_training", "waits"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert torch.stdin is not None
    assert torch.stdout is not None
    with ThreadPoolExecutor(8) as pool:
        cases = [case for case in pool.map(compiled, our_cases().items()) if case]
    for line in iter(torch.stdout.readline, ""):  # nothing is timed while PyTorch compiles
        if line == "ready\n":
            break
        tell(*line.rstrip().split(": ", 1))
    for what, most in floors(network_1x()).items():
        tell(f"floor of ShuffleNet V2 1x, {what}", f"{most:.0f} images/s")
    for case in cases:
        tell(case.name, rate(case.images, case.take_step))
    for case in cases:
        tell(f"{case.name}: idle", f"{idle_share(case.take_step):.0%} of the time")
    for line in torch.communicate("go\n")[0].splitlines():
        tell(*line.split(": ", 1))
    speed = {what: float(str(words).split()[0]) for what, words in details.items() if "ms a step" in str(words)}
    ours = max(value for what, value in speed.items() if what.startswith("ShuffleNet"))
    theirs = max(value for what, value in speed.items() if what.startswith("PyTorch, ShuffleNet"))
    return Result(
        name=name,
        value=round(ours / theirs, 3),
        unit="times the images a second of PyTorch's best for ShuffleNet V2 1x",
        target="at least 1",
        met=ours >= theirs,
        spread=f"quartiles over the steps of {SECONDS:g} seconds, below",
        device=f"{device}, JAX {jax.__version__}, bfloat16",
        details=details,
    )


if __name__ == "__main__":
    torch_rates("waits" in sys.argv)
