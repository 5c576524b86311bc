"""The client and the service with real proxies between them: squid, nginx, a prefix, a unix socket."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.local import Service, free_port
from neumeta import checkpoint, transfer
from neumeta import pull as client
from service import cli
from service.app import BRIEFLY
from tests.conftest import lenet
from tests.integration.test_client_faults import command as pulled_by
from tests.integration.test_client_proxy import Proxy

PATH = "/weights/lenet?width=0.5"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that a proxy which gave up root can write."""
    path = Path(tempfile.mkdtemp(prefix="neumeta-"))
    path.chmod(0o777)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def running(port: int, command: list[str], folder: Path) -> Iterator[str]:
    """A proxy on this port until the block ends; its address."""
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    with (folder / "told").open("wb") as told:
        process = subprocess.Popen(command, stdout=told, stderr=told)
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "told").read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def squid(folder: Path, more: str = "") -> Iterator[str]:
    """Squid as it comes (what it stores and when it asks again is its default policy), or with more in
    its configuration."""
    port = free_port()
    (folder / "squid.conf").write_text(
        more + "\n"
        f"http_port 127.0.0.1:{port}\nhttp_access allow all\npid_filename none\n"
        f"access_log stdio:{folder}/access.log\ncache_log {folder}/cache.log\n"
        f"coredump_dir {folder}\nshutdown_lifetime 0 seconds\nvisible_hostname test\n"
    )
    with running(port, ["squid", "-N", "-f", f"{folder}/squid.conf"], folder) as address:
        yield address


@contextlib.contextmanager
def nginx(folder: Path, server: str) -> Iterator[str]:
    """nginx with this inside its server block."""
    port = free_port()
    places = " ".join(
        f"{kind}_temp_path {folder}/{kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"daemon off; {user} pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {places}\n"
        f"proxy_cache_path {folder}/cache keys_zone=files:1m;\n"
        f"server {{ listen 127.0.0.1:{port}; {server} }} }}\n"
    )
    with running(port, ["nginx", "-c", f"{folder}/nginx.conf"], folder) as address:
        yield address


def pulls(url: str, folder: Path, good: bytes, *names: str, **environment: str) -> None:
    """One device after the other pulls the file and has it in the end."""
    for name in names:
        out = folder / name
        done = subprocess.run(
            [*pulled_by(url, out), "--width", "0.5"],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == good


@pytest.fixture(scope="module")
def good(url: str) -> bytes:
    """The file, made by another path, so that the one that is pulled is cold behind the proxies."""
    return httpx.get(f"{url}{PATH}").content


@pytest.fixture
def cold(file: Path) -> Iterator[str]:
    """A service that has made nothing yet."""
    with Service(file) as service:
        yield service.url


def test_behind_squid_a_cold_file_is_pulled_and_then_kept(
    cold: str, good: bytes, folder: Path, tmp_path: Path
) -> None:
    with squid(folder) as proxy:
        pulls(cold, tmp_path, good, "a", "b", "c", http_proxy=proxy)
        for _ in range(100):  # written a moment later
            told = (folder / "access.log").read_text()
            if told.count("HIT/200") >= 2 * 2:
                break
            time.sleep(0.05)
        # Where it is and what it is were asked for once.
        assert len(re.findall(r"TCP_MISS/200 .* GET \S+/plan/lenet", told)) == 1, told
        assert len(re.findall(r"TCP_MISS/200 .* GET \S+/weights/lenet", told)) == 1, told
        assert len(re.findall(r"HIT/200 .* GET \S+/weights/lenet", told)) == 2, told
        # By the URL that may mean another file tomorrow it asks the service each time.
        for _ in range(2):
            there = httpx.get(f"{cold}{PATH}", proxy=proxy)
            assert there.content == good and there.headers["repr-digest"]
        for _ in range(100):
            told = (folder / "access.log").read_text()
            if "TCP_REFRESH_UNMODIFIED/200" in told:
                break
            time.sleep(0.05)
    assert "TCP_REFRESH_UNMODIFIED/200" in told, told


def test_a_copy_that_squid_keeps_without_a_digest_gets_it_from_a_304(
    cold: str, good: bytes, folder: Path, tmp_path: Path
) -> None:
    """As a service that lets cold answers be stored would have left it there."""

    def storable(answer: bytes, _: socket.socket) -> bytes:
        answer = re.sub(rb"(?i)repr-digest: [^\r]*\r\n", b"", answer)
        return re.sub(rb"(?i)cache-control: [^\r]*", b"Cache-Control: public, no-cache", answer)

    origin = Proxy(cold, storable, broken=1)
    with squid(folder) as proxy:
        kept = httpx.get(f"{origin.url}{PATH}", proxy=proxy)
        assert kept.content == good and "repr-digest" not in kept.headers
        pulls(origin.url, tmp_path, good, "a", "b", http_proxy=proxy)
        again = httpx.get(f"{origin.url}{PATH}", proxy=proxy)
        assert again.headers["repr-digest"] and "hit" in again.headers["x-cache"].lower()


@pytest.mark.parametrize("ignored", ["Cache-Control", "Cache-Control Expires X-Accel-Expires Vary"])
def test_behind_nginx_that_ignores_what_caches_are_told(
    cold: str, good: bytes, folder: Path, tmp_path: Path, ignored: str
) -> None:
    location = (
        f"location / {{ proxy_pass {cold}; proxy_cache files; proxy_cache_valid 200 10m;"
        f" proxy_ignore_headers {ignored}; add_header X-Cache $upstream_cache_status always; }}"
    )
    with nginx(folder, location) as address:
        pulls(address, tmp_path, good, "a", "b", "c")
        plan = httpx.get(f"{address}{PATH.replace('weights', 'plan')}").json()
        assert httpx.get(address + plan["address"]).headers["x-cache"] == "HIT"


def test_a_fleet_behind_nginx_costs_a_request_a_file_and_stale_copies_are_found_out(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds, each = ({"width": "0.25"}, {"width": "0.5"}, {"format": "onnx"}), 8
    with Service(file) as service:
        # The first as docs/device.md has it; the second is blind to queries, and to what it is told.
        server = f"""
            location / {{ proxy_pass {service.url}; proxy_cache files; proxy_cache_lock on;
                proxy_cache_lock_timeout 60s; proxy_cache_lock_age 60s; }}
            location /stale/ {{ proxy_pass {service.url}/; }}
            location = /stale/weights {{ proxy_pass {service.url}/weights; }}
            location /stale/weights/ {{ proxy_pass {service.url}/weights/; proxy_cache files;
                proxy_cache_key $uri; proxy_cache_valid 200 10m;
                proxy_ignore_headers Cache-Control X-Accel-Expires; }}
        """

        def asked() -> dict[str, int]:
            text = httpx.get(f"{service.url}/metrics").text
            found = re.findall(r'neumeta_requests_total{route="(\S+)",status="200"} (\S+)', text)
            return {route: int(float(count)) for route, count in found}

        # For a day, whatever it is told; a plan and its file fit together then as they do now.
        keeps = "refresh_pattern . 1440 100% 1440 override-expire override-lastmod"
        with nginx(folder, server) as address, squid(folder, keeps) as proxy:

            def by_squid() -> bytes:
                with httpx.Client(base_url=service.url, proxy=proxy, timeout=60) as http:
                    client.pull(
                        service.url, "lenet", tmp_path / "net", parameters=half, client=http
                    )
                return (tmp_path / "net").read_bytes()

            def pulled(number: int) -> str:
                kind, out = kinds[number % len(kinds)], tmp_path / str(number)
                with httpx.Client(base_url=address, timeout=60) as http:
                    digest = client.pull(address, "lenet", out, parameters=kind, client=http)
                assert hashlib.sha256(out.read_bytes()).hexdigest() == digest
                return digest

            began = time.monotonic()
            with ThreadPoolExecutor(len(kinds) * each) as devices:
                digests = list(devices.map(pulled, range(len(kinds) * each)))
            rounds = 1 + int((time.monotonic() - began) / 10)  # where a file is, is told for 10 s
            cost = asked()
            assert cost["/weights"] == len(kinds) == len(set(digests))
            assert len(kinds) <= cost["/plan"] <= len(kinds) * rounds

            out, half = tmp_path / "stale", {"width": "0.5"}
            client.pull(f"{address}/stale", "lenet", out, parameters=half)
            old = out.read_bytes()
            assert by_squid() == old
            kept = time.monotonic()
            checkpoint.write(lenet(seed=7), file)
            service.process.send_signal(signal.SIGHUP)
            now = httpx.get(f"{service.url}{PATH}")
            for _ in range(200):
                if now.content != old:
                    break
                time.sleep(0.05)
                now = httpx.get(f"{service.url}{PATH}")
            there = now.headers["content-location"]
            assert httpx.get(f"{address}/stale{there}").content == old  # it does serve a stale one
            client.pull(f"{address}/stale", "lenet", out, parameters=half)
            assert out.read_bytes() == now.content != old

            # A plan may be ten seconds old, as the service says itself, and no more.
            assert transfer.NO_OLDER == {"Cache-Control": BRIEFLY}
            time.sleep(max(0.0, kept + 2 - time.monotonic()))  # ages are whole seconds
            plan = httpx.get(f"{service.url}{PATH.replace('weights', 'plan')}", proxy=proxy).json()
            assert httpx.get(f"{service.url}{plan['address']}", proxy=proxy).content == old
            monkeypatch.setattr(transfer, "NO_OLDER", {"Cache-Control": "max-age=1"})
            assert by_squid() == now.content


def test_behind_a_prefix_and_a_unix_socket_everything_is_found(
    file: Path, good: bytes, folder: Path, tmp_path: Path
) -> None:
    path = folder / "service.sock"
    with Socket(file, path, "--root-path", "/fleet", "--log-level", "info") as service:
        strips = f"location /fleet/ {{ proxy_pass http://unix:{path}:/; {FORWARDED} }}"
        keeps = f"location / {{ proxy_pass http://unix:{path}; {FORWARDED} }}"
        for how in (strips, keeps):
            with nginx(folder, how) as address:
                docs = httpx.get(f"{address}/fleet/docs").text
                (there,) = re.findall(r"url: '([^']*)'", docs)
                assert there == "/fleet/openapi.json"
                document = httpx.get(f"{address}{there}").json()
                assert document["servers"] == [{"url": "/fleet"}]
                assert (
                    httpx.get(f"{address}/fleet/").headers["content-type"].startswith("text/html")
                )
                answer = httpx.get(f"{address}/fleet{PATH}")
                assert httpx.get(address + answer.headers["content-location"]).content == good
                asked = {"arch": "lenet", "width": 0.5}
                plan = httpx.post(f"{address}/fleet/plan", json=asked).json()
                assert httpx.get(address + plan["location"]).content == good
                out = tmp_path / "net"
                client.pull(f"{address}/fleet", "lenet", out, parameters={"width": "0.5"})
                assert out.read_bytes() == good
    lines = [json.loads(line) for line in service.errors.splitlines()]
    clients = {line["client"] for line in lines if line["message"] == "request"}
    assert clients == {"127.0.0.1"}  # nginx's client, as it says; not "unix"


FORWARDED = "proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;"


class Socket:
    """A service on a unix socket, until the block ends."""

    def __init__(self, models: Path, path: Path, *flags: str) -> None:
        command = [sys.executable, "-m", "service.cli", "--models", str(models), "--uds", str(path)]
        self.process = subprocess.Popen(
            [*command, "--drain-seconds", "0", *flags], stdout=-1, stderr=-1, text=True
        )
        self.errors = ""

    def __enter__(self) -> Socket:
        assert self.process.stdout
        self.welcome = "".join(line for _, line in zip(range(3), self.process.stdout, strict=False))
        return self

    def __exit__(self, *why: object) -> None:
        self.process.terminate()
        _, self.errors = self.process.communicate(timeout=30)


def test_a_unix_socket_is_made_taken_over_and_removed(file: Path, folder: Path) -> None:
    path = folder / "service.sock"
    with Socket(file, path) as first:
        (shown,) = re.findall(r"curl .*", first.welcome)
        done = subprocess.run(["bash", "-c", shown], cwd=folder, capture_output=True, timeout=60)
        assert done.returncode == 0 and (folder / "net.safetensors").stat().st_size > 1000
        # While it listens nobody takes its place.
        second = Socket(file, path)
        _, error = second.process.communicate(timeout=60)
        assert second.process.returncode == 2 and len(error.strip().splitlines()) == 1
        assert "another process listens" in error
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(transport=transport, base_url="http://x") as asking:
            assert asking.get("/livez").status_code == 200
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    assert path.exists()  # a killed process cannot remove it
    with Socket(file, path) as third:
        assert "--unix-socket" in third.welcome
    assert third.process.returncode == 0 and not path.exists()


@pytest.mark.parametrize("what", ["file", "folder", "no folder", "too long"])
def test_where_no_socket_can_be_is_one_line_and_stays_as_it_was(
    file: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "taken"
    if what == "file":
        path.write_text("precious")
    elif what == "folder":
        path.mkdir()
    else:
        path = path / "absent" if what == "no folder" else tmp_path / ("x" * 120)
    assert cli.serve(["--models", str(file), "--uds", str(path)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert str(path) in error and "uds" in error
    assert what != "file" or path.read_text() == "precious"
