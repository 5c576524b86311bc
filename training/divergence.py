"""Training that has diverged: seen at once, and told with what to try.

Knows no stage: each says where it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class Diverged(ValueError):
    """A loss, a gradient or a weight is no finite number any more: what follows would be noise."""


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, as a tensor: no wait for the device."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def check_step(where: str, rate: float, loss: Tensor, norm: Tensor, attempt: str) -> None:
    """Raise Diverged unless `loss` and gradient `norm` are finite; the device is waited for once.

    `where` names the stage and the step, `attempt` the recipe's keys to change.
    """
    values = torch.stack([loss.detach(), norm]).tolist()
    if not all(map(math.isfinite, values)):
        raise Diverged(
            f"{where}, learning rate {rate:.3g}: training diverged (loss {values[0]:.3g},"
            f" gradient norm {values[1]:.3g}); try {attempt}"
        )


def check_tensors(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise Diverged naming the first of these tensors that holds a NaN or an infinity."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            bad = int((~tensor.isfinite()).sum())
            raise Diverged(f"{where}: {name}: {bad} of {tensor.numel()} values are not finite")
