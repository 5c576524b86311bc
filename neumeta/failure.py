"""A pull that failed. Knows nothing of how."""

from __future__ import annotations


class PullError(RuntimeError):
    """The file could not be had; one sentence says why. The last good file is untouched.

    `refused`: the service understood and said no, so that asking again is no use.
    """

    def __init__(self, why: str, *, refused: bool = False) -> None:
        super().__init__(why)
        self.refused = refused
