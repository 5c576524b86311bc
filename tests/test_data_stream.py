"""Images read when they are needed, by workers; and a user's own torch Datasets."""

from __future__ import annotations

import textwrap
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.images import classes, encoded, pixels, write
from training.data import Stream, load_from
from training.data.stream import part

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def stream(folder: Path, **more: object) -> Stream:
    found = load_from(str(folder), stream=True, **more)  # type: ignore[arg-type]
    assert isinstance(found, Stream)
    return found


def photos(folder: Path) -> Path:
    """Three classes of images of many sizes, each of one colour: a part shows which image it is."""
    files = {}
    for number in range(18):
        size = (20 + 3 * number, 50 - number, 3)
        image = np.full(size, (number * 10, 255 - number * 10, number), np.uint8)
        split = "train" if number < 12 else "val"
        files[f"{split}/n{number % 3}/i{number}.JPEG"] = encoded(image, "PNG")
    return write(folder, files)


def numbers(x: torch.Tensor, data: Stream) -> list[int]:
    values = x * torch.tensor(data.std).view(-1, 1, 1) + torch.tensor(data.mean).view(-1, 1, 1)
    assert torch.allclose(values, values[:, :, :1, :1].expand_as(values), atol=1e-5)
    return (values[:, 2, 0, 0] * 255).round().int().tolist()


def test_a_stream_has_the_images_labels_and_classes_of_its_folders(tmp_path: Path) -> None:
    data = stream(photos(tmp_path / "net"), size=(16, 24), workers=0)
    assert (len(data), data.shape, data.targets) == (12, (3, 16, 24), "classes")
    assert data.classes == ("n0", "n1", "n2") and data.name == "net"
    for augment in (False, True):
        x, y = data.batch(torch.arange(12), torch.Generator().manual_seed(0), augment)
        assert x.shape == (12, 3, 16, 24) and x.dtype == torch.float32
        assert [number % 3 for number in numbers(x, data)] == y.tolist()
        assert sorted(numbers(x, data)) == list(range(12))
    found = list(data.test_batches(4))
    assert [len(x) for x, _ in found] == [4, 2]
    assert sorted(number for x, _ in found for number in numbers(x, data)) == list(range(12, 18))
    x = torch.cat([data.batch(torch.arange(12), torch.Generator(), False)[0]])
    assert x.mean((0, 2, 3)).abs().max() < 5e-3 and (x.std((0, 2, 3)) - 1).abs().max() < 0.05
    given = [0.1, 0.2, 0.3]  # one of them: the other is measured
    half = stream(tmp_path / "net", size=(16, 24), workers=0, mean=given)
    assert (half.mean, half.std) == (given, data.std)
    half = stream(tmp_path / "net", size=(16, 24), workers=0, std=given)
    assert (half.mean, half.std) == (data.mean, given)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_however_many_workers_read(tmp_path: Path, workers: int) -> None:
    files = classes("a", "b", each=4, size=(20, 30))
    alone = stream(write(tmp_path / "x", files), size=8, flips=True, workers=0)
    data = stream(tmp_path / "x", size=8, flips=True, workers=workers)
    plan = [(torch.tensor([7, 1, 1]), 5), (torch.tensor([0]), 5), (torch.tensor([2, 3]), 6)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = list(data.batches(plan))
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from the global one
    for (rows, seed), (x, y) in zip(plan, found, strict=True):
        expected = alone.batch(rows, torch.Generator().manual_seed(seed))
        assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    assert not torch.equal(found[0][0][1], found[0][0][2])  # one image twice: two parts of it


def test_without_augmentation_the_middle_is_shown_as_torchvision_shows_it(tmp_path: Path) -> None:
    image = pixels(3, 64, 96)
    files = classes("a", "b", size=(40, 40)) | {"train/a/0.png": encoded(image)}
    data = stream(write(tmp_path / "x", files), size=28, workers=0, mean=[0.0] * 3, std=[1.0] * 3)
    x, _ = data.batch(torch.tensor([0]), torch.Generator(), augment=False)
    small = Image.fromarray(image).resize((48, 32), Image.Resampling.BILINEAR)  # 256/224 of 28
    middle = np.asarray(small)[2:30, 10:38].transpose(2, 0, 1)
    assert np.array_equal((x[0] * 255).round().numpy(), middle)


def test_mirroring_follows_flips(tmp_path: Path) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :, 0] = np.arange(32) * 8  # brighter to the right
    files = classes("a", "b", size=(32, 32)) | {"train/a/0.png": encoded(image)}
    folder = write(tmp_path / "x", files)
    for flips, least, most in ((False, 0, 0), (True, 20, 80)):
        data = stream(folder, size=8, flips=flips, workers=0)
        x, _ = data.batch(torch.zeros(100).long(), torch.Generator().manual_seed(0))
        turned = int((x[:, 0, 4, 0] > x[:, 0, 4, 7]).sum())
        assert least <= turned <= most


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 10**6))
def test_a_part_lies_inside_and_is_neither_small_nor_narrow(
    width: int, height: int, seed: int
) -> None:
    draws = torch.rand(23, generator=torch.Generator().manual_seed(seed)).tolist()
    left, top, right, bottom = part(width, height, draws)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    if min(width, height) >= 30 and max(width, height) <= 2 * min(width, height):
        assert 0.7 < w / h < 1.45 and w * h >= 0.06 * width * height


def test_where_no_part_fits_the_middle_is_taken_as_narrow_as_a_part_may_be() -> None:
    draws = [1.0, 0.5] * 11 + [0.5]  # the whole area as a square, ten times
    assert part(300, 30, draws) == (130, 0, 170, 30)
    assert part(30, 300, draws) == (0, 130, 30, 170)


def test_parts_are_of_all_places_and_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    boxes = torch.tensor(
        [part(100, 100, torch.rand(23, generator=generator).tolist()) for _ in range(500)]
    )
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 1e4
    assert float(areas.min()) < 0.12 and float(areas.max()) > 0.9
    assert (
        abs(float(areas.float().mean()) - 0.5) < 0.06
    )  # uniform in 0.08..1, large ones less often
    middle = boxes.float().view(-1, 2, 2).mean(1)
    assert (middle.mean(0) - 50).abs().max() < 3 and float(middle.min()) < 25


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_one_line_with_its_name_from_workers_too(
    tmp_path: Path, workers: int
) -> None:
    files = classes("a", "b", each=3) | {"test/b/1.png": encoded(pixels(0))[:-30]}
    folder = write(tmp_path / "x", files)
    data = stream(folder, size=8, workers=workers)
    with pytest.raises(ValueError, match="test/b/1.png: a damaged image") as error:
        list(data.test_batches(2))
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)
    (folder / "train/a/1.png").unlink()  # after it was listed
    with pytest.raises(ValueError, match="train/a/1.png: no such file"):
        list(data.batches([(torch.arange(6), 0)]))


def test_what_cannot_be_streamed_is_refused(tmp_path: Path) -> None:
    images = write(tmp_path / "x", {f"{i}.png": encoded(pixels(i)) for i in range(3)})
    with pytest.raises(ValueError, match="only class folders can be streamed, .* 'images'"):
        load_from(str(images), stream=True)
    (tmp_path / "y.zip").write_bytes(b"")
    with pytest.raises(ValueError, match="y.zip: only a folder can be streamed: unpack it"):
        load_from(str(tmp_path / "y.zip"), stream=True)


def test_the_digest_follows_names_sizes_and_labels_but_not_the_place(tmp_path: Path) -> None:
    one = stream(write(tmp_path / "x", classes("a", "b")), size=8)
    assert stream(write(tmp_path / "y", classes("a", "b")), size=8).digest() == one.digest()
    other = stream(write(tmp_path / "z", classes("a", "c")), size=8)
    (tmp_path / "y/train/a/0.png").write_bytes(encoded(pixels(1, 9, 9)))
    assert len({one.digest(), other.digest(), stream(tmp_path / "y", size=8).digest()}) == 3


def test_memory_stays_flat_as_the_folder_grows(tmp_path: Path) -> None:
    def peak(folder: Path, each: int) -> int:
        raw = encoded(pixels(0, 200, 200))
        files = {
            f"{split}/{name}/{i}.png": raw
            for split, count in (("train", each), ("test", 1))
            for name in "ab"
            for i in range(count)
        }
        data = stream(write(folder, files), size=32, workers=0)
        tracemalloc.start()
        for _ in data.batches([(torch.tensor([i, i + 1]), i) for i in range(0, 2 * each, 2)]):
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(tmp_path / "small", 4), peak(tmp_path / "large", 60)
    assert large < small + 200_000  # 112 images more would be 344 kB at 32x32, 13 MB as they are


MINE = """
    import torch
    from torch.utils.data import Dataset

    class Mine(Dataset):
        classes = ("x", "y", "z")

        def __init__(self, count, bad=False):
            self.count, self.bad = count, bad

        def __len__(self):
            return self.count

        def __getitem__(self, row):
            if self.bad and row == 1:
                raise RuntimeError("two\\nlines")
            noise = torch.rand(1, 4, 6) * 0.1
            return noise + row / 20, row % 3

    def build():
        return Mine(9), Mine(5)

    def failing():
        return Mine(9), Mine(5, bad=True)

    def normalised():
        return [(torch.randn(3, 4, 4), 0)] * 4, [(torch.randn(3, 4, 4), 1)] * 4

    def masks():
        one = (torch.full((3, 4, 4), 7, dtype=torch.uint8), torch.full((4, 4), 255))
        return [one] * 3, [one]

    def bare():
        return [torch.rand(1, 4, 4)] * 3, [torch.rand(1, 4, 4)]

    def uneven():
        return [torch.rand(1, 4, 4), torch.rand(1, 5, 4)], [torch.rand(1, 4, 4)]

    def wrong():
        return [(torch.rand(2, 4, 4), 0)], [(torch.rand(1, 4, 4), 0)]

    def empty():
        return [], []

    def one():
        return Mine(9)

    def label():
        return [(torch.rand(1, 4, 4), 5)] * 3, [(torch.rand(1, 4, 4), 0)]

    def crash():
        raise KeyError("gone")
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(MINE))
    return str(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_users_datasets_are_a_stream(mine: str, workers: int) -> None:
    data = load_from(f"{mine}:build", workers=workers)
    assert isinstance(data, Stream)
    assert (len(data), data.shape, data.classes) == (9, (1, 4, 6), ("x", "y", "z"))
    plan = [(torch.tensor([4, 8]), 3)]
    ((x, y),) = data.batches(plan)
    ((again, _),) = load_from(f"{mine}:build", workers=0).batches(plan)
    assert torch.equal(x, again) and y.tolist() == [1, 2]
    raw = x * data.std[0] + data.mean[0]
    assert float(raw[0].min()) >= 0.2 and float(raw[0].max()) <= 0.3 + 1e-6
    assert torch.cat([y for _, y in data.test_batches(2)]).tolist() == [0, 1, 2, 0, 1]
    other = load_from(f"{mine}:build", workers=0, mean=[0.5])
    assert data.digest() == other.digest()
    assert (other.mean, other.std) == ([0.5], data.std)
    other = load_from(f"{mine}:build", workers=0, std=[0.5])
    assert (other.mean, other.std) == (data.mean, [0.5])


def test_a_users_module_is_found_by_its_name(
    tmp_path: Path, mine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    assert len(load_from("mine:build", workers=0)) == 9


def test_a_users_masks_and_images_alone(mine: str) -> None:
    data = load_from(
        f"{mine}:masks", classes=2, ignore=255, workers=0, mean=[0.0] * 3, std=[1.0] * 3
    )
    x, y = data.batch(torch.tensor([0]), torch.Generator())
    assert data.targets == "masks" and y.unique().tolist() == [-100]
    assert torch.allclose(x, torch.tensor(7 / 255))
    assert load_from(f"{mine}:bare", workers=0).targets == "nothing"
    free = load_from(f"{mine}:normalised", classes=2, workers=0, mean=[0.0] * 3, std=[1.0] * 3)
    assert float(next(free.test_batches())[0].min()) < 0  # with mean and std given, any values


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("nothing", "AttributeError"),
        ("normalised", "item 0: values .* but 0..1 is expected"),
        ("masks", "how many classes"),
        ("uneven", r"item 1: shape \(1, 5, 4\), but others are \(1, 4, 4\)"),
        ("wrong", r"item 0: shape \(2, 4, 4\)"),
        ("empty", "0 training and 0 test images"),
        ("one", "two torch Datasets: TypeError: it returned Mine"),
        ("crash", "KeyError: 'gone'"),
        ("failing", "item 1: RuntimeError: two lines"),
        ("label", "how many classes"),
    ],
)
def test_a_users_faults_are_named_in_one_line(mine: str, function: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        load_from(f"{mine}:{function}", workers=0)
    assert f"{mine}:{function}" in str(error.value) and "\n" not in str(error.value)


def test_a_users_label_beyond_the_classes_and_missing_code_are_named(mine: str) -> None:
    data = load_from(f"{mine}:label", classes=3, workers=0)
    with pytest.raises(ValueError, match="a label 5, but classes are 0..2"):
        data.batch(torch.tensor([0]), torch.Generator())
    for name in ("no/such.py:build", "no_such_module:build"):
        with pytest.raises(ValueError, match=f"{name}: (FileNotFound|ModuleNotFound)Error"):
            load_from(name)
