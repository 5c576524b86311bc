"""The Dockerfile without an engine: its steps in a clean folder and environment. One command:

    python -m benchmarks.image [--dockerfile docker/Dockerfile] [--torch-index URL]

Each stage has a root folder; COPY obeys .dockerignore; RUN is executed where it needs only Python and
that folder, and is listed under "not_run" otherwise. The build stage is deleted before the service
starts from the final one, with the image's environment and entry point. Knows no base image: Python
is this one, and the user is who runs it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
TRAINING = ("sklearn", "scipy", "PIL", "tqdm", "tensorboard", "matplotlib", "torchvision", "pytest")
PLACES = re.compile(r"(?<![\w./:])/(venv|app|models)\b")
"""The image's own folders, where a command names them."""


def steps(dockerfile: Path) -> Iterator[tuple[str, str]]:
    """(instruction, argument) of each step, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.M).replace("\\\n", " ")
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.strip().partition(" ")
        yield word.upper(), rest.strip()


def ignored(name: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps this path, relative to the context, out: the last match decides."""
    out = False
    parents = ["/".join(name.split("/")[: end + 1]) for end in range(name.count("/") + 1)]
    for pattern in patterns:
        kept, pattern = pattern.startswith("!"), pattern.lstrip("!")
        ends = [pattern, pattern.removeprefix("**/")] if pattern.startswith("**/") else [pattern]
        if any(fnmatch.fnmatch(each, end) for each in parents for end in ends):
            out = not kept
    return out


class Image:
    """The stages of a Dockerfile as folders; `root` is the one being built."""

    def __init__(self, folder: Path, index: str) -> None:
        self.folder, self.root, self.index = folder, folder / "root", index
        self.environment: dict[str, str] = {}
        self.stage, self.workdir, self.entry, self.check = "", "/", [""], [""]
        self.skipped: list[str] = []
        self.seconds: dict[str, float] = {}
        lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
        self.patterns = [line for line in lines if line and not line.startswith("#")]

    def inside(self, command: str) -> str:
        """The command with the image's folders where they are here."""
        return PLACES.sub(rf"{self.root}/\1", command)

    def execute(self, word: str, rest: str) -> None:
        """One step."""
        if word == "FROM":
            if self.root.exists():  # the next stage has the same path: a venv cannot be moved
                self.root.rename(self.folder / self.stage)
            self.stage, self.workdir = rest.partition(" AS ")[2], "/"
            self.root.mkdir()
            self.environment = {}
        elif word == "ARG":
            name, _, default = rest.partition("=")
            given = self.index if name == "TORCH_INDEX" and self.index else default
            self.environment[name] = given
        elif word == "WORKDIR":
            self.workdir = rest
            (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif word == "ENV":
            self.environment |= dict(pair.split("=", 1) for pair in shlex.split(rest))
        elif word == "COPY":
            self.copy(shlex.split(rest))
        elif word == "RUN":
            self.run(rest)
        elif word == "ENTRYPOINT":
            self.entry = json.loads(rest)
        elif word == "HEALTHCHECK":
            self.check = json.loads(rest.partition("CMD ")[2])
        else:
            self.skipped.append(f"{word} {rest}")

    def copy(self, words: list[str]) -> None:
        """COPY, from the context or from an earlier stage."""
        context = REPOSITORY
        if words[0].startswith("--from="):
            context = self.folder / words.pop(0).removeprefix("--from=")
        *sources, target = words
        into = self.root / (Path(self.workdir) / target).as_posix().lstrip("/")
        for source in sources:
            path = context / source.lstrip("/")
            if path.is_dir():
                shutil.copytree(path, into, symlinks=True, ignore=self.unwanted(context))
            elif context == REPOSITORY and ignored(source, self.patterns):
                raise SystemExit(f"{source}: in .dockerignore, and copied")
            else:
                name = into / path.name if target.endswith("/") else into
                name.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, name)

    def unwanted(self, context: Path) -> Any:
        """What copytree leaves out: what .dockerignore says, of the context only."""

        def choose(folder: str, names: list[str]) -> list[str]:
            if context != REPOSITORY:
                return []
            within = Path(folder).relative_to(context).as_posix()
            return [name for name in names if ignored(f"{within}/{name}", self.patterns)]

        return choose

    def run(self, command: str) -> None:
        """RUN, where it needs only Python and the root."""
        if not command.startswith(("python ", "rm -rf /venv/")):
            self.skipped.append(f"RUN {command}")
            return
        here = self.inside(command)
        if here.startswith("python "):
            here = f"{shlex.quote(sys.executable)} {here.removeprefix('python ')}"
        here = here.replace("-m pip ", "-m pip --disable-pip-version-check ")
        passed = {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")}
        cwd, started = self.root / self.workdir.lstrip("/"), time.monotonic()
        subprocess.run(
            ["sh", "-ec", here], cwd=cwd, env=passed | self.environment, check=True, timeout=900
        )
        self.seconds[command] = round(time.monotonic() - started, 1)


def size(folder: Path) -> int:
    """Bytes of the files below."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def state(folder: Path) -> str:
    """A digest of every path, length and time below: the same while nothing was written."""
    found = sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))
    return hashlib.sha256(repr(found).encode()).hexdigest()


def serve(image: Image) -> dict[str, Any]:
    """Start the entry point on the image's environment; wait, ask, check its health, stop it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    chosen = {name: image.inside(value) for name, value in image.environment.items()}
    chosen |= {"NEUMETA_HOST": "127.0.0.1", "NEUMETA_PORT": port, "PATH": "/usr/bin:/bin"}
    url, started = f"http://127.0.0.1:{port}", time.monotonic()
    entry = [image.inside(word) for word in image.entry]
    process = subprocess.Popen(entry, env=chosen, cwd=image.root)
    try:
        while True:
            with contextlib.suppress(urllib.error.URLError):
                if urllib.request.urlopen(f"{url}/readyz", timeout=2).status == 200:
                    break
            if process.poll() is not None or time.monotonic() - started > 120:
                raise SystemExit(f"the service did not start: exit code {process.poll()}")
            time.sleep(0.02)
        ready = time.monotonic() - started
        status = Path(f"/proc/{process.pid}/status").read_text()
        with urllib.request.urlopen(f"{url}/weights/resnet20?width=0.5", timeout=30) as answer:
            body = answer.read()
            assert len(body) == int(answer.headers["Content-Length"])
        check = [image.inside(word).replace(":8000", f":{port}") for word in image.check]
        health = subprocess.run(check, env=chosen, timeout=10).returncode
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        unhealthy = subprocess.run(check, env=chosen, stderr=subprocess.DEVNULL).returncode
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return {
        "seconds_to_ready": round(ready, 2),
        "resident_mib": int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) >> 10,
        "weights_bytes": len(body),
        "health_check": health,
        "health_check_when_stopped": unhealthy,
        "exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dockerfile", default="docker/Dockerfile")
    parser.add_argument("--torch-index", default="", help="instead of the Dockerfile's TORCH_INDEX")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="image-") as name:
        image = Image(Path(name), given.torch_index)
        for word, rest in steps(REPOSITORY / given.dockerfile):
            print(f"{word} {rest}", flush=True)
            image.execute(word, rest)
        for stage in Path(name).iterdir():
            if stage != image.root:
                shutil.rmtree(stage)
        python = image.root / "venv/bin/python"
        code = (
            "import importlib.util as u, json, sys, torch; print(json.dumps([torch.__version__,"
            " [n for n in sys.argv[1:] if u.find_spec(n)]]))"
        )
        clean = {"PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
        asked = [python, "-c", code, *TRAINING, "pip", "training.cli"]
        answer = subprocess.run(asked, env=clean, check=True, capture_output=True, cwd=image.root)
        torch_version, present = json.loads(answer.stdout)
        before = state(image.root)
        served = serve(image)
        result = {
            "dockerfile": given.dockerfile,
            "torch": torch_version,
            "venv_mib": size(image.root / "venv") >> 20,
            "torch_mib": sum(size(p) for p in (image.root / "venv").glob("lib/*/*/torch")) >> 20,
            "models_mib": round(size(image.root / "models") / 2**20, 1),
            "present_but_unwanted": present,
            **served,
            "root_unchanged": state(image.root) == before,
            "seconds": image.seconds,
            "not_run": image.skipped,
            "python": platform.python_version(),
            "cpus": len(os.sched_getaffinity(0)),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
