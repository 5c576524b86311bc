"""The sizes that a step of training takes, drawn at random. Knows no weights and no images."""

from __future__ import annotations

import torch

from neumeta.space import Architecture, Space
from training.recipe import Recipe


def choose(recipe: Recipe, space: Space, generator: torch.Generator) -> tuple[Architecture, ...]:
    """This step's architectures: a random one, or with it the smallest and largest (`fit.sandwich`)."""
    low, high = space.width

    def uniform() -> float:
        return float(torch.rand((), generator=generator))

    def blocks() -> list[int] | None:
        if space.blocks is None:
            return None
        least, most = space.blocks
        return [int(torch.randint(least, most + 1, (), generator=generator)) for _ in space.depth]

    asked = recipe.fit
    widest = [asked.widest(group) for group in range(len(space.groups))]
    both = space.blocks is not None and low < high
    own = list(space.depth)
    if space.blocks is not None:  # the source's, or the nearest that is trained
        own = [min(max(n, space.blocks[0]), space.blocks[1]) for n in own]
    depth = own if both else blocks()
    if asked.smallest and uniform() < asked.smallest:
        width: float | list[float] = low
    elif (asked.per_group or not asked.widths) and uniform() < asked.per_group:
        width = [low + (most - low) * uniform() for most in widest]
    elif asked.widths:
        index = int(torch.randint(len(asked.widths), (), generator=generator))
        width = asked.widths[index]
    else:
        width = low + (high - low) * uniform()
    if both and asked.per_depth and uniform() < asked.per_depth:
        depth = blocks() or []
        if uniform() < 0.5:
            depth = [depth[0]] * len(depth)
    if asked.shallow and space.blocks is not None:
        depth = list(depth or own)
        stages = asked.shallow_stages or range(len(depth))
        depth[stages[int(torch.randint(len(stages), (), generator=generator))]] = space.blocks[0]
    if asked.most:
        each = width if isinstance(width, list) else [width] * len(widest)
        width = [min(factor, most) for factor, most in zip(each, widest, strict=True)]
    drawn = space.architecture(width, depth)
    if not asked.sandwich:
        return (drawn,)
    if both:
        assert space.blocks is not None
        deep = blocks() or []
        if uniform() < 0.5:  # the same for all stages; as often as not the fewest
            deep = [space.blocks[0] if uniform() < 0.5 else deep[0]] * len(deep)
        wide: float | list[float] = high
        if uniform() < 0.5:
            wide = [low + (high - low) * uniform() for _ in space.groups]
        others = (space.architecture(low, own), drawn, space.architecture(wide, deep))
        # The source's own size needs no training where it is kept as it is.
        return (space.full, *others) if recipe.fit.full_weight else others
    if space.blocks is not None:
        least, most = space.blocks
        ends = [space.architecture(high, [n] * len(space.depth)) for n in (most, least)]
    else:
        ends = [space.architecture(end) for end in (high, low)]
    return (ends[0], ends[1], drawn)
