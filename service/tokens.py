"""Bearer tokens from a file: one a line, several valid at once. Knows no HTTP but the field's syntax.

The file is read again when it changes, so that rewriting it rotates the tokens.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

log = logging.getLogger("neumeta")


def _digest(token: bytes) -> bytes:
    # Equal lengths: compare_digest would tell a wrong length by its time.
    return hashlib.sha256(token).digest()


class Tokens:
    """The tokens that are valid now."""

    def __init__(self, path: Path) -> None:
        """Raises FileNotFoundError or another OSError, or ValueError for a file without a token."""
        self.path = path
        self._stamp = self._found()
        self._digests = self._read()
        if not self._digests:
            raise ValueError(f"tokens_file: {path} has no token")

    def allow(self, authorization: bytes) -> bool:
        """Whether this Authorization field carries a valid token."""
        self.refresh()
        scheme, _, token = authorization.partition(b" ")
        given, right = _digest(token.strip()), scheme.lower() == b"bearer"
        # Every one is compared: the time says nothing about which was close.
        same = [hmac.compare_digest(given, each) for each in self._digests]
        return any(same) and right

    def refresh(self) -> None:
        """Read the file again if it changed; one that cannot be read leaves the tokens as they are."""
        stamp = self._found()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._digests = self._read()
            log.info("tokens: %d in %s", len(self._digests), self.path)
        except OSError as error:
            log.error("tokens: the last ones stay valid: %s", error)

    def _found(self) -> tuple[int, int, int] | None:
        try:
            found = self.path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> list[bytes]:
        lines = (line.strip() for line in self.path.read_bytes().splitlines())
        return [_digest(line) for line in lines if line and not line.startswith(b"#")]
