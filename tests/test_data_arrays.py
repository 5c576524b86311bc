"""Arrays that are data sets already: .npz files, CIFAR's official batches, IDX files."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.images import pack, pixels
from training.data import DataMissing, load, load_from


def npz(path: Path, **more: Any) -> Path:
    held: dict[str, Any] = {
        "train_images": np.stack([pixels(i, 6, 5) for i in range(4)]),
        "train_labels": np.array([0, 1, 2, 0]),
        "test_images": np.stack([pixels(i, 6, 5) for i in range(4, 6)]),
        "test_labels": np.array([2, 1], np.uint8),
    }
    held |= more
    np.savez(path, **{name: value for name, value in held.items() if value is not None})
    return path


def test_arrays_of_every_layout_are_the_same_images(tmp_path: Path) -> None:
    last = load_from(str(npz(tmp_path / "last.npz")))
    first = {
        f"{split}_images": np.stack([pixels(i, 6, 5) for i in rows]).transpose(0, 3, 1, 2)
        for split, rows in (("train", range(4)), ("test", range(4, 6)))
    }
    other = load_from(str(npz(tmp_path / "first.npz", **first)))
    assert last.shape == (3, 6, 5) and last.classes == ("0", "1", "2") and last.name == "last"
    assert last.digest() == other.digest()
    grey = {name: image[:, 0] for name, image in first.items()}
    one = load_from(str(npz(tmp_path / "grey.npz", **grey)))
    assert one.shape == (1, 6, 5)
    x, y = next(one.test_batches(2))
    assert torch.allclose(
        x[0, 0], (torch.from_numpy(grey["test_images"][0]) / 255 - one.mean[0]) / one.std[0]
    )
    assert y.tolist() == [2, 1]


def test_arrays_may_be_masks_or_have_no_labels_or_name_their_classes(tmp_path: Path) -> None:
    masks = {"train_labels": np.full((4, 6, 5), 255), "test_labels": np.zeros((2, 6, 5), int)}
    masks["train_labels"][0, 0, 0] = 1
    data = load_from(str(npz(tmp_path / "m.npz", **masks)), ignore=255)
    assert data.targets == "masks" and data.classes == ("0", "1")
    small = load_from(str(tmp_path / "m.npz"), ignore=255, size=(3, 5), channels=1)
    _, y = small.batch(torch.tensor([1]), torch.Generator(), augment=False)
    assert small.shape == (1, 3, 5) and y.shape == (1, 3, 5) and int(y.max()) == -100
    none = load_from(str(npz(tmp_path / "n.npz", train_labels=None, test_labels=None)))
    assert none.targets == "nothing" and none.classes == ()
    names = np.array(["cat", "dog", "owl", "never"])
    assert load_from(str(npz(tmp_path / "c.npz", classes=names))).classes == tuple(names.tolist())
    assert load_from(str(tmp_path / "c.npz"), classes=["x", "y", "z"]).classes == ("x", "y", "z")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"train_images": None}, "no array train_images, but test_images, test_labels"),
        ({"test_images": None}, "no array test_images"),
        ({"train_images": np.zeros((4, 6, 5, 2), np.uint8)}, r"train_images: .*\(4, 6, 5, 2\)"),
        ({"train_images": np.zeros((4, 6, 5, 3))}, "train_images: .* not float64"),
        ({"test_images": np.zeros((2, 7, 5, 3), np.uint8)}, "training and test arrays differ"),
        ({"train_labels": np.zeros(3, int)}, r"train_labels: .* not int64 \(3,\)"),
        ({"train_labels": np.zeros(4)}, "train_labels: .* not float64"),
        ({"train_labels": np.array([0, 1, 2, -1])}, "train_labels: -1..2, but classes are 0..2"),
        ({"train_labels": np.array(["a", "b", "c", "d"])}, "train_labels: integers"),
        ({"train_labels": np.array([{}, 1, 2, 3], object)}, "damaged, or no .npz of plain arrays"),
        ({"classes": np.array(["cat", "dog"])}, "train_labels: 0..2, but classes are 0..1"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, more: Any, named: str) -> None:
    path = npz(tmp_path / "x.npz", **more)
    with pytest.raises(ValueError, match=named) as error:
        load_from(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_damaged_npz_is_refused_by_name(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz")
    whole = path.read_bytes()
    for raw in (whole[:-50], whole[:10], b"", b"text", whole[:300] + b"\1" + whole[301:]):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match="x.npz: damaged"):
            load_from(str(path))


def cifar100(**more: Any) -> dict[str, bytes]:
    def batch(seed: int, labels: list[int]) -> bytes:
        rows = np.stack([pixels(seed + i, 32, 32).transpose(2, 0, 1).reshape(-1) for i in range(3)])
        return pickle.dumps({b"data": rows, b"fine_labels": labels}, protocol=2)

    names = [f"c{number:02}".encode() for number in range(100)]
    files = {
        "train": batch(0, [99, 0, 50]),
        "test": batch(3, [1, 1, 2]),
        "meta": pickle.dumps({b"fine_label_names": names}, protocol=2),
    }
    return {f"cifar-100-python/{name}": raw for name, raw in (files | more).items()}


def test_the_official_cifar100_as_a_folder_and_as_its_archive(tmp_path: Path) -> None:
    pack(tmp_path / "cifar-100-python.tar.gz", cifar100())
    data = load("cifar100", tmp_path)
    assert len(data.classes) == 100 and data.classes[99] == "c99"
    assert data.train_labels.tolist() == [99, 0, 50] and data.test_labels.tolist() == [1, 1, 2]
    assert torch.equal(data.test_images[0], torch.from_numpy(pixels(3, 32, 32)).permute(2, 0, 1))
    assert (data.flips, data.pad, data.mean[0]) == (True, 4, 0.485)
    with pytest.raises(DataMissing, match="cifar100' is not under"):
        load("cifar100", tmp_path / "nowhere")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code from a data file ran",))


@pytest.mark.parametrize(
    ("name", "raw", "named"),
    [
        ("train", b"\x80\x02}q\x00", "train: a damaged batch"),
        ("train", b"", "train: a damaged batch"),
        ("train", pickle.dumps(Evil()), "train: a damaged batch.*calls builtins.print"),
        ("test", pickle.dumps([1, 2]), "test: no official CIFAR batch"),
        ("test", pickle.dumps({b"data": np.zeros((2, 5), np.uint8)}), "test: no official CIFAR"),
        ("meta", pickle.dumps({}), "meta: no names"),
    ],
)
def test_a_batch_that_is_damaged_or_calls_code_is_refused_by_name(
    tmp_path: Path, name: str, raw: bytes, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = pack(tmp_path / "cifar-100-python.tar.gz", cifar100(**{name: raw}))
    with pytest.raises(ValueError, match=named) as error:
        load_from(str(path))
    assert "\n" not in str(error.value) and "ran" not in capsys.readouterr().out


def idx(values: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    return header + values.tobytes()


def mnist(count: int = 3, labels: int | None = None) -> dict[str, bytes]:
    files = {}
    for part in ("train", "t10k"):
        images = np.stack([pixels(i, 5, 4, 1) for i in range(count)])
        files[f"{part}-images-idx3-ubyte"] = idx(images)
        values = np.arange(count if labels is None else labels, dtype=np.uint8)
        files[f"{part}-labels-idx1-ubyte"] = idx(values)
    return files


def test_idx_files_of_any_size_compressed_or_not_with_names_given(tmp_path: Path) -> None:
    pack(tmp_path / "fashion.zip", mnist())
    data = load_from("fashion", tmp_path, classes=["coat", "bag", "shirt", "boot"])
    assert data.shape == (1, 5, 4) and data.classes == ("coat", "bag", "shirt", "boot")
    dots = {
        name.replace("-idx", ".idx") + ".gz": gzip.compress(raw) for name, raw in mnist().items()
    }
    pack(tmp_path / "dots.tar", dots)
    assert load_from("dots", tmp_path).digest() == data.digest()
    with pytest.raises(ValueError, match="3 classes there, but 2 were given"):
        load_from("fashion", tmp_path, classes=["coat", "bag"])


def test_idx_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for files, named in (
        (mnist(labels=2), "train: images .* and labels .* do not fit"),
        (
            mnist() | {"t10k-images-idx3-ubyte": b"\0\0\10\3\xff\xff\xff\xff"},
            "t10k-images.*cut short",
        ),
        (
            mnist() | {"t10k-images-idx3-ubyte": b"\0\0\10\1" + b"\xff" * 4},
            "t10k-images.*cut short",
        ),
        (mnist() | {"train-labels-idx1-ubyte": b"\x1f\x8b\x08"}, "train-labels.*damaged"),
        (mnist() | {"train-labels-idx1-ubyte": b""}, "train-labels.*not an IDX file"),
    ):
        with pytest.raises(ValueError, match=named):
            load_from(str(pack(tmp_path / "x.zip", files)))
    some = mnist()
    del some["t10k-labels-idx1-ubyte"]
    with pytest.raises(DataMissing, match="t10k-labels-idx1-ubyte.gz: this file is missing"):
        load_from(str(pack(tmp_path / "x.zip", some)))


def test_known_data_keeps_its_constants_in_another_size_and_number_of_channels() -> None:
    data = load_from("digits", size=(12, 10), channels=3)
    assert data.shape == (3, 12, 10) and data.mean == [0.3053] * 3 and data.std == [0.3765] * 3
    plain = load_from("digits", size=8, channels=1)
    assert plain.digest() == load("digits").digest()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "clases"}, "kind: 'clases' is not one of classes"),
        ({"size": 0}, "size: 0"),
        ({"size": (8, -1)}, r"size: \(8, -1\)"),
        ({"channels": 2}, "channels: 2 is not 1 or 3"),
        ({"mean": [0.1, 0.2]}, "mean: 2 values, but images have 1 channels"),
        ({"mean": [float("nan")]}, "mean: .*finite"),
        ({"std": [0.0]}, "std: .*above 0"),
        ({"pad": -1}, "pad: -1"),
        ({"workers": -1}, "workers: -1"),
        ({"classes": 0}, "classes: 0"),
        ({"classes": ["a", "a"]}, "classes: .*differ"),
        ({"stream": True}, "only class folders can be streamed"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        load_from("digits", **options)
    with pytest.raises(ValueError, match="name"):
        load_from("")
