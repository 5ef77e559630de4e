"""Configurations that earlier versions wrote: a run's `config.yaml` stays readable where today's keys say the same."""

from typing import Any

from nlray.errors import UserError

_LOCAL_UPDATE = {"none": False, "summed": True}


def upgraded(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping of a run's own configuration with today's keys.

    `text_column: text`, once the default of every source, is null: for tables it is the same, and text files have no columns. A level's
    `predict` is gone, and its `local_update`, which was none, own or summed, is false or true.

    Raises:
        UserError: a level asks for what nlray does not do any more.
    """
    data, memory = plain.get("data"), plain.get("memory")
    if isinstance(data, dict) and isinstance(data.get("sources"), list):
        plain = plain | {"data": data | {"sources": [_source(source) for source in data["sources"]]}}
    if isinstance(memory, dict):
        levels = memory.get("levels")
        changed = {"defaults": _level(memory.get("defaults"), "memory.defaults")} if "defaults" in memory else {}
        if isinstance(levels, dict):
            changed["levels"] = {name: _level(level, f"memory.levels.{name}") for name, level in levels.items()}
        plain = plain | {"memory": memory | changed}
    return plain


def _source(source: Any) -> Any:
    is_default = isinstance(source, dict) and source.get("text_column") == "text"
    return source | {"text_column": None} if is_default else source


def _level(level: Any, key: str) -> Any:
    if not isinstance(level, dict):
        return level
    predict, update = str(level.get("predict", 0)), str(level.get("local_update", ""))
    if predict.strip("0."):
        raise UserError(f"{key}.predict is {predict}, which nlray does not do any more; local_update=true takes all of a delay's cost away")
    if update == "own":
        raise UserError(f"{key}.local_update is own, which nlray does not do any more; allowed: false, true (which was summed)")
    level = {name: value for name, value in level.items() if name != "predict"}
    return level | {"local_update": _LOCAL_UPDATE[update]} if update in _LOCAL_UPDATE else level
