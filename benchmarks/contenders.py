"""What trains and scores in the speed benchmarks: ours and PyTorch's, each in a process of its own.

A contender is started by name, answers `(seconds, facts)` for each piece of work, and waits in between, so that pieces
of work of several contenders can be measured in turn.
"""

# pyright: reportMissingImports=false
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from hwnas.data import DataSet, TestSplit, TrainSplit, ValidationSplit
from hwnas.network import Network
from hwnas.reference import shufflenet_v2
from hwnas.space import Architecture, SearchSpace
from hwnas.space_toml import load_space

SPACE, PATHS = "shufflenet-32", 2
TRAIN_IMAGES, VALIDATION_IMAGES, CALIBRATION_IMAGES, SCORE_BATCH = 1024, 512, 256, 64

Code = tuple[int, ...]
Work = Callable[[Sequence[Code]], Any]
"""Trains one step on these encodings (none for ShuffleNet V2), or scores them; returns losses or accuracies."""


def noise_images() -> DataSet:
    """Noise in the shapes of CIFAR-10: speed does not depend on what is seen."""
    rng = np.random.default_rng(0)

    def split(kind: Any, count: int) -> Any:
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        return kind(images, np.resize(np.arange(10), count).astype(np.int32))

    parts = split(TrainSplit, TRAIN_IMAGES), split(ValidationSplit, VALIDATION_IMAGES), split(TestSplit, 10)
    return DataSet("noise", tuple("0123456789"), 32, *parts, flip=True)


def network_1x() -> Network:
    """ShuffleNet V2 1x for images of 32x32."""
    return shufflenet_v2("1x", dialect="torchvision", input_size=32, classes=10, stem_stride=1, max_pool=False)


def endless_batches(data: DataSet, batch_size: int) -> Iterator[Any]:
    while True:
        yield from data.train.batches(batch_size, seed=0)


# ---- ours --------------------------------------------------------------------------------------------------------


def our_training(space: SearchSpace | None, batch_size: int, *, in_pieces: bool = False) -> Work:
    """A step of `hwnas.training`, of the supernet or of ShuffleNet V2 1x."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hwnas.jax_layers import Form
    from hwnas.jax_network import FixedNetwork
    from hwnas.supernet import Supernet
    from hwnas.training import Recipe, prepare_process, start_state, training_step

    prepare_process(Path(tempfile.mkdtemp(prefix="hwnas-compiled-")))
    data, recipe = noise_images(), Recipe(epochs=1, batch_size=batch_size)
    model: Any = None
    if space is None:
        model = FixedNetwork(network_1x(), rngs=nnx.Rngs(0))
    else:
        model = Supernet(space, rngs=nnx.Rngs(0), form=Form(in_pieces=in_pieces))
    _, state = start_state(model)
    step, batches, key = training_step(model, recipe, data), endless_batches(data, batch_size), jax.random.key(0)
    number = 0

    def work(codes: Sequence[Code]) -> float:
        nonlocal state, number
        number += 1
        paths = np.array(codes, np.int32) if codes else np.zeros((1, 0), np.int32)
        batch = next(batches).divided(len(paths))
        *state, losses = step(*state, jax.random.fold_in(key, number), jnp.float32(0.01), *batch, paths)
        return float(losses.mean())

    return work


def pieces_of(space: SearchSpace, images: int, architectures: Iterable[Architecture]) -> int:
    """How many programs a training in pieces needs for these architectures, with so many images each."""
    import jax
    from flax import nnx

    from hwnas import sliced_supernet
    from hwnas.pieces import Tape
    from hwnas.programs import Programs
    from hwnas.supernet import Supernet

    programs, weights = Programs(compiles=False), nnx.split(Supernet(space, rngs=nnx.Rngs(0)), nnx.Param)[1]
    own, _ = sliced_supernet.named(weights)
    batch: Any = jax.ShapeDtypeStruct((images, space.input_size, space.input_size, 3), np.float32)
    targets: Any = jax.ShapeDtypeStruct((images, space.classes), np.float32)
    for architecture in architectures:
        tape = Tape(own, programs, surveys=True)
        tape.gradients(sliced_supernet.loss(tape, sliced_supernet.logits(tape, space, architecture, batch), targets))
    return len(programs)


def our_scoring(space: SearchSpace | None, batch_size: int) -> Work:
    """`hwnas.candidate_scoring.CandidateScorer` on a supernet with new weights."""
    from flax import nnx

    from hwnas.candidate_scoring import CandidateScorer
    from hwnas.supernet import Supernet
    from hwnas.training import prepare_process

    assert space is not None
    prepare_process(Path(tempfile.mkdtemp(prefix="hwnas-compiled-")))
    data = noise_images()
    scorer = CandidateScorer(
        Supernet(space, rngs=nnx.Rngs(0)), data, calibration_images=CALIBRATION_IMAGES, batch_size=batch_size
    )
    return lambda codes: [scorer.accuracy(data.validation, code) for code in codes]


# ---- PyTorch's ---------------------------------------------------------------------------------------------------


def torch_model(space: SearchSpace | None, channels_last: bool) -> Any:
    import torch

    from benchmarks.torch_shufflenet import ShuffleNetV2
    from benchmarks.torch_supernet import TorchSupernet

    torch.manual_seed(0)
    model: Any = TorchSupernet(space) if space else ShuffleNetV2("1x", classes=10, small_images=True)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def torch_images(images: Any, channels_last: bool) -> Any:
    """Bytes `[N, H, W, 3]` as the network takes them."""
    import torch

    x = (torch.as_tensor(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def torch_training(space: SearchSpace | None, batch_size: int, *, channels_last: bool) -> Work:
    """The same step: crop and mirror, gradients of each path, clipping, SGD with Nesterov momentum."""
    import torch
    from torch.nn import functional

    model, data = torch_model(space, channels_last), noise_images()
    kernels = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": kernels, "weight_decay": 4e-5}, {"params": others}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    batches = endless_batches(data, batch_size)

    def augmented(images: Any) -> Any:
        padded = functional.pad(torch.as_tensor(images), (0, 0, 4, 4, 4, 4))
        rows, columns = (torch.randint(0, 9, (len(images), 1)) + torch.arange(32) for _ in range(2))
        columns = torch.where(torch.rand(len(images), 1) < 0.5, columns.flip(1), columns)
        cropped = padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
        return torch_images(cropped, channels_last)

    def work(codes: Sequence[Code]) -> float:
        batch, total = next(batches), 0.0
        images, labels = augmented(batch.images), torch.as_tensor(batch.labels).long()
        paths = [(space.decode(code),) for code in codes] if space else [()]
        optimizer.zero_grad()
        for path, x, y in zip(paths, images.chunk(len(paths)), labels.chunk(len(paths)), strict=True):
            loss = functional.cross_entropy(model(x, *path), y, label_smoothing=0.1) / len(paths)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return total

    return work


def torch_scoring(space: SearchSpace | None, batch_size: int, *, channels_last: bool) -> Work:
    """Batch norms estimated anew over the same images, then the accuracy on the validation split."""
    import torch

    assert space is not None
    model, data = torch_model(space, channels_last), noise_images()
    batches = data.train.batches(batch_size, seed=0)
    calibration = [next(batches).images for _ in range(CALIBRATION_IMAGES // batch_size)]

    @torch.inference_mode()
    def work(codes: Sequence[Code]) -> list[float]:
        found: list[float] = []
        for architecture in map(space.decode, codes):
            for number, images in enumerate(calibration):
                mode = "estimate" if number else "first estimate"
                model(torch_images(images, channels_last), architecture, mode)
            correct = sum(
                int(
                    (
                        model(torch_images(images, channels_last), architecture, "score").argmax(1).numpy() == labels
                    ).sum()
                )
                for images, labels in data.validation.batches(batch_size, seed=None)
            )
            found.append(correct / len(data.validation))
        return found

    return work


# ---- processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Contender:
    """A process that works when asked.

    Attributes:
        name: as printed.
        first_s: seconds from the start of its process to the end of its first piece of work.
        process, pipe: of it.
    """

    name: str
    first_s: float
    process: Any
    pipe: Connection

    def work(self, codes: Sequence[Code]) -> float:
        """Seconds of one piece of work."""
        self.pipe.send(codes)
        return self.pipe.recv()["seconds"]

    def facts(self) -> dict[str, float]:
        """Peak memory in MB, compilations so far."""
        self.pipe.send(None)
        return self.pipe.recv()


def serve(
    pipe: Connection, folder: str, make: Callable[..., Work], space_name: str | None, batch_size: int, options: Any
) -> None:
    """What a contender's process runs; its temporary files lie in a folder that outlives it."""
    tempfile.tempdir, compilations = folder, 0
    if make in (our_training, our_scoring):
        import jax

        def count(event: str, duration_secs: float, **_: Any) -> None:
            nonlocal compilations
            compilations += event == "/jax/core/compile/backend_compile_duration"

        jax.monitoring.register_event_duration_secs_listener(count)
    work = make(load_space(space_name) if space_name else None, batch_size, **options)
    while True:
        asked = pipe.recv()
        if asked is None:
            peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            pipe.send({"peak_mb": peak_mb, "compilations": compilations})
            continue
        started = time.perf_counter()
        work(asked)
        pipe.send({"seconds": time.perf_counter() - started})


@contextmanager
def contenders(
    makers: dict[str, tuple[Callable[..., Work], dict[str, Any]]],
    space: str | None,
    batch_size: int,
    first: Sequence[Code],
) -> Iterator[list[Contender]]:
    """Starts processes one after another, each with a first piece of work, and ends them."""
    context, started = multiprocessing.get_context("spawn"), []
    folder = tempfile.TemporaryDirectory(prefix="hwnas-contenders-")
    try:
        for name, (make, options) in makers.items():
            pipe, other = context.Pipe()
            begin = time.perf_counter()
            arguments = other, folder.name, make, space, batch_size, options
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            other.close()
            pipe.send(first)
            pipe.recv()
            started.append(Contender(name, time.perf_counter() - begin, process, pipe))
        yield started
    finally:
        for contender in started:
            contender.process.terminate()
            contender.process.join()
        folder.cleanup()
