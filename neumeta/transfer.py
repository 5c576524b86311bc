"""One file on its way: its bytes, resumed where they broke off, and the digest that vouches for them.

Knows neither when to try again nor what the bytes mean.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

import httpx

from neumeta.asking import NO_OLDER, PAST_CACHES, RETRIED, json_of, reason_of, send
from neumeta.failure import PullError
from neumeta.record import beside, hashed, kept, matches, read_record, write_record

LONGEST_ADDRESS = 8192
MOVES = 3
"""Addresses in a row that are gone when they are asked for: manifolds are being replaced."""


class Retry(Exception):
    """This attempt failed in a way that another may not; `after` are the seconds to wait first."""

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


class Transfer:
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
        self.good = kept(out, state, source)
        self.good_etag = str(state.get("etag", "")) if self.good else ""
        self.kept = {key: state[key] for key in ("kept", "etag", "sha256")} if self.good else {}
        if matches(state.get("incomplete"), source) and self.path.is_file():
            self._inherit(str(state.get("incomplete_etag", "")))
        else:
            self._restart()

    def _inherit(self, etag: str) -> None:
        """Go on where a process that was killed stopped."""
        self.hash, self.size = hashed(self.path)
        self.etag, self.inherited = etag, True

    def _restart(self) -> None:
        self.size, self.total, self.etag, self.promised = 0, -1, "", ""
        self.hash, self.inherited = hashlib.sha256(), False
        self.path.unlink(missing_ok=True)

    def attempt(self) -> None:
        """One try to have the file complete and verified. Raises Retry or PullError."""
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
            raise Retry("the bytes that arrived do not have the digest the service states")
        if not promised:
            if self.inherited:
                self._restart()  # a power cut may have left holes, and nothing here would show them
            raise Retry("no digest vouches for what arrived")

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
                raise Retry("the service answered another range than was asked for")
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
            raise Retry(why)
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
        raise Retry(f"status {status}", float(after) if after.isdecimal() else 0.0)
    if status == 416:
        raise Retry("the file has become shorter")
    if status not in (200, 206):
        raise PullError(reason_of(answer), refused=400 <= status < 500)
    if headers.get("content-encoding", "identity") != "identity":
        raise Retry(f"the answer is compressed ({headers['content-encoding'][:20]})")
    try:
        if status == 200:
            return 0, int(headers["content-length"])
        extent, _, total = headers["content-range"].removeprefix("bytes ").partition("/")
        return int(extent.partition("-")[0]), int(total)
    except (KeyError, ValueError):
        raise Retry("the answer does not state its length") from None
