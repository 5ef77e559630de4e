"""Keys of earlier versions: a run's own `config.yaml` is read with today's keys, and who types an old key learns the new one."""

from typing import Any

from nlray.errors import UserError

_TITANS = {
    **{key: key for key in ("phase", "memory", "rule", "momentum", "adapt_q", "objective", "retain", "read", "chunk_size", "inner_lr")},
    **{key: key for key in ("inner_lr_bias", "decay_bias", "conv_width", "carry_state", "kernels", "recompute_chunks")},
    "memory_options": "options",
    "memory_hidden": "hidden",
    "memory_chunks": "chunk_sizes",
}
"""Keys that were in `model` and now are in `model.titans`, with their names there."""
_LOCAL_UPDATE = {"none": False, "summed": True}


def refuse_renamed(plain: dict[str, Any]) -> None:
    """Raise UserError where a configuration that a user wrote has keys that were renamed; the message names the new ones."""
    model, found = plain.get("model"), []
    if isinstance(model, dict):
        found = [_path(f"model.{old}", f"model.titans.{new}", model[old]) for old, new in _TITANS.items() if old in model]
    if "memory" in plain:
        found.append(_path("memory", "cms", plain["memory"]))
    if found:
        raise UserError("; ".join(f"{old}: renamed {new}" for old, new in found))


def _path(old: str, new: str, value: Any) -> tuple[str, str]:
    """Return both keys, continued for as long as there is one key below: the whole of what `memory.levels.fast.ranks=2` says."""
    while isinstance(value, dict) and len(value) == 1:
        ((key, value),) = value.items()
        old, new = f"{old}.{key}", f"{new}.{key}"
    return old, new


def upgraded(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the mapping of a run's own configuration with today's keys.

    `memory` is `cms`, and the keys of the memory in context are in `model.titans`. `text_column: text`, once the default of every source,
    is null: for tables it is the same, and text files have no columns. A level's `predict` is gone, and its `local_update`, which was
    none, own or summed, is false or true.

    Raises:
        UserError: a level asks for what nlray does not do any more.
    """
    data, model, cms = plain.get("data"), plain.get("model"), plain.get("memory")
    if isinstance(data, dict) and isinstance(data.get("sources"), list):
        plain = plain | {"data": data | {"sources": [_source(source) for source in data["sources"]]}}
    if isinstance(model, dict) and not _TITANS.keys().isdisjoint(model):
        titans = {new: model[old] for old, new in _TITANS.items() if old in model}
        plain = plain | {"model": {key: value for key, value in model.items() if key not in _TITANS} | {"titans": titans}}
    if isinstance(cms, dict):
        levels = cms.get("levels")
        changed = {"defaults": _level(cms.get("defaults"), "memory.defaults")} if "defaults" in cms else {}
        if isinstance(levels, dict):
            changed["levels"] = {name: _level(level, f"memory.levels.{name}") for name, level in levels.items()}
        plain = {key: value for key, value in plain.items() if key != "memory"} | {"cms": cms | changed}
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
