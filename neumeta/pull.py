"""`neumeta-pull`: one verified file on a device, or the file that was there before.

Knows when to try again; neither how an answer comes nor what makes a file whole, and no torch.
"""

from __future__ import annotations

import asyncio
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from neumeta import atomic
from neumeta.asking import backoff, client_for
from neumeta.failure import PullError
from neumeta.plan import DTYPES
from neumeta.record import beside, kept, read_record, target_of, turn, write_record
from neumeta.transfer import Retry, Transfer
from neumeta.whole import FORMATS, check_file

LONGEST_WAIT = 60.0
"""Seconds: a Retry-After beyond it is not waited out."""
LOCK_WAIT = 600.0
"""Seconds another pull of the same file is waited for."""


def pull(
    url: str,
    arch: str,
    out: str | Path,
    *,
    parameters: Mapping[str, str] | None = None,
    retries: int = 4,
    timeout: float = 30.0,
    token: str = "",
    progress: Callable[[int, int], None] | None = None,
    client: httpx.Client | None = None,
    sleep: Callable[[float], None] = time.sleep,
    lock_wait: float = LOCK_WAIT,
    waiting: Callable[[], None] = lambda: None,
) -> str:
    """Download the network of `arch` to `out`, whole and verified; returns the file's sha256.

    `parameters` are those of `GET /weights/{arch}`. A temporary file in the same folder is hashed
    while it streams; length, digest, header and shapes are checked, then it is synced and renamed
    over `out`, and the folder synced. The file is asked for at the address that names its content
    (`GET /plan/{arch}` tells it), which any cache may answer; what a cache gets wrong is asked for
    past it. A broken transfer is resumed by Range where the ETag still
    holds, also one that an earlier process left. Processes that pull to one `out` take turns: who
    finds it taken calls `waiting` and waits at most `lock_wait` seconds. A file that is whole and
    current is not pulled again. Where `out` is a symbolic link, what it names is replaced.
    Raises PullError, or OSError of the file system; `out` is then what it was before.
    """
    asked = dict(parameters or {})
    dtype, file_format = asked.get("dtype", "float32"), asked.get("format", FORMATS[0])
    for name, value, allowed in (("dtype", dtype, [*DTYPES]), ("format", file_format, [*FORMATS])):
        if value not in allowed:
            raise PullError(f"{name}: {value[:40]!r} is not one of {allowed}", refused=True)
    out = target_of(Path(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    source = [url, arch, sorted(asked.items())]
    http = client or client_for(url, timeout, token)
    try:
        with turn(out, lock_wait, waiting) as record:
            transfer = Transfer(out, http, arch, asked, source, record, progress)
            for attempt in range(retries + 1):
                try:
                    transfer.attempt()
                    break
                except httpx.UnsupportedProtocol as error:
                    raise PullError(f"{url}: {error}", refused=True) from None
                except (httpx.TransportError, Retry) as error:
                    after = error.after if isinstance(error, Retry) else 0.0
                    if attempt == retries or after > LONGEST_WAIT:
                        raise PullError(f"{url}: {error or type(error).__name__}") from None
                    sleep(after + backoff(attempt))
            if transfer.current:
                return transfer.current
            try:
                check_file(transfer.path, arch, dtype, file_format)
            except PullError:
                transfer.path.unlink()
                raise
            transfer.path.replace(out)
            atomic.sync_folder(out.parent)
            digest = transfer.hash.hexdigest()
            write_record(record, {"kept": source, "etag": transfer.etag, "sha256": digest})
            return digest
    finally:
        if client is None:
            http.close()


async def apull(url: str, arch: str, out: str | Path, **options: Any) -> str:
    """`pull` in a thread of its own, for an event loop. Cancelling stops the wait, not the pull."""
    return await asyncio.to_thread(pull, url, arch, out, **options)


def kept_whole(url: str, arch: str, out: Path, parameters: Mapping[str, str] | None = None) -> str:
    """The sha256 of the file at `out` if it is, unchanged, what an earlier pull of the same request
    put there; else an empty string. Asks no service."""
    source = [url, arch, sorted((parameters or {}).items())]
    try:
        out = target_of(out)
        return kept(out, read_record(beside(out, "pull")), source)
    except (OSError, PullError):
        return ""


class _Callable(types.ModuleType):
    """So that `neumeta.pull(...)` is `neumeta.pull.pull(...)`."""

    def __call__(self, *given: Any, **options: Any) -> str:
        return pull(*given, **options)


sys.modules[__name__].__class__ = _Callable
