"""YAML as the configuration has it: text to mappings, lists and strings, and back.

Nothing is guessed from how a value looks. A value without quotes stays as it is written (`Scalar`), and the key that it belongs to says
what it is (`nlray.config.checks.read`): `run.name: 010` is that name, `run.steps: 010` is ten. Only null has a meaning of its own.
"""

import re
from typing import Any, ClassVar

import yaml
from yaml.constructor import ConstructorError

from nlray.config.checks import FLOAT, Scalar
from nlray.errors import UserError

MAX_NODES, MAX_DEPTH = 100_000, 100
"""Of one text, with every alias written out: more is a mistake or an attack."""

_NULL = re.compile(r"(~|null|Null|NULL|)\Z")


def load_yaml(name: str, text: str) -> Any:
    """Return what a YAML text holds; `name` is for messages.

    Raises:
        UserError: it is no YAML, has a key twice, an explicit type, or is too large or too deep.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        size, depth = _measure(node, {})
        if size > MAX_NODES or depth > MAX_DEPTH:
            raise UserError(f"{name}: too large or too deep; allowed: {MAX_NODES} values, {MAX_DEPTH} levels, aliases written out")
        return loader.construct_document(node)
    except RecursionError as error:
        raise UserError(f"{name}: nested too deep; allowed: {MAX_DEPTH} levels") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{name}{where}: not valid YAML: {problem}") from error


def dump_yaml(value: Any) -> str:
    """Return plain values as YAML; strings that look like another type are quoted."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}
    yaml_constructors: ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    pass


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConstructorError(None, None, "a key is a list or a mapping", key.start_mark)
        if key.value in seen:
            raise ConstructorError(None, None, f"the key {key.value} comes twice", key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


def _measure(node: yaml.Node, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """Return how many nodes there are below a node, itself included, and on how many levels."""
    if id(node) not in known:
        # What contains itself has no end.
        known[id(node)] = (float("inf"), float("inf"))
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        parts = [_measure(part, known) for child in children for part in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = (1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0))
    return known[id(node)]


_TAG = "tag:yaml.org,2002:"
_Loader.add_implicit_resolver(f"{_TAG}null", _NULL, ["~", "n", "N", ""])
_Loader.add_implicit_resolver(f"{_TAG}merge", re.compile(r"<<\Z"), ["<"])
_Loader.add_constructor(f"{_TAG}null", lambda loader, node: None)
_Loader.add_constructor(f"{_TAG}str", lambda loader, node: Scalar(node.value) if node.style is None else node.value)
_Loader.add_constructor(f"{_TAG}seq", lambda loader, node: [loader.construct_object(child, deep=True) for child in node.value])
_Loader.add_constructor(f"{_TAG}map", _mapping)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)
# YAML 1.1 takes 1e3 for a string; `nlray.config.checks` takes it for a number.
_Dumper.add_implicit_resolver(f"{_TAG}float", FLOAT, list("-+.0123456789"))
