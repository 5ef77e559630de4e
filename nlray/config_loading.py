"""Reading and writing the configuration: presets, YAML files and `key=value` overrides become one checked `Config`.

Nothing here imports torch or ray, so that a mistake is told before anything slow starts.
"""

import difflib
import re
from dataclasses import fields, is_dataclass, replace
from importlib import resources as package_files
from pathlib import Path
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from nlray.config import Config, DataConfig, LevelConfig, MemoryConfig, OptimizerConfig, SourceConfig
from nlray.errors import UserError

PRESETS = ("tiny", "small", "hope-340m", "hope-760m", "hope-1.3b")


def load_config(source: str | None, overrides: list[str] | None = None, *, default_name: str | None = None) -> Config:
    """Read a preset or YAML file, apply `key=value` overrides, and return the checked configuration.

    Args:
        source: a preset's name, a path of a YAML file, or None: what `init` says, if it is among the overrides, else the preset `tiny`.
        overrides: `key=value` strings with dotted keys; values are YAML.
        default_name: `run.name` where neither file nor overrides set it; `run.dir` is then filled in too.

    Raises:
        UserError: an unknown preset, file or key, or a value out of range; one line that names the key.
    """
    init = _init_of(overrides or [])
    found = _read_init(init) if source is None and init else _read_source(source)
    return parse_config(*found, overrides, default_name=default_name)


def parse_config(name: str, text: str, overrides: list[str] | None = None, *, default_name: str | None = None) -> Config:
    """Return the checked configuration of a YAML text with overrides; `name` is for messages. Raises as `load_config`."""
    try:
        raw = OmegaConf.create(text) if text.strip() else OmegaConf.create({})
    except YAMLError as error:
        raise UserError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, DictConfig):
        raise UserError(f"{name}: not a mapping of keys")
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"argument {override!r}: not of the form key=value")
        try:
            raw = OmegaConf.merge(raw, OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{key}: cannot read the value in {override!r}: {_first_line(error)}") from error
    plain = OmegaConf.to_container(raw)
    _expand_shorthands(plain)
    if default_name is not None:
        run = plain.setdefault("run", {})
        if isinstance(run, dict):
            run["name"] = run.get("name") or default_name
            run["dir"] = run.get("dir") or f"runs/{run['name']}"
    return config_from_dict(plain, where=name)


def config_from_dict(plain: dict[str, Any], *, where: str = "config") -> Config:
    """Return the checked configuration of a plain mapping; raise UserError in one line."""
    _check_keys(plain, Config, prefix="")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(plain))
        return OmegaConf.to_object(merged)
    except UserError as error:
        raise UserError(_locate(str(error), plain)) from error
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or where
        raise UserError(f"{key}: {_first_line(error)}") from error


def config_to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML; `load_config` of it gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def default_run_name(source: str | None, overrides: list[str], stamp: str) -> str:
    """Return `<preset or file>-<stamp>`, or that of the folder that `init` names where there is neither."""
    if source is None:
        return f"{Path(_init_of(overrides) or 'tiny').name}-{stamp}"
    return f"{source if source in PRESETS else Path(source).stem}-{stamp}"


def _init_of(overrides: list[str]) -> str | None:
    return next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("init=")), None)


def with_run(config: Config, **changes: Any) -> Config:
    """Return the configuration with fields of `run` replaced."""
    return replace(config, run=replace(config.run, **changes))


def _read_source(source: str | None) -> tuple[str, str]:
    name = source or "tiny"
    if name in PRESETS:
        return name, (package_files.files("nlray") / "presets" / f"{name}.yaml").read_text()
    path = Path(name)
    if path.is_file():
        return name, path.read_text()
    if path.suffix in (".yaml", ".yml"):
        raise UserError(f"{name}: no such file")
    close = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(f"{name!r}: no such preset or file; {hint}presets: {', '.join(PRESETS)}")


def _read_init(init: str) -> tuple[str, str]:
    """Return name and text of the configuration that belongs to a run's folder or one of its checkpoints: what the parameters need."""
    from nlray.storage import locate

    run_dir = re.sub(r"/checkpoints/step_\d+/?$", "", init.rstrip("/"))
    name = f"{run_dir}/config.yaml"
    try:
        fs, path = locate(name)
        plain = OmegaConf.to_container(OmegaConf.create(fs.cat_file(path).decode()))
    except (OSError, ValueError, ImportError, YAMLError) as error:
        raise UserError(f"init: {init}: no configuration there ({name}); allowed: a folder of a run or of `nlray stack`") from error
    kept = {key: plain[key] for key in ("model", "memory", "sequence") if key in plain}
    data = plain.get("data", {})
    kept["data"] = {"tokenizer": "bytes"} | {key: data[key] for key in ("tokenizer", "end_token", "begin_token") if key in data}
    return name, OmegaConf.to_yaml(OmegaConf.create(kept))


def _expand_shorthands(plain: dict[str, Any]) -> None:
    """Turn path strings into sources, drop removed levels, and give every level the defaults."""
    data, memory = plain.get("data"), plain.get("memory")
    if isinstance(data, dict) and isinstance(data.get("sources"), str):
        data["sources"] = [data["sources"]]
    if isinstance(data, dict) and isinstance(data.get("sources"), list):
        data["sources"] = [{"path": s} if isinstance(s, str) else s for s in data["sources"]]
    if isinstance(memory, dict) and isinstance(memory.get("levels"), dict):
        defaults = memory.get("defaults") or {}
        _check_keys(defaults, LevelConfig, prefix="memory.defaults.")
        memory["levels"] = {
            name: OmegaConf.to_container(OmegaConf.merge(_defaults_of(level, defaults), level)) if isinstance(level, dict) else level
            for name, level in memory["levels"].items()
            if level is not None
        }


def _defaults_of(level: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults that hold for a level: options belong to an optimizer, so not those of another one than the level's."""
    optimizer, own = defaults.get("optimizer"), level.get("optimizer")
    if not isinstance(optimizer, dict) or not isinstance(own, dict):
        return defaults
    name = optimizer.get("name", OptimizerConfig().name)
    if own.get("name", name) == name:
        return defaults
    return defaults | {"optimizer": {key: value for key, value in optimizer.items() if key != "options"}}


def _check_keys(value: Any, schema: type, *, prefix: str) -> None:
    """Raise UserError for the first key that the schema does not have, with the nearest one."""
    if not isinstance(value, dict):
        raise UserError(f"{prefix.rstrip('.')}: is {value!r}; allowed: keys {', '.join(f.name for f in fields(schema))}")
    known = {f.name: f for f in fields(schema)}
    for key, item in value.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}? " if close else ""
            raise UserError(f"unknown key {prefix}{key}; {hint}allowed here: {', '.join(known)}")
        if schema is MemoryConfig and key == "levels" and isinstance(item, dict):
            for name, level in item.items():
                _check_keys(level, LevelConfig, prefix=f"{prefix}levels.{name}.")
        elif schema is DataConfig and key == "sources" and isinstance(item, list):
            for index, source in enumerate(item):
                _check_keys(source, SourceConfig, prefix=f"{prefix}sources[{index}].")
        elif (section := _section(known[key].type)) is not None and (item is not None or section is known[key].type):
            _check_keys(item, section, prefix=f"{prefix}{key}.")


def _section(kind: Any) -> type | None:
    """Return the schema of a field that is a section of its own, or may be one or null; None: it is no section."""
    return next((k for k in (kind, *get_args(kind)) if is_dataclass(k)), None)


def _locate(message: str, plain: dict[str, Any]) -> str:
    """Prefix the message of a nested section, such as an optimizer's, with the key of that section."""
    if message.startswith(tuple(f"{f.name}." for f in fields(Config))):
        return message
    return f"{_section_of(message, plain, Config, '')}{message}"


def _section_of(message: str, plain: Any, schema: type, prefix: str) -> str:
    """Return the key, with a dot, of the deepest section whose own check gives `message`."""
    for f in fields(schema):
        value = plain.get(f.name) if isinstance(plain, dict) else None
        sections = {f.name: (f.type, value)} if is_dataclass(f.type) else {}
        if schema is MemoryConfig and f.name == "levels" and isinstance(value, dict):
            sections = {f"levels.{name}": (LevelConfig, level) for name, level in value.items()}
        for name, (section, content) in sections.items():
            try:
                OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(section), OmegaConf.create(content or {})))
            except UserError as error:
                if str(error) == message:
                    return _section_of(message, content, section, f"{prefix}{name}.")
            except OmegaConfBaseException:
                continue
    return prefix


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
