"""The page at `/`: one file, and the headers that let nothing else run in it. Knows no manifold."""

from __future__ import annotations

import hashlib
import re
from base64 import b64encode
from pathlib import Path

from fastapi.responses import Response

HTML = (Path(__file__).parent / "page.html").read_bytes()


def _source(tag: str) -> str:
    """The hash under which the page's own inline script or style is allowed."""
    (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), HTML, re.DOTALL)
    return f"'sha256-{b64encode(hashlib.sha256(inner).digest()).decode()}'"


HEADERS = {
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_source('script')}",
            f"style-src {_source('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def response() -> Response:
    """The page; all it shows, it asks the API for."""
    return Response(HTML, headers=HEADERS, media_type="text/html")
