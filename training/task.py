"""What a network is for: its loss, how it imitates a teacher, and its score. Three of them.

Nothing else knows which one it is. Knows no network and no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from neumeta.program import Outputs, output
from training.data import NO_LABEL, Data

LARGEST = 10.0
"""A trained network's log variances lie between -LARGEST and LARGEST: deviations of 0.007 to 148."""


@runtime_checkable
class Task(Protocol):
    """Outputs are what the network returns for a batch; targets what `targets` made of the batch.

    A score is counted batch by batch: `tally`s add up (over batches and over processes), and `score`
    reads the sum.
    """

    @property
    def metric(self) -> str:
        """What the score is."""

    @property
    def unit(self) -> str:
        """Of the score."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""

    def check(self, data: Data) -> None:
        """Raises ValueError if this data set has not what the task needs."""

    def targets(self, x: Tensor, y: Tensor, data: Data) -> Tensor:
        """What the outputs for the batch (x, y) of `data` are compared with."""

    def read(self, outputs: Any) -> Any:
        """What the other methods take of all that the network returns."""

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """What training lowers: a scalar, the mean over the batch."""

    def imitation(self, outputs: Any, teacher: Any) -> Tensor:
        """How far the outputs are from a teacher's: a divergence in nats, 0 where they are equal."""

    def tally(self, outputs: Any, targets: Tensor) -> Tensor:
        """What `score` needs of one batch, float64; the sum of tallies is that of all batches."""

    def score(self, tally: Tensor) -> float:
        """The score of everything that was counted."""


@dataclass(frozen=True)
class Classification:
    """Logits (N, K) and classes (N,): cross-entropy; percent of images whose class is right."""

    metric: str = "accuracy"
    unit: str = "%"
    higher_is_better: bool = True

    def check(self, data: Data) -> None:
        """Raises ValueError unless each image has one of two or more classes."""
        if data.targets != "classes" or len(data.classes) < 2:
            raise ValueError(
                f"data: {data.name}: classification needs two classes or more, one for each image;"
                f" this data set has {len(data.classes)} classes and {data.targets} as targets"
            )

    def targets(self, x: Tensor, y: Tensor, data: Data) -> Tensor:
        """The classes (N,)."""
        return y

    def read(self, outputs: Outputs) -> Tensor:
        """The logits: the only tensor, a dict's 'out', or the first."""
        return output(outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        return F.cross_entropy(outputs, targets)

    def imitation(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher || network) of the class probabilities, the mean over images."""
        return _divergence(outputs, teacher).mean()

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(right, counted)."""
        right = (outputs.argmax(1) == targets).sum()
        return torch.stack((right, torch.tensor(len(targets), device=right.device))).double()

    def score(self, tally: Tensor) -> float:
        """Percent right."""
        return 100 * float(tally[0] / tally[1])


@dataclass(frozen=True)
class Segmentation:
    """Logits (N, K, H, W) and masks (N, H, W): cross-entropy; mean intersection over union.

    Pixels whose target is NO_LABEL count nowhere.
    """

    metric: str = "mean IoU"
    unit: str = "%"
    higher_is_better: bool = True

    def check(self, data: Data) -> None:
        """Raises ValueError unless each image has a mask."""
        if data.targets != "masks" or len(data.classes) < 2:
            raise ValueError(
                f"data: {data.name}: segmentation needs a mask for each image and two classes or"
                f" more; this data set has {len(data.classes)} and {data.targets} as targets"
            )

    def targets(self, x: Tensor, y: Tensor, data: Data) -> Tensor:
        """The masks (N, H, W)."""
        return y

    def read(self, outputs: Outputs) -> Tensor:
        """The logits: the only tensor, a dict's 'out', or the first."""
        return output(outputs)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats, the mean over labelled pixels; 0 where there are none."""
        total = F.cross_entropy(outputs, targets, ignore_index=NO_LABEL, reduction="sum")
        return total / (targets != NO_LABEL).sum().clamp(min=1)

    def imitation(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher || network) of the class probabilities, the mean over all pixels."""
        return _divergence(outputs, teacher).mean()

    def tally(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(K, K) pixels by their class (rows) and the network's (columns)."""
        count = outputs.shape[1]
        labelled = targets != NO_LABEL
        pairs = targets[labelled] * count + outputs.argmax(1)[labelled]
        return torch.bincount(pairs, minlength=count**2).view(count, count).double()

    def score(self, tally: Tensor) -> float:
        """Percent, the mean over the classes that occur in the masks."""
        both, truth, said = tally.diagonal(), tally.sum(1), tally.sum(0)
        occurs = truth > 0
        return 100 * float((both[occurs] / (truth + said - both)[occurs]).mean())


@dataclass(frozen=True)
class Generation:
    """A variational autoencoder: outputs are (reconstruction, mean, log variance).

    The reconstruction (N, C, H, W) is pixels in 0..1: with `variance` None the probability of each
    (Bernoulli: binary cross-entropy), else the mean of a Gaussian with that variance (squared error).
    mean and log variance (N, Z) are those of the latent code, whose prior is N(0, 1). The ELBO is of
    the codes that the network drew: while the source trains, since its module draws them; of their
    mean everywhere else, since a traced graph draws none.
    """

    variance: float | None = None
    metric: str = "ELBO"
    unit: str = "nats"
    higher_is_better: bool = True

    def check(self, data: Data) -> None:
        """Any images will do."""

    def targets(self, x: Tensor, y: Tensor, data: Data) -> Tensor:
        """The pixels in 0..1 themselves."""
        mean, std = (torch.tensor(each, device=x.device) for each in (data.mean, data.std))
        return (x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)).clamp(0, 1)

    def read(self, outputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """All three.

        Raises ValueError for anything else.
        """
        if not isinstance(outputs, tuple) or len(outputs) != 3:
            raise ValueError("generation needs a network that returns (pixels, mean, log variance)")
        return outputs

    def loss(self, outputs: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
        """The negative ELBO in nats, the mean over images."""
        return -self._elbo(outputs, targets, _exp).mean()

    def imitation(
        self, outputs: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor, Tensor]
    ) -> Tensor:
        """KL(teacher || network) of the pixels and of the latent codes, the mean over images."""
        (pixels, mean, log_variance), (pixels_, mean_, log_variance_) = outputs, teacher
        if self.variance is None:
            entropy = F.binary_cross_entropy(pixels_, pixels_, reduction="none")
            of_pixels = F.binary_cross_entropy(pixels, pixels_, reduction="none") - entropy
        else:
            of_pixels = (pixels - pixels_).square() / (2 * self.variance)
        moved = (mean_ - mean).square() * _exp(-log_variance)
        wider = log_variance_ - log_variance
        of_codes = 0.5 * (_exp(wider) + moved - 1 - wider)
        return (of_pixels.flatten(1).sum(1) + of_codes.flatten(1).sum(1)).mean()

    def tally(self, outputs: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
        """(sum of the ELBOs, counted)."""
        elbo = self._elbo(outputs, targets, torch.exp).double().sum()
        return torch.stack((elbo, torch.tensor(float(len(targets)), device=elbo.device).double()))

    def score(self, tally: Tensor) -> float:
        """The mean ELBO."""
        return float(tally[0] / tally[1])

    def _elbo(
        self,
        outputs: tuple[Tensor, Tensor, Tensor],
        targets: Tensor,
        exp: Callable[[Tensor], Tensor],
    ) -> Tensor:
        pixels, mean, log_variance = outputs
        if self.variance is None:
            likelihood = -F.binary_cross_entropy(pixels, targets, reduction="none")
        else:
            constant = math.log(2 * math.pi * self.variance)
            likelihood = -0.5 * ((pixels - targets).square() / self.variance + constant)
        divergence = 0.5 * (exp(log_variance) + mean.square() - 1 - log_variance)
        return likelihood.flatten(1).sum(1) - divergence.flatten(1).sum(1)


def _exp(x: Tensor) -> Tensor:
    """e^x, and above LARGEST its tangent there. A small network's log variances are far off before it
    has learnt anything, and their exponentials may be no float32 numbers."""
    return x.clamp(max=LARGEST).exp() * (1 + (x - LARGEST).clamp(min=0))


def _divergence(outputs: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || outputs) over dimension 1 of two tensors of logits."""
    parts = F.kl_div(
        outputs.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="none"
    )
    return parts.sum(1)


TASKS: dict[str, Task] = {
    "classification": Classification(),
    "segmentation": Segmentation(),
    "generation": Generation(),
}
