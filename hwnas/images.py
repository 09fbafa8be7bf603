"""Images as they are found, encoded or not, and how they become RGB of one square size.

Pillow is loaded only where a file needs it: data sets of plain arrays work without.
"""

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import track

from hwnas.errors import HwnasError

CHUNK = 512
"""Images that are decoded or resized in one go."""


class Images(Protocol):
    """A row of images of any size and any encoding."""

    def __len__(self) -> int: ...

    def resized(self, indices: np.ndarray, size: int) -> np.ndarray:
        """The images at `indices` (any integers, `[N]`) as uint8 RGB `[N, size, size, 3]`: centre crop, bilinear."""
        ...

    def identity(self, indices: np.ndarray) -> Iterator[bytes]:
        """Bytes that change when the images do; of files, their names and sizes only."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PixelImages:
    """Decoded images of one size: uint8, `[N, H, W, 1]` (grey) or `[N, H, W, 3]`."""

    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def resized(self, indices: np.ndarray, size: int) -> np.ndarray:
        resized = np.empty((len(indices), size, size, 3), np.uint8)
        for start in range(0, len(indices), CHUNK):
            resized[start : start + CHUNK] = resize_pixels(self.pixels[indices[start : start + CHUNK]], size)
        return resized

    def identity(self, indices: np.ndarray) -> Iterator[bytes]:
        return (self.pixels[index].tobytes() for index in indices)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImages:
    """PNG, JPEG, ...: for each image the path of its file or its bytes, and the name that an error message gives it."""

    items: Sequence[str | bytes]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.items)

    def resized(self, indices: np.ndarray, size: int) -> np.ndarray:
        resized = np.empty((len(indices), size, size, 3), np.uint8)

        def fill(start: int) -> None:
            for place in range(start, min(start + CHUNK, len(indices))):
                index = int(indices[place])
                resized[place] = decode(self.items[index], self.names[index], size)

        if len(indices) <= CHUNK:
            fill(0)
            return resized
        starts = range(0, len(indices), CHUNK)
        console = Console(stderr=True)
        silent = not console.is_terminal
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            chunks = pool.map(fill, starts)
            for _ in track(chunks, "Decoding images", len(starts), console=console, transient=True, disable=silent):
                pass
        finally:
            pool.shutdown(cancel_futures=True)
        return resized

    def identity(self, indices: np.ndarray) -> Iterator[bytes]:
        for index in indices:
            item = self.items[index]
            if isinstance(item, bytes):
                yield item
            else:
                path = Path(item)
                yield f"{path.parent.name}/{path.name} {path.stat().st_size}".encode()


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Images and their classes: int32 `[N]`, places in a list of class names."""

    images: Images
    labels: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class FoundImages:
    """What a source holds. `None` stands for a part that it does not keep apart.

    Attributes:
        name: of the source, for people.
        classes: class names in the order of the labels.
        flip: whether a mirrored image is still one of its class.
        set_apart: how many images a part gets that has to be divided off; `None` for a tenth, 5,000 at most.
    """

    name: str
    classes: tuple[str, ...]
    train: LabelledImages
    validation: LabelledImages | None = None
    test: LabelledImages | None = None
    flip: bool = True
    set_apart: int | None = None


@contextmanager
def images_extra(what: str) -> Iterator[None]:
    """Imports inside belong to the extra `images`; where it is not installed, an `HwnasError` says how to get it."""
    try:
        yield
    except ImportError as error:
        raise HwnasError(
            f"{what} need the Python package '{error.name}', which is not installed. Run: pip install 'hwnas[images]'"
        ) from None


# ---- one size ------------------------------------------------------------------------------------------------------


def decode(item: str | bytes, name: str, size: int) -> np.ndarray:
    """An encoded image as uint8 RGB `[size, size, 3]`: the largest centred square, resized bilinearly.

    Raises:
        HwnasError: Pillow cannot read it to its end, or it has more than 8 bits a channel.
    """
    with images_extra("Image files"):
        from PIL import Image
    try:
        with Image.open(item if isinstance(item, str) else io.BytesIO(item)) as image:
            if image.mode.startswith(("I", "F")):
                raise HwnasError(f"{name}: images have 8 bits a channel; this one has mode '{image.mode}'. Convert it.")
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
    except HwnasError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types on broken files, SyntaxError among them
        raise HwnasError(f"{name}: not a whole image file ({error}). Mend or remove it.") from None


def resize_pixels(pixels: np.ndarray, size: int) -> np.ndarray:
    """Decoded images `[N, H, W, 1 or 3]` as uint8 RGB `[N, size, size, 3]`: centre crop, then bilinear.

    A triangle filter that grows when the image shrinks: the same as Pillow's bilinear filter, to one grey level.
    """
    height, width = pixels.shape[1:3]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = pixels[:, top : top + side, left : left + side]
    if side != size:
        weights = _triangle_weights(side, size)
        rows = np.matmul(weights, pixels.astype(np.float32).transpose(0, 3, 1, 2))
        pixels = np.rint(np.matmul(rows, weights.T)).astype(np.uint8).transpose(0, 2, 3, 1)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def _triangle_weights(side: int, size: int) -> np.ndarray:
    """The share of each of `side` old pixels in each of `size` new ones: float32 `[size, side]`, rows sum to 1."""
    scale = side / size
    centres = (np.arange(size) + 0.5) * scale
    distances = np.abs(np.arange(side) + 0.5 - centres[:, None])
    weights = np.maximum(0, 1 - distances / max(scale, 1))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


# ---- labels --------------------------------------------------------------------------------------------------------


def check_labels(labels: Any, classes: Sequence[str] | None, name: str) -> np.ndarray:
    """Labels as int32 `[N]`. They count from 0, and up to the last of `classes` where the names are known."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise HwnasError(f"{name}: labels are integers [N]; these are {labels.dtype} {list(labels.shape)}.")
    if not len(labels):
        raise HwnasError(f"{name}: there are no images in it.")
    most = len(classes) - 1 if classes else np.iinfo(np.int32).max
    wrong = (labels < 0) | (labels > most)
    if wrong.any():
        place = int(np.argmax(wrong))
        rule = f"labels lie from 0 to {most}" if classes else "labels count from 0"
        raise HwnasError(f"{name}: {rule}; label {place} is {labels[place]}.")
    return labels.astype(np.int32)


def numbered_classes(labels: np.ndarray, name: str) -> tuple[str, ...]:
    """Names for classes that have only numbers: `("0", "1", ...)` up to the largest label."""
    most = int(labels.max())
    if most >= len(labels):
        raise HwnasError(
            f"{name}: labels count from 0 and each has images; the largest is {most}, for {len(labels)} images."
        )
    return tuple(str(number) for number in range(most + 1))
