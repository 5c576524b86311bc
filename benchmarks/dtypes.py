"""What a dtype costs and saves: bytes, score and latency of one manifold's files, by width.

    python -m benchmarks.dtypes [MANIFOLD] --data /path/to/datasets

The score is ONNX Runtime's, over raw test images (as in `benchmarks.reach`), of the ONNX file that a
device would pull. Latency is of one image and one thread, the median of many runs that take turns, in
the thread's processor time, so that other work on this machine is not counted: ONNX Runtime as it is
installed, and the module that `network.load` makes of the safetensors file. Rows of `int8,
DequantizeLinear` are of the same models with that operation in place of a cast and a product. Rows are
kept in RESULTS, and a score that is there is not measured again. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from benchmarks.local import hardware
from benchmarks.reach import raw
from neumeta import atomic, checkpoint, network, wire
from neumeta.manifold import Manifold
from neumeta.sample import sample
from training import data

WIDTHS = (1.0, 0.75, 0.5, 0.35, 0.25)
DTYPES = ("float32", "float16", "int8")
DEQUANTIZED = "int8, DequantizeLinear"
BATCH = 250


def dequantizing(model: bytes) -> bytes:
    """An int8 model with DequantizeLinear wherever a cast and a product by scales stand."""
    made = onnx.load_from_string(model)
    held = {each.name: each for each in made.graph.initializer}
    casts = {node.output[0]: node for node in made.graph.node if node.op_type == "Cast"}
    nodes = []
    for node in made.graph.node:
        if node.op_type == "Mul" and node.input[0] in casts:
            weight, scales = casts[node.input[0]].input[0], held[node.input[1]]
            axis = max(range(len(scales.dims)), key=lambda place: scales.dims[place])
            count = math.prod(scales.dims)
            del scales.dims[:]
            scales.dims.append(count)
            read = [weight, scales.name]
            node = onnx.helper.make_node("DequantizeLinear", read, node.output, axis=axis)
        if node.op_type != "Cast":
            nodes.append(node)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    return made.SerializeToString()


def session(model: bytes) -> onnxruntime.InferenceSession:
    """A runtime of one thread that holds this model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def files(manifold: Manifold, width: float) -> Iterator[tuple[str, bytes, bytes]]:
    """(dtype, safetensors file, ONNX file) of a width."""
    architecture = manifold.space.architecture(width)
    tensors = list(sample(manifold, architecture))
    for dtype in DTYPES:
        made = [
            b"".join(wire.stream(wire.plan(manifold, architecture, dtype, form), tensors))
            for form in ("safetensors", "onnx")
        ]
        yield dtype, made[0], made[1]


def score(here: onnxruntime.InferenceSession, images: data.Dataset) -> float:
    """Percent of the test images whose class a model finds."""
    right = 0
    for start in range(0, len(images.test_images), BATCH):
        pixels = images.test_images[start : start + BATCH].numpy().astype(np.float32) / 255
        found = here.run(None, {"input": pixels})[0].argmax(1)
        right += int((found == images.test_labels[start : start + BATCH].numpy()).sum())
    return round(100 * right / len(images.test_images), 2)


def medians(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, which take turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 3):
        for name, run in runs.items():
            began = time.thread_time()
            run()
            if turn >= 3:
                taken[name].append(1000 * (time.thread_time() - began))
    return {name: round(statistics.median(each), 3) for name, each in taken.items()}


@torch.no_grad()
def measure(
    manifold: Manifold, images: data.Dataset, width: float, rounds: int, held: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The rows of one width."""
    pixels = torch.rand(
        1, *images.test_images.shape[1:], generator=torch.Generator().manual_seed(0)
    )
    given = {"input": pixels.numpy()}
    runtimes: dict[str, onnxruntime.InferenceSession] = {}
    modules: dict[str, torch.nn.Module] = {}
    rows: dict[str, dict[str, Any]] = {}
    for dtype, file, model in files(manifold, width):
        rows[dtype] = {"bytes": len(file), "onnx_bytes": len(model)}
        runtimes[dtype] = session(model)
        rows[dtype]["score"] = held.get(f"{width} {dtype}", {}).get("score")
        if rows[dtype]["score"] is None:
            rows[dtype]["score"] = score(runtimes[dtype], images)
        with tempfile.TemporaryDirectory() as folder:
            (path := Path(folder) / "net").write_bytes(file)
            modules[dtype] = network.load(path)
        if dtype == "int8":
            runtimes[DEQUANTIZED] = session(other := dequantizing(model))
            rows[DEQUANTIZED] = {"onnx_bytes": len(other)}
    onnx_ms = medians(
        {name: lambda here=here: here.run(None, given) for name, here in runtimes.items()}, rounds
    )
    torch_ms = medians({name: lambda net=net: net(pixels) for name, net in modules.items()}, rounds)
    for name, row in rows.items():
        yield {
            "width": width,
            "dtype": name,
            **row,
            "onnx_ms": onnx_ms[name],
            "torch_ms": torch_ms.get(name),
        }


def table(rows: list[dict[str, Any]]) -> None:
    """All rows, as docs/onnx.md has them."""
    print("| width | dtype | bytes | bytes, ONNX | score | ms, ONNX Runtime | ms, torch |")
    print("|---:|---|---:|---:|---:|---:|---:|")
    for row in rows:
        cells = [
            f"{row[key]:{form}}" if row.get(key) is not None else ""
            for key, form in (
                ("bytes", ","),
                ("onnx_bytes", ","),
                ("score", ".2f"),
                ("onnx_ms", ".2f"),
                ("torch_ms", ".2f"),
            )
        ]
        print(f"| {row['width']:g} | {row['dtype']} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path("models/resnet20-cifar10.safetensors")
    parser.add_argument("manifold", type=Path, nargs="?", default=default)
    parser.add_argument("--widths", type=float, nargs="+", default=WIDTHS)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--data", type=Path, help="default $NEUMETA_DATA")
    parser.add_argument("--results", type=Path, default=Path("docs/results/dtypes"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    manifold = checkpoint.read(asked.manifold)
    root = asked.data or Path(os.environ.get("NEUMETA_DATA", "data"))
    images = raw(data.load("cifar10", root), root)
    path = asked.results / f"{asked.manifold.stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if held.get("digest") != manifold.digest:
        held = {"digest": manifold.digest, "rows": {}}
    for width in asked.widths:
        for row in measure(manifold, images, width, asked.rounds, held["rows"]):
            held["rows"][f"{width} {row['dtype']}"] = row
        held["hardware"] = hardware()
        atomic.write(path, json.dumps(held, indent=1))
    rows = list(held["rows"].values())
    table(rows)
    print(json.dumps({"benchmark": "dtypes", "hardware": hardware(), "rows": rows}))


if __name__ == "__main__":
    main()
