"""`neumeta-pull`: one verified file on a device, or the file that was there before.

Needs httpx, filelock, the graph and the wire format; knows neither torch nor the service's code.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import random
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qs, quote

import httpx
from filelock import FileLock, Timeout

from neumeta import atomic, onnx
from neumeta.notation import BadGraph, sized
from neumeta.plan import DTYPES, Part, layout

RETRIED = {408, 429, 500, 502, 503, 504}
CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}
"""By dtype, what safetensors calls it."""
FORMATS = ("safetensors", "onnx")
LONGEST_WAIT = 60.0
"""Seconds: a Retry-After beyond it is not waited out."""
LOCK_WAIT = 600.0
"""Seconds another pull of the same file is waited for."""
REDIRECTS = 5
LONGEST_ADDRESS = 8192
LONGEST_TOLD = 16 << 20
"""Bytes of a plan, a problem or a description."""
MOVES = 3
"""Addresses in a row that are gone when they are asked for: manifolds are being replaced."""
PAST_CACHES = {"Accept-Encoding": "identity", "Cache-Control": "no-cache"}
"""Headers of a question that a shared cache is to pass on."""
NO_OLDER = {"Cache-Control": "max-age=10"}
"""Headers of a question that a shared cache may answer as long as the service says, and no longer."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


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
        with _turn(out, lock_wait, waiting) as record:
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
        return _kept(out, read_record(beside(out, "pull")), source)
    except (OSError, PullError):
        return ""


def backoff(attempt: int) -> float:
    """Seconds until the next try, at random up to a bound that doubles: with full jitter a fleet that
    lost its server does not return as one."""
    return random.uniform(0, min(10.0, 0.25 * 2**attempt))  # noqa: S311


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


def client_for(url: str, timeout: float, token: str) -> httpx.Client:
    """A client for one service. Raises PullError naming the variable of the environment that makes
    it impossible; never a proxy's address, which may hold a password."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for name in PROXIES:
        for variable in (name, name.upper()):
            for value in filter(None, os.environ.get(variable, "").split(",")):
                try:
                    _check_proxy(value.strip(), among=name == "no_proxy")
                except (ValueError, ImportError, httpx.InvalidURL) as error:
                    why = str(error).replace(value.strip(), "...").partition(" Make sure")[0]
                    why = why.partition(" for proxy URL")[0]
                    told = f"{variable} in the environment is no proxy that can be used: {why}"
                    raise PullError(told, refused=True) from None
    try:
        return httpx.Client(base_url=url, timeout=timeout, headers=headers)
    except OSError as error:
        for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
            if variable in os.environ:
                told = f"{variable} in the environment ({os.environ[variable]}): {error}"
                raise PullError(told, refused=True) from None
        raise


def _check_proxy(value: str, *, among: bool) -> None:
    """Raise ValueError, ImportError or InvalidURL unless httpx can use this proxy (or, `among`, this
    entry of no_proxy)."""
    if among:
        httpx.URL("all://" + (f"[{value}]" if value.count(":") > 1 else value))
        return
    address = httpx.URL(value if "://" in value else f"http://{value}")
    if not address.host or not (address.port is None or 0 < address.port < 65536):
        raise ValueError("it names no host, or no port from 1 to 65535")
    httpx.Client(proxy=httpx.Proxy(address), trust_env=False, verify=False).close()  # noqa: S501


def beside(out: Path, what: str) -> Path:
    """The hidden file beside `out` that is kept for this."""
    return out.with_name(f".{out.name}.{what}")


@contextmanager
def _turn(out: Path, lock_wait: float, waiting: Callable[[], None]) -> Iterator[Path]:
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


def _same(given: object, source: list[Any]) -> bool:
    return bool(given == json.loads(json.dumps(source)))


def _kept(out: Path, state: dict[str, Any], source: list[Any]) -> str:
    if not _same(state.get("kept"), source) or not out.is_file():
        return ""
    digest = _hashed(out)[0].hexdigest()
    return digest if digest == state.get("sha256") else ""


def _hashed(path: Path) -> tuple[hashlib._Hash, int]:
    """The sha256 of a file, ready for more, and its size."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return digest, size


class _Retry(Exception):
    """This attempt failed in a way that another may not; `after` are the seconds to wait first."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


@contextmanager
def send(
    http: httpx.Client,
    method: str,
    path: str,
    headers: dict[str, str],
    asked: Mapping[str, str] | None = None,
    content: bytes | None = None,
) -> Iterator[httpx.Response]:
    """The answer, redirects followed. To another host httpx sends no token along; from https to
    http is never followed, because whoever listens there could write the answer."""
    request = http.build_request(method, path, params=asked, headers=headers, content=content)
    for _ in range(REDIRECTS + 1):
        answer = http.send(request, stream=True, follow_redirects=False)
        if (following := answer.next_request) is None:
            try:
                yield answer
            finally:
                answer.close()
            return
        answer.close()
        if request.url.scheme == "https" and following.url.scheme != "https":
            told = f"redirected from https to {following.url.scheme}, which is not followed"
            raise PullError(told, refused=True)
        request = following
    raise PullError(f"redirected more than {REDIRECTS} times", refused=True)


class _Transfer:
    """What has arrived so far: bytes on disk, their hash, and the ETag they belong to."""

    def __init__(
        self,
        out: Path,
        http: httpx.Client,
        arch: str,
        asked: dict[str, str],
        source: list[Any],
        record: Path,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.path, self.http, self.arch, self.asked = beside(out, "incomplete"), http, arch, asked
        self.source, self.record, self.progress = source, record, progress
        state = read_record(record)
        self.size, self.total, self.etag, self.promised = 0, -1, "", ""
        self.hash, self.inherited, self.current = hashlib.sha256(), False, ""
        self.located, self.place, self.wanted, self.vouched, self.past = False, "", "", "", False
        self.good = _kept(out, state, source)
        self.good_etag = str(state.get("etag", "")) if self.good else ""
        self.kept = {key: state[key] for key in ("kept", "etag", "sha256")} if self.good else {}
        if _same(state.get("incomplete"), source) and self.path.is_file():
            self._inherit(str(state.get("incomplete_etag", "")))
        else:
            self._restart()

    def _inherit(self, etag: str) -> None:
        """Go on where a process that was killed stopped."""
        self.hash, self.size = _hashed(self.path)
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
        promised = self.vouched or self.promised or self._asked_digest()
        arrived = f"sha-256=:{base64.b64encode(self.hash.digest()).decode()}:"
        if promised and promised != arrived:
            self._restart()
            self._pass_by()
            raise _Retry("the bytes that arrived do not have the digest the service states")
        if not promised:
            if self.inherited:
                self._restart()  # a power cut may have left holes, and nothing here would show them
            raise _Retry("no digest vouches for what arrived")

    def _locate(self) -> None:
        """Ask which bytes these are and at which address, unless they are known to be current."""
        headers = {"Accept-Encoding": "identity", **NO_OLDER}
        if self.good_etag and not (self.size and self.etag):
            headers["If-None-Match"] = f"W/{self.good_etag}"
        there = f"/plan/{quote(self.arch, safe='')}"
        with self._request("GET", headers, there, self.asked) as answer:
            status = answer.status_code
            if status == 304 and "If-None-Match" in headers:
                self.current = self.good
                return
            if status == 200:
                self._aim(json_of(answer))
            # A service of before, or a mirror that has files alone, knows no such path.
            elif status in (401, 422) or status in RETRIED or not 400 <= status < 500:
                _extent(answer)
        self.located = True

    def _aim(self, told: Mapping[str, Any]) -> None:
        """From here on, ask for the bytes of this plan or problem; by arch and size, if it has none.

        Of an address the part from its path on counts: where the service is, who asks knows best."""
        address = str(told.get("address", ""))[:LONGEST_ADDRESS]
        rest = address.partition("/weights/")[2]
        etag = parse_qs(rest.partition("?")[2]).get("etag", [""])[0]
        self.place = f"/weights/{rest}" if etag and rest.isascii() and rest.isprintable() else ""
        self.wanted = f'"{etag}"' if self.place else ""
        same = self.place and told.get("etag") == self.wanted
        self.vouched = str(told.get("repr_digest") or "") if same else ""

    def _pass_by(self) -> None:
        """A cache on the way has other bytes than were asked for: ask the way that none answers."""
        if self.place:
            self._aim({})
            self.past = True

    def _fetch(self) -> None:
        if not self.located:
            self._locate()
        moves = 0
        while not self.current and self._asked_for():
            # Its manifold was replaced in between, or a cache on the way had something else.
            moves += 1
            if moves == MOVES:
                self._aim({})

    def _asked_for(self) -> bool:
        """Ask for the rest of the file once; whether another place is to be asked instead."""
        headers = {"Accept-Encoding": "identity"}
        if self.past:
            headers["Content-Type"] = "application/json"
        elif self.size and self.etag:
            headers |= {"Range": f"bytes={self.size}-", "If-Range": self.etag}
        elif self.good_etag:
            headers["If-None-Match"] = self.good_etag
        if self.past:
            asking = self._request("POST", headers, "/weights", content=self._body())
        elif self.place:
            asking = self._request("GET", headers, self.place)
        else:
            asking = self._request("GET", headers)
        with asking as answer:
            etag = answer.headers.get("etag", "")
            if self.place and answer.status_code == 404:
                self._aim(json_of(answer))
                return True
            bytes_of_it = self.place and answer.status_code in (200, 206, 304)
            # Without an ETag only a digest that the service told can say what this is.
            if bytes_of_it and etag != self.wanted and (etag or not self.vouched):
                self._pass_by()
                return True
            if answer.status_code == 304 and "If-None-Match" in headers:
                self.current = self.good
                return False
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
                write_record(self.record, self.kept | note)
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
        return False

    def _body(self) -> bytes:
        return json.dumps({"arch": self.arch, **json_values(self.asked)}).encode()

    @contextmanager
    def _request(
        self,
        method: str,
        headers: dict[str, str],
        path: str = "",
        asked: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Iterator[httpx.Response]:
        there = path or f"/weights/{quote(self.arch, safe='')}"
        with send(
            self.http, method, there, headers, asked if path else self.asked, content
        ) as answer:
            yield answer

    def _asked_digest(self) -> str:
        if told := self._told_digest():
            return told
        # Another replica answered, which never had the file: its last byte makes it have it.
        headers = {**PAST_CACHES, "Range": f"bytes={self.total - 1}-", "If-Range": self.etag}
        with self._request("GET", headers) as answer:
            if answer.status_code == 206:
                answer.read()
        return self._told_digest() or self._planned_digest()

    def _told_digest(self) -> str:
        with self._request("HEAD", PAST_CACHES) as answer:
            same = self.etag and answer.headers.get("etag", "") == self.etag
            return str(answer.headers.get("repr-digest", "")) if same else ""

    def _planned_digest(self) -> str:
        """By POST, which no cache answers, whatever it was told to ignore."""
        headers = {"Content-Type": "application/json"}
        with self._request("POST", headers, "/plan", content=self._body()) as answer:
            told = json_of(answer)
        same = self.etag and told.get("etag") == self.etag
        return str(told.get("repr_digest") or "") if same else ""


def json_values(asked: Mapping[str, str]) -> dict[str, Any]:
    """The parameters of a query as the body of a POST has them."""
    found: dict[str, Any] = {}
    for name, text in asked.items():
        if name in ("dtype", "format"):
            found[name] = text
        elif name == "extrapolate":
            found[name] = text == "true"
        else:
            with suppress(ValueError):  # what is no number the service has refused already
                if ":" in text:
                    pairs = (part.rpartition(":") for part in text.split(","))
                    found[name] = {group: float(number) for group, _, number in pairs}
                    continue
                values = json.loads(f"[{text}]")
                found[name] = values if name == "depth" or len(values) > 1 else values[0]
    return found


def _extent(answer: httpx.Response) -> tuple[int, int]:
    """Where the answer's bytes start and how long the whole file is; raises where it says no."""
    status, headers = answer.status_code, answer.headers
    if status in RETRIED:
        after = headers.get("retry-after", "")
        raise _Retry(f"status {status}", float(after) if after.isdecimal() else 0.0)
    if status == 416:
        raise _Retry("the file has become shorter")
    if status not in (200, 206):
        raise PullError(reason_of(answer), refused=400 <= status < 500)
    if headers.get("content-encoding", "identity") != "identity":
        raise _Retry(f"the answer is compressed ({headers['content-encoding'][:20]})")
    try:
        if status == 200:
            return 0, int(headers["content-length"])
        extent, _, total = headers["content-range"].removeprefix("bytes ").partition("/")
        return int(extent.partition("-")[0]), int(total)
    except (KeyError, ValueError):
        raise _Retry("the answer does not state its length") from None


def json_of(answer: httpx.Response) -> dict[str, Any]:
    """The JSON object that an answer is, or an empty one."""
    if "json" not in answer.headers.get("content-type", ""):
        return {}  # a page, or a file
    text = b""
    for part in answer.iter_bytes():
        text += part
        if len(text) > LONGEST_TOLD:
            return {}
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def reason_of(answer: httpx.Response) -> str:
    """What a refusal says of itself, in one line."""
    detail = json_of(answer).get("detail")
    return f"status {answer.status_code}" + (f": {str(detail)[:300]}" if detail else "")


def check_file(path: Path, arch: str = "", dtype: str = "", file_format: str = "") -> None:
    """Raise PullError unless this is a whole file of this architecture, dtype and format (or of any):
    the tensors of the graph in its metadata, at the depth and channels stated there, and in a
    safetensors file one after the other."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if not file_format:
            file_format = FORMATS[file.read(9)[8:] != b"{"]
            file.seek(0)
        try:
            if file_format == "onnx":
                wrong = _held(*onnx.contents(file, size), arch, dtype)
            else:
                wrong = _checked(file, size, arch, dtype)
        except BadGraph as error:
            raise PullError(f"what arrived is no network: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            what = "is no whole ONNX model" if file_format == "onnx" else "has a broken header"
            raise PullError(f"what arrived {what}") from None
    if wrong:
        raise PullError(f"what arrived is not what was asked for: {wrong}")


def _checked(file: BinaryIO, size: int, arch: str, dtype: str) -> str:
    """What is wrong with a safetensors file, if anything."""
    count = int.from_bytes(file.read(8), "little")
    if size < 8 or count > size - 8:
        raise PullError("what arrived is no safetensors file")
    end, wrong = _laid_out(json.loads(file.read(count)), arch, dtype)
    if not wrong and 8 + count + end != size:
        raise PullError("what arrived does not have the length its header states")
    return wrong


def _held(
    about: Mapping[str, Any], tensors: Mapping[str, onnx.Tensor], arch: str, dtype: str
) -> str:
    """What is wrong with an ONNX model of these tensors, if anything."""
    if wrong := _other(about, arch):
        return wrong
    kinds = {name: kind for name, (kind, _, _) in tensors.items()}
    for part in _parts(about, kinds, onnx.TYPES, dtype):
        if part.name not in tensors:
            return f"{part.name} is missing"
        if tensors[part.name] != (onnx.TYPES[part.dtype], part.shape, part.bytes):
            kind, shape, _ = tensors[part.name]
            return f"{part.name} is type {kind} {shape}, not {part.dtype} {part.shape}"[:160]
    return ""


def _parts(
    about: Mapping[str, Any], kinds: Mapping[str, object], codes: Mapping[str, object], dtype: str
) -> list[Part]:
    """What is to lie in a file of this dtype; without one, of that which most of its tensors, whose
    types are `kinds`, are made of."""
    graph, sizes = sized(about)
    if not dtype:
        given = {kinds[name] for name in graph.tensors if name in kinds}
        # Beside int8 there is float32.
        dtype = next((each for each in [*codes][::-1] if codes[each] in given), "float32")
    return layout(graph, sizes, dtype)[0]


def _other(about: Mapping[str, Any], arch: str) -> str:
    # A named depth, as resnet32 is of resnet20, is a file of that manifold.
    other = arch and arch not in (about["arch"], *about.get("names", ()))
    return f"it is {ascii(about['arch'])[:60]}" if other else ""


def _laid_out(header: dict[str, Any], arch: str, dtype: str) -> tuple[int, str]:
    """How many bytes of tensors a header lays out, and what is wrong with it, if anything."""
    about = json.loads(header.pop("__metadata__")["neumeta"])
    if wrong := _other(about, arch):
        return 0, wrong
    offset, kinds = 0, {name: entry["dtype"] for name, entry in header.items()}
    for part in _parts(about, kinds, CODES, dtype):
        name, wanted = part.name, list(part.shape)
        if name not in header:
            return 0, f"{name} is missing"
        entry, code = header.pop(name), CODES[part.dtype]
        if entry["dtype"] != code or entry["shape"] != wanted:
            given = f"{entry['dtype']} {entry['shape']}"[:80]
            return 0, f"{name} is {given}, not {code} {wanted}"
        if entry["data_offsets"] != [offset, offset + part.bytes]:
            return 0, f"{name} is not where its shape puts it"
        offset += part.bytes
    return offset, f"there is a tensor {ascii(next(iter(header)))[:60]}" if header else ""


class _Callable(types.ModuleType):
    """So that `neumeta.pull(...)` is `neumeta.pull.pull(...)`."""

    def __call__(self, *given: Any, **options: Any) -> str:
        return pull(*given, **options)


sys.modules[__name__].__class__ = _Callable
