"""Training images without most of their JPEG artefacts, and a source that knows raw and JPEG pixels.

    python -m benchmarks.pixels --run runs/pixels

The training images at hand are JPEG copies; raw pixels are there of 4,000 of them. A small network
learns from these pairs what JPEG took away, and restores the other 46,000; a third of those stay as
they are, so that what is trained on them knows both. RUN/cifar10-pixels.npz holds all 50,000, with the
raw test images. The public ResNet-20, trained on raw pixels, is then fine-tuned on them, and the mean
of its weights before and after (`SHARE` of after; WiSE-FT, Wortsman et al. 2022) goes to
RUN/anchor.safetensors.
Stages whose file is there are not run again. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.local import hardware
from benchmarks.reach import raw
from neumeta import atomic
from training import data, networks, source
from training.data import pictures, tree
from training.task import TASKS

PAIRS, HELD_OUT = "cifar10-raw4k.tar.xz", 300
EPOCHS, BATCH, RATE = 10, 32, 2e-3
FINE_TUNED, FINE_RATE, SHARE = 2, 0.01, 0.7


class Restorer(nn.Module):
    """JPEG pixels in [0, 1] -> what they were: a residual network on 2x2 blocks of pixels, which is
    told where in JPEG's own 8x8 block each one lies."""

    def __init__(self, width: int = 48, blocks: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(12 + 16, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, 12, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
        blocks = F.pixel_unshuffle(x - 0.5, 2)
        rows, columns = (torch.arange(side, device=x.device) % 4 for side in blocks.shape[2:])
        place = F.one_hot(rows[:, None] * 4 + columns, 16).movedim(2, 0).to(x)
        seen = torch.cat([blocks * 4, place.expand(len(x), -1, -1, -1)], 1)
        held = F.relu(self.first(seen))
        for block in self.blocks:
            held = held + block(held) / 2
        return x + F.pixel_shuffle(self.last(held), 2) / 4


def pairs(jpeg: data.Dataset, root: Path) -> tuple[UInt8[Tensor, "N 3 H W"], Tensor]:
    """The raw training images, and the row of each one's JPEG copy among the training images."""
    found = pictures.descend(tree.read_archive(root / PAIRS))
    names = sorted(name for name in found.names if name.startswith("train/"))
    (held,) = pictures.decode_all(found, [names], pictures.Options(channels=3))
    copies = pictures.descend(tree.read_archive(root / "cifar10.tar.xz"))
    twins = [name.replace(".png", ".jpg") for name in names]
    (seen,) = pictures.decode_all(copies, [twins], pictures.Options(channels=3))
    rows = {image.numpy().tobytes(): row for row, image in enumerate(jpeg.train_images)}
    return torch.from_numpy(held), torch.tensor([rows[image.tobytes()] for image in seen])


def psnr(made: Tensor, wanted: Tensor) -> float:
    """The mean peak signal-to-noise ratio of images in [0, 1], in decibel."""
    error = (made.clamp(0, 1) - wanted).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def learned(seen: Tensor, wanted: Tensor) -> tuple[Restorer, dict[str, float]]:
    """A restorer of these uint8 pairs, and how near images that it never saw come to raw ones."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    x, y = seen.float() / 255, wanted.float() / 255
    order = torch.randperm(len(x), generator=generator)
    held_out, rows = order[:HELD_OUT], order[HELD_OUT:]
    net = Restorer()
    steps = EPOCHS * (len(rows) // BATCH)
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.1)
    for _ in tqdm(range(EPOCHS), desc="restorer", mininterval=5):
        mixed = rows[torch.randperm(len(rows), generator=generator)]
        for some in mixed.split(BATCH)[: len(rows) // BATCH]:
            before, after = x[some], y[some]
            # Mirrored images keep the borders of JPEG's blocks where they are.
            for side in (2, 3):
                if float(torch.rand((), generator=generator)) < 0.5:
                    before, after = before.flip(side), after.flip(side)
            loss = F.smooth_l1_loss(net(before), after, beta=0.02)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    net.eval()
    with torch.no_grad():
        made = net(x[held_out])
    told = {"jpeg": psnr(x[held_out], y[held_out]), "restored": psnr(made, y[held_out])}
    return net, {name: round(value, 2) for name, value in told.items()}


@torch.no_grad()
def restored(net: Restorer, images: Tensor) -> UInt8[Tensor, "N 3 H W"]:
    """All images, 250 at a time."""
    parts = tqdm(images.split(250), desc="restore", mininterval=5)
    return torch.cat([(net(x.float() / 255).clamp(0, 1) * 255).round().to(x.dtype) for x in parts])


def keep(path: Path, images: Tensor, labels: Tensor, lossless: data.Dataset) -> None:
    """Training images and the raw test images as .npz, whole or not at all."""
    out = io.BytesIO()
    np.savez(
        out,
        train_images=images.numpy(),
        train_labels=labels.numpy().astype(np.int64),
        test_images=lossless.test_images.numpy(),
        test_labels=lossless.test_labels.numpy().astype(np.int64),
        classes=np.array(lossless.classes),
    )
    atomic.write(path, out.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("runs/pixels"))
    parser.add_argument("--data", type=Path, help="default $NEUMETA_DATA")
    parser.add_argument("--checkpoints", type=Path, help="default DATA/../checkpoints")
    asked = parser.parse_args()
    root = asked.data or Path(os.environ.get("NEUMETA_DATA", "data"))
    asked.run.mkdir(parents=True, exist_ok=True)
    images, anchor = asked.run / "cifar10-pixels.npz", asked.run / "anchor.safetensors"
    jpeg, told = data.load("cifar10", root), {}
    lossless = raw(jpeg, root)
    if not images.exists():
        held, rows = pairs(jpeg, root)
        net, told["psnr"] = learned(jpeg.train_images[rows], held)
        made = restored(net, jpeg.train_images)
        every_third = torch.arange(len(made)) % 3 == 0
        made[every_third] = jpeg.train_images[every_third]
        made[rows] = held
        keep(images, made, jpeg.train_labels, lossless)
    with np.load(images) as arrays:
        mixed = replace(lossless, train_images=torch.from_numpy(arrays["train_images"]))
    task = TASKS["classification"]
    net20 = networks.resnet_cifar(shortcut="conv")
    if not anchor.exists():
        public = (asked.checkpoints or root.parent / "checkpoints") / "resnet20-12fca82f.th"
        source.fill(net20, public)
        before = {name: value.clone() for name, value in net20.state_dict().items()}
        state = asked.run / "anchor.pt"
        source.train(net20, mixed, task, epochs=FINE_TUNED, lr=FINE_RATE, state=state)
        after = net20.state_dict()
        mean = {
            name: torch.lerp(value, after[name], SHARE) if value.is_floating_point() else value
            for name, value in before.items()
        }
        net20.load_state_dict(mean)
        source.save(net20, anchor)
    source.restore(net20, anchor)
    net20.eval()
    told["anchor"] = {
        "raw": round(source.score(net20, lossless, task), 2),
        "jpeg": round(source.score(net20, jpeg, task), 2),
    }
    print(json.dumps({"benchmark": "pixels", "hardware": hardware(), "result": told}))


if __name__ == "__main__":
    main()
