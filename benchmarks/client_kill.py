"""Show: the client killed by SIGKILL at random moments never leaves a bad file, and resumes.

python -m benchmarks.client_kill [KILLS]   (default 200; the last line is one JSON object)
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.life import body, manifold
from benchmarks.local import hardware

GOOD = body(manifold("lenet"), 1.0)
PROMISED = f"sha-256=:{base64.b64encode(hashlib.sha256(GOOD).digest()).decode()}:"


class Slow(http.server.BaseHTTPRequestHandler):
    """Sends one body over about a second, by honest ranges, and notes where each answer began."""

    began: list[int] = []
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/plan/"):  # as a mirror that has files alone
            self.send_error(404)
            return
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.began.append(first)
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(GOOD) - 1}/{len(GOOD)}")
        self.send_header("Content-Length", str(len(GOOD) - first))
        self.send_header("ETag", '"tag"')
        self.send_header("Repr-Digest", PROMISED)
        self.end_headers()
        step = len(GOOD) // 50 + 1
        for offset in range(first, len(GOOD), step):
            try:
                self.wfile.write(GOOD[offset : offset + step])
            except OSError:
                return
            time.sleep(0.02)


def main(kills: int) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, chance = f"http://127.0.0.1:{server.server_port}", random.Random(0)
    killed = bad = finished = 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "net.safetensors"
        asked = ["--arch", "lenet", "--url", url, "--out", str(out)]
        command = [sys.executable, "-m", "neumeta.command", *asked]
        while killed < kills:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            time.sleep(chance.uniform(0.2, 1.2))
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
            if out.exists():
                bad += out.read_bytes() != GOOD
                finished += 1
                out.unlink()
        last = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        bad += last != 0 or out.read_bytes() != GOOD
        # The file, what it is known by, and the lock that a second client waits at.
        wanted = {out.name, f".{out.name}.pull", f".{out.name}.lock"}
        litter = len({each.name for each in Path(folder).iterdir()} - wanted)
    server.shutdown()
    assert Slow.began, "the client asked for nothing"
    resumed = [first for first in Slow.began if first]
    print(
        json.dumps(
            {
                "kills": killed,
                "bad_files": bad,
                "finished": finished,
                "transfers": len(Slow.began),
                "resumed": len(resumed),
                "bytes_not_sent_again": sum(resumed),
                "litter": litter,
                "hardware": hardware(),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
