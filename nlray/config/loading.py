"""Reading and writing the configuration: presets, YAML files and `key=value` overrides become one checked `Config`.

Nothing here imports torch or ray, so that a mistake is reported before anything slow starts.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from importlib import resources as package_files
from pathlib import Path
from typing import Any

from nlray.config import Config, OptimizerConfig
from nlray.config.checks import Scalar, build, nearest, shown
from nlray.config.old_keys import refuse_renamed, upgraded
from nlray.config.yaml_text import dump_yaml, load_yaml
from nlray.errors import UserError
from nlray.run_folder import CONFIG, RunFolder, step_of
from nlray.storage import absolute, locate
from nlray.trust import confirm

PRESETS = ("tiny", "small", "hope-340m", "hope-760m", "hope-1.3b")

_KEY = re.compile(r"[^.\[\]\s]+(?:\.[^.\[\]\s]+|\[[^\[\]]+\])*")


def load_config(source: str | None, overrides: list[str] | None = None, *, default_name: str | None = None, trust: bool = False) -> Config:
    """Read a preset or YAML file, apply `key=value` overrides, and return the checked configuration.

    Args:
        source: a preset's name, a path of a YAML file, or None: what `init` says, if it is among the overrides, else the preset `tiny`.
        overrides: `key=value` strings with dotted keys; values are YAML.
        default_name: `run.name` where neither file nor overrides set it; `run.dir` is then filled in too.
        trust: what the configuration in the folder `init` names may be imported and contacted (`nlray.trust`).

    Raises:
        UserError: an unknown preset, file or key, or a value out of range; one line that names the key.
    """
    init = _init_of(overrides or [])
    if source is not None or not init:
        return _parse(_read_source(source), overrides, default_name)
    run_dir = init.rstrip("/") if step_of(init) is None else RunFolder.of_checkpoint(init).url
    config = _parse(_read_init(init, run_dir), overrides, default_name, is_resolved=True)
    confirm(config, run_dir, trust=trust, typed=values_of(overrides or []))
    return config


def parse_config(name: str, text: str | bytes, overrides: list[str] | None = None, *, default_name: str | None = None) -> Config:
    """Return the checked configuration of a YAML text with overrides; `name` is for messages. Raises as `load_config`."""
    return _parse(_load_mapping(name, text), overrides, default_name)


def parse_run_config(name: str, text: str | bytes, overrides: list[str] | None = None, *, default_name: str | None = None) -> Config:
    """Return the configuration that a run wrote, of an earlier version of nlray too, with overrides. Raises as `load_config`.

    Such a configuration has every value, so a default among the overrides (`optimizer`, `cms.defaults`) replaces the values of all that
    it is a default of, unless another override names one of them.
    """
    return _parse(upgraded(_load_mapping(name, text)), overrides, default_name, is_resolved=True)


def _parse(plain: dict[str, Any], overrides: list[str] | None, default_name: str | None, *, is_resolved: bool = False) -> Config:
    changes = [_read_override(override) for override in overrides or []]
    if is_resolved:
        typed: dict[str, Any] = {}
        for key, parts, value in changes:
            if parts[0] in ("optimizer", "cms"):
                typed = _changed(typed, parts, value, key)
        _apply_defaults(plain, typed, lambda default, own: _layered(own, default))
    known = _levels_of(plain)
    for key, parts, value in changes:
        _expand_sources(plain)
        _check_level(_levels_of(plain), parts, key)
        plain = _changed(plain, parts, value, key)
    refuse_renamed(plain)
    _expand_sources(plain)
    _remove_levels(plain)
    _apply_defaults(plain, plain, _layered)
    for name, level in _levels_of(plain).items():
        if known and name not in known and isinstance(level, dict) and "update_period" not in level:
            raise UserError(f"cms.levels.{name}.update_period: has no value; {_new_level(name, known)}")
    if default_name is not None:
        run = plain.setdefault("run", {})
        if isinstance(run, dict):
            run["name"] = run.get("name") or default_name
            run["dir"] = run.get("dir") or f"runs/{run['name']}"
    return config_from_dict(plain)


def config_from_dict(plain: dict[str, Any]) -> Config:
    """Return the checked configuration of a plain mapping; raise UserError in one line."""
    return build(Config, plain)


def config_to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML; `load_config` of it gives an equal one."""
    return dump_yaml(asdict(config))


def default_run_name(source: str | None, overrides: list[str], stamp: str) -> str:
    """Return `<preset or file>-<stamp>`, or with the name of the folder that `init` names where there is neither."""
    if source is None:
        init = _init_of(overrides)
        return f"{Path(init).resolve().name if init else 'tiny'}-{stamp}"
    return f"{source if source in PRESETS else Path(source).stem}-{stamp}"


def _init_of(overrides: list[str]) -> str | None:
    value = next((_read_value("init", o.partition("=")[2]) for o in reversed(overrides) if o.startswith("init=")), None)
    return value if isinstance(value, str) else None


def with_run(config: Config, **changes: Any) -> Config:
    """Return the configuration with fields of `run` replaced."""
    return replace(config, run=replace(config.run, **changes))


def with_absolute_paths(config: Config) -> Config:
    """Return the configuration with every path absolute, for processes that run in other folders; URLs stay.

    Raises:
        UserError: an empty path, `~` of a user without a home, or a kind of URL for `run.dir` that nothing can read; names the key.
    """

    def resolved(key: str, path: str, find: Callable[[str], Any] = absolute) -> str:
        try:
            find(path)
            return absolute(path)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error

    data = config.data
    sources = [replace(source, path=resolved(f"data.sources[{i}].path", source.path)) for i, source in enumerate(data.sources)]
    tokenizer = data.tokenizer if data.tokenizer == "bytes" else resolved("data.tokenizer", data.tokenizer)
    init = None if config.init is None else resolved("init", config.init)
    config = replace(config, data=replace(data, sources=sources, tokenizer=tokenizer), init=init)
    return with_run(config, dir=None if config.run.dir is None else resolved("run.dir", config.run.dir, find=locate))


def read_run_config(run_dir: str, overrides: list[str] | None = None) -> Config | None:
    """Return the configuration in a run's folder, with overrides; None where the folder has none. Raises as `load_config`."""
    folder = RunFolder(run_dir)
    text = folder.read(CONFIG)
    return None if text is None else parse_run_config(folder.file(CONFIG), text, overrides)


def _read_source(source: str | None) -> dict[str, Any]:
    name = source or "tiny"
    if name in PRESETS:
        return _load_mapping(name, (package_files.files("nlray.config") / "presets" / f"{name}.yaml").read_bytes())
    path = Path(absolute(name))
    try:
        is_file, exists = path.is_file(), path.exists()
        content = path.read_bytes() if is_file else b""
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if is_file:
        return _load_mapping(name, content)
    if exists:
        raise UserError(f"{name}: {'a folder' if path.is_dir() else 'no regular file'}; allowed: a preset, or a YAML file")
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{name}: no such file")
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"{name!r}: no such preset or file; {hint}presets: {', '.join(PRESETS)}")


def _read_init(init: str, run_dir: str) -> dict[str, Any]:
    """Return what the parameters need of the configuration that belongs to a run's folder or one of its checkpoints."""
    folder = RunFolder(run_dir)
    name = folder.file(CONFIG)
    try:
        content = folder.read(CONFIG)
    except OSError as error:
        raise UserError(f"init: {init}: {name} cannot be read: {error}") from error
    if content is None:
        raise UserError(f"init: {init}: no configuration there ({name}); allowed: a folder of a run or of `nlray stack`")
    plain = upgraded(_load_mapping(name, content))
    kept = {key: plain[key] for key in ("model", "cms", "optimizer", "sequence") if key in plain}
    data = plain.get("data")
    taken = {key: data[key] for key in ("tokenizer", "end_token", "begin_token") if key in data} if isinstance(data, dict) else {}
    return kept | ({"data": taken} if taken else {})


def _load_mapping(name: str, content: str | bytes) -> dict[str, Any]:
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    plain = load_yaml(name, text)
    if not isinstance(plain, dict | None):
        raise UserError(f"{name}: is {shown(plain)}; allowed: a mapping of keys")
    return plain or {}


def _read_override(override: str) -> tuple[str, list[str], Any]:
    """Return the key of an override, the parts of the key, and the value."""
    key, equals, value = override.partition("=")
    if not equals or not _KEY.fullmatch(key):
        raise UserError(f"argument {override!r}: not of the form key=value")
    return key, [part.strip("[]") for part in re.findall(r"\[[^\[\]]+\]|[^.\[\]]+", key)], _read_value(key, value)


def _read_value(key: str, text: str) -> Any:
    """Return the value of an override: YAML where brackets, braces or quotes begin it, else the characters as they are."""
    text = text.strip()
    return load_yaml(key, text) if text[:1] in ("[", "{", '"', "'") or text in ("", "~", "null") else Scalar(text)


def values_of(overrides: Sequence[str]) -> set[str]:
    """Return every string that `key=value` arguments set."""
    left, found = [_read_value(key, value) for key, _, value in (override.partition("=") for override in overrides)], set()
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, str):
            found.add(str(value))
    return found


def _changed(tree: Any, parts: list[str], value: Any, key: str) -> Any:
    """Return what `tree` is with one entry of it, named by the parts of a key, set or, where both are mappings, merged."""
    if not parts:
        return _merged(tree, value)
    part, *rest = parts
    if isinstance(tree, list):
        if not (part.isdecimal() and int(part) < len(tree)):
            allowed = f"0 to {len(tree) - 1}" if tree else "a whole list"
            raise UserError(f"{key}: no entry {part} in a list of {len(tree)}; allowed: {allowed}")
        return [_changed(one, rest, value, key) if index == int(part) else one for index, one in enumerate(tree)]
    tree = tree if isinstance(tree, dict) else {}
    return tree | {part: _changed(tree.get(part), rest, value, key)}


def _merged(old: Any, new: Any) -> Any:
    """Return `new`, or two mappings as one; `new` wins."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


def _expand_sources(plain: dict[str, Any]) -> None:
    """Turn path strings into sources."""
    data = plain.get("data")
    if isinstance(data, dict) and isinstance(data.get("sources"), str):
        data["sources"] = [data["sources"]]
    if isinstance(data, dict) and isinstance(data.get("sources"), list):
        data["sources"] = [{"path": s} if isinstance(s, str) else s for s in data["sources"]]


def _levels_of(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the levels that are in a mapping of keys, without those that are null."""
    levels = _mapping(_mapping(plain.get("cms")).get("levels"))
    return {name: level for name, level in levels.items() if level is not None}


def _check_level(known: dict[str, Any], parts: list[str], key: str) -> None:
    """Raise UserError where an override is of a key of a level that is not there: a misspelt name would make a level."""
    if parts[:2] == ["cms", "levels"] and len(parts) > 3 and known and parts[2] not in known:
        raise UserError(f"{key}: no level {parts[2]}; {_new_level(parts[2], known)}")


def _new_level(name: str, known: dict[str, Any]) -> str:
    """Return the end of a message: which levels there are, and how one is added."""
    added = f"cms.levels.{name}={{update_period: N}}"
    return f"{nearest(name, known)}levels here: {', '.join(known)}; {added} adds one"


def _remove_levels(plain: dict[str, Any]) -> None:
    """Drop the levels that are null."""
    cms = plain.get("cms")
    if isinstance(cms, dict) and isinstance(cms.get("levels"), dict):
        cms["levels"] = {name: level for name, level in cms["levels"].items() if level is not None}


def _apply_defaults(
    plain: dict[str, Any], source: dict[str, Any], join: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]
) -> None:
    """Join the defaults that `source` has with what the sequence and every level have in `plain`."""
    # A value that is no mapping, but should be one, is reported when it is read.
    optimizer = {"optimizer": _mapping(source.get("optimizer"))}
    if optimizer["optimizer"]:
        plain.setdefault("sequence", {})
    if isinstance(plain.get("sequence"), dict):
        plain["sequence"] = join(optimizer, plain["sequence"])
    cms = plain.get("cms")
    if isinstance(cms, dict) and isinstance(cms.get("levels"), dict):
        defaults = _layered(optimizer, _mapping(_mapping(source.get("cms")).get("defaults")))
        cms["levels"] = {name: join(defaults, level) if isinstance(level, dict) else level for name, level in cms["levels"].items()}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _layered(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return two mappings that have an optimizer as one; `above` wins. Options belong to an optimizer: another name drops those below."""
    other, own = below.get("optimizer"), above.get("optimizer")
    if isinstance(other, dict) and isinstance(own, dict):
        name = other.get("name", OptimizerConfig().name)
        if own.get("name", name) != name:
            below = below | {"optimizer": {key: value for key, value in other.items() if key != "options"}}
    return _merged(below, above)
