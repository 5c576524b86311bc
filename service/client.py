"""`neumeta-pull`: one verified file on a device, or the file that was there before.

Needs httpx and the wire format only; knows neither torch nor the service's code.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

RETRIED = {429, 500, 502, 503, 504}


class PullError(RuntimeError):
    """The file could not be had; one sentence says why. The last good file is untouched."""


def pull(
    url: str,
    arch: str,
    out: Path,
    *,
    parameters: Mapping[str, str] | None = None,
    retries: int = 4,
    timeout: float = 30.0,
    client: httpx.Client | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Download the weights of `arch` to `out`, whole and verified; returns their sha256.

    A temporary file in the same folder is hashed while it streams; length, digest and header are
    checked, then it is synced and renamed over `out`. A broken transfer is resumed by Range where
    the ETag still holds. Raises PullError; `out` is then what it was before.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.incomplete")
    own = client is None
    http = client or httpx.Client(base_url=url, timeout=timeout)
    try:
        transfer = _Transfer(temporary)
        for attempt in range(retries + 1):
            try:
                if transfer.attempt(http, arch, dict(parameters or {})):
                    break
            except (httpx.TransportError, _Retry) as error:
                if attempt == retries:
                    raise PullError(f"{url}: {error or type(error).__name__}") from None
                wait = error.after if isinstance(error, _Retry) and error.after else 0.0
                # Full jitter, so that a fleet that lost its server does not return as one.
                sleep(max(wait, random.uniform(0, min(10.0, 0.25 * 2**attempt))))  # noqa: S311
        check_file(temporary)
        digest = transfer.hash.hexdigest()
        temporary.replace(out)
        folder = os.open(out.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return digest
    finally:
        temporary.unlink(missing_ok=True)
        if own:
            http.close()


class _Retry(Exception):
    def __init__(self, why: str, after: float | None = None) -> None:
        super().__init__(why)
        self.after = after


class _Transfer:
    """What has arrived so far: bytes on disk, their hash, and the ETag they belong to."""

    def __init__(self, path: Path) -> None:
        self.path, self.etag, self.size = path, "", 0
        self.hash = hashlib.sha256()

    def _restart(self) -> None:
        self.size, self.hash = 0, hashlib.sha256()
        self.path.unlink(missing_ok=True)

    def attempt(self, http: httpx.Client, arch: str, parameters: dict[str, str]) -> bool:
        """One request; True if the file is complete and verified. Raises _Retry or PullError."""
        headers = {"Accept-Encoding": "identity"}
        if self.size and self.etag:
            headers |= {"Range": f"bytes={self.size}-", "If-Range": self.etag}
        with http.stream("GET", f"/weights/{arch}", params=parameters, headers=headers) as answer:
            if answer.status_code in RETRIED:
                after = answer.headers.get("retry-after", "")
                wait = float(after) if after.isdigit() else None
                raise _Retry(f"status {answer.status_code}", wait)
            if answer.status_code not in (200, 206):
                answer.read()
                raise PullError(_reason(answer))
            etag = answer.headers.get("etag", "")
            total = _total(answer)
            if answer.status_code == 200 or etag != self.etag:
                self._restart()
            if answer.status_code == 206 and not answer.headers.get("content-range", "").startswith(
                f"bytes {self.size}-"
            ):
                self._restart()
                raise _Retry("the server answered another range than was asked for")
            self.etag = etag
            with self.path.open("ab") as file:
                for chunk in answer.iter_raw():
                    file.write(chunk)
                    self.hash.update(chunk)
                    self.size += len(chunk)
                file.flush()
                os.fsync(file.fileno())
            if self.size != total:
                raise _Retry(f"{self.size} of {total} bytes arrived")
            promised = answer.headers.get("repr-digest") or self._digest(http, arch, parameters)
            arrived = f"sha-256=:{base64.b64encode(self.hash.digest()).decode()}:"
            if promised and promised != arrived:
                self._restart()
                raise _Retry("the bytes that arrived do not have the digest the server states")
        return True

    def _digest(self, http: httpx.Client, arch: str, parameters: dict[str, str]) -> str:
        # A cold answer starts before its digest is known; by now it is.
        answer = http.head(f"/weights/{arch}", params=parameters)
        same = answer.headers.get("etag", "") == self.etag
        return answer.headers.get("repr-digest", "") if same else ""


def _total(answer: httpx.Response) -> int:
    try:
        if answer.status_code == 206:
            return int(answer.headers["content-range"].rpartition("/")[2])
        return int(answer.headers["content-length"])
    except (KeyError, ValueError):
        raise _Retry("the answer does not state its length") from None


def _reason(answer: httpx.Response) -> str:
    try:
        return f"status {answer.status_code}: {answer.json()['detail']}"
    except (ValueError, KeyError, TypeError):
        return f"status {answer.status_code}"


def check_file(path: Path) -> None:
    """Raise PullError unless this is a whole safetensors file whose header fits its length."""
    size = path.stat().st_size
    with path.open("rb") as file:
        count = int.from_bytes(file.read(8), "little")
        if size < 8 or count > size - 8:
            raise PullError("what arrived is no safetensors file")
        try:
            header = json.loads(file.read(count))
            entries = [value for key, value in header.items() if key != "__metadata__"]
            end = max(entry["data_offsets"][1] for entry in entries)
            about = json.loads(header["__metadata__"]["neumeta"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PullError("what arrived has a broken header") from None
    if 8 + count + end != size or "family" not in about:
        raise PullError("what arrived does not have the length its header states")


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: 0 pulled, 1 kept the last good file, 2 no file."""
    parser = argparse.ArgumentParser(prog="neumeta-pull", description=__doc__)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--width", help="a factor, or one per stage separated by commas")
    parser.add_argument("--depth", help="blocks per stage, separated by commas")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--samples")
    parser.add_argument("--seed")
    parser.add_argument("--extrapolate", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    default = os.environ.get("NEUMETA_URL", "http://127.0.0.1:8000")
    parser.add_argument("--url", default=default, help="the service (default $NEUMETA_URL)")
    given = parser.parse_args(argv)
    names = ("width", "depth", "dtype", "samples", "seed")
    parameters = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.extrapolate:
        parameters["extrapolate"] = "true"
    try:
        digest = pull(given.url, given.arch, given.out, parameters=parameters)
    except (PullError, OSError, httpx.InvalidURL) as error:
        kept = given.out.exists()
        also = f"; {given.out} is still the last good file" if kept else ""
        print(f"neumeta-pull: {error}{also}", file=sys.stderr)
        return 1 if kept else 2
    print(f"{given.out} {given.out.stat().st_size} bytes sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
