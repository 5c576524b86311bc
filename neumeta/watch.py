"""A question that is asked again and again: pauses that spread a fleet, longer ones while it fails.

Knows no HTTP and no files. Waits by a clock that only runs forward: the time of day means nothing here.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable

SPREAD = 0.1
"""Part of the pause by which devices that started together drift apart."""
LONGEST = 3600.0
"""Seconds between questions that keep failing, unless more were asked for."""


class CommandFailed(RuntimeError):
    """The command that was to run after a change could not be started, or ended with an error."""


def pause(seconds: float, failures: int, chance: float) -> float:
    """Seconds until the next question, of a `chance` in [0, 1): those asked for, give or take a tenth;
    after so many failures in a row anything from half of them to twice as many for each."""
    if not failures:
        return seconds * (1 + SPREAD * (2 * chance - 1))
    most = max(seconds, min(LONGEST, seconds * 2.0 ** min(failures, 30)))
    return seconds / 2 + chance * (most - seconds / 2)


def watch(
    ask: Callable[[], str],
    seconds: float,
    changed: Callable[[str], None],
    failed: Callable[[Exception, float], None],
    *,
    seen: str = "",
    expected: tuple[type[Exception], ...] = (OSError,),
    sleep: Callable[[float], None] | None = None,
    chance: Callable[[], float] = random.random,
) -> None:
    """Ask until an exception that is not `expected` ends it, such as KeyboardInterrupt.

    `ask` says by which name what it got is known; `changed` is called with a name other than the one
    before (at first, `seen`), and again if it raises. `failed` is told what was expected and happened,
    and the pause that follows.
    """
    failures = 0
    while True:
        try:
            name = ask()
            if name != seen:
                changed(name)
                seen = name
        except expected as error:
            failures += 1
            wait = pause(seconds, failures, chance())
            failed(error, wait)
        else:
            failures = 0
            wait = pause(seconds, 0, chance())
        (sleep or time.sleep)(wait)


def run(command: str, **about: str) -> None:
    """Run a shell's command line with these variables besides its own. Raises CommandFailed."""
    given = {**os.environ, **about}
    done = subprocess.run(command, shell=True, env=given, stdin=subprocess.DEVNULL)  # noqa: S602
    if done.returncode:
        raise CommandFailed(f"{command!r} ended with {done.returncode}")
