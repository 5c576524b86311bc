"""A fully quantized graph, weights and activations in int8, beside float32 and int8 weights alone.

    python -m benchmarks.quantized [MANIFOLD] --data /path/to/datasets [--widths 1 0.75 0.5 0.25]

ONNX Runtime's own static quantization makes it of the float32 file that a device would pull: ranges of
512 training images, weights for each channel. Rows: activations as uint8, the same with weights of 7
bits (`reduce_range`, so that sums do not saturate on processors without VNNI), and as int8. Score: raw
test images (`benchmarks.reach`). Latency: one thread of ONNX Runtime, medians of runs that take turns,
in processor time, of 1 and of 32 images. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.dtypes import files, medians, score, session
from benchmarks.local import hardware
from benchmarks.reach import raw
from neumeta import checkpoint
from training import data

IMAGES, BATCH = 512, 32
KINDS: dict[str, dict[str, Any]] = {
    "activations uint8": {"activation_type": quantization.QuantType.QUInt8},
    "the same, weights in 7 bits": {
        "activation_type": quantization.QuantType.QUInt8,
        "reduce_range": True,
    },
    "activations int8": {"activation_type": quantization.QuantType.QInt8},
}


class Images(quantization.CalibrationDataReader):
    """Batches of pixels in [0, 1]."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.parts: Iterator[dict[str, np.ndarray]] = iter(
            {"input": pixels[start : start + BATCH]} for start in range(0, len(pixels), BATCH)
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None."""
        return next(self.parts, None)


def quantized(model: bytes, pixels: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """A float32 model in every kind, its ranges those of these images."""
    with tempfile.TemporaryDirectory() as folder:
        given, prepared, made = (Path(folder) / name for name in ("given", "prepared", "made"))
        given.write_bytes(model)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        for name, options in KINDS.items():
            quantization.quantize_static(
                prepared, made, Images(pixels), per_channel=True,
                quant_format=quantization.QuantFormat.QDQ,
                weight_type=quantization.QuantType.QInt8, **options,
            )  # fmt: skip
            yield name, made.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path("models/resnet20-cifar10.safetensors")
    parser.add_argument("manifold", type=Path, nargs="?", default=default)
    parser.add_argument("--widths", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--data", type=Path, help="default $NEUMETA_DATA")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    manifold = checkpoint.read(asked.manifold)
    root = asked.data or Path(os.environ.get("NEUMETA_DATA", "data"))
    jpeg = data.load("cifar10", root)
    tested = raw(jpeg, root)
    pixels = jpeg.train_images[:IMAGES].numpy().astype(np.float32) / 255
    rows = []
    print(
        "| width | | bytes | score | ms, 1 image | ms, 32 images |\n|---:|---|---:|---:|---:|---:|"
    )
    for width in asked.widths:
        models = {dtype: model for dtype, _, model in files(manifold, width) if dtype != "float16"}
        models |= quantized(models["float32"], pixels)
        here = {name: session(model) for name, model in models.items()}
        taken = {}
        for count, rounds in ((1, asked.rounds), (BATCH, asked.rounds // 10)):
            given = {"input": pixels[:count]}
            runs = {
                name: lambda net=net, given=given: net.run(None, given)
                for name, net in here.items()
            }
            taken[count] = medians(runs, rounds)
        for name, model in models.items():
            row = {"width": width, "kind": name, "bytes": len(model)}
            row |= {"score": score(here[name], tested), "ms": taken[1][name]}
            row["ms_32"] = taken[BATCH][name]
            rows.append(row)
            print(
                f"| {width:g} | {name} | {len(model):,} | {row['score']:.2f} | {row['ms']:.2f}"
                f" | {row['ms_32']:.1f} |",
                flush=True,
            )
    print(json.dumps({"benchmark": "quantized", "hardware": hardware(), "rows": rows}))


if __name__ == "__main__":
    main()
