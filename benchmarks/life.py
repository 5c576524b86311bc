"""What a service survives: readers that stall, SIGTERM and SIGHUP under load. One command each:

    python -m benchmarks.life stalled|term|hup|widths [--readers 200] [--seconds 20]

Starts its own service on random-parameter manifolds and a free port; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import signal
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.local import Service, hardware
from benchmarks.manifolds import random_manifold
from neumeta import checkpoint, wire
from neumeta.manifold import Manifold
from neumeta.sample import sample

Outcome = tuple[str, int, str]
"""What became of a request ('whole', 'truncated', 'refused', 'status'), its status, its sha256."""
CPU = ("--device", "cpu")
"""As what is compared with the answers is made here."""


def manifold(arch: str = "resnet56", seed: int = 0) -> Manifold:
    """Random parameters: what is served is as large as the real network, and cheap to sample."""
    return random_manifold(arch, deviation=0.1, seed=seed)


def body(held: Manifold, width: float) -> bytes:
    """The file that a service gives of this width, made here."""
    torch.set_num_threads(1)  # as a service does: bytes may depend on it
    architecture = held.space.architecture(width)
    plan = wire.plan(held, architecture, "float32")
    return b"".join(wire.stream(plan, sample(held, architecture)))


def stall(port: int, path: str, *headers: str) -> socket.socket:
    """A reader with a small buffer that takes 1 KB and no more."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    reader.connect(("127.0.0.1", port))
    lines = [f"GET {path} HTTP/1.1", "Host: stalled", *headers]
    reader.sendall("\r\n".join(lines).encode() + b"\r\n\r\n")
    taken = 0
    while taken < 1024:
        taken += len(reader.recv(1024 - taken))
    return reader


def stalled(readers: int, timeout: float, path: str = "/weights/resnet56") -> dict[str, Any]:
    """Readers that stall: when they were cut, memory, and what another client waits meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.safetensors"
        checkpoint.write(manifold(), file)
        service = Service(file, *CPU, "--send-timeout", str(timeout))
        try:
            size = len(httpx.get(service.url + path, timeout=60).content)
            before = service.memory(), service.descriptors()
            began = time.perf_counter()
            held = [stall(service.port, path) for _ in range(readers)]
            opened = time.perf_counter() - began
            during = service.memory(), service.descriptors()
            waits: list[float] = []
            # Half way to their deadline nobody may be gone; a second after it nobody may be left.
            in_flight = []
            with httpx.Client(base_url=service.url, timeout=30) as client:
                while (now := time.perf_counter() - began) < opened + timeout + 1.5:
                    start = time.perf_counter()
                    good = client.get("/weights/resnet56?width=0.5")
                    waits.append(time.perf_counter() - start)
                    assert good.status_code == 200
                    in_flight.append((now, service.descriptors() - before[1]))
                    time.sleep(0.1)
            after = service.memory(), service.descriptors()
            cut = asyncio.run(service.metric("neumeta_stalled_sends_total"))
            for reader in held:
                reader.close()
            return {
                "readers": readers,
                "body_bytes": size,
                "deadline_seconds": timeout,
                "cut": int(cut),
                "all_gone_seconds": round(next(t for t, n in reversed(in_flight) if n > 1), 1),
                "opened_seconds": round(opened, 2),
                "resident_before_during_after": [before[0], during[0], after[0]],
                "descriptors_before_during_after": [before[1], during[1], after[1]],
                "other_client_median_ms": round(1e3 * sorted(waits)[len(waits) // 2], 1),
                "other_client_max_ms": round(1e3 * max(waits), 1),
            }
        finally:
            service.stop()


async def load(url: str, paths: list[str], stop: asyncio.Event, clients: int) -> list[Outcome]:
    """Clients that ask for the paths in turn until the port is closed or `stop` is set."""
    outcomes: list[Outcome] = []

    async def one(offset: int) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            turn = offset
            while not stop.is_set():
                turn += 1
                path, status, started = paths[turn % len(paths)], 0, False
                digest = hashlib.sha256()
                try:
                    async with client.stream("GET", path) as answer:
                        status, started = answer.status_code, True
                        async for part in answer.aiter_bytes():
                            digest.update(part)
                    kind = "whole" if status == 200 else "status"
                except httpx.TransportError:
                    kind = "truncated" if started else "refused"
                outcomes.append((kind, status, digest.hexdigest()))
                if kind == "refused":
                    return

    await asyncio.gather(*(one(each) for each in range(clients)))
    return outcomes


def term(seconds: float, clients: int = 16, drain: float = 3.0) -> dict[str, Any]:
    """SIGTERM under load: what became of every request, and when readiness and the port went."""

    async def scene(service: Service) -> dict[str, Any]:
        stop = asyncio.Event()
        # Cold files too: seeds do nothing without noise, so other widths.
        paths = [f"/weights/resnet56?width={0.25 + step / 128}" for step in range(97)]
        running = asyncio.create_task(load(service.url, paths, stop, clients))
        await asyncio.sleep(seconds)
        service.process.send_signal(signal.SIGTERM)
        began, unready, port_closed = time.perf_counter(), 0.0, 0.0
        async with httpx.AsyncClient(base_url=service.url, timeout=5) as probe:
            while not port_closed:
                try:
                    answer = await probe.get("/readyz", headers={"connection": "close"})
                    if answer.status_code == 503 and not unready:
                        unready = time.perf_counter() - began
                except httpx.TransportError:
                    port_closed = time.perf_counter() - began
                await asyncio.sleep(0.02)
        outcomes = await running
        code = await asyncio.to_thread(service.process.wait, 60)
        kinds = Counter(kind for kind, _, _ in outcomes)
        return {
            "clients": clients,
            "requests": len(outcomes),
            "whole": kinds["whole"],
            "truncated": kinds["truncated"],
            "other_status": kinds["status"],
            "refused_after_the_port_closed": kinds["refused"],
            "not_ready_after_seconds": round(unready, 3),
            "port_closed_after_seconds": round(port_closed, 3),
            "exited_after_seconds": round(time.perf_counter() - began, 3),
            "exit_code": code,
        }

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.safetensors"
        checkpoint.write(manifold(), file)
        service = Service(file, *CPU, "--drain-seconds", str(drain), "--cache-bytes", "30000000")
        try:
            return asyncio.run(scene(service))
        finally:
            if service.process.poll() is None:
                service.process.kill()
                service.process.wait()


def hup(seconds: float, clients: int = 8, reloads: int = 6) -> dict[str, Any]:
    """SIGHUP under load, good files and a bad one: every body is wholly one file's or the other's."""
    path = "/weights/resnet56?width=0.5"

    async def scene(service: Service, file: Path, raws: list[bytes]) -> dict[str, Any]:
        stop, expected = asyncio.Event(), set()
        expected.add(hashlib.sha256(httpx.get(service.url + path).content).hexdigest())
        running = asyncio.create_task(load(service.url, [path], stop, clients))
        bad = 0
        for turn in range(reloads):
            await asyncio.sleep(seconds / (reloads + 1))
            raw = raws[(turn + 1) % 2]
            if turn % 3 == 2:  # damaged, and so refused
                raw, bad = raw[:-5] + bytes(5), bad + 1
            fresh = file.with_suffix(".new")
            fresh.write_bytes(raw)
            fresh.replace(file)
            service.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(seconds / (reloads + 1))
        stop.set()
        outcomes = await running
        name = 'neumeta_reloads_total{outcome="%s"}'
        ok = await service.metric(name % "ok")
        failed = await service.metric(name % "failed")
        kinds = Counter(kind for kind, _, _ in outcomes)
        return {
            "requests": len(outcomes),
            "errors": len(outcomes) - kinds["whole"],
            "bodies": dict(Counter(digest[:12] for _, _, digest in outcomes)),
            "digests": sorted({digest for _, _, digest in outcomes}),
            "reloads_ok": int(ok),
            "reloads_refused": int(failed),
            "bad_files": bad,
        }

    with tempfile.TemporaryDirectory() as folder:
        raws: list[bytes] = []
        wholes: set[str] = set()
        file = Path(folder) / "m.safetensors"
        for seed in (1, 0):
            held = manifold(seed=seed)
            checkpoint.write(held, file)
            raws.insert(0, file.read_bytes())
            wholes.add(hashlib.sha256(body(held, 0.5)).hexdigest())
        service = Service(file, *CPU)
        try:
            told = asyncio.run(scene(service, file, raws))
        finally:
            service.stop()
        told["mixed"] = len(set(told.pop("digests")) - wholes)
        told["checkpoint_bytes"] = len(raws[0])
        return told


def widths(count: int, bound: int = 1_000_000) -> dict[str, Any]:
    """Distinct widths in a row: the cache's bytes, memory, and what a client of one file waits."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "m.safetensors"
        checkpoint.write(manifold("lenet"), file)
        service = Service(file, *CPU, "--cache-bytes", str(bound))
        try:
            most, waits, tags, first = 0.0, [], set(), 0
            space = manifold("lenet").space
            # The finest steps of each group: those of its largest extent.
            full = [max(n for name, n in space.extents if name == each) for each in space.groups]
            with httpx.Client(base_url=service.url, timeout=60) as client:
                for step in range(count):
                    part = [step // 25**place for place in range(len(full))]
                    chosen = [(c // 4 + p % 25) / c for c, p in zip(full, part, strict=True)]
                    answer = client.get(f"/weights/lenet?width={','.join(map(str, chosen))}")
                    assert answer.status_code == 200, answer.text
                    tags.add(answer.headers["etag"])
                    if step % 50 == 0:
                        began = time.perf_counter()
                        assert client.get("/weights/lenet?width=0.25").status_code == 200
                        waits.append(time.perf_counter() - began)
                        most = max(most, asyncio.run(service.metric("neumeta_cache_bytes")))
                        first = first or service.memory() * (step >= count // 4)
            last = service.memory()
        finally:
            service.stop()
    return {
        "requests": count,
        "distinct_files": len(tags),
        "cache_bound_bytes": bound,
        "cache_most_bytes": int(most),
        "resident_after_a_quarter_and_last": [first, last],
        "other_file_max_ms": round(1e3 * max(waits), 1),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.life", description=__doc__)
    parser.add_argument("show", choices=["stalled", "term", "hup", "widths"])
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--deadline", type=float, default=20.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    if given.show == "widths":
        told = widths(given.count)
    elif given.show == "stalled":
        told = stalled(given.readers, given.deadline)
    else:
        told = {"term": term, "hup": hup}[given.show](given.seconds)
    print(
        json.dumps({"show": given.show, "hardware": hardware(), "torch": torch.__version__, **told})
    )


if __name__ == "__main__":
    main()
