"""What is asked again and again: how often, what is done after a change, and what ends it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from neumeta import pull as client
from neumeta.command import main as neumeta_pull
from neumeta.failure import PullError
from neumeta.watch import LONGEST, CommandFailed, pause, run, watch


@pytest.mark.parametrize("seconds", [0.5, 60.0, 90_000.0])
def test_pauses_spread_devices_and_grow_while_it_fails(seconds: float) -> None:
    assert 0.85 * seconds < pause(seconds, 0, 0.0) < seconds < pause(seconds, 0, 0.999)
    assert pause(seconds, 0, 0.999) < 1.15 * seconds
    longest = [pause(seconds, failures, 0.999) for failures in (1, 2, 3, 40, 10**6)]
    assert longest == sorted(longest) and longest[-1] <= max(LONGEST, seconds)
    assert all(pause(seconds, failures, 0.0) >= seconds / 2 for failures in (1, 5, 50))


class Ended(Exception):
    """The test's time is over."""


def watched(
    answers: list[str | Exception], changed: Callable[[str], None]
) -> tuple[list[float], list[str]]:
    """The pauses and the failures of a watch that gets these answers."""
    waits, told = [], []
    left: Iterator[str | Exception] = iter(answers)

    def ask() -> str:
        answer = next(left, None)
        if answer is None:
            raise Ended
        if isinstance(answer, Exception):
            raise answer
        return answer

    def failed(error: Exception, wait: float) -> None:
        told.append(str(error))

    expected = (OSError, CommandFailed)
    with pytest.raises(Ended):
        watch(
            ask, 10, changed, failed,
            seen="a", expected=expected, sleep=waits.append, chance=lambda: 0.5,
        )  # fmt: skip
    return waits, told


def test_a_change_is_told_once_and_failures_back_off_until_one_succeeds() -> None:
    seen: list[str] = []
    away = OSError("away")
    waits, told = watched(["a", "b", "b", away, away, away, "b", "c"], seen.append)
    assert seen == ["b", "c"] and told == ["away"] * 3
    assert waits[:3] + waits[6:] == [10] * 5 and waits[3:6] == sorted(waits[3:6])
    assert waits[3] > 10


def test_a_command_that_fails_runs_again() -> None:
    tried: list[str] = []

    def changed(name: str) -> None:
        tried.append(name)
        if len(tried) == 1:
            raise CommandFailed("it ended with 1")

    _, told = watched(["b", "b", "b"], changed)
    assert tried == ["b", "b"] and told == ["it ended with 1"]


def test_a_command_line_is_a_shells_and_knows_the_file(tmp_path: Path) -> None:
    out = tmp_path / "told"
    run(f'echo "$NAME" > "{out}" && true', NAME="a b")
    assert out.read_text() == "a b\n"
    with pytest.raises(CommandFailed, match="ended with 3"):
        run("exit 3")


@pytest.mark.parametrize("more", [["--watch", "0"], ["--watch", "nan"], ["--on-change", "x"]])
def test_a_watch_that_cannot_be_is_refused(
    tmp_path: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        neumeta_pull(["--arch", "lenet", "--out", str(tmp_path / "x"), *more])
    assert ended.value.code == 2 and "--watch" in capsys.readouterr().err


def test_the_first_refusal_ends_a_watch_and_a_later_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*given: object, **options: object) -> str:
        raise PullError("status 422: width", refused=True)

    asked = ["--arch", "lenet", "--out", str(tmp_path / "x"), "--watch", "1"]
    monkeypatch.setattr(client, "pull", refused)
    assert neumeta_pull(asked) == 2
    assert "status 422" in capsys.readouterr().err
    rounds = 0

    def later(*given: object, **options: object) -> str:
        nonlocal rounds
        rounds += 1
        if rounds == 1:
            (tmp_path / "x").write_bytes(b"x")
            return "digest"
        if rounds == 2:
            refused()
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "pull", later)
    monkeypatch.setattr("neumeta.watch.time.sleep", lambda seconds: None)
    assert neumeta_pull(asked) == 130 and rounds == 3
    assert "status 422: width" in capsys.readouterr().err


def test_a_clock_that_jumps_changes_nothing_because_the_time_of_day_is_not_read() -> None:
    read = re.compile(
        r"time\.(time|time_ns|localtime|gmtime|ctime|strftime)\b|datetime|st_[mac]time"
    )
    sources = sorted(Path(str(client.__file__)).parent.rglob("*.py"))
    assert len(sources) > 20
    assert [path.name for path in sources if read.search(path.read_text())] == []
