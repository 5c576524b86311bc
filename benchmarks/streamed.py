"""The ImageNet recipes on generated folders of small JPEGs: some steps, and memory as the folder grows.

    python -m benchmarks.streamed [RECIPE ...] [--images 1000 10000] [--folder runs/streamed]

Each recipe as it is shipped, but for what says how much: images of 64x64 in 8 classes, random weights,
20 steps of 16 images, two processes of torchrun with two workers each. A folder of N images is
generated once. Memory is what all processes hold together, a page that several share counted once
(Linux's PSS), read five times a second. A run whose row is kept in the folder is not run again. Last
line: one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.local import hardware
from tests.support.torchvision import models
from training import cli, recipe_file

CLASSES, SIZE, BATCH, TEST = 8, 64, 16, 64
RECIPES = ("imagenet-resnet18", "imagenet-resnet50")


def picture(seed: int) -> bytes:
    """A small JPEG, smooth noise, 80 pixels wide and 72 high."""
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 10, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((80, 72), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def generate(folder: Path, images: int) -> None:
    """Class folders of `images` training images and `TEST` validation images, ImageNet's way."""
    if folder.exists():
        return
    begun = folder.with_name(f".{folder.name}.{os.getpid()}")
    for split, count in (("train", images), ("val", TEST)):
        for number in range(count):
            place = begun / split / f"n{number % CLASSES:08d}" / f"{number:06d}.JPEG"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(picture(number + (images if split == "val" else 0)))
    begun.rename(folder)


def small(name: str, images: int, steps: int, folder: Path) -> Path:
    """The shipped recipe with this data and amount, beside its weights and images in `folder`."""
    text = (recipe_file.BUILT_IN / f"{name}.toml").read_text()
    network = tomllib.loads(text)["network"]["network"]
    changes = {
        "path": f'"images-{images}"',
        "size": str(SIZE),
        "workers": "2",
        "batch": str(BATCH),
        "epochs": repr(steps / (images // BATCH)),
        "network": f'"{network}"\narguments = {{ num_classes = {CLASSES} }}',
    }
    for key, value in changes.items():
        text, found = re.subn(f"(?m)^{key} = .*$", f"{key} = {value}", text)
        assert found == 1, f"{name}: {found} lines of {key}"
    path = folder / f"{name}-{images}.toml"
    path.write_text(text)
    return path


def weights(name: str, folder: Path) -> None:
    """Random weights where the recipe looks for published ones."""
    asked = tomllib.loads((recipe_file.BUILT_IN / f"{name}.toml").read_text())["network"]
    torch.manual_seed(0)
    made = getattr(models(), asked["network"].partition(":")[2])(num_classes=CLASSES)
    torch.save(made.state_dict(), folder / asked["weights"])


def tree(process: int) -> list[int]:
    """A process and all that it has started."""
    found = [process]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
    return found


def held(process: int) -> int:
    """Bytes of memory that a process holds, its share of what others hold too; 0 once it is gone."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/smaps_rollup").read_text()
        if told := re.search(r"^Pss:\s+(\d+) kB", lines, re.M):
            return 1024 * int(told.group(1))
    return 0


def measure(name: str, images: int, steps: int, folder: Path) -> dict[str, Any]:
    """One run of a recipe on so many images."""
    generate(folder / f"images-{images}", images)
    weights(name, folder)
    made, run = small(name, images, steps, folder), folder / f"{name}-{images}"
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["-m", "benchmarks.streamed", "--train", str(made), "--folder", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    most, processes, log = 0, 0, folder / f"{name}-{images}.log"
    with log.open("w") as out:
        running = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        while running.poll() is None:
            there = tree(running.pid)
            most, processes = max(most, sum(map(held, there))), max(processes, len(there))
            time.sleep(0.2)
    if running.returncode:
        raise SystemExit(f"{name} on {images} images: {log.read_text()[-2000:]}")
    table = json.loads((run / "evaluation.json").read_text())["evaluation"]
    return {
        "recipe": name,
        "images": images,
        "steps": steps,
        "peak_bytes": most,
        "processes": processes,
        "seconds": round(time.perf_counter() - began, 1),
        "file_bytes": (run / "manifold.safetensors").stat().st_size,
        "parameters": {row["width"]: row["parameters"] for row in table},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path("runs/streamed"))
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # as torchrun starts it
    asked = parser.parse_args()
    if asked.train:
        models()  # on a CPU build of torch it must be imported with care
        return cli.main([str(asked.train), "--folder", str(asked.folder)])
    asked.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    print("| recipe | images | peak memory, MB | processes | seconds |")
    print("|---|---:|---:|---:|---:|")
    for name in asked.recipes or RECIPES:
        for images in asked.images:
            kept = asked.folder / f"{name}-{images}.json"
            if not kept.exists():
                kept.write_text(json.dumps(measure(name, images, asked.steps, asked.folder)))
            row = json.loads(kept.read_text())
            rows.append(row)
            print(
                f"| {name} | {images} | {row['peak_bytes'] / 1e6:.0f} | {row['processes']}"
                f" | {row['seconds']} |",
                flush=True,
            )
    print(json.dumps({"benchmark": "streamed", "hardware": hardware(), "rows": rows}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
