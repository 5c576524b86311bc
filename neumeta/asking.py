"""Questions to one service: a client that its environment allows, redirects, and answers as JSON.

Knows no file here and no weights.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

import httpx

from neumeta.failure import PullError

RETRIED = {408, 429, 500, 502, 503, 504}
REDIRECTS = 5
LONGEST_TOLD = 16 << 20
"""Bytes of a plan, a problem or a description."""
PAST_CACHES = {"Accept-Encoding": "identity", "Cache-Control": "no-cache"}
"""Headers of a question that a shared cache is to pass on."""
NO_OLDER = {"Cache-Control": "max-age=10"}
"""Headers of a question that a shared cache may answer as long as the service says, and no longer."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


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


def backoff(attempt: int) -> float:
    """Seconds until the next try, at random up to a bound that doubles: with full jitter a fleet that
    lost its server does not return as one."""
    return random.uniform(0, min(10.0, 0.25 * 2**attempt))  # noqa: S311


class Asking:
    """Questions about sizes, asked again where that may help."""

    def __init__(self, http: httpx.Client, url: str, retries: int = 4) -> None:
        self.http, self.url, self.retries = http, url, retries
        self.refusal = "what came is no plan"

    def _once(
        self,
        method: str,
        path: str,
        asked: Mapping[str, str] | None,
        headers: dict[str, str],
        content: bytes | None = None,
    ) -> dict[str, Any]:
        for attempt in range(self.retries + 1):
            try:
                with send(self.http, method, path, headers, asked, content) as answer:
                    if answer.status_code == 200:
                        return json_of(answer)
                    if answer.status_code not in RETRIED:
                        self.refusal = reason_of(answer)
                        return {}
                    why = f"status {answer.status_code}"
            except httpx.TransportError as error:
                why = str(error) or type(error).__name__
            if attempt < self.retries:
                time.sleep(backoff(attempt))
        raise PullError(f"{self.url}: {why}")

    def get(self, path: str, asked: Mapping[str, str]) -> dict[str, Any]:
        """The JSON object there; an empty one where it is refused, and `refusal` says why."""
        return self._once("GET", quote(path), asked, dict(NO_OLDER))

    def post(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """The plan of a body. Raises PullError if it is refused."""
        body, headers = json.dumps(asked).encode(), {"Content-Type": "application/json"}
        if not (told := self._once("POST", "/plan", None, headers, body)):
            raise PullError(self.refusal, refused=True)
        return told

    def header(self, arch: str, base: Mapping[str, str]) -> dict[str, Any]:
        """What a safetensors file of this manifold says of itself, from its first bytes alone."""
        asked = {name: value for name, value in base.items() if name not in ("format", "dtype")}
        count = int.from_bytes(self._part(arch, asked, 0, 8), "little")
        try:
            told = json.loads(self._part(arch, asked, 8, 8 + min(count, LONGEST_TOLD)))
            return dict(json.loads(told["__metadata__"]["neumeta"]))
        except (ValueError, KeyError, TypeError):
            raise PullError(f"{self.url}: what arrived has a broken header") from None

    def _part(self, arch: str, asked: Mapping[str, str], start: int, stop: int) -> bytes:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        there, part = f"/weights/{quote(arch, safe='')}", b""
        with send(self.http, "GET", there, headers, asked) as answer:
            if answer.status_code not in (200, 206):
                raise PullError(reason_of(answer), refused=400 <= answer.status_code < 500)
            skipped = start if answer.status_code == 200 else 0  # it knows no ranges
            for chunk in answer.iter_raw():
                part += chunk
                if len(part) >= skipped + stop - start:
                    break
        return part[skipped : skipped + stop - start]
