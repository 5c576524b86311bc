"""The `tiny` recipe from images to a network on a device, through the commands a person types."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.local import Service
from neumeta import checkpoint, network
from neumeta import pull as client
from training import data


def train(run: Path) -> int:
    """The command in a process of its own: as a person runs it, without the checks that tests add."""
    command = [sys.executable, "-m", "training.cli", "tiny", "--folder", str(run)]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True).returncode


def test_tiny_from_digits_to_a_pulled_network(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    report = json.loads((run / "evaluation.json").read_text())
    accuracy = {row["width"]: row["score"] for row in report["evaluation"]}
    assert accuracy[1.0] >= 97 and accuracy[0.5] >= 85 and accuracy[0.25] >= 75
    assert (run / "evaluation.svg").read_text().startswith("<?xml")
    path = run / "manifold.safetensors"
    assert checkpoint.read(path).digest == report["checkpoint"]
    assert train(run) == 2  # never over an earlier run by accident

    out = tmp_path / "net.safetensors"
    with Service(path) as service:
        client.pull(service.url, "lenet", out, parameters={"width": "0.5"})
    net = network.load(out)
    digits = data.load("digits")
    right = net(digits.test_images.float() / 255).argmax(1) == digits.test_labels
    assert round(100 * right.float().mean().item(), 2) == accuracy[0.5]
