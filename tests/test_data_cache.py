"""Decoded images: kept while nothing changed, made again when anything did, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.images import classes, encoded, pack, pixels, write
from training.data import load_from, pictures


@pytest.fixture(autouse=True)
def folder_of_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "not yet" / "cache"
    monkeypatch.setenv("NEUMETA_CACHE", str(folder))
    return folder


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were decoded, by place."""
    places: list[str] = []
    real = pictures.pixels

    def counted(raw: bytes, where: str, options: pictures.Options) -> object:
        places.append(where)
        return real(raw, where, options)

    monkeypatch.setattr(pictures, "pixels", counted)
    return places


CHANGES: dict[str, Callable[[Path], object]] = {
    "an image's pixels": lambda folder: (folder / "train/a/0.png").write_bytes(encoded(pixels(50))),
    "a test image's pixels": lambda folder: (folder / "test/b/1.png").write_bytes(
        encoded(pixels(51))
    ),
    "an image more": lambda folder: (folder / "test/b/2.png").write_bytes(encoded(pixels(52))),
    "an image less": lambda folder: (folder / "train/b/1.png").unlink(),
    "another label": lambda folder: (folder / "train/a/0.png").rename(folder / "train/b/5.png"),
    "another class": lambda folder: (
        (folder / "train/b").rename(folder / "train/c"),
        (folder / "test/b").rename(folder / "test/c"),
    ),
    "an image's time alone": lambda folder: os.utime(folder / "train/a/1.png", ns=(7, 7)),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_any_change_in_a_folder_is_read(
    tmp_path: Path, change: str, decoded: list[str], folder_of_cache: Path
) -> None:
    folder = write(tmp_path / "x", classes("a", "b"))
    top = folder.stat()
    first = load_from(str(folder))
    assert load_from(str(folder)).digest() == first.digest() and len(decoded) == 8
    CHANGES[change](folder)
    os.utime(folder, ns=(top.st_atime_ns, top.st_mtime_ns))  # the top folder shows nothing
    second = load_from(str(folder))
    assert len(decoded) > 8
    again = pack(tmp_path / "y.tar", {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*.png"))
    })  # fmt: skip
    fresh = load_from(str(again))
    assert (second.digest(), second.classes) == (fresh.digest(), fresh.classes)
    same = (second.digest(), second.classes) == (first.digest(), first.classes)
    assert same == (change == "an image's time alone")
    # What the folder was before is not kept for ever.
    assert len(list(folder_of_cache.glob("x-*"))) == 1


def test_what_is_no_data_may_change(tmp_path: Path, decoded: list[str]) -> None:
    folder = write(tmp_path / "x", classes("a", "b"))
    load_from(str(folder))
    write(folder, {".DS_Store": b"x", "train/a/.DS_Store": b"x"})
    load_from(str(folder))
    assert len(decoded) == 8


def test_a_changed_archive_is_read_again(tmp_path: Path, decoded: list[str]) -> None:
    path = pack(tmp_path / "x.zip", classes("a", "b"))
    first = load_from(str(path))
    assert load_from(str(path)).digest() == first.digest() and len(decoded) == 8
    pack(path, classes("a", "b") | {"train/a/0.png": encoded(pixels(50))})
    os.utime(path, ns=(9, 9))
    assert load_from(str(path)).digest() != first.digest()


def test_each_size_and_number_of_channels_is_kept_for_itself(
    tmp_path: Path, decoded: list[str]
) -> None:
    folder = write(tmp_path / "x", classes("a", "b"))
    for _ in range(2):
        shapes = [load_from(str(folder), size=4, channels=c).shape for c in (1, 3)]
        assert shapes == [(1, 4, 4), (3, 4, 4)] and load_from(str(folder)).shape == (3, 8, 8)
    assert len(decoded) == 3 * 8


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "folder"])
def test_a_damaged_copy_is_made_again(
    tmp_path: Path, damage: str, folder_of_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "x", classes("a", "b"))
    first = load_from(str(folder))
    (kept,) = folder_of_cache.glob("*.npz")
    raw = kept.read_bytes()
    at = raw.index(first.train_images[0].numpy().tobytes()[:32])
    kept.write_bytes(
        {
            "cut": raw[: len(raw) // 2],
            "flipped": raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :],
            "empty": b"",
            "text": b"hello",
            "folder": b"",
        }[damage]
    )
    if damage == "folder":
        kept.unlink()
        kept.mkdir()
    assert load_from(str(folder)).digest() == first.digest()
    assert f"{kept}: damaged, made again" in caplog.text
    if damage != "folder":
        caplog.clear()
        assert load_from(str(folder)).digest() == first.digest() and not caplog.text


@pytest.mark.parametrize("step", ["fsync", "replace", "savez"])
def test_a_write_that_fails_leaves_nothing_and_loses_nothing(
    tmp_path: Path,
    step: str,
    folder_of_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    target = {"fsync": "os.fsync", "replace": "pathlib.Path.replace", "savez": "numpy.savez"}[step]
    monkeypatch.setattr(target, full)
    folder = write(tmp_path / "x", classes("a", "b"))
    assert len(load_from(str(folder))) == 4
    assert list(folder_of_cache.iterdir()) == [] and "No space left" in caplog.text


def test_a_copy_is_synced_before_it_has_its_name_and_its_folder_after(
    tmp_path: Path, folder_of_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    load_from(str(write(tmp_path / "x", classes("a", "b"))))
    assert events[0].startswith(".x-") and events[1:] == ["rename", "cache"]


def test_a_cache_folder_that_cannot_be_made_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("NEUMETA_CACHE", str(tmp_path / "file"))
    assert len(load_from(str(write(tmp_path / "x", classes("a", "b"))))) == 4
    assert "not kept" in caplog.text
