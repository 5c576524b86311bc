"""The process's life: ready or draining, and the reload of its manifolds. Knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from service.engine import Engine
from service.metrics import Metrics
from service.settings import Settings
from service.tokens import Tokens

log = logging.getLogger("neumeta")


class Lifecycle:
    """Whether requests are welcome, and how new manifolds replace the served ones."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        metrics: Metrics,
        tokens: Tokens | None,
        reloaded: Callable[[], None],
    ) -> None:
        self.settings, self.engine, self.metrics, self.tokens = settings, engine, metrics, tokens
        self.reloaded = reloaded
        self.draining = False
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._describe()
        metrics.ready.set(1)

    def drain(self) -> None:
        """No new requests are welcome from here on; those that come are still answered."""
        self.draining = True
        self.metrics.ready.set(0)

    def hang_up(self) -> None:
        """SIGHUP: read the tokens and the manifolds again. To be called on the event loop."""
        task = asyncio.create_task(self.reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def reload(self) -> None:
        """Serve what the files hold now; if any of it is bad, all that was served stays served."""
        async with self._reloading:  # each signal is a reload of its own, one after the other
            try:
                if self.tokens:
                    self.tokens.refresh()
                fresh = await asyncio.to_thread(Engine.of, self.settings)
            except Exception as error:
                self.metrics.reloads.labels("failed").inc()
                log.error("reload refused, the earlier manifolds stay: %s", error)
                return
            # Between two steps of the event loop: no request sees half of it.
            self.engine.adopt(fresh)
            self.reloaded()
            self._describe()
            self.metrics.reloads.labels("ok").inc()
            served = {name: each.digest for name, each in self.engine.manifolds.items()}
            log.info("reloaded", extra={"fields": {"manifolds": served}})

    def _describe(self) -> None:
        self.metrics.checkpoint.clear()
        for name, manifold in self.engine.manifolds.items():
            info = {"sha256": manifold.digest, "task": manifold.contract.task}
            self.metrics.checkpoint.labels(name).info(info)
