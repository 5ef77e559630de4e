"""Configurations that earlier versions wrote: a run's `config.yaml` stays readable where today's keys say the same."""

from typing import Any


def upgraded(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping of a run's own configuration with today's keys.

    `text_column: text`, once the default of every source, is null: for tables it is the same, and text files have no columns.
    """
    data = plain.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("sources"), list):
        return plain
    return plain | {"data": data | {"sources": [_source(source) for source in data["sources"]]}}


def _source(source: Any) -> Any:
    is_default = isinstance(source, dict) and source.get("text_column") == "text"
    return source | {"text_column": None} if is_default else source
