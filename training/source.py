"""The source network: imported from a public checkpoint, fine-tuned or trained, and folded.

Knows nothing of permutation or INRs: it ends with a plain network whose batch norm is folded.
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
from torch import Tensor, nn
from tqdm import tqdm

from neumeta import atomic
from neumeta.family import FAMILIES
from neumeta.network import Network
from training import state as states
from training.data import Dataset, augment, to_float

BN_EPS = 1e-5


def import_resnet_cifar(path: Path) -> Network:
    """A public `.th` CIFAR ResNet (akamaster/pytorch_resnet_cifar10) as a `norm=True` Network.

    Its parameter-free shortcuts (stride-2 subsampling, channels zero-padded by a quarter on each
    side; He et al. 2016, option A) become the equivalent 1x1 convolutions with identity batch norm.

    Raises ValueError if the file does not hold such a network.
    """
    held = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, dict) or "state_dict" not in held:
        raise ValueError(f"{path}: no 'state_dict' in this checkpoint")
    state = {name.removeprefix("module."): value for name, value in held["state_dict"].items()}
    blocks = {int(name.split(".")[1]) for name in state if name.startswith("layer1.")}
    if "linear.weight" not in state or not blocks:
        raise ValueError(f"{path}: not a CIFAR ResNet (no layer1 or linear)")
    depth = (len(blocks),) * 3
    family = FAMILIES["resnet-cifar"]
    classes = state["linear.weight"].shape[0]
    net = Network(family.name, depth, family.full_sizes(depth, classes), norm=True)
    for stage, (before, after) in enumerate(zip(family.stages, family.stages[1:], strict=False), 2):
        shortcut = torch.zeros(after, before, 1, 1)
        pad = (after - before) // 2
        shortcut[torch.arange(before) + pad, torch.arange(before)] = 1
        state[f"layer{stage}.0.shortcut.weight"] = shortcut
        identity = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0 - BN_EPS}
        for kind, value in identity.items():
            state[f"layer{stage}.0.bn3.{kind}"] = torch.full((after,), value)
        state[f"layer{stage}.0.bn3.num_batches_tracked"] = torch.tensor(0)
    net.load_state_dict(state)
    return net.eval()


def fold(net: Network) -> dict[str, Tensor]:
    """The tensors of `net` with batch norm folded into its convolutions; computed in float64."""
    state, folded = net.state_dict(), {}
    for layer in FAMILIES[net.family].layers(net.depth):
        weight = state[f"{layer.name}.weight"].double()
        if net.norm and layer.norm is not None:
            gamma, beta, mean, var = (
                state[f"{layer.norm}.{kind}"].double()
                for kind in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / torch.sqrt(var + BN_EPS)
            weight, bias = weight * scale[:, None, None, None], beta - mean * scale
        else:
            bias = state[f"{layer.name}.bias"].double()
        folded[f"{layer.name}.weight"] = weight.float().contiguous()
        folded[f"{layer.name}.bias"] = bias.float().contiguous()
    return folded


def sizes_of(weights: Mapping[str, Tensor], family: str, depth: tuple[int, ...]) -> dict[str, int]:
    """The size of every axis, read off a network's own tensors."""
    sizes: dict[str, int] = {}
    for layer in FAMILIES[family].layers(depth):
        weight = weights[f"{layer.name}.weight"]
        sizes[layer.output_axis], sizes[layer.input_axis] = weight.shape[0], weight.shape[1]
    return sizes


def network_from(weights: dict[str, Tensor], family: str, depth: tuple[int, ...]) -> Network:
    """A folded Network that holds these tensors (not copies)."""
    with torch.device("meta"):
        net = Network(family, depth, sizes_of(weights, family, depth))
    net.load_state_dict(weights, assign=True)
    net.mean, net.std = torch.zeros(1), torch.ones(1)
    return net.eval()


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
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(
        net.parameters(), lr, momentum=0.9, weight_decay=weight_decay, nesterov=True
    )
    start, count = 0, len(data.train_labels)
    if state and state.exists():
        with states.loaded(state, device) as kept:
            net.load_state_dict(kept["net"])
            optimiser.load_state_dict(kept["optimiser"])
            generator.set_state(kept["generator"].cpu())
            start = kept["epoch"]
    # Channels-last convolutions are faster on CPUs, but with channel counts that are no multiple of
    # 8 their backward pass has corrupted memory (torch 2.13, oneDNN): the plain layout for those.
    even = all(conv.out_channels % 8 == 0 for conv in net.modules() if isinstance(conv, nn.Conv2d))
    layout = torch.channels_last if even else torch.contiguous_format
    net.to(memory_format=layout)  # type: ignore[call-overload]
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
            x = x.contiguous(memory_format=layout)
            with torch.no_grad():
                soft = teacher(x) if teacher else None
            loss = task_loss(net(x), data.train_labels[rows].to(device), soft, teacher_weight)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            if i % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        net.eval()
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


def reorder(net: Network, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `net`, batch norm kept, with the channels of each axis in the given order."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for layer in FAMILIES[net.family].layers(net.depth):
        vectors = [f"{layer.name}.bias"]
        if net.norm and layer.norm:
            vectors = [
                f"{layer.norm}.{k}" for k in ("weight", "bias", "running_mean", "running_var")
            ]
        name = f"{layer.name}.weight"
        if layer.output_axis in orders:
            for each in (name, *vectors):
                state[each] = state[each][orders[layer.output_axis]]
        if layer.input_axis in orders:
            state[name] = state[name][:, orders[layer.input_axis]]
    return state
