"""The process's life on a real uvicorn: stalled readers, SIGTERM and SIGHUP under load, its log."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx

from benchmarks.life import hup, manifold, stall, stalled, term
from benchmarks.local import Service
from neumeta import checkpoint


def test_stalled_readers_are_cut_at_the_deadline_and_hurt_nobody() -> None:
    told = stalled(20, 2.0)
    assert told["cut"] == 20
    before, _, after = told["descriptors_before_during_after"]
    assert after <= before + 1
    first, _, last = told["resident_before_during_after"]
    assert last - first < 12 << 20
    assert 1.5 < told["all_gone_seconds"] < told["opened_seconds"] + 4
    assert told["other_client_max_ms"] < 2000


def test_sigterm_under_load_truncates_nothing() -> None:
    told = term(2.0, clients=8, drain=1.0)
    assert told["truncated"] == told["other_status"] == told["exit_code"] == 0
    assert told["whole"] > 10
    # Readiness goes first, the port a while later, the process last.
    assert 0 < told["not_ready_after_seconds"] < told["port_closed_after_seconds"]
    assert told["port_closed_after_seconds"] >= 0.9


def test_sighup_under_load_gives_whole_bodies_of_one_file_or_the_other() -> None:
    told = hup(2.5, clients=4, reloads=3)
    assert told["errors"] == told["mixed"] == 0
    assert (told["reloads_ok"], told["reloads_refused"]) == (2, 1) and told["bad_files"] == 1
    assert len(told["bodies"]) == 2


def test_the_end_of_an_answer_has_a_deadline_too_and_every_log_line_is_json(
    tmp_path: Path,
) -> None:
    file = tmp_path / "resnet56.safetensors"
    checkpoint.write(manifold(), file)
    flags = ("--send-timeout", "1", "--drain-seconds", "0", "--log-level", "info")
    service = Service(file, *flags, stderr=subprocess.PIPE)
    process, port, url = service.process, service.port, service.url
    try:
        whole = len(httpx.get(f"{url}/weights/resnet56", timeout=60).content)
        with socket.create_connection(("127.0.0.1", port)) as garbage:
            garbage.sendall(b"not http at all\r\n\r\n")
            assert b"400" in garbage.recv(100)
        opened = service.descriptors()
        # Somewhere in this row an answer's end fits the server's own buffer and not the kernel's:
        # the application is done with it, and no send waits.
        lengths = range(100_000, whole, 48 << 10)
        held = [stall(port, "/weights/resnet56", f"Range: bytes=0-{n}") for n in lengths]
        deadline = time.monotonic() + 15  # those whom the kernel holds go with the keep-alive
        left = len(held)
        while left > 0 and time.monotonic() < deadline:
            time.sleep(0.2)
            left = service.descriptors() - opened
        text = httpx.get(f"{url}/metrics").text
        for reader in held:
            reader.close()
        assert left <= 0
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    told = [json.loads(line) for line in errors.splitlines()]
    assert {"uvicorn.error", "neumeta", "neumeta.request"} <= {line["logger"] for line in told}
    requests = [line for line in told if line["logger"] == "neumeta.request"]
    cut = re.search(r"(?m)^neumeta_stalled_sends_total (\S+)", text)
    assert cut and float(cut.group(1)) > sum("stalled" in line for line in requests) > 0
    assert process.returncode == 0


def test_a_head_without_an_end_is_431(file: Path) -> None:
    with Service(file, "--drain-seconds", "0") as service:
        for endless in (b"GET /" + b"a" * (1 << 20), b"GET / HTTP/1.1\r\nX: " + b"a" * (1 << 20)):
            with socket.create_connection(("127.0.0.1", service.port), 5) as client:
                answer = b""
                try:
                    client.sendall(endless)
                    answer = client.recv(4096)
                except ConnectionError:
                    pass  # reset while it was still sending: cut all the same
                assert answer == b"" or answer.startswith(b"HTTP/1.1 431")
        with socket.create_connection(("127.0.0.1", service.port), 5) as client:
            client.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * 65_600)
            assert client.recv(4096).startswith(b"HTTP/1.1 431")
        assert httpx.get(f"{service.url}/livez").status_code == 200
