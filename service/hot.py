"""Files that were given before: a request's target -> its plan, so that it need not be made again.

A repeated GET of a whole file needs no routing, parsing or planning, which is most of its time: the
guard has it answered here before it asks the framework. Knows no engine and no token: what it repeats,
`app.py` has answered once, and who may have it, `guard.py` has decided.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.types import Scope, Send

from service.account import Account
from service.cache import Body, Busy, Cache
from service.connection import was_cut

MOST = 1024
"""Targets that are remembered, the least recently used forgotten first."""
OTHERWISE = frozenset(
    (b"range", b"if-range", b"if-none-match", b"expect", b"content-length", b"transfer-encoding")
)
"""Request headers that ask for something else than the whole file."""
CHUNK = 512 << 10
"""Larger than a stream's: these bytes are in memory anyway, and each send costs ten microseconds."""
TAKEN = "neumeta.body"
"""Where a scope holds a (body, tier) that was asked for here and is not whole yet."""

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Target:
    """What `Cache.get` needs for one file, and the headers that do not depend on the tier."""

    key: str
    head: bytes
    length: int
    produce: Callable[[], Iterator[bytes]]
    headers: Headers


class Hot:
    """Targets by the exact bytes of path and query."""

    def __init__(self, cache: Cache, account: Account) -> None:
        self.cache, self.account = cache, account
        self.generation = 0
        self._kept: OrderedDict[tuple[bytes, bytes], Target] = OrderedDict()

    def keep(self, scope: Scope, target: Target, generation: int) -> None:
        """This path and query were answered by 200 and that file, planned in `generation`."""
        if generation != self.generation:
            return  # it was planned on manifolds that are no longer served
        self._kept[scope["raw_path"], scope["query_string"]] = target
        if len(self._kept) > MOST:
            self._kept.popitem(last=False)

    async def answer(self, scope: Scope, send: Send) -> bool:
        """Answer this request, if it is one of these and its file is there, whole."""
        if not (found := await self._take(scope)):
            return False
        headers, body, tier = found
        whole, sent = memoryview(body.data).toreadonly(), 0
        self.account.tier(tier).inc()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            while sent < body.length and not was_cut(scope):
                chunk = whole[sent : sent + CHUNK]
                sent += len(chunk)
                more = sent < body.length
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        finally:
            body.leave()
        return True

    async def _take(self, scope: Scope) -> tuple[Headers, Body, str] | None:
        """Headers, body and tier; whoever gets them says `leave`.

        A body that is still being made is left in the scope: who waits
        for it must watch for a client that goes, and that is not done here.
        """
        asked = scope.get("raw_path", b""), scope["query_string"]
        target = self._kept.get(asked)
        if target is None or scope["method"] != "GET":
            return None
        if target.key not in self.cache.finished and self.cache.shared is None:
            return None
        if not OTHERWISE.isdisjoint(name for name, _ in scope["headers"]):
            return None
        self._kept.move_to_end(asked)
        try:
            body, tier = await self.cache.get(
                target.key, target.head, target.length, target.produce
            )
        except (Busy, RuntimeError):
            return None  # asked again, and answered, by the application
        if body.filled < body.length or body.repr_digest is None:
            scope[TAKEN] = body, tier
            return None
        made = [(b"x-neumeta-cache", tier.encode()), (b"repr-digest", body.repr_digest.encode())]
        return target.headers + made, body, tier

    def clear(self) -> None:
        """Forget everything: the same target means another file from now on."""
        self._kept.clear()
        self.generation += 1
