"""A pulled network as a `.pte` program for ExecuTorch, its convolutions and products by XNNPACK.

    python -m neumeta.executorch net.safetensors net.pte [--batch N]

Knows the pulled file and the module that `network.load` makes of it; no service and no manifold. Needs
torch and executorch (`pip install 'neumeta-serve[executorch]'`), which are imported when they are used.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neumeta import atomic

INSTALL = "pip install 'neumeta-serve[executorch]'"
XNNPACK = "executorch.backends.xnnpack.partition.xnnpack_partitioner"


class CannotLower(RuntimeError):
    """No program can be made of this file here; one sentence says why."""


def lower(path: Path, batch: int = 1) -> tuple[bytes, int, int]:
    """The program of a pulled safetensors file, for `batch` images at a time; how many of its
    operations XNNPACK computes, and how many ExecuTorch's portable kernels.

    Its method `forward` reads float32 pixels in [0, 1] (batch, C, ...) and gives the module's outputs
    in float32, whatever the dtype of the file: float16, bfloat16 and int8 are made float32. Its method
    `neumeta` gives what the file says of itself, without the graph, as JSON. Raises CannotLower,
    and what `network.load` raises.
    """
    with _quiet():
        torch, network = _imported("torch"), _imported("neumeta.network")
        net = network.load(path).float()
        about = json.dumps(network.contract(path), sort_keys=True, separators=(",", ":"))
        exir, xnnpack = _imported("executorch.exir"), _imported(XNNPACK)
        try:
            example = torch.zeros(batch, *net.shape)
            program = torch.export.export(net, (example,))
            edge = exir.to_edge_transform_and_lower(
                program,
                partitioner=[xnnpack.XnnpackPartitioner()],
                constant_methods={"neumeta": about},
            )
            by_xnnpack, rest = _shares(edge.exported_program())
            return bytes(edge.to_executorch().buffer), by_xnnpack, rest
        except Exception as error:  # what either raises for what it cannot do is anything
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CannotLower(f"{path}: ExecuTorch cannot lower it: {lines[0][:300]}") from error


def _imported(name: str) -> Any:
    """A module of what the extra installs, by its name: mypy is not to read it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotLower(f"ExecuTorch cannot be used here ({error}): {INSTALL}") from None


def _shares(program: Any) -> tuple[int, int]:
    """Operations of a lowered program that are XNNPACK's, and those that are not."""
    inside = outside = 0
    for node in program.graph.nodes:
        if node.op == "call_function":
            outside += "getitem" not in str(node.target) and "call_delegate" not in str(node.target)
    for _, module in program.graph_module.named_children():
        held = module.original_module.graph.nodes
        inside += sum(node.op == "call_function" for node in held)
    return inside, outside


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines that these packages have about themselves, and without the
    garbage collector, which takes a quarter of the time and finds nothing."""
    before, collected = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.WARNING)
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if collected:
            gc.enable()


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text} is not allowed; a whole number from 1 to 4096")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """The command. Exit codes: 0 written; 2: not, and what was at OUT is there as it was."""
    parser = argparse.ArgumentParser(
        prog="python -m neumeta.executorch",
        description="Lower a pulled network to a .pte program with the XNNPACK backend.",
    )
    parser.add_argument("file", type=Path, help="what neumeta-pull wrote, as safetensors")
    parser.add_argument("out", type=Path, help="the .pte file to write")
    parser.add_argument("--batch", type=_count, default=1, help="images a run (default 1)")
    given = parser.parse_args(argv)
    try:
        atomic.check(given.out)
        made, by_xnnpack, rest = lower(given.file, given.batch)
        atomic.write(given.out, made)
    except (CannotLower, ValueError, OSError) as error:
        print(f"neumeta.executorch: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    digest = hashlib.sha256(made).hexdigest()
    print(
        f"{given.out} {len(made)} bytes sha256 {digest}; {by_xnnpack} of {by_xnnpack + rest}"
        " operations by XNNPACK"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
