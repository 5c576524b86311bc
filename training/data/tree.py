"""The files of a folder or of an archive of it, by name: read, never unpacked to disk.

Knows no images. What systems leave behind (`.DS_Store`, `__MACOSX`, thumbnails) is not there.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ARCHIVES = (".tar.xz", ".tar.gz", ".tgz", ".tar.bz2", ".tar", ".zip")
JUNK = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "lost+found"})
# What reading a damaged archive may raise, by library.
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    NotImplementedError,  # a compression that zipfile does not know
    RuntimeError,  # an encrypted zip
    OSError,
    ValueError,
)


@dataclass
class Tree:
    """Names below `top`, '/' between their parts, sorted part by part (class by class).

    `folders` are all folders, the empty ones too. `held` is what an archive's files contain.
    """

    where: Path
    names: list[str]
    folders: set[str]
    top: str = ""
    held: dict[str, bytes] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def at(self, name: str) -> str:
        """The place of a file or folder, for a message: the archive's name comes first."""
        inside = f"{self.top}{name}".rstrip("/")
        if self.where.is_dir():
            return str(self.where / inside)
        return f"{self.where}: {inside}" if inside else str(self.where)

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises ValueError with its name if they cannot be read."""
        if self.held:
            return self.held[f"{self.top}{name}"]
        with refused(self.at(name)):
            return (self.where / f"{self.top}{name}").read_bytes()

    def below(self, top: str) -> Tree:
        """The same files as seen from the folder `top` (ends in '/')."""
        names = [name.removeprefix(top) for name in self.names if name.startswith(top)]
        folders = {name.removeprefix(top) for name in self.folders if name.startswith(top)}
        sizes = {name: self.sizes[f"{top}{name}"] for name in names}
        return Tree(self.where, names, folders - {""}, self.top + top, self.held, sizes)

    def heads(self) -> set[str]:
        """The names of the folders at the top."""
        nested = {name.split("/", 1)[0] for name in self.names if "/" in name}
        return nested | {name.split("/", 1)[0] for name in self.folders}


@contextmanager
def refused(where: str) -> Iterator[None]:
    """An operating system's error becomes a ValueError that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{where}: {(error.strerror or str(error)).lower()}") from None


def junk(name: str) -> bool:
    """Whether this name of a file or folder is no data: hidden, or left behind by a system."""
    return name.startswith(".") or name in JUNK


def open_tree(where: Path) -> tuple[Tree, str]:
    """The tree of a folder, with a digest of every file's name, size and time of change.

    Only names are read. Raises ValueError with the file's or folder's name.
    """
    found: list[tuple[list[str], os.stat_result]] = []
    folders: set[str] = set()

    def walk(folder: str, parts: list[str], above: frozenset[tuple[int, int]]) -> None:
        with refused(folder):
            here = os.stat(folder)
            identity = (here.st_dev, here.st_ino)
            if identity in above:
                raise ValueError(f"{folder}: a link that leads back to a folder above it")
            with os.scandir(folder) as entries:
                inside = [entry for entry in entries if not junk(entry.name)]
        for entry in inside:
            inner = [*parts, entry.name]
            with refused(entry.path):
                is_folder = entry.is_dir()
            if is_folder:
                folders.add("/".join(inner))
                walk(entry.path, inner, above | {identity})
                continue
            with refused(entry.path):
                about = entry.stat()
            if not stat.S_ISREG(about.st_mode):
                raise ValueError(f"{entry.path}: not a regular file")
            found.append((inner, about))

    walk(str(where), [], frozenset())
    found.sort(key=lambda each: each[0])
    sha = hashlib.sha256()
    names, sizes = [], {}
    for parts, about in found:
        name = "/".join(parts)
        names.append(name)
        sizes[name] = about.st_size
        sha.update(os.fsencode(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0"))
    for name in sorted(folders):
        sha.update(os.fsencode(f"{name}/\0"))
    return Tree(where, names, folders, sizes=sizes), sha.hexdigest()


def read_archive(where: Path) -> Tree:
    """The tree of a .tar (.xz, .gz, .bz2) or .zip file, all of it in memory.

    Raises ValueError with the archive's name if it is damaged, cut short or no archive.
    """
    files: dict[tuple[str, ...], bytes] = {}
    folders: set[str] = set()
    try:
        with where.open("rb") as raw:
            members = _zipped(raw) if where.suffix.lower() == ".zip" else _tarred(where, raw)
            for name, content in members:
                parts = tuple(part for part in name.split("/") if part not in ("", "."))
                if not parts or any(junk(part) for part in parts):
                    continue
                if content is None:
                    folders.add("/".join(parts))
                else:
                    files[parts] = content
    except LookupError as error:
        raise ValueError(f"{where}: {error}") from None
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ValueError(f"{where}: {(error.strerror or str(error)).lower()}") from None
        raise ValueError(f"{where}: damaged, cut short or no such archive: {error}") from None
    for parts in files:
        folders.update("/".join(parts[:depth]) for depth in range(1, len(parts)))
    ordered = sorted(files)
    held = {"/".join(parts): files[parts] for parts in ordered}
    return Tree(
        where, list(held), folders, held=held, sizes={name: len(raw) for name, raw in held.items()}
    )


def _zipped(raw: io.BufferedReader) -> Iterator[tuple[str, bytes | None]]:
    with zipfile.ZipFile(raw) as archive:
        for member in archive.infolist():
            name = member.filename.replace("\\", "/")  # some programs on Windows write these
            yield name, None if member.is_dir() else archive.read(member)


class _Counted:
    """Reads on, and knows how much was read and where the last byte was that is not zero."""

    def __init__(self, source: io.BufferedIOBase) -> None:
        self.source, self.total, self.last = source, 0, 0

    def read(self, size: int = -1) -> bytes:
        chunk = self.source.read(size)
        used = len(chunk.rstrip(b"\0"))
        if used:
            self.last = self.total + used
        self.total += len(chunk)
        return chunk


def _tarred(where: Path, raw: io.BufferedReader) -> Iterator[tuple[str, bytes | None]]:
    # Decompressed here, so that the compression's own checksum is read to its end.
    suffix = where.suffix.lower()
    source: io.BufferedIOBase = raw
    if suffix == ".xz":
        source = lzma.LZMAFile(raw)  # noqa: SIM115 - closed with `raw`
    elif suffix in (".gz", ".tgz"):
        source = gzip.GzipFile(fileobj=raw)  # noqa: SIM115 - as this is
    elif suffix == ".bz2":
        source = bz2.BZ2File(raw)
    counted = _Counted(source)
    with tarfile.open(fileobj=counted, mode="r|") as archive:  # type: ignore[call-overload]
        for member in archive:
            if member.isfile():
                file = archive.extractfile(member)
                assert file is not None
                yield member.name, file.read()
            elif member.isdir():
                yield member.name, None
            else:
                raise LookupError(f"{member.name} is a link or a device: pack the file itself")
        end = archive.offset
    while counted.read(1 << 20):
        pass
    # tarfile stops in silence at a header that it cannot read, and at a cut between two files: only
    # zeros may follow, and there must be some.
    if counted.last > end or counted.total < end + tarfile.BLOCKSIZE:
        raise ValueError("its end is missing")
