"""JSON files that others wrote, such as a decoder's config.json: every mistake in one is one line with file and key.

config = JsonObject.read(folder / "config.json")
config.get("hidden_size", int), config.get("head_dim", int, default=64), config.get("rope_scaling", dict, default={})
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nlray.errors import UserError
from nlray.storage import locate

MAX_SIZE = 1 << 24
"""Largest whole number that is taken for the size of something: products of two stay far below 2^63 bytes."""
_ALLOWED = {
    int: f"a whole number from 1 to {MAX_SIZE}",
    float: "a number of more than 0",
    bool: "true or false",
    str: "a string",
    dict: "an object",
}
_REQUIRED = object()


class JsonObject:
    """The object that a JSON file holds, or one inside it. A value of null counts as one that is not there.

    Args:
        where: the file, for messages.
        prefix: the keys that lead to the object, each with a dot.
    """

    def __init__(self, values: dict[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self._prefix = values, where, prefix

    @classmethod
    def read(cls, path: Path | str) -> "JsonObject":
        """Read a file, at a path or URL.

        Raises:
            FileNotFoundError: there is none.
            UserError: it cannot be read, or is no JSON object; a key that an object has twice too.
        """
        try:
            fs, place = locate(str(path))
            values = json.loads(fs.cat_file(place), object_pairs_hook=_no_key_twice)
        except (FileNotFoundError, UserError):
            raise
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except RecursionError as error:
            raise UserError(f"{path}: nested too deep; allowed: a JSON object") from error
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: is a JSON {type(values).__name__}; allowed: an object")
        return cls(values, str(path))

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return the value of a key, checked; numbers that are asked for as int are sizes.

        Args:
            kind: int, float, bool, str or dict (which comes as a JsonObject).
            default: where the key is not there; left out: the key is required.

        Raises:
            UserError: the value is of another kind or out of range, or a required one is not there.
        """
        value = self.values.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.error(key, "is not there", _ALLOWED[kind])
            return JsonObject(default, self.where, f"{self._prefix}{key}.") if isinstance(default, dict) else default
        if not _fits(value, kind):
            raise self.error(key, f"is {_short(value)}", _ALLOWED[kind])
        if kind is dict:
            return JsonObject(value, self.where, f"{self._prefix}{key}.")
        return float(value) if kind is float else value

    def refuse_unless(self, key: str, allowed: Any, default: Any = None) -> None:
        """Raise UserError unless the value of a key, or the default where it is not there, is the one allowed."""
        value = self.values.get(key)
        value = default if value is None else value
        if value != allowed or type(value) is not type(allowed):
            raise self.error(key, f"is {_short(value)}", repr(allowed))

    def error(self, key: str, came: str, allowed: str) -> UserError:
        """Return the error that names file and key."""
        return UserError(f"{self.where}: {self._prefix}{key} {came}; allowed: {allowed}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {_short(twice)} is there twice")
    return values


def _fits(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and 1 <= value <= MAX_SIZE
    if kind is float:
        # A whole number beyond the range of a float compares, but does not convert.
        return type(value) in (int, float) and 0 < value <= 1e300 and math.isfinite(value)
    return type(value) is kind


def _short(value: Any) -> str:
    """Return a value for a message, on one line and not endlessly long."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."
