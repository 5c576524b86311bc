"""A recipe: every hyperparameter of one published result, read from one flat TOML file.

Knows no stage's work; each stage reads the fields it needs.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from neumeta.architecture import Space
from neumeta.family import FAMILIES
from neumeta.inr import REPRESENTATIONS

BUILT_IN = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One run of the pipeline. Units: rates per step, epochs of the training set, widths as factors.

    `source`: 'train' from scratch, 'import' a public checkpoint as it is, or 'fine-tune' one.
    `sandwich`: each step trains the largest, the smallest and one random architecture; where width
    and depth both morph, those three at the source's depth and a fourth at a random one. `per_stage`:
    the share of random widths that differ by stage. `full_weight`: of the largest in the loss; 0
    where the representation keeps the source's own size as it is (`reach`): then a second random
    width and the fewest blocks at full width are trained in its place.
    `distill`: 'none', 'source' (the source network teaches) or 'inplace' (the full-size sample
    teaches the smaller ones). `norm`: train with batch statistics, fold with fitted ones; else the
    paper's folded training. `feature_views`: activations of the frozen leading part computed once
    for this many augmented passes (0: run it in every step).
    """

    name: str
    title: str
    data: str
    family: str
    arch: str
    width: tuple[float, float]
    seed: int = 0
    morph: tuple[str, ...] = ("*",)
    blocks: tuple[int, int] | None = None
    # source network
    source: str = "train"
    source_checkpoint: str = ""
    source_epochs: int = 0
    source_lr: float = 0.05
    source_batch: int = 128
    # channel order
    permutation: str = "mshp"
    # representation
    representation: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)
    norm: bool = False
    noise: float = 0.5
    depth_noise: float = 0.0
    samples: int = 8
    scale: int = 64
    # regression on the smoothed weights, before any image
    regression_steps: int = 0
    regression_lr: float = 1e-3
    # Algorithm 2
    epochs: float = 1.0
    batch: int = 128
    optimiser: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 10.0
    warm: float = 0.1
    ema: float = 0.995
    widths: tuple[float, ...] = ()
    sandwich: bool = False
    per_stage: float = 0.0
    full_weight: float = 1.0
    reconstruction: float = 1.0
    regularisation: float = 1e-4
    distill: str = "none"
    distill_weight: float = 1.0
    augment: bool = True
    feature_views: int = 0
    # evaluation
    evaluate_widths: tuple[float, ...] = (1.0,)
    evaluate_blocks: tuple[int, int] | None = None

    @property
    def space(self) -> Space:
        """The architectures this recipe's manifold covers (ten classes in every data set here)."""
        return Space(self.family, self.arch, 10, self.morph, self.width, self.blocks)

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values, for the checkpoint."""
        return asdict(self)


def load(name: str) -> Recipe:
    """The recipe of this name among the built-in ones, or in this TOML file.

    Raises ValueError naming the key that is unknown, missing or of no use.
    """
    path = Path(name) if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    if not path.exists():
        known = ", ".join(sorted(found.stem for found in BUILT_IN.glob("*.toml")))
        raise ValueError(f"recipe: {name!r} is neither a .toml file nor one of {known}")
    try:
        given = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None
    known_keys = {entry.name for entry in fields(Recipe)}
    for key in given:
        if key not in known_keys:
            raise ValueError(f"{path}: {key!r} is no recipe key")
    types = {entry.name: str(entry.type) for entry in fields(Recipe)}
    values = {key: _typed(types[key], value) for key, value in given.items()}
    try:
        recipe = Recipe(**{"name": path.stem, **values})
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from None
    _check(path, recipe)
    return recipe


def _typed(kind: str, value: Any) -> Any:
    """A TOML value as the field's type: whole numbers may stand for real ones, lists for tuples."""
    if isinstance(value, list):
        return tuple(_typed("float" if "float" in kind else kind, each) for each in value)
    if kind == "float" and type(value) is int:
        return float(value)
    return value


def _check(path: Path, recipe: Recipe) -> None:
    closed = {
        "family": tuple(FAMILIES),
        "source": ("train", "import", "fine-tune"),
        "representation": tuple(REPRESENTATIONS),
        "optimiser": ("adamw", "sgd"),
        "distill": ("none", "source", "inplace"),
        "permutation": ("none", "random", "layer-greedy", "layer-2opt", "mshp"),
    }
    for key, allowed in closed.items():
        if getattr(recipe, key) not in allowed:
            raise ValueError(f"{path}: {key}: {getattr(recipe, key)!r} is not one of {allowed}")
    if recipe.arch not in FAMILIES[recipe.family].architectures:
        allowed = tuple(FAMILIES[recipe.family].architectures)
        raise ValueError(f"{path}: arch: {recipe.arch!r} is not one of {allowed}")
    both = recipe.blocks is not None and recipe.width[0] < recipe.width[1]
    if recipe.full_weight == 0 and not (both and recipe.options.get("reach")):
        raise ValueError(
            f"{path}: full_weight: 0 leaves the source's own size untrained: it needs a grid's"
            " options.reach, which keeps that size as it is, and width and blocks that morph"
        )
    if recipe.norm and recipe.morph != ("*",):
        # A frozen layer is folded already, and batch statistics follow one another from the image on.
        raise ValueError(f"{path}: norm: true needs morph = ['*'], not {list(recipe.morph)}")
