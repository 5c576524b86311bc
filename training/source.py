"""The source network: the user's or a built-in module, trained or fine-tuned, scored, and kept.

Knows nothing of graphs, permutation or representations.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn
from tqdm import tqdm

from neumeta import atomic, checkpoint
from neumeta.deflated import raw_bytes
from neumeta.sample import seed_of
from training import networks, statistics, weights
from training import state as states
from training.data import Data
from training.divergence import check_step, check_tensors, gradient_norm
from training.layout import channels_last, soundly
from training.recipe import BadRecipe, Recipe, refused
from training.resolution import resolution, shrunk
from training.task import Task
from training.teacher import Views

Run = Callable[[Tensor], Any]
"""A network: a batch of normalised images -> its outputs."""


@torch.no_grad()
def score(run: Run, data: Data, task: Task, device: torch.device | str = "cpu") -> float:
    """The score of a network on all test images. Raises ValueError if an output is not finite."""
    total: Tensor | None = None
    for x, y in data.test_batches():
        x, y = x.to(device), y.to(device)
        outputs = task.read(run(x))
        for part in outputs if isinstance(outputs, tuple) else (outputs,):
            if not bool(part.isfinite().all()):
                raise ValueError("the network's outputs are not finite numbers")
        tally = task.tally(outputs, task.targets(x, y, data)).cpu()
        total = tally if total is None else total + tally
    if total is None:
        raise ValueError(f"data: {data.name}: there are no test images")
    return task.score(total)


def one_cycle(step: int, steps: int, warm: float = 0.2) -> float:
    """The learning rate's factor at `step`: linear to 1 over the first `warm`, then cosine to 0."""
    rise = max(1, round(steps * warm))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def predicted(
    task: Task, run: Callable[[], Any], device: torch.device, bfloat16: bool = False
) -> Any:
    """What a network says while it trains; in sixteen bits (torch.autocast, classification alone) its
    outputs come back in float32."""
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        outputs = task.read(run())
    return outputs.float() if bfloat16 else outputs


def mixed(task: Task, outputs: Any, targets: Tensor, teacher: Any, weight: float) -> Tensor:
    """The task's loss, of which `weight` is the imitation of a teacher where there is one."""
    if teacher is None:
        return task.loss(outputs, targets)
    soft = task.imitation(outputs, teacher)
    return soft if weight == 1 else (1 - weight) * task.loss(outputs, targets) + weight * soft


def epoch_plan(
    seed: int, label: str, count: int, batch: int, start: int, steps: int
) -> Iterator[tuple[Tensor, int]]:
    """(rows, seed) of each batch from step `start` to `steps`: every epoch in a new order."""
    per_epoch, order, shuffled = max(1, count // batch), torch.empty(0), -1
    for step in range(start, steps):
        epoch, place = divmod(step, per_epoch)
        if epoch != shuffled:
            shuffle = torch.Generator().manual_seed(seed_of(seed, f"{label}/epoch/{epoch}"))
            order, shuffled = torch.randperm(count, generator=shuffle), epoch
        rows = order[place * batch : (place + 1) * batch]
        yield rows, seed_of(seed, f"{label}/images/{step}")


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@soundly(lambda *_, **__: _device())
def train(
    net: nn.Module,
    data: Data,
    task: Task,
    *,
    epochs: int,
    lr: float,
    batch: int = 128,
    weight_decay: float = 5e-4,
    seed: int = 0,
    state: Path | None = None,
    label: str = "source",
    teacher: Run | Views | None = None,
    teacher_weight: float = 0.8,
    resolutions: Sequence[float] = (1.0,),
    bfloat16: bool = False,
) -> nn.Module:
    """Train `net` in place: SGD with Nesterov momentum, one cycle, augmented; resumes from `state`.

    `state` is written after each epoch; a run started again with it goes on after the last whole
    epoch to the same result as an uninterrupted one. `teacher` distils (see `mixed`); what it is given
    are whole images, whatever their `resolutions` for the network (see `resolution`). `bfloat16`: the
    network runs in sixteen bits (torch.autocast); its weights and the optimiser stay in float32.

    Raises Diverged, with the last good state left on disk, at the first loss, gradient or weight
    that is not finite, and before the first step if `net` comes with such a weight.
    """
    check_tensors(label, net.state_dict())
    device = _device()
    net.to(device)
    optimiser = torch.optim.SGD(
        net.parameters(), lr, momentum=0.9, weight_decay=weight_decay, nesterov=True
    )
    start = 0
    if state and state.exists():
        with states.loaded(state, device) as kept:
            check_tensors(str(state), kept["net"])
            net.load_state_dict(kept["net"])
            optimiser.load_state_dict(kept["optimiser"])
            start = kept["epoch"]
    # Channels-last convolutions are faster on CPUs.
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    per_epoch = max(1, len(data) // batch)
    for epoch in range(start, epochs):
        net.train()
        # What the module itself draws (dropout, latent codes) is the same after a resumption.
        torch.manual_seed(seed_of(seed, f"{label}/{epoch}"))
        began, first = time.monotonic(), epoch * per_epoch
        plan = epoch_plan(seed, label, len(data), batch, first, first + per_epoch)
        bar = tqdm(
            _taught(data, plan, teacher, epoch),
            desc=f"{label} {epoch + 1}/{epochs}",
            total=per_epoch,
            mininterval=5,
        )
        for step, (x, y, soft) in enumerate(bar, first):
            x, y = x.to(device), y.to(device)
            soft = None if soft is None else soft.to(device)
            factor = one_cycle(step, epochs * per_epoch)
            for group in optimiser.param_groups:
                group["lr"] = lr * factor
            x = channels_last(x)
            if soft is None and callable(teacher):
                with torch.no_grad():
                    soft = task.read(teacher(x))
            targets = task.targets(x, y, data)
            x = shrunk(x, resolution(resolutions, step, epochs * per_epoch))
            outputs = predicted(task, partial(net, x), device, bfloat16)
            loss = mixed(task, outputs, targets, soft, teacher_weight)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            where = f"{label}, step {step + 1} of {epochs * per_epoch}"
            norm = gradient_norm(net.parameters())
            check_step(where, lr * factor, loss, norm, "a lower network.train.lr")
            optimiser.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        net.eval()
        check_tensors(f"{label}, after epoch {epoch + 1} of {epochs}", net.state_dict())
        found = score(net, data, task, device)
        tqdm.write(
            f"{label} epoch {epoch + 1}/{epochs}: test {task.metric} {found:.2f} {task.unit}"
            f"  {time.monotonic() - began:.0f} s"
        )
        if state:
            held = {
                "net": net.state_dict(),
                "optimiser": optimiser.state_dict(),
                "epoch": epoch + 1,
            }
            states.save(held, state)
    return net.cpu().eval()


def _taught(
    data: Data, plan: Iterator[tuple[Tensor, int]], teacher: Run | Views | None, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Images, targets, and what the teacher said of them where that is known."""
    if isinstance(teacher, Views):
        for rows, _ in plan:
            yield teacher.batch(rows, epoch % len(teacher.outputs))
        return
    for x, y in data.batches(plan):
        yield x, y, None


def weights_file(asked: Recipe, checkpoints: Path) -> Path:
    """The file of the recipe's network.weights: beside the recipe, or under `checkpoints`.

    Raises BadRecipe if it is in neither.
    """
    places = [Path(asked.file).parent, checkpoints]
    for folder in places:
        if (folder / asked.network.weights).is_file():
            return folder / asked.network.weights
    where = " nor in ".join(str(folder) for folder in places)
    allowed = f"it is neither in {where}: see --checkpoints"
    if asked.network.network.startswith("resnet"):
        allowed += "; published at https://github.com/akamaster/pytorch_resnet_cifar10"
    raise BadRecipe(asked.file, [refused("network.weights", asked.network.weights, allowed)])


def weights_digest(asked: Recipe, checkpoints: Path, module: nn.Module | None) -> str | None:
    """sha256 of the weights that are given: the recipe's file, else the module's own.

    None where there are none, or the file is no longer there.
    """
    if asked.network.weights:
        try:
            with weights_file(asked, checkpoints).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except BadRecipe:
            return None
    if module is None:
        return None
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(raw_bytes(value))
    return sha.hexdigest()


def fill(net: nn.Module, path: Path) -> None:
    """Load a file of weights into the network: a public one, or a manifold, of which the full size is
    taken. Shortcuts without parameters (option A, as published CIFAR ResNets have them) become the
    convolutions that compute the same.

    Raises ValueError, naming the file, what was expected and what was found, if it does not fit.
    """
    if checkpoint.is_manifold(path):
        held = checkpoint.read(path)
        weights.fit_into(net, statistics.whole(held, held.space.full), path)
        return
    found = weights.read(path)
    padded = isinstance(net, networks.ResNetCifar) and not any(
        ".shortcut." in key for key in weights.common(found).values()
    )
    if not padded:
        weights.fit_into(net, found, path)
        return
    assert isinstance(net, networks.ResNetCifar)
    plain = networks.resnet_cifar(
        net.depth, net.linear.out_features, net.widths, net.conv1.in_channels, "A"
    )
    weights.fit_into(plain, found, path)
    net.load_state_dict(networks.convolved(plain).state_dict())


def save(net: nn.Module, path: Path) -> None:
    """Write the trained network as safetensors, whole or not at all."""
    # Copies: modules may share a tensor, which safetensors would refuse.
    tensors = {
        name: value.detach().clone().contiguous() for name, value in net.state_dict().items()
    }
    atomic.write(path, serialised(tensors))


def restore(net: nn.Module, path: Path) -> nn.Module:
    """Fill the network with what `save` wrote. Raises BadState if the file is damaged."""
    with states.reading(path):
        net.load_state_dict(load_file(path))
    return net.eval()


def tensors(net: nn.Module, names: Mapping[str, Any]) -> dict[str, Tensor]:
    """The module's tensors of these names: parameters, buffers, and plain tensors among its
    attributes.

    Raises ValueError naming one that it does not have.
    """
    held: dict[str, Tensor] = dict(net.named_parameters(remove_duplicate=False))
    held |= dict(net.named_buffers(remove_duplicate=False))
    found = {}
    for name in names:
        value = held.get(name)
        if value is None:
            parent, _, last = name.rpartition(".")
            value = getattr(net.get_submodule(parent), last, None)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"network: {name}: a tensor that the forward pass itself makes: register it as a"
                " buffer"
            )
        found[name] = value.detach().clone()
    return found
