"""A thousand devices of three kinds start together behind a real nginx: what reaches a cold service?

    python -m benchmarks.fleet [--clients 1000] [--models models/resnet20-cifar10.safetensors]

Each device is `neumeta.pull` in a thread with a connection of its own. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import ssl
import subprocess
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from benchmarks.local import Service, free_port, hardware
from neumeta import pull as client
from neumeta.failure import PullError

KINDS = ({"width": "0.25"}, {"width": "0.5"}, {"width": "0.5", "format": "onnx"})
CONFIG = """
daemon off; {user} pid {folder}/pid; error_log {folder}/error.log; worker_rlimit_nofile 8192;
events {{ worker_connections 4096; }}
http {{
    access_log off; {places}
    proxy_cache_path {folder}/cache keys_zone=files:1m;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass {url}; proxy_cache files; proxy_cache_lock on;
            proxy_cache_lock_timeout 60s; proxy_cache_lock_age 60s;
        }}
    }}
}}
"""


def asked(url: str) -> dict[str, int]:
    """Requests that reached the service, by route and status."""
    text = httpx.get(f"{url}/metrics").text
    found = re.findall(r'neumeta_requests_total{route="(/[wp]\S+)",status="(\d+)"} (\S+)', text)
    return {f"{route} {status}": int(float(count)) for route, status, count in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--models", type=Path, default=Path("models/resnet20-cifar10.safetensors"))
    parser.add_argument("--arch", default="resnet20")
    given = parser.parse_args()
    context, start = ssl.create_default_context(), threading.Barrier(given.clients + 1)

    with tempfile.TemporaryDirectory() as there, Service(given.models) as service:
        folder, port = Path(there), free_port()
        folder.chmod(0o777)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        user = "user root;" if os.getuid() == 0 else ""
        text = CONFIG.format(folder=folder, places=places, user=user, port=port, url=service.url)
        (folder / "nginx.conf").write_text(text)
        nginx = subprocess.Popen(["nginx", "-c", f"{folder}/nginx.conf"])
        address = f"http://127.0.0.1:{port}"

        def device(number: int) -> tuple[int, str, float]:
            kind, out = number % len(KINDS), folder / f"device{number}"
            with httpx.Client(base_url=address, timeout=120, verify=context) as http:
                start.wait()
                began = time.monotonic()
                try:
                    digest = client.pull(
                        address, given.arch, out, parameters=KINDS[kind], client=http
                    )
                except (PullError, OSError) as error:
                    return kind, f"failed: {error}", 0.0
            seconds = time.monotonic() - began
            whole = hashlib.sha256(out.read_bytes()).hexdigest() == digest
            return kind, digest if whole else "failed: not what was told", seconds

        try:
            time.sleep(1)
            with ThreadPoolExecutor(given.clients) as devices:
                waiting = [devices.submit(device, number) for number in range(given.clients)]
                start.wait()
                began = time.monotonic()
                done = [each.result() for each in waiting]
                seconds = time.monotonic() - began
            reached = asked(service.url)
            right = []
            for parameters in KINDS:
                body = httpx.get(f"{service.url}/weights/{given.arch}", params=parameters).content
                right.append(hashlib.sha256(body).hexdigest())
        finally:
            nginx.terminate()
            nginx.wait(20)
    failures = sorted({told for _, told, _ in done if told.startswith("failed")})
    print(
        json.dumps(
            {
                "benchmark": "fleet",
                "clients": given.clients,
                "kinds": len(KINDS),
                "reached_the_service": reached,
                "failures": sum(told.startswith("failed") for _, told, _ in done),
                "digests_right": sum(told == right[kind] for kind, told, _ in done),
                "seconds": round(seconds, 1),
                "slowest_seconds": round(max(took for _, _, took in done), 1),
                "why": failures[:3],
                "hardware": hardware(),
            }
        )
    )


if __name__ == "__main__":
    main()
