"""Images in: a source is read, divided into three splits kept apart by type, and handed out in batches.

Small sets live in memory at the network's input size. Sets that would not fit stream: grain decodes and resizes them in
threads while the device computes. Augmentation and normalisation are compiled on the device.

The network takes float32 RGB `[B, H, W, 3]` made from bytes x by `(x / 255 - mean) / std`, with the `mean` and `std` of
the `DataSet`; an exported model takes the same.
"""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from hwnas.datasets import DIGITS, dataset_names, load_named
from hwnas.errors import HwnasError
from hwnas.image_sources import read_images
from hwnas.images import FoundImages, Images, LabelledImages, images_extra

if TYPE_CHECKING:
    import jax

MEMORY_LIMIT_BYTES = 2 * 1024**3
"""Decoded images of all splits together; above this they stream."""
SET_APART, MOST_SET_APART = 0.1, 5000
"""For validation, and for the test where the source has none: a share of the images, and at most so many."""
STREAM_THREADS, STREAM_AHEAD = min(16, 2 * (os.cpu_count() or 1)), 1024
"""Threads that decode a streamed split, and how many images they may be ahead of the device."""
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class Batch(NamedTuple):
    """Images uint8 `[B, H, W, 3]` and labels int32 `[B]`; a JAX pytree."""

    images: np.ndarray
    labels: np.ndarray

    def divided(self, paths: int) -> "Batch":
        """Each path's part: images `[P, N, H, W, 3]` and labels `[P, N]`."""
        return Batch(*(x.reshape(paths, -1, *x.shape[1:]) for x in self))


@dataclass(frozen=True, slots=True, eq=False)
class StreamedImages:
    """Images decoded each time they are asked for: those of `source` at `indices` `[N]`, `size` pixels wide."""

    source: Images
    indices: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> np.ndarray:
        """Image `index` of the split, uint8 `[H, W, 3]`."""
        return self.source.resized(self.indices[index : index + 1], self.size)[0]


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Labelled images for one purpose. Only its three children are made.

    Attributes:
        images: uint8 `[N, H, W, 3]` in memory, or `StreamedImages` of the same length.
        labels: int32 `[N]`.
    """

    images: np.ndarray | StreamedImages
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        batch_size: int,
        *,
        seed: int | None,
        epoch: int = 0,
        start_batch: int = 0,
        places: Sequence[int] | None = None,
    ) -> Iterator[Batch]:
        """One epoch, from batch `start_batch` on; what comes is fixed by `seed` and `epoch` alone, streamed or not.

        Without a seed the images come in order and the last batch may be short. With a seed they come shuffled, anew
        in each epoch, and a last batch that would be short is left out, so that all have one shape. With `places`, of
        each shuffled batch only the images there are read.

        Raises:
            HwnasError: a shuffled split smaller than one batch, or, when streamed, a file that is broken.
        """
        order = np.arange(len(self))
        if seed is not None:
            if batch_size > len(self):
                raise HwnasError(
                    f"A batch is at most as large as the training split: {batch_size} images asked for, "
                    f"{len(self)} there. Choose a smaller batch."
                )
            order = np.random.default_rng((seed, epoch)).permutation(order)
            order = order[: len(self) // batch_size * batch_size]
        order = order[start_batch * batch_size :]
        if places is not None:
            order, batch_size = order.reshape(-1, batch_size)[:, places].ravel(), len(places)
        if isinstance(self.images, StreamedImages):
            return _streamed_batches(self.images, self.labels, order, batch_size)
        return _memory_batches(self.images, self.labels, order, batch_size)


AnySplit = TypeVar("AnySplit", bound=Split)


class TrainSplit(Split):
    """What weights are trained on."""

    __slots__ = ()


class ValidationSplit(Split):
    """What the search scores architectures on, and what decisions are made by."""

    __slots__ = ()


class TestSplit(Split):
    """What only the final report reads."""

    __slots__ = ()
    __test__ = False  # not a test case, whatever pytest thinks of the name


@dataclass(frozen=True, eq=False)
class DataSet:
    """A set of labelled images, ready for a network.

    Attributes:
        name: of the source, for people.
        classes: class names in the order of the labels.
        image_size: side of the square images, in pixels.
        train, validation, test: disjoint splits; each holds every class.
        flip: whether a mirrored image is still one of its class; not so for digits.
        mean, std: per channel (red, green, blue), of values from 0 to 1; see `normalize`.
    """

    name: str
    classes: tuple[str, ...]
    image_size: int
    train: TrainSplit
    validation: ValidationSplit
    test: TestSplit
    flip: bool
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change with the classes, the size, the images, the labels or the splits.

        Images in memory count byte by byte, streamed files by name and size.
        """
        digest = hashlib.sha256(repr((self.classes, self.image_size, self.mean, self.std)).encode())
        for split in (self.train, self.validation, self.test):
            digest.update(f"{len(split)} images".encode())
            digest.update(np.ascontiguousarray(split.labels).data)
            if isinstance(split.images, StreamedImages):
                for identity in split.images.source.identity(split.images.indices):
                    digest.update(identity)
            else:
                digest.update(np.ascontiguousarray(split.images).data)
        return digest.hexdigest()[:16]


def load_data(source: str | Path = DIGITS, *, image_size: int, seed: int = 0) -> DataSet:
    """The images of a source at `image_size`, in three splits.

    Where the source keeps test images apart, they are the test split; else a tenth of each class is set apart. The
    validation split is a tenth of each class of the training images. Both are fixed by `seed`. Images that are not
    square lose their longer sides' ends; grey ones become RGB.

    Args:
        source: the name of a data set (`digits`, `cifar10`, `fashion-mnist`, `eurosat`), a folder of images by class,
            a Parquet file or a folder of them, or an `.npz` file; `hwnas.image_sources.read_images` has the layouts.
        image_size: side of the network's input, in pixels.
        seed: of the division into splits.

    Raises:
        HwnasError: there is no such source, it cannot be downloaded, or it breaks a rule of its layout.
    """
    if str(source) in dataset_names():
        found = load_named(str(source))
    elif Path(source).exists():
        found = read_images(Path(source).resolve())
    else:
        raise HwnasError(
            f"There are no images at '{source}': it is neither a folder, a .parquet or an .npz file, nor one of "
            f"{', '.join(dataset_names())}."
        )
    return _divided(found, image_size, seed)


def stratified_part(labels: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of the labels `[N]` in two groups, both in order: the rest, and about `count` drawn evenly by class.

    A class gives its share to the nearest whole image, at least one, and keeps at least one.
    """
    rng = np.random.default_rng(seed)
    of_class = np.bincount(labels)
    shares = of_class * (count / len(labels))
    taken = np.floor(shares).astype(int)
    largest_first = np.argsort(taken - shares, kind="stable")
    taken[largest_first[: count - taken.sum()]] += 1
    taken = np.minimum(np.maximum(taken, 1), np.maximum(of_class - 1, 0))
    places = [rng.permutation(np.flatnonzero(labels == label))[:number] for label, number in enumerate(taken)]
    part = np.sort(np.concatenate(places))
    return np.setdiff1d(np.arange(len(labels)), part, assume_unique=True), part


def stratified_subset(split: AnySplit, count: int, seed: int) -> AnySplit:
    """About `count` images of a split, in its order, each class with its share; `stratified_part` says which.

    All of them if there are no more.
    """
    if count >= len(split):
        return split
    _, places = stratified_part(split.labels, count, seed)
    images = split.images
    if isinstance(images, StreamedImages):
        return type(split)(replace(images, indices=images.indices[places]), split.labels[places])
    return type(split)(images[places], split.labels[places])


def _divided(found: FoundImages, image_size: int, seed: int) -> DataSet:
    """The splits of a source, each in memory if all of them fit."""
    if len(found.classes) < 2:
        raise HwnasError(f"{found.name}: a data set has at least two classes; this one has {len(found.classes)}.")
    everything = np.arange(len(found.train.labels))
    train, validation, test = (found.train, everything), _whole(found.validation), _whole(found.test)
    if test is None:
        kept, part = stratified_part(found.train.labels, _part_size(found, len(everything)), seed)
        train, test = (found.train, everything[kept]), (found.train, everything[part])
    if validation is None:
        places = train[1]
        kept, part = stratified_part(found.train.labels[places], _part_size(found, len(places)), seed)
        train, validation = (found.train, places[kept]), (found.train, places[part])
    total = sum(len(places) for _, places in (train, validation, test))
    stream = total * image_size**2 * 3 > MEMORY_LIMIT_BYTES
    return DataSet(
        found.name,
        found.classes,
        image_size,
        _split(TrainSplit, found, train, image_size, stream),
        _split(ValidationSplit, found, validation, image_size, stream),
        _split(TestSplit, found, test, image_size, stream),
        found.flip,
    )


def _whole(part: LabelledImages | None) -> tuple[LabelledImages, np.ndarray] | None:
    return None if part is None else (part, np.arange(len(part.labels)))


def _part_size(found: FoundImages, count: int) -> int:
    return found.set_apart or min(MOST_SET_APART, round(SET_APART * count))


def _split(
    kind: type[AnySplit], found: FoundImages, chosen: tuple[LabelledImages, np.ndarray], size: int, stream: bool
) -> AnySplit:
    part, places = chosen
    labels = part.labels[places]
    counts = np.bincount(labels, minlength=len(found.classes))
    if not counts.all():
        raise HwnasError(
            f"{found.name}: every class has an image in each split, but class '{found.classes[int(counts.argmin())]}' "
            f"has none in the {kind.__name__.removesuffix('Split').lower()} split. Add images of it, three at least, "
            "or remove the class."
        )
    images = StreamedImages(part.images, places, size) if stream else part.images.resized(places, size)
    return kind(images, labels)


def _memory_batches(images: np.ndarray, labels: np.ndarray, order: np.ndarray, batch_size: int) -> Iterator[Batch]:
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        yield Batch(images[places], labels[places])


def _streamed_batches(images: StreamedImages, labels: np.ndarray, order: np.ndarray, size: int) -> Iterator[Batch]:
    with images_extra("Data sets larger than memory"):
        import grain
    items = grain.MapDataset.source(order.tolist()).map(lambda place: Batch(images[place], labels[place]))
    return iter(items.to_iter_dataset(grain.ReadOptions(STREAM_THREADS, STREAM_AHEAD)).batch(size))


# ---- on the device -------------------------------------------------------------------------------------------------


def augment(
    key: "jax.Array",
    images: "jax.Array | np.ndarray",
    *,
    flip: bool,
    mean: tuple[float, ...] = MEAN,
    std: tuple[float, ...] = STD,
) -> "jax.Array":
    """Training images as the network takes them, each shifted and perhaps mirrored at random; pure, to be jitted.

    A random crop after padding with an eighth of the size in black (4 pixels at 32x32), and with `flip` every other
    image mirrored: the recipe of He et al. 2015 (arXiv 1512.03385, section 4.2).

    Args:
        key: of `jax.random`; it fixes what comes.
        images: uint8 `[..., H, W, 3]`; what comes of each follows from its place in the order of all.
        flip: static; a data set's.
        mean, std: as for `normalize`.

    Returns:
        float32 `[..., H, W, 3]`.
    """
    import jax
    import jax.numpy as jnp

    *axes, height, width, _ = images.shape
    batch, (shift_key, flip_key) = math.prod(axes), jax.random.split(key)
    reach_y, reach_x = max(1, height // 8), max(1, width // 8)
    padded = jnp.pad(images, (*[(0, 0)] * len(axes), (reach_y, reach_y), (reach_x, reach_x), (0, 0)))
    shifts = jax.random.randint(shift_key, (batch, 2), 0, jnp.array([2 * reach_y + 1, 2 * reach_x + 1]))

    def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), (height, width, 3))

    crops = crop
    for _ in axes:
        crops = jax.vmap(crops)
    cropped = crops(padded, shifts.reshape(*axes, 2))
    if flip:
        mirrored = jax.random.bernoulli(flip_key, shape=(batch, 1, 1, 1)).reshape(*axes, 1, 1, 1)
        cropped = jnp.where(mirrored, cropped[..., ::-1, :], cropped)
    return normalize(cropped, mean, std)


def normalize(
    images: "jax.Array | np.ndarray", mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD
) -> "jax.Array":
    """Bytes as the network takes them: `(images / 255 - mean) / std`, float32 `[..., H, W, 3]`; pure, to be jitted."""
    import jax.numpy as jnp

    return (jnp.asarray(images, jnp.float32) / 255 - jnp.array(mean)) / jnp.array(std)
