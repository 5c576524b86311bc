"""A published network as one of today's families.

Knows the family's module tree, not how its weights were found.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from neumeta.family import FAMILIES
from neumeta.network import Network
from training import networks, weights


def import_resnet_cifar(
    path: Path, depth: Sequence[int] | None = None, classes: int | None = None
) -> Network:
    """A published CIFAR ResNet (He et al. 2016, section 4.2) as a `norm=True` Network in eval mode.

    Shortcuts may be parameter-free (option A, as akamaster/pytorch_resnet_cifar10 writes it:
    stride-2 subsampling, channels of zeros before and after) or 1x1 convolutions with batch norm
    (option B); the former become the equivalent convolutions. Depth and classes are the file's own
    unless given.

    Raises ValueError, naming the file, what was expected and what was found, if it does not hold
    such a network; FileNotFoundError if it is not there.
    """
    found = weights.read(path)
    spelled = {key: found[name] for name, key in weights.common(found).items()}
    family = FAMILIES["resnet-cifar"]
    stages = [f"layer{stage + 1}" for stage in range(len(family.stages))]
    blocks = [{key.split(".")[1] for key in spelled if key.startswith(f"{s}.")} for s in stages]
    last = spelled.get("classifier.weight")
    if not all(blocks) or last is None or last.dim() != 2 or not len(last):
        raise ValueError(
            f"{path}: not a CIFAR ResNet: expected {', '.join(stages)} and a linear layer of channels"
            f" {family.stages}, found {weights.outline(found)}: {weights.first(list(found))}"
        )
    own = tuple(depth or (len(each) for each in blocks))
    convolutions = any(".shortcut." in key for key in spelled)
    net = networks.resnet_cifar(
        own, classes or len(last), family.stages, shortcut="conv" if convolutions else "A"
    )
    weights.fit_into(net, found, path)
    if not convolutions:
        net = networks.convolved(net)
    made = Network(family.name, own, family.full_sizes(own, net.linear.out_features), norm=True)
    made.load_state_dict(net.state_dict())
    return made.eval()
