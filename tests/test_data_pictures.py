"""Class folders, folders with masks and images alone: served right, or refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.images import classes, encoded, pack, pixels, write
from training.data import Dataset, load, load_from


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUMETA_CACHE", str(tmp_path / "cache"))


def found(folder: Path, **more: object) -> Dataset:
    data = load_from(str(folder), **more)  # type: ignore[arg-type]
    assert isinstance(data, Dataset)
    return data


@pytest.mark.parametrize("count", [2, 3, 11])
def test_classes_are_the_folders_names_and_as_many_as_there_are(tmp_path: Path, count: int) -> None:
    names = [f"k{number}" for number in range(count)]
    data = load("cifar10", write(tmp_path, classes(*names, each=1, top="cifar10/")))
    assert data.classes == tuple(sorted(names))  # k10 before k2, as torchvision sorts them
    assert data.train_labels.tolist() == data.test_labels.tolist() == list(range(count))


def test_every_image_has_the_label_of_its_own_folder(tmp_path: Path) -> None:
    files = classes("b-2", "b", "A", "ä b", each=3)
    data = found(write(tmp_path / "x", files))
    assert data.classes == ("A", "b", "b-2", "ä b")
    by_pixels = {
        np.asarray(Image.open(tmp_path / "x" / name)).tobytes(): name.split("/")[1]
        for name in files
    }
    for images, labels in (
        (data.train_images, data.train_labels),
        (data.test_images, data.test_labels),
    ):
        for image, label in zip(images, labels.tolist(), strict=True):
            raw = image.permute(1, 2, 0).contiguous().numpy().tobytes()
            assert by_pixels[raw] == data.classes[label]


@pytest.mark.parametrize("end", [".JPG", ".jpeg", ".JPEG", ".Png", ".bmp", ".webp", ".TIF"])
def test_images_of_any_usual_suffix_in_any_case_are_read(tmp_path: Path, end: str) -> None:
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF"}.get(end.lower(), end[1:].upper())
    files = classes("a", "b") | {f"train/a/deeper/9{end}": encoded(pixels(99), kind)}
    assert found(write(tmp_path / "x", files)).train_labels.tolist() == [0, 0, 0, 1, 1]


def test_a_class_without_test_images_keeps_its_label_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = classes("a", "b", "c")
    for number in range(2):
        del files[f"test/b/{number}.png"]
    data = found(write(tmp_path / "x", files | {"test/b/": b""}))
    assert data.classes == ("a", "b", "c") and data.test_labels.tolist() == [0, 0, 2, 2]
    assert "no test images of b" in caplog.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "less", "named"),
    [
        ({"train/aa/": b""}, "", "train/aa: a class folder without images"),
        ({"train/aa/notes.txt": b"x"}, "", "train/aa: a class folder without images"),
        ({"test/z/0.png": encoded(pixels(0))}, "", "test/z: a class without training images"),
        ({"train/0.png": encoded(pixels(0))}, "", "train/0.png: lies in no class folder"),
        ({}, "/b/", "train: two class folders or more are needed, but only a/"),
        ({}, "test/", "no folder test .nor val"),
        ({"test/a/": b""}, "test/", "test: no test images"),
        ({}, "train/", "no folder train there, but test"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, more: dict[str, bytes], less: str, named: str, stream: bool
) -> None:
    files = {name: raw for name, raw in classes("a", "b").items() if not less or less not in name}
    folder = write(tmp_path / "x", files | more)
    with pytest.raises(ValueError, match=named) as error:
        load_from(str(folder), stream=stream, size=8)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_folders_without_train_are_refused_with_what_is_there(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", {"cat/0.png": encoded(pixels(0)), "dog/0.png": b""})
    with pytest.raises(ValueError, match=r"no folder train/ there, but cat, dog: expected"):
        load_from(str(folder))
    with pytest.raises(ValueError, match="no images"):
        load_from(str(write(tmp_path / "y", {"README.md": b"nothing"})))


@pytest.mark.parametrize("test", ["val", "valid", "validation"])
def test_val_stands_for_test_where_there_is_no_test_and_that_is_said_each_time(
    tmp_path: Path, test: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "x", classes("a", "b", test=test))
    for _ in range(2):  # the second time from the decoded copy
        caplog.clear()
        assert found(folder).test_labels.tolist() == [0, 0, 1, 1]
        assert f"{test}/ is used as the test images" in caplog.text
    write(folder, {f"test/{name}/7.png": encoded(pixels(7)) for name in "ab"})
    caplog.clear()
    assert found(folder).test_labels.tolist() == [0, 1] and not caplog.text


JUNK = {
    ".DS_Store": b"\0\0\0\1Bud1",
    "train/.DS_Store": b"\0\0\0\1Bud1",
    "train/a/._0.png": b"\0\5\26\7",
    "train/a/Thumbs.db": b"x",
    "train/.ipynb_checkpoints/0.png": b"x",
    "__MACOSX/train/a/._0.png": b"\0\5\26\7",
    "__MACOSX/._train": b"\0\5\26\7",
}


@pytest.mark.parametrize("end", ["", ".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar", ".zip"])
@pytest.mark.parametrize("top", ["", "deep/er/"])
def test_what_systems_leave_behind_is_no_data(tmp_path: Path, end: str, top: str) -> None:
    clean = found(write(tmp_path / "clean", classes("a", "b")))
    files = classes("a", "b", top=top) | {f"{top}{name}": raw for name, raw in JUNK.items()}
    files |= {"README.md": b"about"} if top else {}
    place = tmp_path / f"x{end}"
    data = found(pack(place, files) if end else write(place, files))
    assert data.digest() == clean.digest() and data.classes == ("a", "b")


def test_other_files_in_a_class_folder_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = classes("a", "b") | {"train/a/list.txt": b"x", "train/b/photo.heic": b"x"}
    assert len(found(write(tmp_path / "x", files))) == 4
    assert "a/list.txt: left out, it is no image (and 1 more)" in caplog.text


def broken() -> dict[str, bytes]:
    whole = encoded(pixels(0))
    return {
        "truncated": whole[:-40],
        "empty": b"",
        "no image": b"<html>not found</html>",
        "flipped": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "jpeg cut": encoded(pixels(0, 64, 64), "JPEG")[:-300],
        "only a head": whole[:20],
        "16 bit": encoded(pixels(0, channels=1).astype(np.uint16) * 256),
        "other size": encoded(pixels(0, 9, 8)),
    }


@pytest.mark.parametrize("end", ["", ".tar.gz", ".zip"])
@pytest.mark.parametrize("how", list(broken()))
def test_an_image_that_cannot_be_used_is_named(tmp_path: Path, how: str, end: str) -> None:
    files = classes("a", "b") | {"test/b/bad.png": broken()[how]}
    place = tmp_path / f"x{end}"
    place = pack(place, files) if end else write(place, files)
    with pytest.raises(ValueError, match="test/b/bad.png") as error:
        load_from(str(place))
    assert str(place) in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))


def test_images_of_several_sizes_are_one_data_set_at_the_size_asked_for(tmp_path: Path) -> None:
    files = classes("a", "b") | {"train/a/wide.png": encoded(pixels(1, 10, 40))}
    folder = write(tmp_path / "x", files)
    with pytest.raises(ValueError, match=r"wide.png: 40x10 pixels .* is 8x8 .* give `size`"):
        load_from(str(folder))
    data = found(folder, size=(6, 5))
    assert data.shape == (3, 6, 5) and len(data) == 5


def test_an_image_is_resized_to_cover_the_size_and_its_middle_is_kept(tmp_path: Path) -> None:
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = (10, 200, 30)
    files = classes("a", "b") | {"train/a/0.png": encoded(image)}
    data = found(write(tmp_path / "x", files), size=8)
    colour = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1)
    assert torch.equal(data.train_images[0], colour.expand(3, 8, 8))


def test_grey_images_have_one_channel_and_three_among_coloured_ones(tmp_path: Path) -> None:
    grey = {
        f"{split}/{name}/0.png": encoded(pixels(seed, channels=1))
        for seed, (split, name) in enumerate((s, n) for s in ("train", "test") for n in "ab")
    }
    folder = write(tmp_path / "x", grey)
    data = found(folder)
    assert data.shape == (1, 8, 8) and len(data.mean) == 1
    assert torch.equal(data.train_images[0, 0], torch.from_numpy(pixels(0, channels=1)))
    three = found(folder, channels=3)
    assert torch.equal(three.train_images, data.train_images.expand(-1, 3, -1, -1))
    write(folder, {"test/b/1.png": encoded(pixels(9))})
    mixed = found(folder)
    assert torch.equal(mixed.train_images, three.train_images)
    assert torch.equal(mixed.test_images[2], torch.from_numpy(pixels(9)).permute(2, 0, 1))
    assert found(folder, channels=1).shape == (1, 8, 8)


def test_mean_and_std_are_those_of_the_training_images_unless_given(tmp_path: Path) -> None:
    data = found(write(tmp_path / "x", classes("a", "b", each=5)))
    values = data.train_images.double() / 255
    assert np.allclose(data.mean, values.mean((0, 2, 3)), atol=6e-5)
    assert np.allclose(data.std, values.std((0, 2, 3), correction=0), atol=6e-5)
    data = found(tmp_path / "x", mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    assert (data.mean, data.std) == ([0.1, 0.2, 0.3], [1.0, 2.0, 3.0])
    half = found(tmp_path / "x", mean=[0.1, 0.2, 0.3])
    assert half.mean == [0.1, 0.2, 0.3] and np.allclose(
        half.std, values.std((0, 2, 3), correction=0), atol=6e-5
    )


def test_given_classes_are_the_folders_in_the_order_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", classes("a", "b", "c", each=1))
    data = found(folder, classes=["c", "a", "b"])
    assert data.classes == ("c", "a", "b") and sorted(data.train_labels.tolist()) == [0, 1, 2]
    assert data.train_labels.tolist() == [1, 2, 0]
    for wrong in (["a", "b"], ["a", "b", "d"], 4):
        with pytest.raises(ValueError, match="x/train.*classes"):
            load_from(str(folder), classes=wrong)


def pairs(test: str = "test") -> dict[str, bytes]:
    files = {}
    for number, split in enumerate(("train", "train", test)):
        mask = np.random.default_rng(number).integers(0, 3, (6, 8), dtype=np.uint8)
        mask[0, 0] = 11
        files[f"{split}/n{number}.jpg"] = encoded(pixels(number, 6, 8), "JPEG")
        files[f"{split}annot/n{number}.png"] = encoded(mask)
    return files


@pytest.mark.parametrize("end", ["", ".tar.xz", ".zip"])
def test_masks_are_read_beside_their_images(tmp_path: Path, end: str) -> None:
    place = tmp_path / f"seg{end}"
    place = pack(place, pairs()) if end else write(place, pairs())
    data = found(place, ignore=11)
    assert data.targets == "masks" and data.classes == ("0", "1", "2")
    assert data.train_labels.shape == (2, 6, 8) and data.train_images.shape == (2, 3, 6, 8)
    for number in range(2):
        mask = np.random.default_rng(number).integers(0, 3, (6, 8), dtype=np.uint8)
        mask[0, 0] = 11
        assert np.array_equal(data.train_labels[number].numpy(), mask)
    _, y = data.batch(torch.tensor([0]), torch.Generator(), augment=False)
    assert int(y[0, 0, 0]) == -100 and int((y == -100).sum()) == 1
    assert found(place, ignore=11, classes=["sky", "road", "car"]).classes == ("sky", "road", "car")
    small = found(place, ignore=11, size=(3, 4))
    assert small.train_labels.shape == (2, 3, 4) and set(small.train_labels.unique().tolist()) <= {
        0, 1, 2, 11,
    }  # nearest: no values between classes  # fmt: skip


@pytest.mark.parametrize(
    ("name", "raw", "named"),
    [
        ("trainannot/n0.png", None, "train/n0.jpg: no mask of this name in trainannot/"),
        (
            "testannot/n9.png",
            encoded(pixels(0, 6, 8, 1)),
            "testannot/n9.png: no image of this name",
        ),
        ("trainannot/n1.png", encoded(pixels(0, 6, 7, 1)), "n1.png: a mask of 7x6 .* is 8x6"),
        ("trainannot/n1.png", encoded(pixels(0, 6, 8)), "n1.png: a mask of mode RGB"),
        ("testannot/n2.png", encoded(np.full((6, 8), 7, np.uint8)), "n2.png: class 7 in this mask"),
        (
            "testannot/n2.png",
            encoded(pixels(0, 6, 8, 1))[:-30],
            "testannot/n2.png: a damaged image",
        ),
    ],
)
def test_masks_that_do_not_fit_are_named(
    tmp_path: Path, name: str, raw: bytes | None, named: str
) -> None:
    files = pairs() | {name: raw or b""}
    if raw is None:
        del files[name]
    with pytest.raises(ValueError, match=named):
        load_from(str(write(tmp_path / "seg", files)), ignore=11, classes=3)


def test_images_alone_are_a_data_set_without_classes_a_tenth_kept_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {f"faces/{number:02}.png": encoded(pixels(number)) for number in range(20)}
    data = found(pack(tmp_path / "lfw.tar.xz", files | {"README.md": b"about"}))
    assert (data.classes, data.targets, data.name) == ((), "nothing", "lfw")
    assert len(data) == 18 and len(data.test_images) == 2 and "2 of 20 images" in caplog.text
    both = torch.cat((data.train_images, data.test_images)).flatten(1)
    assert len(both.unique(dim=0)) == 20  # none is lost, none in both
    again = found(write(tmp_path / "lfw", files))
    assert again.digest() == data.digest()
    with pytest.raises(ValueError, match="two images or more"):
        load_from(str(write(tmp_path / "one", {"0.png": encoded(pixels(0))})))
