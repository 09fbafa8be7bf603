"""Readers of images: folders by class, Parquet files as Hugging Face lays them out, and `.npz` files.

A reader makes `FoundImages`: labelled images, not yet decoded, in the parts in which the source keeps them.
"""

import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from hwnas.errors import HwnasError
from hwnas.images import (
    EncodedImages,
    FoundImages,
    LabelledImages,
    PixelImages,
    check_labels,
    images_extra,
    numbered_classes,
)

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""What the folders and files of a source that is already divided are called, and the part that each one is."""
PARQUET_LIMIT_BYTES = 4 * 1024**3
"""Encoded images of Parquet files are held in memory; above this they have to be unpacked into a folder."""


def read_images(path: Path) -> FoundImages:
    """The images of a folder by class, of a Parquet file or a folder of them, or of an `.npz` file.

    A folder may be divided into `train` and `test`; where it has `val` and no `test`, `val` is the test part, as in
    ImageNet. A class is a sub-folder. Parquet files are laid out as by Hugging Face: a column `image` or `img` with
    `bytes` in it, a column `label`, and file names that begin with the part. An `.npz` file has `images` and `labels`,
    or `x_train`, `y_train`, `x_test` and `y_test`: uint8 `[N, H, W]` or `[N, H, W, C]`, and integers `[N]`.

    Raises:
        HwnasError: something in it breaks these rules.
    """
    if path.is_dir():
        found = _read_parquet_folder(path) or _read_class_folder(path)
    elif path.suffix == ".npz":
        found = _read_npz(path)
    elif path.suffix == ".parquet":
        found = FoundImages(path.stem, *_read_parquet([path]))
    else:
        raise HwnasError(f"{path}: images come as a folder, a .parquet file or an .npz file; this is none of them.")
    return found if found.test else replace(found, validation=None, test=found.validation)


def _found(name: str, classes: tuple[str, ...], parts: dict[str, LabelledImages]) -> FoundImages:
    return FoundImages(name, classes, parts["train"], parts.get("validation"), parts.get("test"))


# ---- folders by class ----------------------------------------------------------------------------------------------


def _read_class_folder(path: Path) -> FoundImages:
    folders = _sub_folders(path)
    parts = {"train": path}
    if folders and all(folder.name.lower() in PARTS for folder in folders):
        parts = {PARTS[folder.name.lower()]: folder for folder in folders}
        if "train" not in parts:
            raise HwnasError(f"{path}: of {', '.join(f.name for f in folders)}, none is called 'train'. Add it.")
    classes = tuple(folder.name for folder in _sub_folders(parts["train"]))
    if len(classes) < 2:
        seen = f"one, '{classes[0]}'" if classes else "none"
        raise HwnasError(f"{parts['train']}: a folder of images has at least two class folders; this has {seen}.")
    return _found(path.name, classes, {part: _read_classes(folder, classes) for part, folder in parts.items()})


def _read_classes(path: Path, classes: tuple[str, ...]) -> LabelledImages:
    strangers = sorted({folder.name for folder in _sub_folders(path)} - set(classes))
    if strangers:
        raise HwnasError(f"{path}: there is no class '{strangers[0]}' among the training images. Add or remove it.")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        in_class = _image_files(path / name)
        if not in_class:
            raise HwnasError(f"{path / name}: a class has images ({', '.join(IMAGE_SUFFIXES)}); there are none here.")
        files += in_class
        labels += [label] * len(in_class)
    return LabelledImages(EncodedImages(files, files), np.array(labels, np.int32))


def _image_files(folder: Path) -> list[str]:
    """The paths of all images in a folder and below it, in order."""
    return sorted(
        os.path.join(place, name)
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    )


def _sub_folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


# ---- Parquet -------------------------------------------------------------------------------------------------------


def _read_parquet_folder(path: Path) -> FoundImages | None:
    """`None` if there are no Parquet files, neither in the folder nor one folder below."""
    files = sorted(path.glob("*.parquet")) or sorted(path.glob("*/*.parquet"))
    if not files:
        return None
    parts: dict[str, list[Path]] = {}
    for file in files:
        word = file.stem.lower().split("-")[0].split("_")[0]
        if word not in PARTS:
            raise HwnasError(f"{file}: the name of a Parquet file begins with {', '.join(PARTS)}. Rename or remove it.")
        parts.setdefault(PARTS[word], []).append(file)
    if "train" not in parts:
        raise HwnasError(f"{path}: there is no Parquet file whose name begins with 'train'. Add it.")
    classes, train = _read_parquet(parts.pop("train"))
    others = {part: _read_parquet(files, classes)[1] for part, files in parts.items()}
    return _found(path.name, classes, {"train": train, **others})


def _read_parquet(files: list[Path], classes: tuple[str, ...] | None = None) -> tuple[tuple[str, ...], LabelledImages]:
    """The class names, from the files if not given, and all images of some Parquet files, still encoded."""
    total = sum(file.stat().st_size for file in files)
    if total > PARQUET_LIMIT_BYTES:
        raise HwnasError(
            f"{files[0].parent}: Parquet files of {PARQUET_LIMIT_BYTES} bytes at most are read; these have {total}. "
            "Unpack them into a folder of images by class, which is streamed."
        )
    items: list[str | bytes] = []
    names: list[str] = []
    labels: list[np.ndarray] = []
    for file in files:
        encoded, numbers, own_classes = _read_parquet_file(file)
        classes = classes or own_classes
        labels.append(check_labels(numbers, classes, str(file)))
        items += encoded
        names += [f"{file}, row {row}" for row in range(len(encoded))]
    joined = np.concatenate(labels)
    return classes or numbered_classes(joined, str(files[0])), LabelledImages(EncodedImages(items, names), joined)


def _read_parquet_file(file: Path) -> tuple[list[bytes], np.ndarray, tuple[str, ...] | None]:
    """The encoded images, the labels, and the class names if the file has them."""
    with images_extra("Parquet files"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            column = next((name for name in ("image", "img") if name in schema.names), None)
            if column is None or "label" not in schema.names:
                seen = ", ".join(schema.names)
                raise HwnasError(f"{file}: it needs a column 'image' or 'img' and a column 'label'; it has {seen}.")
            kind = schema.field(column).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise HwnasError(f"{file}: the column '{column}' is a struct with 'bytes' in it; this is {kind}.")
            table = opened.read([column, "label"])
    except (pa.ArrowException, OSError) as error:
        raise HwnasError(f"{file}: not a whole Parquet file ({error}). Get it again.") from None
    if table["label"].null_count:
        raise HwnasError(f"{file}: every row has a label; {table['label'].null_count} rows have none.")
    encoded = [item for chunk in table[column].chunks for item in chunk.field("bytes").to_pylist()]
    if None in encoded:
        raise HwnasError(f"{file}: every row has the bytes of its image; row {encoded.index(None)} has none.")
    return encoded, table["label"].to_numpy(), _class_names(schema.metadata)


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...] | None:
    """The names of the labels in the metadata that Hugging Face's writer leaves in a Parquet file, if any."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


# ---- .npz ----------------------------------------------------------------------------------------------------------


def _read_npz(path: Path) -> FoundImages:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise HwnasError(f"{path}: not a whole .npz file ({error}). Make it again with numpy.savez.") from None
    keys = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
    if "images" in arrays:
        keys = {"train": ("images", "labels")}
    if not {key for pair in keys.values() for key in pair} <= set(arrays):
        raise HwnasError(
            f"{path}: it needs the arrays images and labels, or x_train, y_train, x_test and y_test; "
            f"it has {', '.join(arrays)}."
        )
    classes: tuple[str, ...] = ()
    parts: dict[str, LabelledImages] = {}
    for part, (x, y) in keys.items():
        images, labels = _check_pixels(arrays[x], f"{path}, {x}"), check_labels(arrays[y], classes, f"{path}, {y}")
        if len(images) != len(labels):
            raise HwnasError(f"{path}: {x} has {len(images)} images and {y} has {len(labels)} labels.")
        classes = classes or numbered_classes(labels, f"{path}, {y}")
        parts[part] = LabelledImages(images, labels)
    return _found(path.stem, classes, parts)


def _check_pixels(pixels: np.ndarray, name: str) -> PixelImages:
    shape = pixels.shape if pixels.ndim == 4 else (*pixels.shape, 1)
    if pixels.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or 0 in shape[1:]:
        raise HwnasError(
            f"{name}: images are uint8 [N, H, W] or [N, H, W, 1 or 3]; these are {pixels.dtype} {list(pixels.shape)}."
        )
    return PixelImages(pixels.reshape(shape))
