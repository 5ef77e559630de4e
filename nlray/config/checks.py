"""The values of the configuration: the types and ranges that keys are declared with, and the one check of all of them.

    @dataclass(frozen=True, kw_only=True, slots=True)
    class RunConfig(Section):
        steps: Annotated[int, Range(1)] = 300

    RunConfig(steps="010").steps    # 10: what YAML has as text becomes the declared type
    RunConfig(steps=0)              # UserError: steps is 0; allowed: 1 or more

A section reads its own keys when it is made, and makes its subsections from mappings. So every error has the key as its first word:
each section puts its own name before the errors of its subsections.
"""

import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from nlray.errors import UserError

LIMITS = {int: 2.0**31 - 1, float: 1e30}
"""The largest sizes of numbers whose range has no narrower end: an int32, and what float32 can still multiply."""

SMALLEST = 1e-30
"""The smallest size of a number but 0: what float32 would take for 0."""

_INT = re.compile(r"[-+]?[0-9]{1,30}")
FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", types.NoneType: "null", list: "a list"}


class Scalar(str):
    """A value that YAML has without quotes, as it is written: which type it is of, the key says."""


@dataclass(frozen=True, slots=True)
class Range:
    """The range of a number. above, below: ends that do not belong to it."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def allows(self, value: float) -> bool:
        is_high_enough = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return is_high_enough and (self.most is None or value <= self.most) and (self.below is None or value < self.below)

    def closed(self, limit: float) -> "Range":
        """Return the range with an end of size `limit` where it has none."""
        has_start, has_end = (self.least, self.above) != (None, None), (self.most, self.below) != (None, None)
        return replace(self, least=self.least if has_start else -limit, most=self.most if has_end else limit)

    def __str__(self) -> str:
        if self.least is not None and (self.most, self.below) != (None, None):
            return f"{_digits(self.least)} to {f'below {_digits(self.below)}' if self.most is None else _digits(self.most)}"
        words = {"more than": self.above, "": self.least, "less than": self.below, "at most": self.most}
        parts = [f"{word} {_digits(end)}" if word else f"{_digits(end)} or more" for word, end in words.items() if end is not None]
        return ", ".join(parts)


def _digits(end: float) -> str:
    """Return an end of a range as one would write it, a whole number with all its digits."""
    return f"{end:.17g}" if isinstance(end, float) and end == int(end) else str(end)


@dataclass(frozen=True, slots=True)
class Form:
    """What a string looks like: a regular expression, and its meaning in words."""

    pattern: str
    words: str

    def allows(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value, re.DOTALL) is not None

    def __str__(self) -> str:
        return self.words


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(above=0)]
Amount = Annotated[float, Range(0)]
Decay = Annotated[float, Range(0, below=1)]
Rate = Annotated[float, Range(above=0, most=1000)]
"""A learning rate or the size of an update; larger ones only overflow."""
Iterations = Annotated[int, Range(1, 100)]
Seconds = Annotated[float, Range(above=0, most=1e6)]
"""A wait: eleven days at most, for system calls count milliseconds in 32 bits."""
Epsilon = Annotated[float, Range(above=0, most=1)]
"""Added to a divisor that may be 0."""
Text = Annotated[str, Form(r".*\S.*", "a string that is not empty")]
Width = Annotated[int, Range(1, 2**20)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Base of every section of the configuration: reads its values by their declared types; `check` is for rules between keys."""

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, read(f.name, getattr(self, f.name), f.type))
        self.check()

    def check(self) -> None:
        """Raise UserError where the values do not go together."""

    def require(self, condition: bool, key: str, allowed: str, given: str = "") -> None:
        """Raise UserError, with the key's value and what is allowed, given other keys, unless `condition`."""
        if not condition:
            value: Any = self
            for name in key.split("."):
                value = value[name] if isinstance(value, Mapping) else getattr(value, name)
            said = value if isinstance(value, str) else shown(value)
            raise UserError(f"{key} is {said}; allowed{given and f' {given}'}: {allowed}")


def read(key: str, value: Any, kind: Any) -> Any:
    """Return a value, as YAML or Python has it, as one of the annotated type.

    Raises:
        UserError: it is none, or out of range; the message begins with the key.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return _resolved(value)
    if origin is Annotated:
        # A section as the annotation: a mapping with some of its keys.
        if is_dataclass(inner[1]) and isinstance(inner[1], type):
            return _read_part(key, value, inner[1])
        if isinstance(inner[1], Range):
            return _read_number(key, value, inner[0], inner[1])
        found = read(key, value, inner[0])
        _require(inner[1].allows(found), key, value, str(inner[1]))
        return found
    if origin in (Union, types.UnionType):
        if len(inner) == 2 and inner[1] is types.NoneType:
            try:
                return None if value is None else read(key, value, inner[0])
            except UserError as error:
                raise UserError(f"{error}, or null") from error
        for one in inner:
            with suppress(UserError):
                return read(key, value, one)
        raise UserError(f"{key} is {shown(value)}; allowed: {describe(kind)}")
    if origin is Literal:
        _require(value in inner, key, value, describe(kind))
        return str(value) if isinstance(value, str) else value
    if origin in (list, tuple, Sequence):
        _require(isinstance(value, list | tuple), key, value, describe(kind))
        return [read(f"{key}[{index}]", one, inner[0] if inner else Any) for index, one in enumerate(value)]
    if origin in (dict, Mapping):
        _require(isinstance(value, Mapping), key, value, describe(kind))
        return {str(name): read(f"{key}.{name}", one, inner[1]) for name, one in value.items()}
    if is_dataclass(kind):
        return value if isinstance(value, kind) else build(kind, value, key)
    return _read_number(key, value, kind, Range()) if kind in (int, float) else _read_plain(key, value, kind)


def build(schema: type, value: Any, key: str = "") -> Any:
    """Return a section made of a mapping; `key` is where it stands. Raises as `read`."""
    known, prefix = _keys_of(schema, value, key), f"{key}." if key else ""
    for name, f in known.items():
        if name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise UserError(f"{prefix}{name}: has no value; allowed: {describe(f.type)}")
    try:
        return schema(**{str(name): item for name, item in value.items()})
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


def nearest(name: str, known: Iterable[str], quote: str = "'") -> str:
    """Return a question that names the nearest of the known names, or nothing."""
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {quote}{close[0]}{quote}? " if close else ""


def require_known(key: str, name: str, known: tuple[str, ...]) -> None:
    """Raise UserError unless the name is known or an import path."""
    if name not in known and not _IMPORT_PATH.fullmatch(name):
        raise UserError(f"{key} is {name!r}; {nearest(name, known)}allowed: {', '.join(known)}, or package.module:Class")


def describe(kind: Any) -> str:
    """Return a type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        words = describe(inner[0])
        return str(inner[1]) if isinstance(inner[1], Form) else f"{words}, {inner[1]}" if inner[1] != Range() else words
    if origin is Literal:
        return ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        return ", or ".join(map(describe, inner))
    if origin in (list, tuple, Sequence):
        return f"a list, each {describe(inner[0]) if inner else 'a value'}"
    if is_dataclass(kind):
        return f"keys {', '.join(f.name for f in fields(kind))}"
    if origin in (dict, Mapping):
        return "a mapping of keys"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def shown(value: Any) -> str:
    """Return a value as a message has it: on one line, not too long."""
    value = _resolved(value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_number(key: str, value: Any, kind: type, rule: Range) -> float:
    """Read a number of a range: decimal digits, or a number of Python's but a boolean."""
    words = describe(Annotated[kind, rule])
    number = value
    if isinstance(value, str):
        _require((_INT if kind is int else FLOAT).fullmatch(value) is not None, key, value, words)
        number = kind(value)
    _require(isinstance(number, int if kind is int else int | float) and not isinstance(number, bool), key, value, words)
    _require(number == 0 or not abs(number) < SMALLEST, key, number, f"no number so near 0; from {SMALLEST:g} on float32 has it")
    closed = rule.closed(LIMITS[kind])
    _require(closed.allows(number), key, number, str(closed if rule.allows(number) else rule))
    return kind(number)


def _read_plain(key: str, value: Any, kind: Any) -> Any:
    """Read one of the plain types; a type beyond these is left to whoever uses the value."""
    text = value if isinstance(value, str) else None
    if kind is bool:
        value = _BOOLS.get(value, value) if text is not None else value
    if kind is str and text is not None:
        _require(not re.search("[\0\ud800-\udfff]", text), key, value, "a string that UTF-8 can write, without NUL")
        _require("${" not in text, key, value, "the value itself; ${...} is not replaced")
        return str(text)
    _require(not isinstance(kind, type) or isinstance(value, kind), key, value, describe(kind))
    return _resolved(value)


def _read_part(key: str, value: Any, schema: type) -> dict[str, Any]:
    """Read a mapping with some keys of a section."""
    parts = {}
    for name, f in _keys_of(schema, value, key).items():
        if name in value:
            section = next((k for k in (f.type, *get_args(f.type)) if is_dataclass(k)), None)
            is_part = section is not None and isinstance(value[name], Mapping)
            parts[name] = (_read_part if is_part else read)(f"{key}.{name}", value[name], section if is_part else f.type)
    return parts


def _keys_of(schema: type, value: Any, key: str) -> dict[str, Any]:
    """Return the fields of a section by name; raise UserError unless `value` is a mapping with none but these keys."""
    known = {f.name: f for f in fields(schema)}
    _require(isinstance(value, Mapping), key or "the configuration", value, describe(schema))
    for name in value:
        if name not in known:
            prefix = f"{key}." if key else ""
            raise UserError(f"{prefix}{name}: unknown key; {nearest(name, known, '')}allowed here: {', '.join(known)}")
    return known


def _resolved(value: Any) -> Any:
    """Return a value whose type nothing declares: text without quotes is a boolean or a decimal number, if it looks so."""
    if isinstance(value, Mapping):
        return {str(name): _resolved(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(one) for one in value]
    if not isinstance(value, Scalar):
        return value
    if value in _BOOLS:
        return _BOOLS[value]
    kind = int if _INT.fullmatch(value) else float if FLOAT.fullmatch(value) else str
    return kind(value)


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise UserError(f"{key} is {shown(value)}; allowed: {allowed}")
