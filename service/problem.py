"""Errors as application/problem+json (RFC 9457). Knows no route; prints any input without failing."""

from __future__ import annotations

import json
from typing import Any

from fastapi.responses import Response

MEDIA = "application/problem+json"
TITLES = {
    400: "Malformed request",
    401: "Unauthorized",
    404: "Not found",
    405: "Method not allowed",
    413: "Body too large",
    415: "Unsupported media type",
    416: "Range not satisfiable",
    422: "Request not allowed",
    429: "Too many requests",
    431: "Headers too large",
    500: "Internal error",
    503: "Not ready",
}


class Problem(Exception):
    """A refused request: the status and, per field, what was given and what is allowed.

    `more` are members of the answer beside those (RFC 9457, 3.2).
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: list[dict[str, str]] | None = None,
        headers: dict[str, str] | None = None,
        more: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.detail = status, detail
        self.errors, self.headers, self.more = errors or [], headers or {}, more or {}


def printed(given: object) -> str:
    """What was given, in ASCII and cut short; any object can be printed."""
    try:
        text = ascii(given)
    except ValueError:  # Python refuses to print an integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def field(name: str, given: object, allowed: str) -> dict[str, str]:
    """One refused field."""
    return {"field": name, "given": printed(given), "allowed": allowed}


def refuse(name: str, given: object, allowed: str, status: int = 422) -> Problem:
    """A Problem about a single field."""
    entry = field(name, given, allowed)
    return Problem(status, f"{name}: {entry['given']} is not allowed; {allowed}", [entry])


def body(problem: Problem) -> bytes:
    """The problem as JSON bytes."""
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": TITLES.get(problem.status, "Error"),
        "status": problem.status,
        "detail": problem.detail,
    }
    if problem.errors:
        content["errors"] = problem.errors
    return json.dumps(content | problem.more).encode()


def response(problem: Problem) -> Response:
    """The problem as a response, which no cache keeps: by default some statuses (404) may be kept."""
    headers = {"Cache-Control": "no-store", **problem.headers}
    return Response(body(problem), problem.status, headers, media_type=MEDIA)
