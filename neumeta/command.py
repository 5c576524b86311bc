"""`neumeta-pull`: flags, the size that is chosen, what is told, exit codes.

Knows neither the transfer nor what makes a file whole: those are `transfer.py` and `whole.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import httpx

from neumeta import afford, atomic, measure, memory, pull
from neumeta import watch as watching
from neumeta.asking import Asking, client_for
from neumeta.failure import PullError
from neumeta.notation import BadGraph
from neumeta.plan import DTYPES
from neumeta.record import beside, read_record, target_of, write_record
from neumeta.transfer import json_values
from neumeta.whole import FORMATS, check_file


class _Bar:
    """A line on a terminal that says how far the transfer is."""

    def __init__(self) -> None:
        self.shown = -1

    def __call__(self, size: int, total: int) -> None:
        percent = 100 * size // max(1, total)
        if percent != self.shown:
            self.shown = percent
            end = "\n" if size == total else ""
            sys.stderr.write(f"\r[{'#' * (percent // 4):<25}] {percent:3d} % of {total} bytes{end}")
            sys.stderr.flush()


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: 0 pulled; else, where there is a whole network at `--out`, 1: it is
    still the last good one; without one 2: refused (the command line, or by the service), 3: not
    reached; 130: interrupted. With --offline-ok a file that is still whole is enough, where the
    service cannot be reached: 0. SIGTERM ends --watch with 0.
    """
    parser = argparse.ArgumentParser(
        prog="neumeta-pull", description="Download the weights of one architecture, verified."
    )
    parser.add_argument("--arch", required=True, help="a served architecture, e.g. resnet20")
    parser.add_argument(
        "--width", help="a factor, one per group separated by commas, or group:factor pairs"
    )
    parser.add_argument("--depth", help="blocks per stage, separated by commas")
    parser.add_argument("--dtype", choices=list(DTYPES))
    parser.add_argument("--format", choices=FORMATS, help="onnx: a model for ONNX Runtime")
    parser.add_argument("--samples", help="K, how many noisy samples are averaged")
    parser.add_argument("--seed", help="the seed of their noise")
    parser.add_argument("--extrapolate", action="store_true", help="allow untrained sizes")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    default = os.environ.get("NEUMETA_URL", "http://127.0.0.1:8000")
    parser.add_argument("--url", default=default, help="the service (default $NEUMETA_URL)")
    parser.add_argument("--token-file", type=Path, help="holds the token (or $NEUMETA_TOKEN)")
    parser.add_argument(
        "--offline-ok", action="store_true", help="be content with a whole file if not reached"
    )
    parser.add_argument(
        "--lock-wait",
        type=float,
        default=pull.LOCK_WAIT,
        help="seconds to wait for another pull of the same file (default %(default)g)",
    )
    parser.add_argument(
        "--watch", type=_positive, metavar="SECONDS", help="stay, and ask again so often"
    )
    parser.add_argument("--on-change", metavar="CMD", help="with --watch: run after each new file")
    parser.add_argument(
        "--max-ms",
        type=_positive,
        metavar="M",
        help="measure here, and pull the best size that takes at most M milliseconds an image",
    )
    parser.add_argument("--max-bytes", type=int, help="pull the best size of at most so many bytes")
    parser.add_argument(
        "--max-ram",
        type=int,
        metavar="BYTES",
        help="measure here, and pull the best size that takes at most so much memory to run, beside"
        " what the runtime takes",
    )
    parser.add_argument("--threads", type=int, default=1, help="to measure with (default 1)")
    parser.add_argument("--runtime", choices=list(measure.RUNTIMES), help="to measure with")
    parser.add_argument(
        "--measure", action="store_true", help="measure again what was measured here before"
    )
    names = ("width", "depth", "dtype", "format", "samples", "seed")
    given = parser.parse_args(argv)
    if given.on_change and given.watch is None:
        parser.error("--on-change needs --watch")
    budgeted = any(each is not None for each in (given.max_ms, given.max_bytes, given.max_ram))
    if budgeted and given.width:
        parser.error(
            "--width is what --max-ms, --max-bytes and --max-ram choose; give one or the other"
        )
    counts = (given.threads, given.max_bytes, given.max_ram)
    if any(each is not None and each < 1 for each in counts):
        parser.error("--threads, --max-bytes and --max-ram: whole numbers of at least 1")
    parameters = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.extrapolate:
        parameters["extrapolate"] = "true"

    arch, choice = given.arch, None

    def pulled() -> str:
        nonlocal arch, parameters, choice
        token = os.environ.get("NEUMETA_TOKEN", "")
        if given.token_file:
            token = given.token_file.read_text().strip()
        if not (token.isascii() and token.isprintable()):
            raise PullError("the token is not one line of ASCII", refused=True)
        if budgeted:
            choice = choice or _Choice(given, parameters)
            arch, parameters = choice.known  # for where the service is away
            arch, parameters = choice.made(token)
        return pull.pull(
            given.url,
            arch,
            given.out,
            parameters=parameters,
            token=token,
            progress=_Bar() if sys.stderr.isatty() else None,
            lock_wait=given.lock_wait,
            waiting=lambda: _tell(
                f"waiting for another pull of {given.out}, at most {given.lock_wait:g} seconds"
            ),
        )

    try:
        if given.watch is not None:
            return _watched(pulled, given.out, given.watch, given.on_change or "")
        digest = pulled()
    except KeyboardInterrupt:
        _tell("interrupted; the next pull goes on from here")
        return 130
    except (PullError, OSError, httpx.HTTPError, httpx.InvalidURL) as error:
        away = isinstance(error, (PullError, httpx.TransportError))
        if given.offline_ok and away and not getattr(error, "refused", False):
            digest = pull.kept_whole(given.url, arch, given.out, parameters)
            if digest:
                size = given.out.stat().st_size
                print(f"{given.out} {size} bytes sha256 {digest} (kept; the service is away)")
                return 0
        kept, also = _standing(given.out)
        _tell(f"{error}{also}")
        if kept:
            return 1
        return 2 if isinstance(error, PullError) and error.refused else 3
    print(f"{given.out} {given.out.stat().st_size} bytes sha256 {digest}")
    return 0


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e8:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; a number more than 0")
    return value


class _Choice:
    """The size that --max-ms, --max-ram and --max-bytes ask for, which is chosen again where something
    changed."""

    def __init__(self, given: argparse.Namespace, base: dict[str, str]) -> None:
        self.given, self.base, self.again = given, dict(base), given.measure
        self.runtime, self.device = "", []
        self.limits = afford.Limits(given.max_ms, given.max_ram)
        if self.limits != afford.Limits():
            try:
                self.runtime = measure.runtime_of(given.runtime or "", base.get("format", ""))
                if given.max_ram is not None:
                    memory.check()
            except (measure.NoRuntime, memory.NotMeasured) as error:
                raise PullError(str(error), refused=True) from None
            self.device = measure.device(self.runtime, given.threads)
            if self.runtime == "onnx":
                self.base["format"] = "onnx"
        self.record = beside(target_of(given.out), "choice")
        asked = [given.url, given.arch, sorted(self.base.items())]
        self.key = [*asked, given.max_ms, given.max_bytes, given.max_ram, *self.device]
        kept = afford.remembered(self.record, self.key)
        self.etag = str(kept.get("etag", ""))
        self.known = (str(kept.get("arch", given.arch)), dict(kept.get("parameters", self.base)))

    def made(self, token: str) -> tuple[str, dict[str, str]]:
        """The arch and the parameters to pull. Raises PullError."""
        given = self.given
        try:
            with client_for(given.url, 30.0, token) as http:
                asking = Asking(http, given.url)
                whole = asking.get(f"/plan/{given.arch}", self.base)
                if not whole:
                    raise PullError(f"{given.arch}: {asking.refusal}", refused=True)
                if whole["etag"] == self.etag and not self.again:
                    return self.known
                chosen = self._measured(asking, whole) if self.runtime else self._fitting(asking)
            self.etag, self.known, self.again = str(whole["etag"]), chosen, False
            kept = {"etag": self.etag, "arch": chosen[0], "parameters": chosen[1]}
            afford.remember(self.record, self.key, kept)
        except atomic.BadTarget as error:
            raise PullError(str(error), refused=True) from None
        except (KeyError, TypeError, ValueError) as error:
            told = f"{given.url}: what it tells of {given.arch}'s sizes is broken: {error!r}"
            raise PullError(told[:300]) from None
        return chosen

    def _fitting(self, asking: Asking) -> tuple[str, dict[str, str]]:
        """By bytes alone the service chooses."""
        budget = {"budget": {"max_bytes": self.given.max_bytes}}
        told = asking.post({"arch": self.given.arch, **json_values(self.base), **budget})
        return told["arch"], dict(parse_qsl(told["location"].partition("?")[2]))

    def _measured(self, asking: Asking, whole: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        given, arch = self.given, self.given.arch
        found, about = afford.sizes(asking.get, arch, self.base, whole)
        most = given.max_bytes or math.inf
        fit = [size for size in found if size.bytes <= most]
        if not fit:
            least = min(size.bytes for size in found)
            raise PullError(f"--max-bytes {most}: the smallest has {least}", refused=True)

        try:
            size = afford.choose(
                fit,
                about,
                self.limits,
                runtime=self.runtime,
                threads=given.threads,
                dtype=self.base.get("dtype", "float32"),
                header=lambda: asking.header(arch, self.base),
                say=_tell,
            )
        except measure.TooMuch as error:
            raise PullError(str(error), refused=True) from None
        except (BadGraph, ImportError, memory.NotMeasured) as error:
            raise PullError(f"no candidate can be measured: {error}", refused=True) from None
        return arch, {**self.base, **dict(size.asked)}


class _Terminated(BaseException):
    """SIGTERM."""


def _watched(pulled: Callable[[], str], out: Path, seconds: float, command: str) -> int:
    """Keep `out` current until SIGTERM (0) or Ctrl-C (130); a first question that is refused ends it.

    The command runs whenever the file is another than that for which it last ended well, which is kept
    beside it: a device that lost its power in between runs it later.
    """
    known = False
    marked = beside(target_of(out), "seen")

    def ask() -> str:
        nonlocal known
        digest = pulled()
        known = True
        return digest

    def changed(digest: str) -> None:
        print(f"{out} {out.stat().st_size} bytes sha256 {digest}", flush=True)
        if command:
            watching.run(command, NEUMETA_FILE=str(out), NEUMETA_SHA256=digest)
            write_record(marked, {"seen": digest})

    def failed(error: Exception, wait: float) -> None:
        if isinstance(error, PullError) and error.refused and not known:
            raise error
        _tell(f"{error or type(error).__name__}{_standing(out)[1]}; asking again in {wait:.3g} s")

    def terminated(number: int, frame: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminated)
    expected = (PullError, watching.CommandFailed, OSError, httpx.HTTPError, httpx.InvalidURL)
    seen = str(read_record(marked).get("seen", "")) if command else ""
    try:
        watching.watch(ask, seconds, changed, failed, seen=seen, expected=expected)
    except _Terminated:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _tell(what: str) -> None:
    print(f"neumeta-pull: {what}".replace("\n", " "), file=sys.stderr)


def _standing(out: Path) -> tuple[bool, str]:
    """Whether there is a whole network at `out`, and what to say about what is there."""
    try:
        if not out.is_file():
            return False, ""
        check_file(out)
    except (PullError, OSError):
        return False, f"; {out} is there as it was, and is no whole network"
    return True, f"; {out} is still the last good file"


if __name__ == "__main__":
    sys.exit(main())
