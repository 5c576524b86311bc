"""Which images a manifold carries for its batch statistics, and the sizes whose statistics it keeps.

Knows no training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from tqdm import tqdm

from neumeta.manifold import Manifold
from neumeta.program import Program
from neumeta.representation import Anchored
from neumeta.sample import sample_site, seed_of
from neumeta.sites import sites
from neumeta.space import Architecture
from neumeta.statistics import Statistics, flatten, measure, unflatten
from training import data as sets
from training.data import Data
from training.divergence import check_tensors

IMAGES = 1000
"""How many images kept statistics are measured on, of up to PIXELS in all."""
CANDIDATES = 4000
"""Of how many images these and the carried ones are chosen, so that their moments are those of all."""
PIXELS = 1000 * 64 * 64
MOST_KEPT = 128
"""More sizes than that at scalar widths: those of widths on a ladder of STEP alone are kept."""
STEP = 0.05
SWAPS = 300


@torch.no_grad()
def raw(manifold: Manifold, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of this size before folding, as a request without other wishes gets them."""
    made = sites(manifold.space, architecture)
    drawn = {name: sample_site(manifold, site, manifold.samples, 0) for name, site in made.items()}
    return {**manifold.frozen, **drawn}


@torch.no_grad()
def whole(manifold: Manifold, architecture: Architecture) -> dict[str, Tensor]:
    """The tensors of this size before folding with the batch norms' kept statistics among them.

    Raises KeyError if the manifold keeps none for it.
    """
    graph, sizes = manifold.space.graph_of(architecture), manifold.space.sizes(architecture)
    found = raw(manifold, architecture)
    norms = [node for node in graph.nodes if node.op == "batch_norm"]
    moments = unflatten(graph, sizes, manifold.statistics.kept[architecture.key]) if norms else {}
    for node in norms:
        if node.tensors["mean"] not in found:
            mean, variance = moments[node.name]
            found |= {node.tensors["mean"]: mean, node.tensors["variance"]: variance}
    return found


def exact(
    manifold: Manifold, architecture: Architecture, x: Float[Tensor, "N C H W"]
) -> Float[Tensor, "2 channels"]:
    """The statistics of every batch norm on these normalised images, as `Statistics.kept` holds them.

    Raises Diverged if one is not finite.
    """
    space = manifold.space
    graph, sizes = space.graph_of(architecture), space.sizes(architecture)
    found = flatten(measure(graph, sizes, raw(manifold, architecture), x))
    check_tensors(f"statistics at {architecture.key}", {"batch norm": found})
    return found


def compact(kept: Float[Tensor, "2 channels"]) -> Float[Tensor, "2 channels"]:
    """The same in float16, unless a number would lose more than its last bits there."""
    half = kept.half()
    close = (half.float() - kept).abs() <= 2**-10 * kept.abs() + 1e-6
    return half if bool(half.isfinite().all() and close.all()) else kept


def usual(manifold: Manifold) -> list[Architecture]:
    """The sizes that people ask for most: every scalar width at the source's depth, and even depths at
    full width."""
    space = manifold.space
    found = list(space.scaled())
    low, high = space.width
    if len(found) > MOST_KEPT:
        count = int((high - low) / STEP + 1e-9)
        widths = {low, high, *(round(low + STEP * k, 6) for k in range(count + 1))}
        found = [space.architecture(min(width, high)) for width in sorted(widths)]
    if space.blocks:
        for blocks in range(1, space.most + 1):
            depth = [max(blocks, stage.least) for stage in space.graph.stages]
            found.append(space.architecture(high, depth, extrapolate=True))
        found += [space.architecture(high, d, extrapolate=True) for d in space.named.values()]
    return list({each.key: each for each in found}.values())


@torch.no_grad()
def moments(
    manifold: Manifold, architecture: Architecture, x: Float[Tensor, "N C H W"]
) -> Float[Tensor, "N features"]:
    """How far each image's own first and second moments in front of every batch norm are from those of
    all, in units of the channel; every batch norm counts the same."""
    space = manifold.space
    graph, sizes = space.graph_of(architecture), space.sizes(architecture)
    held = raw(manifold, architecture)
    norms = {
        node.name
        for node in graph.nodes
        if node.op == "batch_norm" and node.tensors["mean"] not in held
    }
    parts: list[Tensor] = []

    def watch(name: str, value: Tensor) -> None:
        if name in norms:
            first = value.flatten(2).mean(2) if value.ndim > 2 else value
            second = value.square().flatten(2).mean(2) if value.ndim > 2 else value.square()
            mean = first.mean(0)
            variance = (second.mean(0) - mean.square()).clamp(min=1e-12)
            weight = 1 / len(mean) ** 0.5
            parts.append((first - mean) / variance.sqrt() * weight)
            parts.append((second - second.mean(0)) / variance * weight)

    Program(graph, sizes).run(held, x, watch=watch)
    return torch.cat(parts, 1) if parts else x.new_zeros(len(x), 1)


def products(features: Float[Tensor, "N features"]) -> Float[Tensor, "N N"]:
    """The product of every two rows, in float64."""
    features = features.double()
    return features @ features.T


def chosen(gram: Float[Tensor, "N N"], count: int) -> Int64[Tensor, " count"]:
    """The `count` rows whose mean is nearest to 0, from the `products` of rows: greedily, then by
    exchanging one for another."""
    norms = gram.diagonal()
    held = torch.zeros(len(gram), dtype=torch.bool)
    total = torch.zeros_like(norms)  # each row's product with the sum
    for _ in range(min(count, len(gram))):
        best = int((2 * total + norms).masked_fill(held, torch.inf).argmin())
        held[best] = True
        total += gram[best]
    for _ in range(SWAPS):
        inside, outside = held.nonzero()[:, 0], (~held).nonzero()[:, 0]
        if not len(outside):
            break
        # |s - a + b|^2 - |s|^2
        leaves = norms[inside] - 2 * total[inside]
        joins = norms[outside] + 2 * total[outside]
        change = leaves[:, None] + joins - 2 * gram[inside][:, outside]
        least = int(change.argmin())
        if float(change.flatten()[least]) >= -1e-9 * float(norms.mean()):
            break
        a, b = inside[least // len(outside)], outside[least % len(outside)]
        held[a], held[b] = False, True
        total += gram[b] - gram[a]
    return held.nonzero()[:, 0]


def pixels(x: Float[Tensor, "N C H W"], data: Data) -> Tensor:
    """Normalised images as uint8 pixels, or in float16 as they are if they were no such pixels."""
    around = (1, -1, *[1] * (x.ndim - 2))
    mean, std = torch.tensor(data.mean).view(around), torch.tensor(data.std).view(around)
    values = (x * std + mean) * 255
    whole = values.round()
    if bool(((values - whole).abs() < 0.05).all()) and whole.min() >= 0 and whole.max() <= 255:
        return whole.to(torch.uint8)
    return x.half()


def training_images(data: Data, count: int, seed: int) -> Float[Tensor, "N C H W"]:
    """Augmented training images, normalised."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data), generator=generator)[:count]
    # Not all at once: augmenting takes several copies.
    parts = [data.batch(rows[at : at + 250], generator)[0] for at in range(0, len(rows), 250)]
    return torch.cat(parts)


def noise_images(shape: tuple[int, ...], count: int, seed: int) -> Float[Tensor, "N C H W"]:
    """Normalised images of noise whose power falls with frequency as that of photographs does."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    drawn = torch.randn(count, channels, height, width, generator=generator)
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    falls = 1 / (y.square() + x.square()).sqrt().clamp(min=1 / max(height, width))
    made = torch.fft.irfft2(torch.fft.rfft2(drawn) * falls, s=(height, width))
    scaled: Tensor = made / made.std()
    return scaled


def own_images(path: str, data: Data) -> Data:
    """The user's own folder, archive or .npz: images of the data's shape, normalised like the data's,
    and augmented likewise unless those are streamed.

    Raises DataMissing or ValueError naming the path.
    """
    channels, height, width = data.shape
    flips, pad = (data.flips, data.pad) if isinstance(data, sets.Dataset) else (False, 0)
    return sets.load_from(
        path,
        size=(height, width),
        channels=channels,
        mean=data.mean,
        std=data.std,
        flips=flips,
        pad=pad,
    )


def of_source(manifold: Manifold, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `kept` holds of the source's own batch statistics, where its own size is kept as it is."""
    if not any(isinstance(module, Anchored) for module in manifold.representation.modules()):
        return {}
    graph = manifold.space.graph
    norms = [node for node in graph.nodes if node.op == "batch_norm"]
    own = {
        node.name: (source[node.tensors["mean"]].float(), source[node.tensors["variance"]].float())
        for node in norms
    }
    return {manifold.space.full.key: compact(flatten(own))}


def calibrate(
    manifold: Manifold,
    data: Data,
    *,
    calibration: int,
    images: str = "training",
    seed: int = 0,
    source: Mapping[str, Tensor] | None = None,
) -> None:
    """Fill `manifold.statistics`: the images it carries (of training images those that together have
    the moments of many more) and the statistics of the usual sizes, on images that are chosen so too.
    The source's own size, if it is kept as it is, keeps the statistics among the `source`'s tensors,
    and batch norms in front of all that morphs keep them at every size, whatever the images.

    `images` is 'training', 'noise' or the path of the user's own, whose statistics then are the kept
    ones too. Nothing to do for a graph without batch norm. Raises Diverged if a statistic is not
    finite, DataMissing or ValueError for a path.
    """
    space = manifold.space
    if not any(node.op == "batch_norm" for node in space.graph.nodes):
        return
    height, width = data.shape[1:]
    fits = PIXELS // (height * width)
    many = max(calibration, min(CANDIDATES, fits))
    owner = data if images in ("training", "noise") else own_images(images, data)
    x = training_images(owner, many, seed_of(seed, "statistics"))
    if len(x) < 2:
        raise ValueError(f"data.calibration_images: {images} has {len(x)} images, not two or more")
    gram = products(torch.cat([moments(manifold, each, x) for each in _few(manifold)], 1))
    if images == "noise":
        carried = noise_images(data.shape, calibration, seed_of(seed, "noise"))
        carried = _as_pixels(carried, data)
    else:
        carried = x[chosen(gram, calibration)]
    x = x[chosen(gram, max(calibration, min(IMAGES, fits)))]
    kept = of_source(manifold, source) if source else {}
    wanted = [each for each in usual(manifold) if each.key not in kept]
    for each in tqdm(wanted, desc="statistics", mininterval=5):
        kept[each.key] = compact(exact(manifold, each, x))
    manifold.statistics = Statistics(pixels(carried, data), kept)


def _as_pixels(x: Tensor, data: Data) -> Tensor:
    around = (1, -1, 1, 1)
    mean, std = torch.tensor(data.mean).view(around), torch.tensor(data.std).view(around)
    return ((x * std + mean).clamp(0, 1).mul(255).round() / 255 - mean) / std


def _few(manifold: Manifold) -> Iterable[Architecture]:
    """The sizes whose statistics the carried images shall share with all: both ends, the middle, and
    those whose groups differ most, of which none is kept."""
    space = manifold.space
    low, high = space.width
    found = [space.architecture(width) for width in (low, (low + high) / 2, high)]
    ends = [(low, high)[group % 2] for group in range(len(space.groups))]
    found += [space.architecture(ends), space.architecture([low + high - end for end in ends])]
    if space.blocks:
        least = [max(space.blocks[0], stage.least) for stage in space.graph.stages]
        most = [max(space.blocks[1], stage.least) for stage in space.graph.stages]
        found += [space.architecture(high, least), space.architecture(high, most)]
    return list(dict.fromkeys(found))
