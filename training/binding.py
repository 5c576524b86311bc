"""What a run's folder is bound to: the state that a stage has left there is gone on with only if
nothing has changed that its result depends on.

Knows no stage's work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neumeta import atomic
from training import data
from training.recipe import Recipe, parse

FITTED = ("teacher.pt", "regression.pt", "fit.pt")
STATE = ("source.pt", "source.safetensors", *FITTED)
"""What stages leave in a run's folder to go on with."""


def depends(asked: Recipe, loaded: data.Data, weights: str | None) -> dict[str, dict[str, Any]]:
    """What the result of each stage that keeps state depends on, by stage and dotted key.

    `weights` is the digest of those that the source network begins with.
    """
    whole = asked.as_dict()
    held, built = whole["representation"], whole["network"]
    del held["samples"]  # of evaluation and use, not of the fit
    del built["name"], built["named"]  # of use, likewise
    built["weights_sha256"] = weights
    images = {
        "sha256": loaded.digest(),
        "classes": list(loaded.classes),
        "mean": list(loaded.mean),
        "std": list(loaded.std),
        "flips": getattr(loaded, "flips", asked.data.flips),
        "pad": getattr(loaded, "pad", asked.data.pad),
    }
    stages = {
        "source": {"seed": asked.seed, "task": asked.task, "network": built, "data": images},
        "fit": {"order": whole["order"], "representation": held, "fit": whole["fit"]},
    }
    return {stage: dict(_flat(keys)) for stage, keys in stages.items()}


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def begin(
    asked: Recipe, loaded: data.Data, weights: str | None, run: Path, *, resume: bool
) -> None:
    """Write `run/recipe.json`, what this run is bound to; on resume only what no stage's result that
    is there depends on may have changed.

    Raises ValueError naming the first key that differs, with both values.
    """
    path, now = run / "recipe.json", depends(asked, loaded, weights)
    left = [name for name in STATE if (run / name).exists()]
    if not resume and (path.exists() or left):
        raise ValueError(f"{run} holds an earlier run: add --resume, or choose another --folder")
    if left:
        before = _bound(path, now)
        _same_weights(before["source"], now["source"])
        for stage in ("source", "fit") if {*FITTED} & {*left} else ("source",):
            held = before.get(stage, {})
            for key in {**held, **now[stage]}:
                old, new = held.get(key), now[stage].get(key)
                if old != new:
                    raise ValueError(
                        f"{run} was begun with {key} = {json.dumps(old)}, and now it is"
                        f" {json.dumps(new)}: go back to that, or choose another --folder"
                    )
    told = {"recipe": asked.as_dict(), "depends": now}
    atomic.write(path, json.dumps(told, indent=1, sort_keys=True))


def _same_weights(before: dict[str, Any], now: dict[str, Any]) -> None:
    """A file of weights that is gone since is as it was, and so is one whose digest was not written."""
    key = "network.weights_sha256"
    now[key] = now[key] or before.get(key)
    before.setdefault(key, now[key])


def _bound(path: Path, now: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What an earlier run wrote down. Of keys that there were not yet it had what they have by default.

    Raises ValueError if that cannot be known.
    """
    try:
        told = json.loads(path.read_text())
        held = {stage: told["depends"][stage] for stage in now}
        if all(isinstance(keys, dict) for keys in held.values()):
            if any(now[stage].keys() - held[stage].keys() for stage in now):
                begun = dict(_flat(parse(told["recipe"], str(path)).as_dict()))
                for stage, keys in now.items():
                    held[stage] = {k: begun[k] for k in keys if k in begun} | held[stage]
            return held
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path}: missing, damaged or of another version, so what this run was begun with is"
        " unknown: choose another --folder"
    )
