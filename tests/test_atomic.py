"""A file is there whole or not at all, and nothing that is no file is ever replaced."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from neumeta import atomic


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_other(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(error), atomic.writing(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_text() == "old" and names(tmp_path) == {"a"}


def test_the_file_is_synced_before_it_has_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen, real = tmp_path / "a", [], os.fsync

    def fsync(descriptor: int) -> None:
        found = Path(f"/proc/self/fd/{descriptor}").resolve()
        seen.append(("folder" if found == tmp_path.resolve() else "file", path.exists()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic.write(path, "new")
    assert seen == [("file", False), ("folder", True)] and path.read_text() == "new"


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (Path.mkdir, "folder"),
        (fifo, "FIFO"),
        (bound, "socket"),
        (lambda path: path.symlink_to("/dev/null"), "device"),
        (lambda path: path.symlink_to(path), "levels of symbolic links"),
    ],
)
def test_what_is_no_file_is_refused_and_stays(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    path = tmp_path / "x"
    make(path)
    before = path.lstat().st_mode
    for use in (atomic.check, lambda path: atomic.write(path, b"new")):
        with pytest.raises((atomic.BadTarget, OSError), match=kind) as told:
            use(path)
        assert str(path) in str(told.value)
    assert path.lstat().st_mode == before and names(tmp_path) == {"x"}
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_symlink_stays_and_its_target_is_replaced(tmp_path: Path, dangling: bool) -> None:
    link, held = tmp_path / "link", tmp_path / "deep" / "held"
    held.parent.mkdir()
    if not dangling:
        held.write_text("old")
    link.symlink_to(held)
    atomic.check(link)
    atomic.write(link, "new")
    assert link.is_symlink() and held.read_text() == "new" and not held.is_symlink()
    assert names(tmp_path) == {"link", "deep"} and names(held.parent) == {"held"}


def test_permissions_and_long_names_are_kept(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 255)
    atomic.write(path, "old")
    path.chmod(0o640)
    atomic.write(path, "new")
    assert path.stat().st_mode & 0o777 == 0o640 and path.read_text() == "new"


def test_a_check_says_which_folder_cannot_hold_it_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    atomic.check(tmp_path / "new" / "folders" / "a")
    for path, named in (
        (tmp_path / "file" / "a", "is a file"),
        (tmp_path / "file" / "b" / "a", "is a file"),
        (Path("/proc/nowhere/a"), "/proc"),
    ):
        with pytest.raises(atomic.BadTarget, match=named):
            atomic.check(path)
    assert names(tmp_path) == {"file"}
