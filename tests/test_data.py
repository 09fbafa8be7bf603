import gzip
import hashlib
import http.server
import io
import json
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from hwnas import data, datasets, image_sources, images
from hwnas.data import DataSet, Split, load_data
from hwnas.errors import HwnasError
from hwnas.images import EncodedImages, PixelImages

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"
RNG = np.random.default_rng(0)


def picture(shade: int, height: int = 12, width: int = 12) -> Image.Image:
    """An RGB image whose red is `shade` everywhere, and otherwise noise."""
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8)
    pixels[..., 0] = shade
    return Image.fromarray(pixels)


def encoded(shade: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture(shade).save(out, kind)
    return out.getvalue()


def write_classes(folder: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture(label * 50 + number).save(folder / name / f"{number:03}{suffix}")
    return folder


def write_parquet(path: Path, labels: list[int], names: list[str] | None = None, column: str = "image") -> Path:
    rows = [{"bytes": encoded(label, "JPEG" if label % 2 else "PNG"), "path": None} for label in labels]
    table = pa.table({column: rows, "label": pa.array(labels, pa.int64())})
    if names:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path


def write_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


def numbered(count: int, size: int = 8) -> np.ndarray:
    """Grey images [count, size, size] in which every pixel holds the image's number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None], (count, size, size))


def splits(dataset: DataSet) -> tuple[Split, Split, Split]:
    return dataset.train, dataset.validation, dataset.test


def message(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(HwnasError) as caught:
        function(*arguments, **options)
    return str(caught.value)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HWNAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")


# ---- the default, and the splits -------------------------------------------------------------------------------------


def test_the_digits_come_at_the_networks_size_in_three_splits_that_hold_every_image_once():
    dataset = load_data(image_size=8)
    assert dataset.classes == tuple("0123456789")
    assert not dataset.flip
    assert [len(split) for split in splits(dataset)] == [1197, 300, 300]
    for split in splits(dataset):
        assert isinstance(split.images, np.ndarray)
        assert split.images.shape == (len(split), 8, 8, 3)
        assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        assert np.array_equal(split.images[..., 0], split.images[..., 2])
    together = sorted(
        (int(label), image[..., 0].tobytes())
        for split in splits(dataset)
        for image, label in zip(split.images, split.labels, strict=True)
    )
    everything = datasets.read_digits().train
    grey = everything.images.resized(np.arange(1797), 8)[..., 0]
    assert together == sorted((int(k), image.tobytes()) for image, k in zip(grey, everything.labels, strict=True))


def test_the_digits_need_neither_pillow_nor_pyarrow_nor_grain_nor_jax():
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('PIL', 'pyarrow', 'grain', 'jax')))\n"
        "from hwnas.data import load_data\n"
        "print(len(next(load_data(image_size=16).train.batches(32, seed=1)).labels))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "32\n"


def test_the_splits_are_fixed_by_the_seed_and_have_classes_in_their_shares():
    first, again, other = (load_data(image_size=8, seed=seed) for seed in (3, 3, 4))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    for one, same, another in zip(splits(first), splits(again), splits(other), strict=True):
        assert np.array_equal(one.images, same.images)
        assert not np.array_equal(one.labels, another.labels)
        counts = np.bincount(one.labels) / len(one)
        assert np.abs(counts - np.bincount(datasets.read_digits().train.labels) / 1797).max() < 0.004


def test_a_stratified_part_takes_the_nearest_share_of_each_class_and_leaves_at_least_one():
    labels = np.repeat([0, 1, 2, 3], [40, 20, 2, 1])
    rest, part = data.stratified_part(labels, 9, seed=0)
    assert np.bincount(labels[part], minlength=4).tolist() == [6, 3, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([rest, part])), np.arange(63))


def test_the_splits_are_types_that_do_not_stand_in_for_each_other():
    kinds = data.TrainSplit, data.ValidationSplit, data.TestSplit
    assert [type(split) for split in splits(load_data(image_size=8))] == list(kinds)
    assert not any(issubclass(one, other) for one in kinds for other in kinds if one is not other)


def test_the_fingerprint_changes_with_a_pixel_a_label_and_the_size(tmp_path: Path):
    arrays = {"x_train": numbered(30), "y_train": np.arange(30) % 2, "x_test": numbered(6), "y_test": np.arange(6) % 2}
    pixels, labels = numbered(6).copy(), np.arange(6) // 3
    pixels[4, 0, 0] += 1
    prints = [
        load_data(write_npz(tmp_path / "set.npz", **(arrays | change)), image_size=size).fingerprint
        for change, size in (({}, 8), ({}, 9), ({"x_test": pixels}, 8), ({"y_test": labels}, 8))
    ]
    assert len(set(prints)) == 4
    assert all(len(text) == 16 for text in prints)


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "streamed"])
def mixed(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSet:
    """A data set of 40 PNG files, 32 of which are for training, in either form."""
    if request.param == "streamed":
        monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 40 * 8 * 8 * 3 - 1)
    dataset = load_data(write_classes(tmp_path / "mixed", {"a": 20, "b": 20}), image_size=8)
    assert isinstance(dataset.train.images, data.StreamedImages) == (request.param == "streamed")
    return dataset


def test_without_a_seed_images_come_in_order_and_the_last_batch_is_short(mixed: DataSet):
    batches = list(mixed.train.batches(10, seed=None))
    assert [batch.images.shape for batch in batches] == [(10, 8, 8, 3)] * 3 + [(2, 8, 8, 3)]
    assert np.array_equal(np.concatenate([batch.labels for batch in batches]), mixed.train.labels)
    assert batches[0].images.dtype == np.uint8
    assert batches[0].labels.dtype == np.int32
    reds = np.concatenate([batch.images[:, 4, 4, 0] for batch in batches])
    assert all(one < two for one, two in pairwise(reds.tolist()))


def test_with_a_seed_batches_are_full_and_shuffled_anew_in_each_epoch_and_stay_with_their_labels(mixed: DataSet):
    epochs = [list(mixed.train.batches(10, seed=5, epoch=epoch)) for epoch in (0, 0, 1)]
    reds = [[batch.images[:, 4, 4, 0].tolist() for batch in epoch] for epoch in epochs]
    assert [len(batch) for batch in reds[0]] == [10, 10, 10]
    assert reds[0] == reds[1] != reds[2]
    assert len({red for batch in reds[0] for red in batch}) == 30
    for batch in epochs[0]:
        assert np.array_equal(batch.labels, batch.images[:, 4, 4, 0] >= 50)


def test_an_epoch_goes_on_at_the_batch_where_it_stopped(mixed: DataSet):
    whole = list(mixed.train.batches(10, seed=5, epoch=3))
    rest = list(mixed.train.batches(10, seed=5, epoch=3, start_batch=2))
    assert len(rest) == 1
    assert np.array_equal(rest[0].images, whole[2].images)


def test_streamed_batches_equal_those_from_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_classes(tmp_path / "set", {"a": 9, "b": 12}, ".jpg")
    in_memory = load_data(folder, image_size=7)
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 0)
    streamed = load_data(folder, image_size=7)
    for one, other in zip(splits(in_memory), splits(streamed), strict=True):
        for batch, same in zip(one.batches(2, seed=1), other.batches(2, seed=1), strict=True):
            assert np.array_equal(batch.images, same.images)
            assert np.array_equal(batch.labels, same.labels)


def test_a_training_split_smaller_than_a_batch_is_refused(mixed: DataSet):
    assert "33 images asked for, 32 there" in message(mixed.train.batches, 33, seed=0)


def test_a_broken_image_in_a_streamed_split_is_named_when_it_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 0)
    folder = write_classes(tmp_path / "set", {"a": 9, "b": 9})
    for file in (folder / "a").iterdir():
        file.write_bytes(file.read_bytes()[:80])
    dataset = load_data(folder, image_size=8)
    assert f"{folder / 'a'}/00" in message(lambda: list(dataset.train.batches(4, seed=None)))


def test_the_fingerprint_of_streamed_images_changes_with_a_files_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 0)
    folder = write_classes(tmp_path / "set", {"a": 9, "b": 9})
    before = load_data(folder, image_size=8).fingerprint
    assert load_data(folder, image_size=8).fingerprint == before
    picture(3, 20, 20).save(folder / "a" / "003.png")
    assert load_data(folder, image_size=8).fingerprint != before


# ---- one size --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 32), (28, 28, 32), (64, 64, 24), (30, 47, 16), (9, 4, 4)])
def test_resizing_arrays_agrees_with_pillow_to_one_grey_level(height: int, width: int, size: int):
    pixels = RNG.integers(0, 256, (3, height, width, 3), np.uint8)
    ours = PixelImages(pixels).resized(np.arange(3), size)
    out = [io.BytesIO() for _ in pixels]
    for image, file in zip(pixels, out, strict=True):
        Image.fromarray(image).save(file, "PNG")
    theirs = EncodedImages([file.getvalue() for file in out], ["", "", ""]).resized(np.arange(3), size)
    assert ours.shape == (3, size, size, 3)
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def test_images_that_are_not_square_lose_the_ends_of_their_longer_side():
    wide = np.zeros((1, 4, 10, 1), np.uint8)
    wide[:, :, 3:7] = 200
    assert (PixelImages(wide).resized(np.array([0]), 8) == 200).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_images_of_other_modes_become_rgb(mode: str, tmp_path: Path):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode).save(path)
    assert np.abs(images.decode(str(path), "", 5).astype(int).mean((0, 1)) - 200).max() <= (55 if mode == "1" else 3)


def test_an_image_of_16_bits_a_channel_is_refused(tmp_path: Path):
    Image.fromarray(np.full((5, 5), 40000, np.uint16)).save(tmp_path / "deep.png")
    assert "deep.png: images have 8 bits a channel" in message(
        images.decode, str(tmp_path / "deep.png"), str(tmp_path / "deep.png"), 5
    )


def test_more_images_than_a_chunk_are_decoded_by_threads_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch):
    sources = EncodedImages([encoded(shade) for shade in range(50)], [""] * 50)
    alone = sources.resized(np.arange(50), 6)
    monkeypatch.setattr(images, "CHUNK", 7)
    assert np.array_equal(sources.resized(np.arange(50), 6), alone)


# ---- folders by class ------------------------------------------------------------------------------------------------


def test_a_folder_by_class_gives_its_sub_folders_as_classes(tmp_path: Path):
    dataset = load_data(write_classes(tmp_path / "pets", {"cat": 20, "dog": 20}, ".jpg"), image_size=8)
    assert (dataset.name, dataset.classes, dataset.flip) == ("pets", ("cat", "dog"), True)
    assert [len(split) for split in splits(dataset)] == [32, 4, 4]


@pytest.mark.parametrize("last", ["test", "val"])
def test_a_folder_with_train_and_test_or_val_keeps_the_second_as_the_test_split(tmp_path: Path, last: str):
    write_classes(tmp_path / "set" / "train", {"a": 20, "b": 20})
    write_classes(tmp_path / "set" / last, {"a": 3, "b": 2})
    dataset = load_data(tmp_path / "set", image_size=8)
    assert [len(split) for split in splits(dataset)] == [36, 4, 5]
    assert dataset.test.labels.tolist() == [0, 0, 0, 1, 1]


def test_a_folder_with_all_three_parts_keeps_them(tmp_path: Path):
    for part, count in (("train", 6), ("val", 3), ("test", 2)):
        write_classes(tmp_path / "set" / part, {"a": count, "b": count})
    assert [len(split) for split in splits(load_data(tmp_path / "set", image_size=8))] == [12, 6, 4]


def test_a_class_may_be_called_train(tmp_path: Path):
    dataset = load_data(write_classes(tmp_path / "set", {"bus": 4, "train": 4}), image_size=8)
    assert dataset.classes == ("bus", "train")


def test_a_path_that_is_not_there_is_refused_with_the_names_that_there_are(tmp_path: Path):
    text = message(load_data, tmp_path / "nothing", image_size=8)
    assert f"no images at '{tmp_path / 'nothing'}'" in text
    assert "digits, cifar10, fashion-mnist, eurosat" in text


def test_a_file_of_another_kind_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt: images come as a folder" in message(load_data, tmp_path / "notes.txt", image_size=8)


@pytest.mark.parametrize(("counts", "seen"), [({"only": 5}, "this has one, 'only'"), ({}, "this has none")])
def test_a_folder_with_fewer_than_two_classes_is_refused(tmp_path: Path, counts: dict[str, int], seen: str):
    (tmp_path / "set").mkdir()
    assert seen in message(load_data, write_classes(tmp_path / "set", counts), image_size=8)


def test_an_empty_class_is_refused_with_its_name(tmp_path: Path):
    folder = write_classes(tmp_path / "set", {"a": 5, "b": 0})
    (folder / "b" / "notes.txt").write_text("hello")
    assert f"{folder / 'b'}: a class has images" in message(load_data, folder, image_size=8)


def test_a_class_with_too_few_images_for_three_splits_is_refused_with_its_name(tmp_path: Path):
    text = message(load_data, write_classes(tmp_path / "set", {"a": 9, "rare": 2}), image_size=8)
    assert "class 'rare' has none in the validation split" in text
    load_data(write_classes(tmp_path / "enough", {"a": 9, "rare": 3}), image_size=8)


def test_a_class_that_only_the_test_images_have_is_refused(tmp_path: Path):
    write_classes(tmp_path / "set" / "train", {"a": 5, "b": 5})
    write_classes(tmp_path / "set" / "test", {"a": 5, "b": 5, "c": 5})
    assert "no class 'c' among the training images" in message(load_data, tmp_path / "set", image_size=8)


def test_a_divided_folder_without_train_is_refused(tmp_path: Path):
    write_classes(tmp_path / "set" / "test", {"a": 5, "b": 5})
    write_classes(tmp_path / "set" / "val", {"a": 5, "b": 5})
    assert "of test, val, none is called 'train'" in message(load_data, tmp_path / "set", image_size=8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tiff"])
def test_a_truncated_image_is_refused_with_the_name_of_its_file(tmp_path: Path, suffix: str):
    folder = write_classes(tmp_path / "set", {"a": 4, "b": 4}, suffix)
    file = folder / "b" / f"002{suffix}"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert message(load_data, folder, image_size=8).startswith(f"{file}: not a whole image file")


def test_a_text_that_is_called_an_image_is_refused_with_its_name(tmp_path: Path):
    folder = write_classes(tmp_path / "set", {"a": 4, "b": 4})
    (folder / "a" / "001.png").write_text("this is no image")
    assert f"{folder / 'a' / '001.png'}: not a whole image file" in message(load_data, folder, image_size=8)


# ---- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("below", "column"), [("", "image"), ("data", "img")])
def test_a_folder_of_parquet_files_in_the_hugging_face_layout_is_read(tmp_path: Path, below: str, column: str):
    names = ["cat", "dog", "fish"]
    for shard in range(2):
        file = f"train-0000{shard}-of-00002.parquet"
        write_parquet(tmp_path / "set" / below / file, [0, 1, 2] * 10, names, column)
    write_parquet(tmp_path / "set" / below / "test-00000-of-00001.parquet", [2, 1, 0], names, column)
    dataset = load_data(tmp_path / "set", image_size=8)
    assert dataset.classes == ("cat", "dog", "fish")
    assert [len(split) for split in splits(dataset)] == [54, 6, 3]
    assert isinstance(dataset.test.images, np.ndarray)
    assert np.abs(dataset.test.images[..., 0].mean((1, 2)) - [2, 1, 0]).max() < 60
    assert dataset.test.labels.tolist() == [2, 1, 0]


def test_one_parquet_file_without_class_names_numbers_its_classes(tmp_path: Path):
    dataset = load_data(write_parquet(tmp_path / "all.parquet", [0, 1] * 10), image_size=8)
    assert (dataset.name, dataset.classes) == ("all", ("0", "1"))
    assert [len(split) for split in splits(dataset)] == [16, 2, 2]


def refused_tables() -> dict[str, tuple[pa.Table, str]]:
    image = [{"bytes": encoded(1), "path": None}] * 4
    names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["a", "b"]}}}})}
    return {
        "no label": (pa.table({"image": image, "tag": [0, 1, 0, 1]}), "a column 'label'; it has image, tag"),
        "no image": (pa.table({"photo": image, "label": [0, 1, 0, 1]}), "it has photo, label"),
        "plain bytes": (pa.table({"image": [b"x"] * 4, "label": [0, 1, 0, 1]}), "this is binary"),
        "only paths": (
            pa.table(
                {
                    "image": pa.array([{"bytes": None, "path": "x"}] * 4, image_type()),
                    "label": [0, 1, 0, 1],
                }
            ),
            "row 0 has none",
        ),
        "no labels": (pa.table({"image": image, "label": [0, None, 0, 1]}), "1 rows have none"),
        "hidden labels": (pa.table({"image": image, "label": [0, 1, -1, 1]}), "label 2 is -1"),
        "text labels": (pa.table({"image": image, "label": ["a", "b", "a", "b"]}), "labels are integers"),
        "unknown class": (
            pa.table({"image": image, "label": [0, 1, 0, 2]}).replace_schema_metadata(names),
            "labels lie from 0 to 1; label 3 is 2",
        ),
        "gap": (pa.table({"image": image, "label": [0, 1, 0, 9]}), "the largest is 9, for 4 images"),
        "one class": (pa.table({"image": image, "label": [0, 0, 0, 0]}), "this one has 1"),
        "empty": (pa.table({"image": pa.array([], image_type()), "label": pa.array([], pa.int64())}), "no images"),
        "broken image": (
            pa.table({"image": [*image[:3], {"bytes": b"GIF89a", "path": None}], "label": [0, 1, 0, 1]}),
            "bad.parquet, row 3: not a whole image file",
        ),
    }


def image_type() -> pa.StructType:
    return pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.mark.parametrize("case", refused_tables())
def test_a_parquet_file_that_breaks_the_layout_is_refused_with_the_reason(tmp_path: Path, case: str):
    table, reason = refused_tables()[case]
    parquet.write_table(table, tmp_path / "bad.parquet")
    text = message(load_data, tmp_path / "bad.parquet", image_size=8)
    assert reason in text
    assert "bad" in text


def test_a_truncated_parquet_file_is_refused_with_its_name(tmp_path: Path):
    path = write_parquet(tmp_path / "cut.parquet", [0, 1] * 8)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cut.parquet: not a whole Parquet file" in message(load_data, path, image_size=8)


def test_parquet_files_have_to_say_which_part_they_are(tmp_path: Path):
    write_parquet(tmp_path / "set" / "test.parquet", [0, 1])
    assert "no Parquet file whose name begins with 'train'" in message(load_data, tmp_path / "set", image_size=8)
    write_parquet(tmp_path / "set" / "more.parquet", [0, 1])
    assert "more.parquet: the name of a Parquet file begins" in message(load_data, tmp_path / "set", image_size=8)


def test_parquet_files_too_large_for_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(tmp_path / "large.parquet", [0, 1] * 8)
    monkeypatch.setattr(image_sources, "PARQUET_LIMIT_BYTES", 1000)
    assert "Parquet files of 1000 bytes at most are read" in message(load_data, path, image_size=8)


@pytest.mark.skipif(not CIFAR10.is_dir(), reason=f"CIFAR-10 as Parquet files is not at {CIFAR10}")
def test_real_cifar10_images_are_read_with_their_class_names(tmp_path: Path):
    some = parquet.ParquetFile(CIFAR10 / "test.parquet").read_row_group(0)
    parquet.write_table(some, tmp_path / "some.parquet")
    dataset = load_data(tmp_path / "some.parquet", image_size=32)
    assert dataset.classes == datasets.CIFAR10_CLASSES
    assert sum(len(split) for split in splits(dataset)) == some.num_rows
    assert isinstance(dataset.train.images, np.ndarray)
    assert 100 < dataset.train.images.mean() < 140  # the mean of CIFAR-10 is 121


# ---- .npz ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 8, 8), (40, 8, 8, 1), (40, 9, 8, 3)])
def test_an_npz_of_images_and_labels_is_divided(tmp_path: Path, shape: tuple[int, ...]):
    pixels = RNG.integers(0, 256, shape, np.uint8)
    path = write_npz(tmp_path / "set.npz", images=pixels, labels=np.arange(40) % 2)
    dataset = load_data(path, image_size=8)
    assert [len(split) for split in splits(dataset)] == [32, 4, 4]
    assert dataset.classes == ("0", "1")


def test_an_npz_with_test_arrays_keeps_them(tmp_path: Path):
    arrays = {"x_train": numbered(20), "y_train": np.arange(20) % 2, "x_test": numbered(4), "y_test": np.arange(4) % 2}
    dataset = load_data(write_npz(tmp_path / "set.npz", **arrays), image_size=4)
    assert [len(split) for split in splits(dataset)] == [18, 2, 4]
    assert isinstance(dataset.test.images, np.ndarray)
    assert dataset.test.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


GOOD = {"images": numbered(9), "labels": np.arange(9) % 2}


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"images": GOOD["images"]}, "it has images"),
        ({"x_train": GOOD["images"], "y_train": GOOD["labels"]}, "it has x_train, y_train"),
        (GOOD | {"images": np.zeros((9, 8, 8))}, "these are float64 [9, 8, 8]"),
        (GOOD | {"images": np.zeros((9, 64), np.uint8)}, "these are uint8 [9, 64]"),
        (GOOD | {"images": np.zeros((9, 3, 8, 8), np.uint8)}, "these are uint8 [9, 3, 8, 8]"),
        (GOOD | {"labels": np.arange(8) % 2}, "images has 9 images and labels has 8 labels"),
        (GOOD | {"labels": np.zeros((9, 1), int)}, "these are int64 [9, 1]"),
        (GOOD | {"labels": np.zeros(9)}, "these are float64 [9]"),
        (GOOD | {"labels": np.arange(9) - 1}, "label 0 is -1"),
        (GOOD | {"labels": np.arange(9) * 2}, "the largest is 16, for 9 images"),
        (GOOD | {"labels": np.arange(9) % 2 * 2}, "class '1' has none"),
        (
            {"x_train": numbered(9), "y_train": np.arange(9) % 2, "x_test": numbered(3), "y_test": np.arange(3)},
            "y_test: labels lie from 0 to 1; label 2 is 2",
        ),
        (GOOD | {"labels": np.array([None] * 9)}, "not a whole .npz file"),
    ],
)
def test_an_npz_that_breaks_the_layout_is_refused_with_the_reason(
    tmp_path: Path, arrays: dict[str, np.ndarray], reason: str
):
    path = write_npz(tmp_path / "bad.npz", **arrays)
    assert reason in message(load_data, path, image_size=8)


@pytest.mark.parametrize("kept", [0, 100, -30])
def test_a_truncated_npz_is_refused_with_its_name(tmp_path: Path, kept: int):
    path = write_npz(tmp_path / "cut.npz", **GOOD)
    path.write_bytes(path.read_bytes()[:kept])
    assert "cut.npz: not a whole .npz file" in message(load_data, path, image_size=8)


# ---- named data sets -------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def fashion_files() -> dict[str, bytes]:
    labels = np.arange(60) % 10
    return {
        "train-images-idx3-ubyte.gz": idx(numbered(60, 28)),
        "train-labels-idx1-ubyte.gz": idx(labels),
        "t10k-images-idx3-ubyte.gz": idx(numbered(20, 28)),
        "t10k-labels-idx1-ubyte.gz": idx(labels[:20]),
    }


class Server:
    """An HTTP server on the loopback: `files` by name; those in `cut` end half-way."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.removeprefix("/")
                outer.requests.append(name)
                if name not in outer.files:
                    self.send_error(404)
                    return
                body = outer.files[name]
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if name in outer.cut else body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Serves a small Fashion-MNIST, which takes the place of the published one."""
    server = Server()
    server.files = fashion_files()
    published = [
        datasets.PublishedFile(f"{server.url}/{name}", hashlib.sha256(body).hexdigest())
        for name, body in server.files.items()
    ]
    known = datasets.NamedDataSet(tuple(published), datasets.read_fashion_mnist, package="apt install it")
    monkeypatch.setitem(datasets.NAMED, "fashion-mnist", known)
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.server.shutdown()
    server.server.server_close()
    thread.join()


def test_a_named_data_set_is_downloaded_once_and_then_read_from_the_cache(server: Server, tmp_path: Path):
    first = load_data("fashion-mnist", image_size=28)
    assert [len(split) for split in splits(first)] == [50, 10, 20]
    assert first.classes[9] == "Ankle boot"
    assert isinstance(first.test.images, np.ndarray)
    assert first.test.images[:, 5, 5, 1].tolist() == list(range(20))
    assert load_data("fashion-mnist", image_size=28).fingerprint == first.fingerprint
    assert sorted(server.requests) == sorted(server.files)
    folder = tmp_path / "cache" / "data" / "fashion-mnist"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == server.files


def test_a_download_with_another_digest_is_refused_and_removed(server: Server, tmp_path: Path):
    name = "train-labels-idx1-ubyte.gz"
    server.files[name] += b"!"
    text = message(load_data, "fashion-mnist", image_size=28)
    assert f"{server.url}/{name}: the SHA-256 of the file must be" in text
    assert hashlib.sha256(server.files[name]).hexdigest() in text
    assert [path.name for path in (tmp_path / "cache/data/fashion-mnist").iterdir()] == ["train-images-idx3-ubyte.gz"]


def test_a_cut_download_is_refused_and_removed_and_the_next_run_goes_on(server: Server, tmp_path: Path):
    server.cut = {"t10k-images-idx3-ubyte.gz"}
    size = len(server.files["t10k-images-idx3-ubyte.gz"])
    assert f"cut after {size // 2} of {size} bytes" in message(load_data, "fashion-mnist", image_size=28)
    assert len(list((tmp_path / "cache/data/fashion-mnist").iterdir())) == 2
    server.cut = set()
    server.requests.clear()
    load_data("fashion-mnist", image_size=28)
    assert server.requests == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]


def test_a_damaged_file_in_the_cache_is_refused_with_its_name(server: Server, tmp_path: Path):
    load_data("fashion-mnist", image_size=28)
    path = tmp_path / "cache/data/fashion-mnist/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1])
    text = message(load_data, "fashion-mnist", image_size=28)
    assert text.startswith(f"{path}: its SHA-256 must be")
    assert "Remove the file" in text


def test_without_a_network_one_message_says_what_to_put_where(server: Server, tmp_path: Path):
    known = datasets.NAMED["fashion-mnist"]
    server.files = {}
    text = message(load_data, "fashion-mnist", image_size=28)
    assert "'fashion-mnist' is not on this machine" in text
    assert "404" in text
    assert f"put into {tmp_path / 'cache' / 'data' / 'fashion-mnist'}" in text
    assert all(file.url in text and file.sha256 in text for file in known.files)
    assert "apt install it" in text


def test_a_server_that_is_not_there_gives_the_same_message(server: Server, monkeypatch: pytest.MonkeyPatch):
    files = (datasets.PublishedFile("http://127.0.0.1:1/x.gz", "0" * 64),)
    monkeypatch.setitem(datasets.NAMED, "fashion-mnist", datasets.NamedDataSet(files, datasets.read_fashion_mnist))
    text = message(load_data, "fashion-mnist", image_size=28)
    assert "http://127.0.0.1:1/x.gz cannot be fetched" in text
    assert "refused" in text


def test_debians_files_are_used_before_anything_is_downloaded(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    packaged = tmp_path / "usr"
    packaged.mkdir()
    for name, body in server.files.items():
        (packaged / name).write_bytes(body)
    known = datasets.NamedDataSet((*datasets.NAMED["fashion-mnist"].files,), datasets.read_fashion_mnist, packaged)
    monkeypatch.setitem(datasets.NAMED, "fashion-mnist", known)
    assert len(load_data("fashion-mnist", image_size=28).test) == 20
    assert server.requests == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("damage", ["cut", "short", "type"])
def test_a_broken_idx_file_is_refused_with_its_name(tmp_path: Path, damage: str):
    whole = gzip.decompress(idx(np.arange(9)))
    body = {"cut": gzip.compress(whole)[:-9], "short": gzip.compress(whole[:-1])}.get(damage)
    (tmp_path / "x.gz").write_bytes(body or gzip.compress(b"\0\0\x0d" + whole[3:]))
    assert f"{tmp_path / 'x.gz'}: not a whole IDX file" in message(datasets.read_idx, tmp_path / "x.gz")


def test_cifar10_is_read_from_its_archive(tmp_path: Path):
    planes = np.arange(3 * 32 * 32).reshape(3, 32, 32).astype(np.uint8)
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, label in [(f"data_batch_{number}", number) for number in range(1, 6)] + [("test_batch", 7)]:
            body = (bytes([label]) + planes.tobytes()) * 2
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    found = datasets.read_cifar10(tmp_path)
    assert found.train.labels.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert found.test is not None
    assert found.test.labels.tolist() == [7, 7]
    assert np.array_equal(found.train.images.resized(np.array([3]), 32)[0], np.moveaxis(planes, 0, -1))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"no archive")
    assert "not the CIFAR-10 archive" in message(datasets.read_cifar10, tmp_path)


def test_eurosat_is_read_from_its_archive_with_folders_as_classes(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "EuroSAT.zip", "w") as archive:
        for name, shade in (("River", 90), ("Forest", 30)):
            archive.writestr(f"2750/{name}/", "")
            archive.writestr(f"2750/{name}/{name}_1.jpg", encoded(shade, "JPEG"))
    found = datasets.read_eurosat(tmp_path)
    assert found.classes == ("Forest", "River")
    assert found.train.labels.tolist() == [0, 1]
    assert found.train.images.resized(np.array([0, 1]), 12).shape == (2, 12, 12, 3)
    (tmp_path / "EuroSAT.zip").write_bytes(b"PK no archive")
    assert "not the EuroSAT archive" in message(datasets.read_eurosat, tmp_path)


def test_published_files_come_over_https_and_have_a_digest():
    for dataset in datasets.NAMED.values():
        for file in dataset.files:
            assert file.url.startswith("https://")
            assert len(bytes.fromhex(file.sha256)) == 32


# ---- what is not installed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["PIL", "pyarrow", "grain"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
):
    path = write_parquet(tmp_path / "set.parquet", [0, 1] * 8)
    monkeypatch.setitem(sys.modules, package, None)
    if package == "grain":
        monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 0)
    text = message(lambda: list(load_data(path, image_size=8).train.batches(2, seed=0)))
    assert f"'{package}'" in text
    assert "pip install 'hwnas[images]'" in text


# ---- on the device ---------------------------------------------------------------------------------------------------


def test_normalizing_gives_the_documented_values():
    pixels = np.array([[[[0, 51, 255]]]], np.uint8)
    assert np.allclose(data.normalize(pixels), [[[[-2.0, -1.2, 2.0]]]])
    assert np.allclose(data.normalize(pixels, (0.0, 0.2, 0.5), (1.0, 2.0, 0.1)), [[[[0.0, 0.0, 5.0]]]], atol=1e-6)


def test_augmentation_shifts_and_mirrors_and_does_nothing_else():
    import jax

    size, reach = 16, 2
    pixels = RNG.integers(1, 256, (64, size, size, 3), np.uint8)
    augmented = jax.jit(data.augment, static_argnames="flip")
    key = jax.random.key(1)
    out = np.asarray(augmented(key, pixels, flip=True))
    assert (out.shape, out.dtype) == (pixels.shape, np.float32)
    assert np.array_equal(out, augmented(key, pixels, flip=True))
    assert not np.array_equal(out, augmented(jax.random.key(2), pixels, flip=True))
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach), (0, 0)))

    def crop(image: np.ndarray, top: int, left: int) -> np.ndarray:
        return image[top : top + size, left : left + size]

    seen = set()
    for image, made in zip(padded, out, strict=True):
        matches = [
            (top, left, mirrored)
            for top in range(2 * reach + 1)
            for left in range(2 * reach + 1)
            for mirrored in (False, True)
            if np.allclose(made * 63.75, crop(image, top, left)[:, :: -1 if mirrored else 1] - 127.5, atol=0.01)
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert {mirrored for *_, mirrored in seen} == {False, True}
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(5))


def test_without_flip_no_image_is_mirrored():
    import jax

    ramp = np.broadcast_to(np.arange(100, 116, dtype=np.uint8)[None, None, :, None], (50, 16, 16, 3))
    out = np.asarray(data.augment(jax.random.key(0), ramp, flip=False))[:, 8, 4:12, 0]
    assert (np.diff(out) > 0).all()
