"""`neumeta-pull`: one verified file on a device, or the file that was there before.

Needs httpx, the axis tables and the wire format; knows neither torch nor the service's code.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import httpx

from neumeta.family import FAMILIES, shape

RETRIED = {408, 429, 500, 502, 503, 504}
ITEM = {"F32": 4, "F16": 2, "BF16": 2}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LONGEST_WAIT = 60.0
"""Seconds: a Retry-After beyond it is not waited out."""


class PullError(RuntimeError):
    """The file could not be had; one sentence says why. The last good file is untouched.

    `refused`: the service understood and said no, so that asking again is no use.
    """

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused


def pull(
    url: str,
    arch: str,
    out: Path,
    *,
    parameters: Mapping[str, str] | None = None,
    retries: int = 4,
    timeout: float = 30.0,
    token: str = "",
    progress: Callable[[int, int], None] | None = None,
    client: httpx.Client | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Download the weights of `arch` to `out`, whole and verified; returns their sha256.

    `parameters` are those of `GET /weights/{arch}`. A temporary file in the same folder is hashed
    while it streams; length, digest, header and shapes are checked, then it is synced and renamed
    over `out`, and the folder synced. A broken transfer is resumed by Range where the ETag still
    holds, also one that an earlier process left. Processes that pull to one `out` take turns; a
    file that is whole and current is not pulled again.
    Raises PullError, or OSError of the file system; `out` is then what it was before.
    """
    asked = dict(parameters or {})
    dtype = DTYPES.get(asked.get("dtype", "float32"))
    if dtype is None:
        raise PullError(
            f"dtype: {asked['dtype'][:40]!r} is not one of {list(DTYPES)}", refused=True
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    source = [url, arch, sorted(asked.items())]
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    http = client or httpx.Client(base_url=url, timeout=timeout, headers=headers)
    try:
        with _turn(out) as record:
            transfer = _Transfer(out, http, arch, asked, source, record, progress)
            for attempt in range(retries + 1):
                try:
                    transfer.attempt()
                    break
                except httpx.UnsupportedProtocol as error:
                    raise PullError(f"{url}: {error}", refused=True) from None
                except (httpx.TransportError, _Retry) as error:
                    after = error.after if isinstance(error, _Retry) else 0.0
                    if attempt == retries or after > LONGEST_WAIT:
                        raise PullError(f"{url}: {error or type(error).__name__}") from None
                    # Full jitter, so that a fleet that lost its server does not return as one.
                    sleep(after + random.uniform(0, min(10.0, 0.25 * 2**attempt)))  # noqa: S311
            if transfer.current:
                return transfer.current
            try:
                check_file(transfer.path, arch, dtype)
            except PullError:
                transfer.path.unlink()
                raise
            transfer.path.replace(out)
            _sync_folder(out.parent)
            digest = transfer.hash.hexdigest()
            _write(record, {"kept": source, "etag": transfer.etag, "sha256": digest})
            return digest
    finally:
        if client is None:
            http.close()


async def apull(url: str, arch: str, out: Path, **options: Any) -> str:
    """`pull` in a thread of its own, for an event loop. Cancelling stops the wait, not the pull."""
    return await asyncio.to_thread(pull, url, arch, out, **options)


def kept_whole(url: str, arch: str, out: Path, parameters: Mapping[str, str] | None = None) -> str:
    """The sha256 of the file at `out` if it is, unchanged, what an earlier pull of the same request
    put there; else an empty string. Asks no service."""
    source = [url, arch, sorted((parameters or {}).items())]
    try:
        with _beside(out, "pull").open("rb") as record:
            return _kept(out, _read(record), source)
    except OSError:
        return ""


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f".{out.name}.{what}")


@contextmanager
def _turn(out: Path) -> Iterator[IO[bytes]]:
    """The record beside `out`, locked: who holds it may write the incomplete file and `out`. The
    lock ends with its process. A record that would be empty is removed, with what it is about."""
    path = _beside(out, "pull")
    while True:
        with path.open("a+b") as record:
            fcntl.flock(record, fcntl.LOCK_EX)
            try:
                ours = path.stat().st_ino == os.fstat(record.fileno()).st_ino
            except FileNotFoundError:
                ours = False
            if not ours:  # its last holder removed it while we waited: lock the present one
                continue
            try:
                yield record
            finally:
                incomplete = _beside(out, "incomplete")
                state = _read(record)
                if not (incomplete.exists() and state.get("incomplete")):
                    incomplete.unlink(missing_ok=True)
                    if not state.get("kept"):
                        path.unlink()
            return


def _read(record: IO[bytes]) -> dict[str, Any]:
    record.seek(0)
    try:
        state = json.loads(record.read(1 << 16))
    except ValueError:  # its writer was killed: nothing is known
        return {}
    return state if isinstance(state, dict) else {}


def _write(record: IO[bytes], state: dict[str, Any]) -> None:
    record.truncate(0)
    record.write(json.dumps(state).encode())
    record.flush()
    os.fsync(record.fileno())


def _same(given: object, source: list[Any]) -> bool:
    return bool(given == json.loads(json.dumps(source)))


def _kept(out: Path, state: dict[str, Any], source: list[Any]) -> str:
    if not _same(state.get("kept"), source) or not out.is_file():
        return ""
    with out.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest if digest == state.get("sha256") else ""


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Retry(Exception):
    """This attempt failed in a way that another may not; `after` are the seconds to wait first."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class _Transfer:
    """What has arrived so far: bytes on disk, their hash, and the ETag they belong to."""

    def __init__(
        self,
        out: Path,
        http: httpx.Client,
        arch: str,
        asked: dict[str, str],
        source: list[Any],
        record: IO[bytes],
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.path, self.http, self.arch, self.asked = _beside(out, "incomplete"), http, arch, asked
        self.source, self.record, self.progress = source, record, progress
        state = _read(record)
        self.size, self.total, self.etag, self.promised = 0, -1, "", ""
        self.hash, self.inherited, self.current = hashlib.sha256(), False, ""
        self.good = _kept(out, state, source)
        self.good_etag = str(state.get("etag", "")) if self.good else ""
        self.kept = {key: state[key] for key in ("kept", "etag", "sha256")} if self.good else {}
        if _same(state.get("incomplete"), source) and self.path.is_file():
            self._inherit(str(state.get("incomplete_etag", "")))
        else:
            self._restart()

    def _inherit(self, etag: str) -> None:
        """Go on where a process that was killed stopped."""
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 20):
                self.hash.update(chunk)
                self.size += len(chunk)
        self.etag, self.inherited = etag, True

    def _restart(self) -> None:
        self.size, self.total, self.etag, self.promised = 0, -1, "", ""
        self.hash, self.inherited = hashlib.sha256(), False
        self.path.unlink(missing_ok=True)

    def attempt(self) -> None:
        """One try to have the file complete and verified. Raises _Retry or PullError."""
        if self.size != self.total:
            self._fetch()
        if self.current:
            return
        # A cold answer starts before its digest is known; by now it is.
        promised = self.promised or self._asked_digest()
        arrived = f"sha-256=:{base64.b64encode(self.hash.digest()).decode()}:"
        if promised and promised != arrived:
            self._restart()
            raise _Retry("the bytes that arrived do not have the digest the service states")
        if not promised:
            if self.inherited:
                self._restart()  # a power cut may have left holes, and nothing here would show them
            raise _Retry("no digest vouches for what arrived")

    def _fetch(self) -> None:
        headers = {"Accept-Encoding": "identity"}
        if self.size and self.etag:
            headers |= {"Range": f"bytes={self.size}-", "If-Range": self.etag}
        elif self.good_etag:
            headers["If-None-Match"] = self.good_etag
        with self._request("GET", headers) as answer:
            etag = answer.headers.get("etag", "")
            if answer.status_code == 304 and "If-None-Match" in headers:
                self.current = self.good
                return
            if answer.status_code in (200, 416):
                self._restart()
            start, total = _extent(answer)
            if answer.status_code == 206 and (start, etag) != (self.size, self.etag):
                self._restart()
                raise _Retry("the service answered another range than was asked for")
            self.etag, self.total = etag, total
            self.promised = answer.headers.get("repr-digest", "")
            if shutil.disk_usage(self.path.parent).free < total - self.size:
                raise PullError(f"{self.path.parent}: no space for {total} bytes")
            if etag:  # without one nothing can be resumed
                note = {"incomplete": self.source, "incomplete_etag": etag}
                _write(self.record, self.kept | note)
            with self.path.open("ab") as file:
                try:
                    for chunk in answer.iter_raw():
                        file.write(chunk)
                        self.hash.update(chunk)
                        self.size += len(chunk)
                        if self.progress:
                            self.progress(self.size, self.total)
                finally:
                    file.flush()
                    os.fsync(file.fileno())
        if self.size != self.total:
            why = f"{self.size} of {self.total} bytes arrived"
            if self.size > self.total:
                self._restart()
            raise _Retry(why)

    def _request(self, method: str, headers: dict[str, str]) -> Any:
        path = f"/weights/{quote(self.arch, safe='')}"
        return self.http.stream(method, path, params=self.asked, headers=headers)

    def _asked_digest(self) -> str:
        if told := self._told_digest():
            return told
        # Another replica answered, which never had the file: its last byte makes it have it.
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={self.total - 1}-"}
        with self._request("GET", headers | {"If-Range": self.etag}) as answer:
            if answer.status_code == 206:
                answer.read()
        return self._told_digest()

    def _told_digest(self) -> str:
        with self._request("HEAD", {"Accept-Encoding": "identity"}) as answer:
            same = self.etag and answer.headers.get("etag", "") == self.etag
            return str(answer.headers.get("repr-digest", "")) if same else ""


def _extent(answer: httpx.Response) -> tuple[int, int]:
    """Where the answer's bytes start and how long the whole file is; raises where it says no."""
    status, headers = answer.status_code, answer.headers
    if status in RETRIED:
        after = headers.get("retry-after", "")
        raise _Retry(f"status {status}", float(after) if after.isdecimal() else 0.0)
    if status == 416:
        raise _Retry("the file has become shorter")
    if status not in (200, 206):
        raise PullError(_reason(answer), refused=400 <= status < 500)
    if headers.get("content-encoding", "identity") != "identity":
        raise _Retry(f"the answer is compressed ({headers['content-encoding'][:20]})")
    try:
        if status == 200:
            return 0, int(headers["content-length"])
        extent, _, total = headers["content-range"].removeprefix("bytes ").partition("/")
        return int(extent.partition("-")[0]), int(total)
    except (KeyError, ValueError):
        raise _Retry("the answer does not state its length") from None


def _reason(answer: httpx.Response) -> str:
    answer.read()
    try:
        return f"status {answer.status_code}: {str(answer.json()['detail'])[:300]}"
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def check_file(path: Path, arch: str, dtype: str) -> None:
    """Raise PullError unless this is a whole file of this architecture's family and this dtype:
    the tensors of the family's table, at the sizes the header states, one after the other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        count = int.from_bytes(file.read(8), "little")
        if size < 8 or count > size - 8:
            raise PullError("what arrived is no safetensors file")
        try:
            end, wrong = _laid_out(json.loads(file.read(count)), arch, dtype)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise PullError("what arrived has a broken header") from None
    if wrong:
        raise PullError(f"what arrived is not what was asked for: {wrong}")
    if 8 + count + end != size:
        raise PullError("what arrived does not have the length its header states")


def _laid_out(header: dict[str, Any], arch: str, dtype: str) -> tuple[int, str]:
    """How many bytes of tensors a header lays out, and what is wrong with it, if anything."""
    about = json.loads(header.pop("__metadata__")["neumeta"])
    family = FAMILIES[about["family"]]
    depth = tuple(int(blocks) for blocks in about["depth"])
    if arch not in family.architectures:
        return 0, f"the family is {family.name}"
    if len(depth) != len(family.architectures[arch]) or max(depth, default=0) > family.max_blocks:
        return 0, "the depth is impossible"
    offset = 0
    for tensor in sorted(family.tensors(depth), key=lambda tensor: tensor.name):
        entry, wanted = header.pop(tensor.name), list(shape(tensor, about["sizes"]))
        end = offset + math.prod(wanted) * ITEM[dtype]
        if entry["dtype"] != dtype or entry["shape"] != wanted:
            given = f"{entry['dtype']} {entry['shape']}"[:80]
            return 0, f"{tensor.name} is {given}, not {dtype} {wanted}"
        if entry["data_offsets"] != [offset, end]:
            return 0, f"{tensor.name} is not where its shape puts it"
        offset = end
    return offset, f"there is a tensor {ascii(next(iter(header)))[:60]}" if header else ""


class _Bar:
    """A line on a terminal that says how far the transfer is."""

    def __init__(self) -> None:
        self.shown = -1

    def __call__(self, size: int, total: int) -> None:
        percent = 100 * size // max(1, total)
        if percent != self.shown:
            self.shown = percent
            end = "\n" if size == total else ""
            sys.stderr.write(f"\r[{'#' * (percent // 4):<25}] {percent:3d} % of {total} bytes{end}")
            sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: 0 pulled; else, where there is a file at `--out`, 1: it is still the
    last good one; without a file 2: refused (the command line, or by the service), 3: not reached.
    With --offline-ok a file that is still whole is enough, where the service cannot be reached: 0.
    """
    parser = argparse.ArgumentParser(
        prog="neumeta-pull", description="Download the weights of one architecture, verified."
    )
    parser.add_argument("--arch", required=True, help="a served architecture, e.g. resnet20")
    parser.add_argument("--width", help="a factor, or one per stage separated by commas")
    parser.add_argument("--depth", help="blocks per stage, separated by commas")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--samples", help="K, how many noisy samples are averaged")
    parser.add_argument("--seed", help="the seed of their noise")
    parser.add_argument("--extrapolate", action="store_true", help="allow untrained sizes")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    default = os.environ.get("NEUMETA_URL", "http://127.0.0.1:8000")
    parser.add_argument("--url", default=default, help="the service (default $NEUMETA_URL)")
    parser.add_argument("--token-file", type=Path, help="holds the token (or $NEUMETA_TOKEN)")
    parser.add_argument(
        "--offline-ok", action="store_true", help="be content with a whole file if not reached"
    )
    given = parser.parse_args(argv)
    names = ("width", "depth", "dtype", "samples", "seed")
    parameters = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.extrapolate:
        parameters["extrapolate"] = "true"
    try:
        token = os.environ.get("NEUMETA_TOKEN", "")
        if given.token_file:
            token = given.token_file.read_text().strip()
        if not (token.isascii() and token.isprintable()):
            raise PullError("the token is not one line of ASCII", refused=True)
        bar = _Bar() if sys.stderr.isatty() else None
        digest = pull(
            given.url, given.arch, given.out, parameters=parameters, token=token, progress=bar
        )
    except (PullError, OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        away = isinstance(error, (PullError, httpx.TransportError))
        if given.offline_ok and away and not getattr(error, "refused", False):
            digest = kept_whole(given.url, given.arch, given.out, parameters)
            if digest:
                size = given.out.stat().st_size
                print(f"{given.out} {size} bytes sha256 {digest} (kept; the service is away)")
                return 0
        kept = given.out.is_file()
        also = f"; {given.out} is still the last good file" if kept else ""
        print(f"neumeta-pull: {error}{also}".replace("\n", " "), file=sys.stderr)
        if kept:
            return 1
        return 2 if isinstance(error, PullError) and error.refused else 3
    print(f"{given.out} {given.out.stat().st_size} bytes sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
