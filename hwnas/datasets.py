"""Data sets with names: found in the cache or where Debian puts them, else downloaded and checked.

The cache holds the files as their authors publish them, in `data/NAME` below the folder that the variable `HWNAS_CACHE`
names (`~/.cache/hwnas` if it is not set). Whatever is read from it has the SHA-256 that stands here.
"""

import gzip
import hashlib
import http.client
import math
import os
import struct
import tarfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from hwnas.errors import HwnasError
from hwnas.images import EncodedImages, FoundImages, LabelledImages, PixelImages, check_labels

DIGITS = "digits"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package `dataset-fashion-mnist` puts its files. They are compressed anew, so digests differ there."""
NO_ANSWER_SECONDS = 30
BLOCK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file of a data set, where its authors publish it, and its SHA-256."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True, slots=True)
class NamedDataSet:
    """How to get a data set and how to read it.

    Attributes:
        files: what is downloaded.
        read: makes the images of the folder in which the files lie.
        packaged: where a Linux distribution's package puts the same files.
        package: a hint with the command that installs that package.
    """

    files: tuple[PublishedFile, ...]
    read: Callable[[Path], FoundImages]
    packaged: Path | None = None
    package: str = ""


def dataset_names() -> tuple[str, ...]:
    """The names that `load_named` knows."""
    return (DIGITS, *NAMED)


def load_named(name: str) -> FoundImages:
    """The data set of that name; `HwnasError` if it is not here and cannot be downloaded."""
    if name == DIGITS:
        return read_digits()
    dataset = NAMED[name]
    folder = cache_folder() / "data" / name
    paths = [folder / file.name for file in dataset.files]
    if not all(path.exists() for path in paths):
        packaged = dataset.packaged
        if packaged and all((packaged / file.name).exists() for file in dataset.files):
            return dataset.read(packaged)
    for file, path in zip(dataset.files, paths, strict=True):
        if not path.exists():
            try:
                download(file, path)
            except (OSError, http.client.HTTPException) as error:
                raise HwnasError(_by_hand(name, folder, file, error)) from None
        elif (seen := sha256_of(path)) != file.sha256:
            raise HwnasError(f"{path}: its SHA-256 must be {file.sha256}; it is {seen}. Remove the file and run again.")
    return dataset.read(folder)


def cache_folder() -> Path:
    """The folder in the variable `HWNAS_CACHE`, else `~/.cache/hwnas`."""
    return Path(os.environ.get("HWNAS_CACHE") or "~/.cache/hwnas").expanduser()


def download(file: PublishedFile, path: Path) -> None:
    """Fetches a file with a progress bar on standard error. It bears its name only when it is whole and checked.

    Raises:
        HwnasError: the transfer was cut, or the SHA-256 is another one; what came is removed.
        OSError: the network or the disk fails; what came is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        length, received, digest = _fetch(file.url, partial)
        if length is not None and received != length:
            raise HwnasError(f"{file.url}: the transfer was cut after {received} of {length} bytes. Run again.")
        if digest != file.sha256:
            raise HwnasError(
                f"{file.url}: the SHA-256 of the file must be {file.sha256}; what came has {digest}. It was removed. "
                "Something on the way, or the publisher, changed the file; try another network."
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fetch(url: str, path: Path) -> tuple[int | None, int, str]:
    """Writes what a URL gives to a file: the length announced, the length received, the SHA-256."""
    digest = hashlib.sha256()
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with (
        urllib.request.urlopen(url, timeout=NO_ANSWER_SECONDS) as response,
        path.open("wb") as out,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        length = int(text) if (text := response.headers.get("Content-Length")) else None
        task = progress.add_task(url.rsplit("/", 1)[1], total=length)
        received = 0
        while block := response.read(BLOCK_BYTES):
            out.write(block)
            digest.update(block)
            received += len(block)
            progress.advance(task, len(block))
    return length, received, digest.hexdigest()


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _by_hand(name: str, folder: Path, file: PublishedFile, error: Exception) -> str:
    """What to do without a network."""
    dataset = NAMED[name]
    lines = [f"The data set '{name}' is not on this machine, and {file.url} cannot be fetched ({error})."]
    lines.append(f"Fetch on another machine, and put into {folder}:")
    lines += [f"  {file.url} (SHA-256 {file.sha256})" for file in dataset.files]
    if dataset.package:
        lines.append(f"Or: {dataset.package}")
    return "\n".join(lines)


# ---- readers of the published files --------------------------------------------------------------------------------


def read_digits() -> FoundImages:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey (Alpaydin & Kaynak 1998); mirrored, they are none."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    grey = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    images = LabelledImages(PixelImages(grey), labels.astype(np.int32))
    return FoundImages(DIGITS, tuple("0123456789"), images, flip=False, set_apart=300)


CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def read_cifar10(folder: Path) -> FoundImages:
    """The binary version of CIFAR-10: records of a label and 3,072 bytes, planes of red, green and blue."""
    path = folder / "cifar-10-binary.tar.gz"
    records: dict[str, list[np.ndarray]] = {"data": [], "test": []}
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                if member.name.endswith(".bin") and (file := archive.extractfile(member)):
                    part = Path(member.name).name.split("_")[0]
                    records[part].append(np.frombuffer(file.read(), np.uint8).reshape(-1, 3073))
        train, test = (np.concatenate(part) for part in records.values())
    except (OSError, EOFError, ValueError, KeyError, zlib.error, tarfile.TarError) as error:
        raise HwnasError(f"{path}: not the CIFAR-10 archive ({error}). Remove it and run again.") from None
    name = str(path)
    return FoundImages("cifar10", CIFAR10_CLASSES, _cifar_images(train, name), test=_cifar_images(test, name))


def _cifar_images(records: np.ndarray, name: str) -> LabelledImages:
    pixels = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = check_labels(records[:, 0], CIFAR10_CLASSES, name)
    return LabelledImages(PixelImages(np.ascontiguousarray(pixels)), labels)


FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip


def read_fashion_mnist(folder: Path) -> FoundImages:
    """Fashion-MNIST: four IDX files."""
    train, test = (_idx_images(folder, part) for part in ("train", "t10k"))
    return FoundImages("fashion-mnist", FASHION_CLASSES, train, test=test)


def _idx_images(folder: Path, part: str) -> LabelledImages:
    path = folder / f"{part}-labels-idx1-ubyte.gz"
    labels = check_labels(read_idx(path), FASHION_CLASSES, str(path))
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz")
    if pixels.ndim != 3 or len(pixels) != len(labels):
        raise HwnasError(f"{folder}: {len(labels)} {part} labels stand against images {list(pixels.shape)}.")
    return LabelledImages(PixelImages(pixels[..., None]), labels)


def read_idx(path: Path) -> np.ndarray:
    """A gzipped IDX file of bytes: two zeros, type 8, the number of axes, their lengths (big-endian), the values."""
    try:
        data = gzip.decompress(path.read_bytes())
        zeros, kind, axes = struct.unpack_from(">HBB", data)
        shape = struct.unpack_from(f">{axes}I", data, 4)
        start = 4 + 4 * axes
        if (zeros, kind) != (0, 8) or len(data) - start != math.prod(shape):
            raise ValueError(f"{len(data)} bytes, shape {list(shape)}, type {kind}")
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise HwnasError(f"{path}: not a whole IDX file of bytes ({error}). Get it again.") from None
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_eurosat(folder: Path) -> FoundImages:
    """EuroSAT RGB: 27,000 JPEG images of 64x64 in a zip, a folder a class (Helber et al., arXiv 1709.00029)."""
    path = folder / "EuroSAT.zip"
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            items = [archive.read(name) for name in members]
    except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile) as error:
        raise HwnasError(f"{path}: not the EuroSAT archive ({error}). Remove it and run again.") from None
    class_of = [Path(name).parent.name for name in members]
    classes = tuple(sorted(set(class_of)))
    labels = check_labels(np.searchsorted(classes, class_of), classes, str(path))
    names = [f"{path}, {name}" for name in members]
    return FoundImages("eurosat", classes, LabelledImages(EncodedImages(items, names), labels))


FASHION_URL = "https://fashion-mnist.s3.eu-central-1.amazonaws.com"
# Digests: tensorflow/datasets, tensorflow_datasets/url_checksums/{cifar10,fashion_mnist,eurosat}.txt. The address of
# Fashion-MNIST is that list's bucket over HTTPS. EuroSAT is the copy that torchvision fetches; its MD5 is that of the
# authors' file, whose server often shows an expired certificate.
NAMED = {
    "cifar10": NamedDataSet(
        (
            PublishedFile(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
        read_cifar10,
    ),
    "fashion-mnist": NamedDataSet(
        (
            PublishedFile(
                f"{FASHION_URL}/train-images-idx3-ubyte.gz",
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            PublishedFile(
                f"{FASHION_URL}/train-labels-idx1-ubyte.gz",
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            PublishedFile(
                f"{FASHION_URL}/t10k-images-idx3-ubyte.gz",
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            PublishedFile(
                f"{FASHION_URL}/t10k-labels-idx1-ubyte.gz",
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ),
        read_fashion_mnist,
        DEBIAN_FASHION_MNIST,
        "apt install dataset-fashion-mnist",
    ),
    "eurosat": NamedDataSet(
        (
            PublishedFile(
                "https://huggingface.co/datasets/torchgeo/eurosat/resolve/c877bcd43f099cd0196738f714544e355477f3fd/"
                "EuroSAT.zip",
                "8ebea626349354c5328b142b96d0430e647051f26efc2dc974c843f25ecf70bd",
            ),
        ),
        read_eurosat,
    ),
}
"""The data sets that are downloaded, by name."""
