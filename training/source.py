"""The source network: fine-tuned or trained, scored, and kept.

Knows nothing of permutation or INRs, nor where the network is from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor
from tqdm import tqdm

from neumeta import atomic
from neumeta.network import Network
from training import state as states
from training.data import Dataset, augment, to_float
from training.divergence import check_step, check_tensors, gradient_norm
from training.layout import SoundConvolutions


@torch.no_grad()
def accuracy(net: torch.nn.Module, images: Tensor, labels: Tensor, data: Dataset) -> float:
    """Percent of uint8 `images` whose class `net` gets right. Raises ValueError if an output is not
    finite: then no class is."""
    right = 0
    device = next(net.parameters()).device
    for at in range(0, len(images), 500):
        x = to_float(images[at : at + 500], data).to(device)
        scores = net(x)
        if not bool(scores.isfinite().all()):
            raise ValueError("the network's outputs are not finite numbers")
        right += int((scores.argmax(1).cpu() == labels[at : at + 500]).sum())
    return 100 * right / len(images)


def one_cycle(step: int, steps: int, warm: float = 0.2) -> float:
    """The learning rate's factor at `step`: linear to 1 over the first `warm`, then cosine to 0."""
    rise = max(1, round(steps * warm))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def task_loss(logits: Tensor, labels: Tensor, teacher: Tensor | None, weight: float) -> Tensor:
    """Cross-entropy, mixed with the divergence from a teacher's probabilities where there is one."""
    hard = F.cross_entropy(logits, labels)
    if teacher is None:
        return hard
    soft = F.kl_div(
        logits.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
    )
    return (1 - weight) * hard + weight * soft


@SoundConvolutions()
def train(
    net: Network,
    data: Dataset,
    *,
    epochs: int,
    lr: float,
    batch: int = 128,
    weight_decay: float = 5e-4,
    seed: int = 0,
    state: Path | None = None,
    label: str = "source",
    teacher: Network | None = None,
    teacher_weight: float = 0.8,
) -> Network:
    """Train `net` in place: SGD with Nesterov momentum, one cycle, augmented; resumes from `state`.

    `state` is written after each epoch; a run started again with it goes on after the last whole
    epoch to the same result as an uninterrupted one. `teacher` distils (see `task_loss`).

    Raises Diverged, with the last good state left on disk, at the first loss, gradient or weight
    that is not finite, and before the first step if `net` comes with such a weight.
    """
    check_tensors(label, net.state_dict())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(
        net.parameters(), lr, momentum=0.9, weight_decay=weight_decay, nesterov=True
    )
    start, count = 0, len(data.train_labels)
    if state and state.exists():
        with states.loaded(state, device) as kept:
            check_tensors(str(state), kept["net"])
            net.load_state_dict(kept["net"])
            optimiser.load_state_dict(kept["optimiser"])
            generator.set_state(kept["generator"].cpu())
            start = kept["epoch"]
    # Channels-last convolutions are faster on CPUs.
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    per_epoch = count // batch
    for epoch in range(start, epochs):
        net.train()
        order = torch.randperm(count, generator=generator)
        began = time.monotonic()
        bar = tqdm(range(per_epoch), desc=f"{label} {epoch + 1}/{epochs}", mininterval=5)
        for i in bar:
            rows = order[i * batch : (i + 1) * batch]
            x = to_float(augment(data.train_images[rows], data, generator), data).to(device)
            factor = one_cycle(epoch * per_epoch + i, epochs * per_epoch)
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                soft = teacher(x) if teacher else None
            loss = task_loss(net(x), data.train_labels[rows].to(device), soft, teacher_weight)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            where = f"{label}, step {epoch * per_epoch + i + 1} of {epochs * per_epoch}"
            norm = gradient_norm(net.parameters())
            check_step(where, lr * factor, loss, norm, "a lower network.train.lr")
            optimiser.step()
            if i % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        net.eval()
        check_tensors(f"{label}, after epoch {epoch + 1} of {epochs}", net.state_dict())
        score = accuracy(net, data.test_images, data.test_labels, data)
        tqdm.write(
            f"{label} epoch {epoch + 1}/{epochs}: test {score:.2f} %  {time.monotonic() - began:.0f} s"
        )
        if state:
            states.save(
                {
                    "net": net.state_dict(),
                    "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(),
                    "epoch": epoch + 1,
                },
                state,
            )
    return net.cpu().eval()


def save(net: Network, path: Path) -> None:
    """Write the trained network (with batch norm) as safetensors, whole or not at all."""
    tensors = {name: value.contiguous() for name, value in net.state_dict().items()}
    atomic.write(path, serialised(tensors))


def restore(path: Path, family: str, depth: tuple[int, ...], sizes: Mapping[str, int]) -> Network:
    """The network (with batch norm) that `save` wrote. Raises BadState if the file is damaged."""
    net = Network(family, depth, sizes, norm=True)
    with states.reading(path):
        net.load_state_dict(load_file(path))
    return net.eval()
