"""The readers of real data sets, on small files in exactly the published formats."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import data


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUMETA_CACHE", str(tmp_path / "cache"))


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    return out.getvalue()


PLACES = [
    f"cifar10/{split}/{label}/{number}.png"
    for split in ("train", "test")
    for label in ("airplane", "automobile")
    for number in range(2)
]


def check_images(found: data.Dataset) -> None:
    assert found.train_labels.tolist() == found.test_labels.tolist() == [0, 0, 1, 1]
    images = torch.cat((found.train_images, found.test_images))
    for seed, image in enumerate(images):
        assert torch.equal(image, torch.from_numpy(pixels(seed)).permute(2, 0, 1))


def test_a_folder_of_images_and_an_archive_of_it_are_the_same_data_set(tmp_path: Path) -> None:
    folder, packed = tmp_path / "folder", tmp_path / "packed"
    packed.mkdir()
    with tarfile.open(packed / "cifar10.tar.xz", "w:xz") as archive:
        for seed, place in enumerate(PLACES):
            raw = png(pixels(seed))
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
            (folder / place).write_bytes(raw)
            entry = tarfile.TarInfo(f"./{place}")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    for root in (folder, packed):
        check_images(data.load("cifar10", root))
        check_images(data.load("cifar10", root))  # and once more, from the decoded copy
    assert data.load("cifar10", folder).digest() == data.load("cifar10", packed).digest()


def test_the_official_cifar_batches(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        rows = pixels(number).transpose(2, 0, 1).reshape(1, 3072)
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"labels": [number]}))
    found = data.load("cifar10", tmp_path)
    assert found.train_labels.tolist() == [0, 1, 2, 3, 4] and found.test_labels.tolist() == [5]
    assert torch.equal(found.test_images[0], torch.from_numpy(pixels(5)).permute(2, 0, 1))


def idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def test_idx_files(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        idx(tmp_path / f"mnist/{part}-images-idx3-ubyte.gz", images)
        idx(tmp_path / f"mnist/{part}-labels-idx1-ubyte.gz", np.array([7, 1, 3], np.uint8))
    found = data.load("mnist", tmp_path)
    assert torch.equal(found.train_images[:, 0], torch.from_numpy(images))
    assert found.test_labels.tolist() == [7, 1, 3]
    # A file that is cut short is refused by name, not read as fewer images.
    whole = gzip.decompress((tmp_path / "mnist/t10k-images-idx3-ubyte.gz").read_bytes())
    (tmp_path / "mnist/t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(whole[:-5]))
    with pytest.raises(ValueError, match="t10k-images"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_a_missing_data_set_is_one_sentence_with_where_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(data.DataMissing) as error:
        data.load(name, tmp_path)
    assert str(tmp_path) in str(error.value) and data.WHERE[name] in str(error.value)
    with pytest.raises(ValueError, match="imagenet"):
        data.load("imagenet", tmp_path)


def test_digits_need_no_download_and_do_not_leak() -> None:
    found = data.load("digits", Path("/nowhere"))
    assert (len(found.train_labels), len(found.test_labels)) == (1297, 500)
    assert found.digest() == data.load("digits").digest()
