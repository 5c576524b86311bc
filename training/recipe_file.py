"""Recipes as TOML files: the built-in ones and a user's own, and what one file takes over from another.

Knows no key of a recipe but the file's own two, `extends` and `without`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.recipe import BadRecipe, Recipe, changed, parse, refused

BUILT_IN = Path(__file__).parent / "recipes"


def load(name: str) -> Recipe:
    """The recipe of this name among the built-in ones, or in this TOML file. Raises BadRecipe.

    Beside the keys of `Recipe` a file may have two more. `extends`, the name of a built-in recipe or
    of a file in the same folder, takes over the values of that one, which must not extend another: no
    more than two files are to be read. A key that the file has itself replaces the whole value, a
    table such as `network.train` too, and all `charts`. `without` lists keys that are not taken over.
    """
    path = _path(name, Path())
    if path is None:
        raise BadRecipe("recipe", [f"{name!r} is neither a .toml file nor one of {_built_in()}"])
    own = _read(path)
    if "extends" not in own:
        return parse({"name": path.stem, **own}, str(path))
    values, base = _extended(own, path)
    return parse({"name": path.stem, **values}, f"{path} (extends {base})", str(path))


def of_run(name: str) -> Recipe:
    """The built-in recipe that makes the run of this name, `seeded` where that says so. Raises
    BadRecipe."""
    told = re.fullmatch(r"(.+)-seed-(\d{1,19})", name)
    return load(told[1]).seeded(int(told[2])) if told else load(name)


def _extended(own: dict[str, Any], path: Path) -> tuple[dict[str, Any], str]:
    """All values of a file that extends another, and what it extends. Raises BadRecipe."""

    def problem(key: str, given: object, allowed: str) -> BadRecipe:
        return BadRecipe(str(path), [refused(key, given, allowed)])

    base, without = own.pop("extends"), own.pop("without", [])
    under = _path(base, path.parent) if isinstance(base, str) and "/" not in base else None
    if under is None:
        allowed = f"it must be a .toml file in the same folder, or one of {_built_in(whole=True)}"
        raise problem("extends", base, allowed)
    values = _read(under)
    values.pop("name", None)  # of the file that is read, as its run's folder is
    if "extends" in values:
        allowed = f"it extends {values['extends']!r} itself: extend that one"
        raise problem("extends", base, allowed)
    if not isinstance(without, list):
        raise problem("without", without, "it must be a list of keys, like ['fit.start']")
    for key in without:
        section, _, inner = str(key).rpartition(".")
        held = values.get(section) if section else values
        if not isinstance(held, dict) or held.pop(inner, None) is None:
            allowed = f"each must be a key of {base}, like 'fit.start', and not be listed twice"
            raise problem("without", key, allowed)
    made = changed(values, own)
    file = _python_file(values)
    there = under.parent.resolve() == path.parent.resolve() or (path.parent / file).is_file()
    if file and not there and _python_file(made) == file:
        allowed = (
            f"its network is in {file!r}, which is not in this folder: give network.network, too"
        )
        raise problem("extends", base, allowed)
    return made, base


def _python_file(values: Mapping[str, Any]) -> str:
    section = values.get("network")
    network = section.get("network") if isinstance(section, dict) else None
    file = network.rpartition(":")[0] if isinstance(network, str) else ""
    return file if file.endswith(".py") else ""


def _path(name: str, folder: Path) -> Path | None:
    path = folder / name if name.endswith(".toml") else BUILT_IN / f"{name}.toml"
    try:
        return path if path.is_file() else None
    except OSError:  # a name that is too long for one
        return None


def _built_in(whole: bool = False) -> str:
    """Their names; only of those which extend no other, if they must be `whole`."""
    found = sorted(BUILT_IN.glob("*.toml"))
    return ", ".join(each.stem for each in found if not (whole and "extends" in _read(each)))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(str(path), [str(error)]) from None
    if "without" in values and "extends" not in values:
        raise BadRecipe(str(path), ["without: there must be `extends` beside it"])
    return values
