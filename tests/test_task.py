"""Three tasks, each beside a plain reference: loss, imitation of a teacher, and score."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.data import NO_LABEL, Dataset
from training.task import TASKS, Classification, Generation, Segmentation, Task


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def dataset(labels: Tensor, classes: int, mean: float = 0.0, std: float = 1.0) -> Dataset:
    images = torch.randint(0, 256, (len(labels), 1, 4, 4), generator=seeded(9)).byte()
    names = tuple(map(str, range(classes)))
    return Dataset("x", images, labels, images, labels, names, [mean], [std], False, 0)


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(math.exp(each) for each in logits))
    return [each - total for each in logits]


def kl(teacher: list[float], network: list[float]) -> float:
    p, q = log_softmax(teacher), log_softmax(network)
    return sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))


SEEDS = st.integers(0, 10**6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 6), st.integers(2, 5), SEEDS)
def test_classification_is_cross_entropy_kl_and_percent_right(n: int, k: int, seed: int) -> None:
    task, generator = Classification(), seeded(seed)
    outputs = torch.randn(n, k, generator=generator)
    teacher = torch.randn(n, k, generator=generator)
    labels = torch.randint(0, k, (n,), generator=generator)
    rows, taught = outputs.tolist(), teacher.tolist()
    loss = -sum(log_softmax(row)[y] for row, y in zip(rows, labels.tolist(), strict=True)) / n
    assert float(task.loss(outputs, labels)) == pytest.approx(loss, abs=1e-5)
    divergence = sum(kl(t, row) for t, row in zip(taught, rows, strict=True)) / n
    assert float(task.imitation(outputs, teacher)) == pytest.approx(divergence, abs=1e-5)
    right = sum(row.index(max(row)) == y for row, y in zip(rows, labels.tolist(), strict=True))
    assert task.score(task.tally(outputs, labels)) == pytest.approx(100 * right / n)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), SEEDS)
def test_segmentation_is_per_pixel_and_counts_no_ignored_pixel(n: int, k: int, seed: int) -> None:
    task, generator = Segmentation(), seeded(seed)
    outputs = torch.randn(n, k, 3, 2, generator=generator)
    teacher = torch.randn(n, k, 3, 2, generator=generator)
    masks = torch.randint(-1, k, (n, 3, 2), generator=generator)
    masks[masks == -1] = NO_LABEL
    pixels = outputs.permute(0, 2, 3, 1).reshape(-1, k).tolist()
    taught = teacher.permute(0, 2, 3, 1).reshape(-1, k).tolist()
    truth = masks.flatten().tolist()
    losses = [-log_softmax(p)[y] for p, y in zip(pixels, truth, strict=True) if y != NO_LABEL]
    expected = sum(losses) / len(losses) if losses else 0.0
    assert float(task.loss(outputs, masks)) == pytest.approx(expected, abs=1e-5)
    divergence = sum(kl(t, p) for t, p in zip(taught, pixels, strict=True)) / len(pixels)
    assert float(task.imitation(outputs, teacher)) == pytest.approx(divergence, abs=1e-5)
    said = [p.index(max(p)) for p in pixels]
    ious = []
    for label in range(k):
        pairs = [(s, y) for s, y in zip(said, truth, strict=True) if y != NO_LABEL]
        if label in truth:
            both = sum(s == y == label for s, y in pairs)
            ious.append(both / sum(label in pair for pair in pairs))
    if ious:
        score = task.score(task.tally(outputs, masks))
        assert score == pytest.approx(100 * sum(ious) / len(ious), abs=1e-6)


def test_a_batch_without_any_labelled_pixel_moves_nothing() -> None:
    outputs = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = Segmentation().loss(outputs, torch.full((2, 4, 4), NO_LABEL))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and outputs.grad is not None and not outputs.grad.any()


def test_mean_iou_leaves_out_classes_that_do_not_occur_but_counts_what_was_wrongly_said() -> None:
    masks = torch.tensor([[[0, 0, 1, 1]]])
    said = torch.tensor([[[0, 2, 1, 1]]])  # class 2 and 3 are nowhere
    outputs = torch.nn.functional.one_hot(said, 4).permute(0, 3, 1, 2).float()
    assert Segmentation().score(Segmentation().tally(outputs, masks)) == pytest.approx(75.0)


def normal(x: float, mean: float, variance: float) -> float:
    return -0.5 * (math.log(2 * math.pi * variance) + (x - mean) ** 2 / variance)


def codes(generator: torch.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
    pixels = torch.rand(n, 1, 2, 2, generator=generator) * 0.9 + 0.05
    return pixels, torch.randn(n, 3, generator=generator), torch.randn(n, 3, generator=generator)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.sampled_from([None, 0.1, 1.0]), SEEDS)
def test_generation_is_the_elbo_in_nats_per_image(
    n: int, variance: float | None, seed: int
) -> None:
    task, generator = Generation(variance), seeded(seed)
    pixels, mean, log_variance = codes(generator, n)
    targets = torch.rand(n, 1, 2, 2, generator=generator)
    elbos = []
    for row in range(n):
        pairs = list(
            zip(targets[row].flatten().tolist(), pixels[row].flatten().tolist(), strict=True)
        )
        if variance is None:
            likelihood = sum(x * math.log(p) + (1 - x) * math.log(1 - p) for x, p in pairs)
        else:
            likelihood = sum(normal(x, p, variance) for x, p in pairs)
        of_code = zip(mean[row].tolist(), log_variance[row].tolist(), strict=True)
        divergence = sum(0.5 * (math.exp(v) + m * m - 1 - v) for m, v in of_code)
        elbos.append(likelihood - divergence)
    outputs = (pixels, mean, log_variance)
    assert float(task.loss(outputs, targets)) == pytest.approx(-sum(elbos) / n, rel=1e-4, abs=1e-4)
    score = task.score(task.tally(outputs, targets))
    assert score == pytest.approx(sum(elbos) / n, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("variance", [None, 0.1])
def test_imitation_of_a_generator_is_torchs_own_divergence(variance: float | None) -> None:
    outputs, teacher = codes(seeded(0), 5), codes(seeded(1), 5)
    kind: Any = torch.distributions
    pixels = (
        [kind.Bernoulli(each[0]) for each in (teacher, outputs)]
        if variance is None
        else [kind.Normal(each[0], math.sqrt(variance)) for each in (teacher, outputs)]
    )
    latent = [kind.Normal(each[1], (each[2] / 2).exp()) for each in (teacher, outputs)]
    expected = sum(
        float(kind.kl_divergence(*pair).flatten(1).sum(1).mean()) for pair in (pixels, latent)
    )
    assert float(Generation(variance).imitation(outputs, teacher)) == pytest.approx(
        expected, rel=1e-4
    )


def example(name: str, generator: torch.Generator, n: int) -> tuple[Any, Tensor]:
    if name == "generation":
        return codes(generator, n), torch.rand(n, 1, 2, 2, generator=generator)
    shape = (n, 2, 2) if name == "segmentation" else (n,)
    outputs = torch.randn(n, 3, *shape[1:], generator=generator)
    return outputs, torch.randint(0, 3, shape, generator=generator)


@pytest.mark.parametrize("name", list(TASKS))
def test_a_network_that_equals_its_teacher_has_nothing_to_imitate(name: str) -> None:
    task = TASKS[name]
    outputs, _ = example(name, seeded(0), 6)
    other, _ = example(name, seeded(1), 6)
    assert float(task.imitation(outputs, outputs)) == pytest.approx(0, abs=1e-5)
    assert float(task.imitation(outputs, other)) > 0.01


@pytest.mark.parametrize("name", list(TASKS))
def test_tallies_of_batches_add_up_to_that_of_all(name: str) -> None:
    task: Task = TASKS[name]
    outputs, targets = example(name, seeded(2), 7)

    def rows(part: slice) -> Any:
        if isinstance(outputs, tuple):
            return tuple(each[part] for each in outputs)
        return outputs[part]

    halves = [task.tally(rows(part), targets[part]) for part in (slice(0, 3), slice(3, 7))]
    whole = task.tally(outputs, targets)
    assert whole.dtype == torch.float64
    assert task.score(halves[0] + halves[1]) == pytest.approx(task.score(whole), rel=1e-6)
    assert task.higher_is_better and task.metric


@pytest.mark.parametrize("name", list(TASKS))
def test_a_better_network_has_the_better_score_and_the_lower_loss(name: str) -> None:
    task = TASKS[name]
    outputs, targets = example(name, seeded(3), 8)
    if name == "generation":
        better: Any = (targets.clamp(0.01, 0.99), *(torch.zeros_like(each) for each in outputs[1:]))
    else:
        right = torch.nn.functional.one_hot(targets, 3).float()
        better = outputs + 10 * (right if right.ndim == 2 else right.permute(0, 3, 1, 2))
    scores = [task.score(task.tally(each, targets)) for each in (better, outputs)]
    assert (scores[0] > scores[1]) == task.higher_is_better and scores[0] != scores[1]
    assert float(task.loss(better, targets)) < float(task.loss(outputs, targets))


def test_targets_are_classes_masks_or_the_pixels_themselves() -> None:
    data = dataset(torch.tensor([0, 1, 1]), 2, mean=0.3, std=0.2)
    x, y = data.batch(torch.arange(3), seeded(0), augment=False)
    for name in ("classification", "segmentation"):
        assert torch.equal(TASKS[name].targets(x, y, data), y)
    pixels = TASKS["generation"].targets(x, y, data)
    assert torch.allclose(pixels, data.train_images / 255, atol=1e-6)
    assert float(pixels.min()) >= 0 and float(pixels.max()) <= 1


def test_each_task_refuses_data_that_has_not_its_targets() -> None:
    labels = dataset(torch.tensor([0, 1]), 2)
    masks = dataset(torch.zeros(2, 4, 4, dtype=torch.uint8), 2)
    nothing, one = dataset(torch.tensor([0, 0]), 0), dataset(torch.tensor([0, 0]), 1)
    good = {"classification": [labels], "segmentation": [masks]}
    for name, fits in good.items():
        for data in (labels, masks, nothing, one):
            if any(data is each for each in fits):
                TASKS[name].check(data)
                continue
            with pytest.raises(ValueError, match=f"data: x: {name} needs"):
                TASKS[name].check(data)
    for data in (labels, masks, nothing, one):
        TASKS["generation"].check(data)


def test_log_variances_that_no_float_can_raise_e_to_are_still_learnt_from() -> None:
    """A VAE at a quarter of its width that has learnt nothing yet gave -115."""
    task, x = Generation(), torch.rand(2, 1, 4, 4, generator=seeded(0))
    log_variance = torch.tensor([[-115.0, 3.0], [200.0, -20.0]], requires_grad=True)
    mean = torch.full((2, 2), 53.0, requires_grad=True)
    outputs = (x.clamp(0.1, 0.9), mean, log_variance)
    teacher = (x.clamp(0.2, 0.8), torch.zeros(2, 2), torch.full((2, 2), -6.0))
    for loss in (task.loss(outputs, x), task.imitation(outputs, teacher)):
        assert bool(loss.isfinite())
        gradient, of_mean = torch.autograd.grad(loss, (log_variance, mean))
        assert bool(gradient.isfinite().all()) and bool((of_mean >= 0).all())
        # A step against the gradient brings both nearer.
        assert gradient[0, 0] < 0 < gradient[1, 0]
