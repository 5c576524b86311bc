"""`neumeta-pull --watch` and a real service that is given other manifolds, and that goes away."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from benchmarks.local import Service
from neumeta import checkpoint
from tests.conftest import lenet
from tests.integration.test_client_faults import command


def until(met: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.02)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def test_a_watched_file_follows_the_service_and_outlives_it(file: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "net.safetensors", tmp_path / "log"
    told = f'echo "$NEUMETA_SHA256 $(sha256sum < $NEUMETA_FILE)" >> {log}'
    with Service(file) as service:
        asked = command(service.url, out)
        watched = [*asked, "--watch", "0.1", "--on-change", told]
        process = subprocess.Popen(watched, stdout=-1, stderr=-1, text=True)
        try:
            until(lambda: log.exists() and len(log.read_text().splitlines()) == 1)
            first = sha256(out)
            checkpoint.write(lenet(seed=7), file)
            service.process.send_signal(signal.SIGHUP)
            until(lambda: len(log.read_text().splitlines()) == 2)
            second = sha256(out)
            assert second != first
            assert (
                second
                == hashlib.sha256(httpx.get(f"{service.url}/weights/lenet").content).hexdigest()
            )
            for line, digest in zip(log.read_text().splitlines(), (first, second), strict=True):
                assert line.split()[:2] == [digest, digest]
            service.kill()
            assert process.poll() is None
            time.sleep(0.5)
            assert process.poll() is None and sha256(out) == second
        finally:
            process.send_signal(signal.SIGTERM)
            printed, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert len(printed.splitlines()) == 2 and "Traceback" not in errors
    assert all(line.startswith("neumeta-pull: ") for line in errors.splitlines())
    with contextlib.suppress(FileNotFoundError):
        assert (tmp_path / f".{out.name}.incomplete").stat() is None
