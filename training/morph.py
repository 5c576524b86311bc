"""The same run from Python: a module, its data, and where the manifold goes.

    from training.morph import morph

    result = morph(MyNet(), "photos", "mynet.safetensors", width=(0.25, 1.0), epochs=4)
    print(result.source, result.rows)

Knows no stage; `pipeline.py` runs them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from training import basis, pipeline, recipe
from training.data import KNOWN


def morph(
    module: nn.Module,
    images: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    width: tuple[float, float] = (0.25, 1.0),
    epochs: float = 1.0,
    folder: str | Path | None = None,
    resume: bool = False,
    **sections: Any,
) -> pipeline.Result:
    """Make a manifold of `module` (its weights as they are) at `out`; returns its table and itself.

    `images` is a folder, an archive, an .npz, a known data set's name, or a recipe's whole [data].
    `epochs` are of the fit. `sections` are any other keys of a recipe (see sections.py), for example
    `task="segmentation"`, `fit={"lr": 1e-2, "blocks": (1, 4)}` or `network={"train": {"epochs": 5}}`.
    State goes to `folder` (`OUT.run` beside the result). The module itself is left as it is.

    Raises ValueError (BadRecipe) with everything that does not fit, before the first step.
    """
    target = Path(out)
    data = images
    if not isinstance(data, Mapping):
        data = {"name" if str(images) in KNOWN else "path": str(images)}
    given: dict[str, Any] = {
        "name": target.stem,
        "title": target.stem,
        "evaluate": {"widths": sorted({width[1], sum(width) / 2, width[0]}, reverse=True)},
    }
    own = {"width": width, "epochs": float(epochs), "sandwich": True, "distill": "inplace"}
    net = {"network": f"python:{type(module).__name__}", "name": target.stem}
    given |= sections
    given["data"] = data
    given["fit"] = {**own, **sections.get("fit", {})}
    given["network"] = {**net, **sections.get("network", {})}
    given.setdefault("representation", {"corrected": {}})
    asked = recipe.parse(given, "morph")
    result = pipeline.run(
        asked,
        basis.dataset(asked, None),
        Path(),
        Path(folder) if folder else target.with_name(target.name + ".run"),
        target,
        resume=resume,
        module=module,
    )
    assert (
        result is not None
    )  # of several processes only the first has one: use neumeta-train there
    return result
