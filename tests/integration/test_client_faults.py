"""Real client processes against a real service: killed at any moment, several at once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx

from benchmarks.slow import slow
from neumeta import pull as client
from tests.test_pull import files


def command(url: str, out: Path) -> list[str]:
    asked = ["--arch", "lenet", "--url", url, "--out", str(out)]
    return [sys.executable, "-m", "neumeta.command", *asked]


def test_a_killed_client_leaves_no_bad_file_and_its_successor_resumes(
    url: str, tmp_path: Path
) -> None:
    body = httpx.get(f"{url}/weights/lenet").content
    out = tmp_path / "net.safetensors"
    incomplete = tmp_path / f".{out.name}.incomplete"
    chance = random.Random(0)
    with slow(body, 0.4) as (address, began):
        kills = 0
        for _ in range(3):
            before = incomplete.stat().st_size if incomplete.exists() else 0
            process = subprocess.Popen(command(address, out))
            until = time.monotonic() + 30
            while time.monotonic() < until and process.poll() is None:
                if incomplete.exists() and incomplete.stat().st_size > before:
                    break
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            kills += process.wait(20) == -signal.SIGKILL
            assert not out.exists() or out.read_bytes() == body
        assert kills and incomplete.exists()
        left = incomplete.stat().st_size
        assert subprocess.run(command(address, out), timeout=60).returncode == 0
        assert out.read_bytes() == body and began[-1] == left > 0
    assert set(files(tmp_path)) == {out.name, f".{out.name}.pull"}


def test_ctrl_c_is_one_line_and_the_next_pull_goes_on(url: str, tmp_path: Path) -> None:
    body, out = httpx.get(f"{url}/weights/lenet").content, tmp_path / "net.safetensors"
    incomplete = tmp_path / f".{out.name}.incomplete"
    with slow(body, 2.0) as (address, began):
        # Where the tests were started in the background, children would ignore Ctrl-C.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        asked = command(address, out)
        process = subprocess.Popen(asked, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
        until = time.monotonic() + 30
        while time.monotonic() < until and not (incomplete.exists() and incomplete.stat().st_size):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=20)
        assert process.returncode == 130 and len(error.strip().splitlines()) == 1, error
        assert "interrupted" in error and not out.exists()
        left = incomplete.stat().st_size
        assert subprocess.run(command(address, out), timeout=60).returncode == 0
        assert out.read_bytes() == body and began[-1] == left > 0


def test_several_processes_pull_one_file(url: str, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pulls = [subprocess.Popen(command(url, out), env=env, stdout=-1, text=True) for _ in range(4)]
    told = [process.communicate(timeout=60)[0] for process in pulls]
    assert [process.returncode for process in pulls] == [0] * 4 and len(set(told)) == 1
    assert hashlib.sha256(out.read_bytes()).hexdigest() in told[0]
    assert set(files(tmp_path)) == {out.name, f".{out.name}.pull"}


def test_the_same_pull_in_an_event_loop(url: str, tmp_path: Path) -> None:
    out = tmp_path / "net.safetensors"
    digest = asyncio.run(client.apull(url, "lenet", out, parameters={"width": "0.5"}))
    assert hashlib.sha256(out.read_bytes()).hexdigest() == digest
