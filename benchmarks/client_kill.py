"""Show: the client killed by SIGKILL at random moments never leaves a bad file, and resumes.

python -m benchmarks.client_kill [KILLS]   (default 200; the last line is one JSON object)
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.life import body, manifold
from benchmarks.local import hardware
from benchmarks.slow import slow

GOOD = body(manifold("lenet"), 1.0)


def main(kills: int) -> None:
    chance = random.Random(0)
    killed = bad = finished = 0
    with tempfile.TemporaryDirectory() as folder, slow(GOOD) as (url, began):
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
    assert began, "the client asked for nothing"
    resumed = [first for first in began if first]
    print(
        json.dumps(
            {
                "kills": killed,
                "bad_files": bad,
                "finished": finished,
                "transfers": len(began),
                "resumed": len(resumed),
                "bytes_not_sent_again": sum(resumed),
                "litter": litter,
                "hardware": hardware(),
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
