"""A file that is written whole or not at all. Knows no format and needs no torch.

What is written lies under a temporary name beside its target, is synced, and then takes the target's
name; on any failure the temporary is gone and the target is what it was.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


class BadTarget(ValueError):
    """A place where no file can be written; the message names it and says why."""


def target(path: Path) -> Path:
    """The file that writing to `path` replaces: `path`, or what it points to if it is a symlink.

    So a link stays a link, and what it points to is replaced in its own folder.

    Raises BadTarget if something else than a regular file is there: a folder, device, FIFO, socket.
    """
    found = Path(os.path.realpath(path))
    try:
        mode = found.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return found
    except OSError as error:
        raise BadTarget(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise BadTarget(f"{path}: is {kind}; it must be a file, or not exist yet")
    return found


def check(path: Path) -> None:
    """Raises BadTarget unless `path` can be written: for use before any work. Leaves nothing."""
    folder = target(path).parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise BadTarget(f"{path}: {folder} is a file and can hold none")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadTarget(f"{path}: nothing can be written in {folder}: {error.strerror}") from None


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A binary file to write what shall stand at `path`, once the block ends without an exception.

    Folders above it are made; the permissions of a file that is replaced are kept. Raises BadTarget
    (see `target`) and OSError with the path in it.
    """
    at = target(path)
    try:
        at.parent.mkdir(parents=True, exist_ok=True)
        # Not made of the target's own name, which may be as long as names can be.
        temporary = at.with_name(f".neumeta-{secrets.token_hex(8)}.part")
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if at.exists():
                temporary.chmod(stat.S_IMODE(at.stat().st_mode))
            temporary.replace(at)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(at.parent)
    except OSError as error:
        if error.errno is not None and error.filename2 is None:
            error.filename = str(path)
        raise


def write(path: Path, raw: bytes | memoryview | str) -> None:
    """Write these bytes, or this text as UTF-8, whole or not at all. Raises as `writing` does."""
    with writing(path) as file:
        file.write(raw.encode() if isinstance(raw, str) else raw)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last: what was renamed there survives a power cut."""
    if os.name == "nt":  # there a folder cannot be opened, and its entries need no sync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
