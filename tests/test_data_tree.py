"""Folders and archives: whole and readable, or refused with the file's name."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.images import classes, encoded, pack, pixels, write
from training.data import DataMissing, load_from


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEUMETA_CACHE", str(tmp_path / "cache"))


def refused(place: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        load_from(str(place))
    assert str(place) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("end", [".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar", ".zip"])
def test_an_archive_cut_at_any_place_is_refused_never_read_as_fewer_images(
    tmp_path: Path, end: str
) -> None:
    whole = pack(tmp_path / f"whole{end}", classes("a", "b", each=3)).read_bytes()
    used = len(whole.rstrip(b"\0"))  # a .tar's last zeros may be fewer than usual
    for share in range(20):
        cut = tmp_path / f"cut{end}"
        cut.write_bytes(whole[: used * share // 20])
        refused(cut, "damaged, cut short or no such archive")


def test_a_tar_cut_between_two_files_is_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", classes("a", "b"))
    with tarfile.open(path) as archive:
        ends = [member.offset for member in archive][5:]
    whole = path.read_bytes()
    for end in ends:
        path.write_bytes(whole[:end])
        refused(path, "its end is missing")


@pytest.mark.parametrize("end", [".tar", ".tar.gz", ".tar.xz", ".tar.bz2", ".zip"])
def test_an_archive_with_a_changed_byte_is_refused_or_the_same(tmp_path: Path, end: str) -> None:
    files = classes("a", "b")
    path = pack(tmp_path / f"x{end}", files)
    good, whole = load_from(str(path)).digest(), path.read_bytes()
    refusals = 0
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        os.utime(path, (at, at))
        try:
            data = load_from(str(path))
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refusals += 1
        else:
            # A plain .tar has no checksum of contents: PNG's own is what vouches for pixels there.
            assert data.digest() == good or end == ".tar"
    assert refusals > 20


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    for end in (".tar.xz", ".tar.gz", ".tar", ".zip"):
        (tmp_path / f"page{end}").write_bytes(b"<html>404</html>")
        refused(tmp_path / f"page{end}", "damaged, cut short or no such archive")
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    refused(tmp_path / "x.rar", "a folder, an archive")


def test_a_link_in_a_tar_is_refused_by_name_not_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        entry = tarfile.TarInfo("train/a/0.png")
        entry.type, entry.linkname = tarfile.SYMTYPE, "1.png"
        archive.addfile(entry)
    refused(path, "x.tar: train/a/0.png is a link")


def test_a_name_written_twice_means_the_later_file(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", classes("a", "b"))
    with tarfile.open(path, "a") as archive:
        write(tmp_path, {"new.png": encoded(pixels(77))})
        archive.add(tmp_path / "new.png", "train/a/0.png")
    folder = write(tmp_path / "x", classes("a", "b") | {"train/a/0.png": encoded(pixels(77))})
    assert load_from(str(path)).digest() == load_from(str(folder)).digest()


@contextmanager
def someone_else() -> Iterator[Path]:
    """A folder that a user without privileges owns, while this process is that user."""
    if os.geteuid():
        with TemporaryDirectory() as folder:
            yield Path(folder)
        return
    with TemporaryDirectory() as folder:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("what", ["train/a/0.png", "train/a", "test", ""])
def test_what_may_not_be_read_is_named(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load_from("digits")  # what is imported late is imported as the user that owns it
    encoded(pixels(0))
    with someone_else() as top:
        monkeypatch.setenv("NEUMETA_CACHE", str(top / "cache"))
        folder = write(top / "x", classes("a", "b"))
        (folder / what).chmod(0)
        try:
            refused_at(folder, what, "permission denied")
        finally:
            (folder / what).chmod(0o755)
        path = pack(top / "y.tar.gz", classes("a", "b"))
        path.chmod(0)
        refused(path, "permission denied")


def refused_at(folder: Path, what: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as error:
        load_from(str(folder))
    assert str(folder / what) in str(error.value) and "\n" not in str(error.value)


def test_links_are_followed_and_bad_ones_are_named(tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "disk", classes("a", "b"))
    folder = tmp_path / "x"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / split).symlink_to(elsewhere / split)
    assert load_from(str(folder)).digest() == load_from(str(elsewhere)).digest()
    bad = elsewhere / "train/a/9.png"
    bad.symlink_to("nowhere.png")
    refused_at(folder, "train/a/9.png", "no such file")
    bad.unlink()
    bad.symlink_to("9.png")
    refused_at(folder, "train/a/9.png", "too many levels")
    bad.unlink()
    bad.symlink_to(elsewhere)
    refused_at(folder, "train/a/9.png", "a link that leads back")
    bad.unlink()
    os.mkfifo(bad)  # to open it would wait for ever
    refused_at(folder, "train/a/9.png", "not a regular file")


def test_data_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        DataMissing, match=f"'photos' is not under {tmp_path}: a folder, an archive"
    ):
        load_from("photos", tmp_path)
    pack(tmp_path / "photos.tar.gz", classes("a", "b"))
    assert load_from("photos", tmp_path).classes == ("a", "b")
