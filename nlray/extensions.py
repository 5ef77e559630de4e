"""Classes that a configuration names: one of nlray's by its name, or one of the user's by its import path `package.module:Class`.

    cls = resolve_class("cms.mlp", "own:LowRank", CLASSES, Level)
    options = options_of(cls, {"rank": 8}, key="cms.mlp_options", owner="own:LowRank")
    level = cls(form, **options)

Every mistake is a UserError of one line that names the key; nothing is built here. See `docs/extending.md`.
"""

import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, get_type_hints
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nlray.config.checks import nearest, read
from nlray.errors import UserError


def resolve_class(key: str, name: str, names: Mapping[str, type], base: type) -> type:
    """Return the class of a name or an import path.

    Args:
        key: of the configuration, for messages.
        name: one of `names`, or `package.module:Class`.
        names: the classes of nlray.
        base: what the user's class is to be a subclass of.

    Raises:
        UserError: it cannot be imported, or is no such subclass.
    """
    if name in names:
        return names[name]
    module_name, _, class_name = name.partition(":")
    try:
        _look_in_current_folder(module_name)
        found = getattr(importlib.import_module(module_name), class_name)
    # Whatever a module of the user's raises while it is imported.
    except Exception as error:
        raise UserError(f"{key} is {name!r}: cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{key} is {name!r}: not a subclass of {base.__module__}.{base.__qualname__}")
    return found


def is_installed(module: str) -> bool:
    """Return whether a module is nlray's own, or of a package that was installed: in site-packages, or editable from its own folder.

    Nothing of it is imported. A module of the current folder is not installed, whatever the folder says of itself.
    """
    top = module.partition(".")[0]
    # A package's `__main__` is a program, which would run.
    if top == "nlray" or "__main__" in module.split("."):
        return top == "nlray"
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return False
    here = os.path.realpath(os.curdir)
    sites = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and os.path.realpath(path) != here]
    allowed = [*sites, *_editable_folders(top, sites)]
    return all(any(Path(place).is_relative_to(root) for root in allowed) for place in spec.submodule_search_locations or [spec.origin])


def _editable_folders(top: str, sites: list[str]) -> Iterator[str]:
    """Give the folders from which packages that have the top module were installed with `pip install -e`."""
    for distribution in metadata.distributions(path=sites):
        if top in (distribution.read_text("top_level.txt") or "").split():
            origin = json.loads(distribution.read_text("direct_url.json") or "{}")
            if origin.get("dir_info", {}).get("editable"):
                yield url2pathname(urlsplit(origin["url"]).path)


def _look_in_current_folder(module: str) -> None:
    """Have a module that is nowhere else be found in the current folder, which the path of a command lacks; Ray's actors have it."""
    top, here = module.partition(".")[0], os.getcwd()
    if top not in sys.modules and importlib.util.find_spec(top) is None and here not in sys.path:
        sys.path.append(here)


def options_of(cls: type, given: Mapping[str, Any], *, key: str, owner: str, taken: Collection[str] = ()) -> dict[str, Any]:
    """Return every option of a class in force: the defaults of its constructor, then what is given.

    Options are what the constructor takes by name, beside its first argument and those in `taken`. A value is read by its annotation as
    a key of the configuration is, ranges of `nlray.config.checks` included; without one, or with one beyond the plain types, it is left
    to the constructor.

    Args:
        key: of the options in the configuration, for messages.
        owner: name of the class in the configuration, for messages.
        taken: further arguments that are not options.

    Raises:
        UserError: an unknown option, a value of another type, or one that is missing.
    """
    parameters = _keywords(cls)
    allowed = [name for name in parameters if name not in taken]
    kinds = _type_hints(cls)
    for name in given:
        if name not in allowed and (name in taken or not takes(cls, name)):
            hint = f"{nearest(name, allowed, '')}allowed: {', '.join(allowed) or 'none'}"
            raise UserError(f"{key}.{name}: {owner} has no such option; {hint}")
    missing = [name for name in allowed if parameters[name].default is inspect.Parameter.empty and name not in given]
    if missing:
        raise UserError(f"{key}.{missing[0]}: {owner} needs a value")
    read_ones = {name: read(f"{key}.{name}", value, kinds.get(name, Any)) for name, value in given.items()}
    return {name: parameters[name].default for name in allowed if name not in given} | read_ones


def takes(cls: type, name: str) -> bool:
    """Return whether a class's constructor takes an argument of this name, beside its first one."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())
    first = [p.name for p in parameters[:2]]
    return name in _keywords(cls) or (name not in first and any(p.kind is p.VAR_KEYWORD for p in parameters))


def one_line(error: Exception) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split())


def _keywords(cls: type) -> dict[str, inspect.Parameter]:
    """Return what a class's constructor takes by name, beside its first argument."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]
    return {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__, include_extras=True)
    except NameError:
        # Names that only a type checker sees: such options are left to the constructor.
        return {}
