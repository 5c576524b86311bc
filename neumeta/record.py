"""What is kept beside a pulled file: its lock, what is incomplete, and what both are about.

Knows no service and no format.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from neumeta.failure import PullError


def target_of(out: Path) -> Path:
    """The regular file that a pull to `out` writes; a symbolic link stays and what it names is
    replaced. Raises PullError for anything else that is there, before anything is asked for."""
    target = Path(os.path.realpath(out))
    if target.is_symlink():
        raise PullError(f"{out}: its symbolic links lead back to themselves", refused=True)
    if target.is_dir():
        raise PullError(f"{out} is a folder; name a file in it", refused=True)
    if target.exists() and not target.is_file():
        raise PullError(f"{out} is no regular file and is left alone", refused=True)
    return target


def beside(out: Path, what: str) -> Path:
    """The hidden file beside `out` that is kept for this."""
    return out.with_name(f".{out.name}.{what}")


@contextmanager
def turn(out: Path, lock_wait: float, waiting: Callable[[], None]) -> Iterator[Path]:
    """The record beside `out`, and the right to write it, the incomplete file and `out`. The lock
    ends with its process; its file stays, so that all who wait wait for the same one. A record that
    would be empty is removed, with what it is about. Raises PullError if it is held for too long."""
    record, incomplete = beside(out, "pull"), beside(out, "incomplete")
    lock = FileLock(beside(out, "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        try:
            lock.acquire(timeout=lock_wait)
        except Timeout:
            raise PullError(f"{out}: another pull has held it for {lock_wait:g} seconds") from None
    try:
        yield record
    finally:
        state = read_record(record)
        if not (incomplete.exists() and state.get("incomplete")):
            incomplete.unlink(missing_ok=True)
            if not state.get("kept"):
                record.unlink(missing_ok=True)
        lock.release()


def read_record(record: Path) -> dict[str, Any]:
    """What `write_record` wrote, or nothing."""
    try:
        state = json.loads(record.read_bytes()[: 1 << 16])
    except (FileNotFoundError, ValueError):  # or its writer was killed: nothing is known
        return {}
    return state if isinstance(state, dict) else {}


def write_record(record: Path, state: dict[str, Any]) -> None:
    """Keep a JSON object, synced; one that is cut short is read as nothing."""
    with record.open("wb") as file:
        file.write(json.dumps(state).encode())
        file.flush()
        os.fsync(file.fileno())


def matches(given: object, source: list[Any]) -> bool:
    """Whether what a record says of its source is this one."""
    return bool(given == json.loads(json.dumps(source)))


def kept(out: Path, state: dict[str, Any], source: list[Any]) -> str:
    """The sha256 of `out` if its record says that it came from this source and has it still, else an
    empty string."""
    if not matches(state.get("kept"), source) or not out.is_file():
        return ""
    digest = hashed(out)[0].hexdigest()
    return digest if digest == state.get("sha256") else ""


def hashed(path: Path) -> tuple[hashlib._Hash, int]:
    """The sha256 of a file, ready for more, and its size."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return digest, size
