"""Classes of the user's in the place of nlray's: `package.module:Class` and options by name, checked before a run starts.

    cls = load_class("lion:Lion", torch.optim.Optimizer)
    options = checked_options(cls, ("lr", "weight_decay"), {"beta1": 0.95})     # with the defaults of all the others

Messages begin with the name or the option; the caller puts its key in front of them. See docs/extending.md.
"""

import difflib
import importlib
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nlray.errors import UserError


def load_class(name: str, base: type) -> type:
    """Return the class that an import path `package.module:Class` names.

    Raises:
        UserError: it cannot be imported, or is no subclass of `base`.
    """
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    # Whatever a module of the user's raises while it is imported.
    except Exception as error:
        raise UserError(f"{name!r}: cannot be imported: {type(error).__name__}: {one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(f"{name!r}: not a subclass of {base.__module__}.{base.__qualname__}")
    return found


def checked_options(cls: type, skip: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option of a class: what its constructor has as a default, then what is given.

    Args:
        cls: its constructor's first argument after `self` is what it is built over, and no option.
        skip: further arguments that are no options.
        options: given ones, by name.

    Raises:
        UserError: an option that the constructor does not have, a value that its annotation does not allow, or one that is missing.
    """
    parameters, kinds = keywords(cls), _type_hints(cls)
    allowed = [key for key in parameters if key not in skip]
    for key, value in options.items():
        if key not in allowed and (key in skip or not takes(cls, key)):
            close = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"{key}: {cls.__name__} has no such option; {hint}allowed: {', '.join(allowed) or 'none'}")
        if key in kinds and not _fits(value, kinds[key]):
            raise UserError(f"{key} is {value!r}; allowed: {_describe(kinds[key])}")
    missing = [key for key in allowed if parameters[key].default is inspect.Parameter.empty and key not in options]
    if missing:
        raise UserError(f"{missing[0]}: {cls.__name__} needs a value")
    return {key: parameters[key].default for key in allowed if key not in options} | dict(options)


def keywords(cls: type) -> dict[str, inspect.Parameter]:
    """Return what a class's constructor takes by name, beside what it is built over."""
    return {p.name: p for p in _arguments(cls) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def takes(cls: type, key: str) -> bool:
    """Return whether a class's constructor takes an argument of this name, beside what it is built over."""
    return key in keywords(cls) or any(p.kind is p.VAR_KEYWORD for p in _arguments(cls))


def one_line(error: Exception) -> str:
    """Return an error's message in one line."""
    return " ".join(str(error).split())


def _arguments(cls: type) -> list[inspect.Parameter]:
    return list(inspect.signature(cls.__init__).parameters.values())[2:]


def _type_hints(cls: type) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__)
    except NameError:
        # Names that only a type checker sees: such options are left to the constructor.
        return {}


def _fits(value: Any, kind: Any) -> bool:
    """Return whether a value from YAML is of an annotated type; types beyond the plain ones are left to the constructor."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in inner
    if origin in (Union, types.UnionType):
        return any(_fits(value, k) for k in inner)
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_fits(v, inner[0] if inner else Any) for v in value)
    if kind in (int, float):
        return isinstance(value, (int, float) if kind is float else int) and not isinstance(value, bool)
    return not isinstance(kind, type) or isinstance(value, kind)


def _describe(kind: Any) -> str:
    """Return a type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, inner))
    if origin in (list, tuple, Sequence):
        return f"a list of {_describe(inner[0]) if inner else 'values'}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))
