"""A stranger's network, start to end: a file of their own, their folders of images, their weights on a
device, and nothing in this repository knows of it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from neumeta import checkpoint, network, wire
from neumeta.sample import sample
from training import cli, data

ROOT = Path(__file__).parent.parent.parent
MODULE = '''
import torch
from torch import nn


class Odd(nn.Module):
    """Batch norm before the convolution, a depthwise layer, a concatenation, a flatten."""

    def __init__(self, classes=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 12, 3, 2, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.bn = nn.BatchNorm2d(12)
        self.side = nn.Conv2d(8, 4, 1, 2)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.hidden = nn.Linear(16 * 16, 20)
        self.head = nn.Linear(20, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = torch.relu(self.bn(self.depthwise(self.body(x))))
        x = self.pool(torch.cat((y, self.side(x)), 1)).flatten(1)
        return self.head(torch.relu(self.hidden(x)))


def build():
    return Odd()
'''
RECIPE = """
title = "a stranger's"
[network]
network = "odd.py:build"
train = { epochs = 6, lr = 0.05, batch = 20 }
[data]
path = "photos"
calibration = 32
[representation]
corrected = {}
[fit]
width = [0.5, 1.0]
epochs = 30
batch = 20
lr = 1e-2
sandwich = true
distill = "inplace"
distill_weight = 0.5
regularisation = 0.0
[evaluate]
widths = [1.0, 0.75, 0.5]
"""


def pictures(folder: Path) -> None:
    """Three classes of 48x40 colour images: a warm, a cold and a striped one, all noisy."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 20)):
        for kind, colour in (("cold", (40, 60, 190)), ("striped", (120, 120, 120)),
                             ("warm", (190, 90, 40))):  # fmt: skip
            place = folder / part / kind
            place.mkdir(parents=True)
            for number in range(count):
                image = np.full((40, 48, 3), colour, float)
                if kind == "striped":
                    image += 70 * np.sin(np.arange(48) / 2 + rng.uniform(0, 6))[None, :, None]
                image += rng.normal(0, 40, image.shape)
                Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(place / f"{number}.png")


def test_a_strangers_network_is_trained_pulled_and_run_without_a_change_here(
    tmp_path: Path,
) -> None:
    (tmp_path / "odd.py").write_text(MODULE)
    (tmp_path / "odd.toml").write_text(RECIPE)
    pictures(tmp_path / "photos")
    before = changed()
    assert cli.main([str(tmp_path / "odd.toml"), "--folder", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "manifold.safetensors"
    manifold = checkpoint.read(path)
    assert manifold.space.name == "odd" and manifold.contract.classes == ("cold", "striped", "warm")
    table = {row["width"]: row for row in manifold.about["evaluation"]}
    assert all(row["metric"] == "accuracy" for row in table.values())
    assert table[1.0]["score"] > 85 and table[0.75]["score"] > 85
    assert table[0.5]["score"] > 60  # of three classes: chance is 33
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["checkpoint"] == manifold.digest

    pulled = tmp_path / "half.safetensors"
    # A width that is none of the table's: its statistics come with the file, or from its images.
    architecture = manifold.space.architecture(
        [0.6, 0.9, 0.5, 0.7, 0.8][: len(manifold.space.groups)]
    )
    plan = wire.plan(manifold, architecture, "float32")
    pulled.write_bytes(b"".join(wire.stream(plan, sample(manifold, architecture))))
    photos = data.load_from(str(tmp_path / "photos"))
    assert isinstance(photos, data.Dataset)
    ready = network.load(pulled)
    own = network.load(pulled, into=resized(tmp_path / "odd.py", manifold, architecture))
    with torch.no_grad():
        raw = ready(photos.test_images)
        filled = own(data.to_float(photos.test_images, photos))
    torch.testing.assert_close(raw, filled, atol=1e-4, rtol=1e-4)
    right = (raw.argmax(1) == photos.test_labels).float().mean()
    assert 100 * float(right) > 65
    assert changed() == before


def resized(path: Path, manifold: checkpoint.Manifold, architecture: object) -> torch.nn.Module:
    """The stranger's own class at another size, its layers as wide as the pulled ones."""
    spec = importlib.util.spec_from_file_location("odd_of_the_device", path)
    assert spec is not None and spec.loader is not None
    held = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(held)
    net: torch.nn.Module = held.build()
    space = manifold.space
    graph, sizes = space.graph_of(architecture), space.sizes(architecture)  # type: ignore[arg-type]
    for name in graph.tensors:
        parent, _, last = name.rpartition(".")
        module, shape = net.get_submodule(parent), graph.shape(name, sizes)
        if last in module._parameters:
            setattr(module, last, torch.nn.Parameter(torch.zeros(shape)))
        else:
            setattr(module, last, torch.zeros(shape))
    net.depthwise.groups = net.depthwise.weight.shape[0]  # type: ignore[union-attr, assignment]
    return net


def changed() -> str:
    """What differs in the repository's product code from its last commit."""
    command = ["git", "status", "--porcelain", "neumeta", "service", "training"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout


if __name__ == "__main__":  # to look at the pictures
    pictures(Path(sys.argv[1]))
