"""What every key of the configuration means, read from the docstrings under the fields of the section modules.

    describe_key("model.titans.phase")    # type, allowed values, default and meaning, as `nlray config --docs KEY` prints them
    python -m nlray.config.docs           # docs/configuration.md

The modules are parsed, because Python keeps no docstrings of fields.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import cache
from importlib.resources import files as package_files
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from nlray.config import Config
from nlray.config.checks import describe, nearest
from nlray.config.old_keys import refuse_renamed
from nlray.errors import UserError

_PARTS = re.compile(r"\[[^\[\]]*\]|[^.\[\]]+")
_WIDTH = 100
_INTRO = """# Configuration

A run is configured by a preset or a YAML file, changed by `key=value` arguments. `nlray config [PRESET | FILE]
[key=value ...]` prints the resolved configuration. `nlray config --docs KEY` prints what a key means. Once a run has
started, its `config.yaml` has every value.

`make docs-config` writes this page from the docstrings in `nlray/config/`.

A preset or a file holds what differs from the defaults on this page. A file is not based on a preset, and the defaults
have no levels, so a file with a CMS names its levels. `nlray config tiny > my.yaml` writes a complete file to start from.

PRESETS
Values are read as follows.

- The type of a key decides what its characters mean. A string is the characters as they are written: `run.name=010`,
  `run.name=yes`.
- A number is decimal digits, in a float also with a point and an exponent: `010` is ten. `0x10`, `1_000`, `1:30`, `nan`
  and `inf` are refused; `3.0` and `1e3` are no whole numbers. A number in quotes is a number.
- A boolean is `true` or `false`; `yes` and `on` are refused. `null`, `~` or nothing is null.
- Options of classes (`options`, `mlp_options`) have no declared type in a file: without quotes they are booleans or
  decimal numbers if they look so, else strings.
- An override is the characters up to its end; lists, mappings and quoted strings are YAML:
  `data.sources=[a.parquet,b/]`. It changes lists that the file or an earlier override has: `data.sources[0].weight=3`,
  or with `.0` for `[0]`. A part of a key that has dots is written in brackets:
  `sequence.resources.labels[ray.io/pool]=a`.
- `cms.levels.slow.delay=4` changes a level of the preset or file. A mapping adds a level:
  `cms.levels.glacial={update_period: 256}`. `cms.levels.slow=null` removes one.
- `optimizer` and `cms.defaults` hold wherever a group does not set its own values. `options` of an optimizer are not
  inherited by an optimizer of another name. A default given to `nlray resume` or with `init` replaces the values that
  the run had.
- A file is UTF-8 YAML. Anchors and merges are read. Refused are a key that comes twice, explicit types (`!!int`), more
  than 100 levels or 100,000 values with every alias written out, and `${...}`, which nothing replaces.
- A key of an earlier version is refused with its new name. A run's own `config.yaml` is read whichever version wrote
  it.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyDoc:
    """One key. section: the class of the section that it is, or that it holds by name or in a list; None: it is a value."""

    key: str
    allowed: str
    default: str
    meaning: str
    section: type | None


def describe_key(key: str | None) -> str:
    """Return what a key means in lines of text, for a section with all its keys; None: the whole configuration.

    Raises:
        UserError: no such key; names the nearest, or the new name of a key of an earlier version.
    """
    doc = None if key is None else find(key)
    if doc is not None and doc.section is None:
        return "\n".join(_lines(doc))
    section, prefix = (Config, "") if doc is None else (doc.section, f"{doc.key}.")
    lines = _wrapped(_purpose(section) if doc is None else f"{doc.key}: {doc.meaning}")
    for one in keys_of(section, prefix):
        lines += ["", *(_lines(one) if one.section is None else [one.key, *_wrapped(one.meaning, "    ")])]
    return "\n".join(lines)


def find(key: str) -> KeyDoc:
    """Return the documentation of a key; any name stands for a level, and any index for a source. Raises as `describe_key`."""
    parts, section, found = [part.strip("[]") for part in _PARTS.findall(key)], Config, None
    tree: Any = "value"
    for part in reversed(parts):
        tree = {part: tree}
    refuse_renamed(tree if isinstance(tree, dict) else {})
    position = 0
    while position < len(parts):
        known = {f.name: f for f in fields(section)} if section is not None else {}
        if parts[position] not in known:
            raise UserError(f"{key}: no such key; {_suggestion(key, parts[:position], parts[position], known)}")
        f, owner = known[parts[position]], section
        position += 1
        section, is_named = _section_of(f.type)
        is_mapping = any(get_origin(one) is dict for one in (f.type, *get_args(f.type)))
        found = _doc_of(owner, f, key)
        if is_named and position < len(parts):
            found = replace(found, meaning=_purpose(section))
            position += 1
        elif is_named:
            found = replace(found, key=f"{key}{_any_of(f.type)}")
        elif section is None and is_mapping:
            position = len(parts)
    if found is None:
        raise UserError(f"{key!r}: no such key; sections: {', '.join(f.name for f in fields(Config))}")
    return found


def _suggestion(key: str, start: list[str], part: str, known: Mapping[str, Any]) -> str:
    prefix = "".join(f"{one}." for one in start)
    if close := nearest(part, known, ""):
        return close.replace("did you mean ", f"did you mean {prefix}").rstrip()
    # A key without its section, as `phase`.
    last = key.rpartition(".")[2]
    others = [doc.key for doc in _every_key() if doc.key.rpartition(".")[2] == last]
    if others:
        return f"did you mean {' or '.join(others)}?"
    return f"known here: {', '.join(prefix + name for name in known)}" if known else f"{prefix.rstrip('.')} has no keys of its own"


def keys_of(section: type, prefix: str) -> Iterator[KeyDoc]:
    """Give the keys of a section, each with the prefix before its name."""
    return (_doc_of(section, f, f"{prefix}{f.name}") for f in fields(section))


def _every_key() -> Iterator[KeyDoc]:
    return (doc for section, prefix, _ in sections() for doc in keys_of(section, prefix) if doc.section is None)


def sections() -> Iterator[tuple[type, str, str]]:
    """Give every class of a section once: the class, the prefix of its keys, and its meaning."""
    seen, left = {Config}, [(Config, "", "")]
    while left:
        section, prefix, meaning = left.pop(0)
        yield section, prefix, meaning
        inner = []
        for doc in keys_of(section, prefix):
            if doc.section is not None and doc.section not in seen and not _is_partial(section, doc):
                seen.add(doc.section)
                of = {f.name: f for f in fields(section)}[doc.key.removeprefix(prefix)]
                is_named = _section_of(of.type)[1]
                suffix, meaning = (_any_of(of.type), _purpose(doc.section)) if is_named else ("", doc.meaning)
                inner.append((doc.section, f"{doc.key}{suffix}.", meaning))
        left = [*inner, *left]


def _is_partial(section: type, doc: KeyDoc) -> bool:
    """Whether a key holds some keys of a section that another key has in full: `cms.defaults`."""
    return section is not Config and doc.key.endswith(".defaults")


def _doc_of(section: type, f: Field, key: str) -> KeyDoc:
    inner, is_named = _section_of(f.type)
    meaning = docstrings_of(section).get(f.name) or (_purpose(inner) if inner else "")
    has_default = f.default is not MISSING or f.default_factory is not MISSING
    default = f.default_factory() if f.default_factory is not MISSING else f.default
    shown = "required" if not has_default else "" if is_dataclass(default) else _text(default)
    return KeyDoc(key=key, allowed=_allowed(f.type, inner, is_named=is_named), default=shown, meaning=meaning, section=inner)


def _section_of(kind: Any) -> tuple[type | None, bool]:
    """Return the section that a type is or holds, and whether it holds sections by name or in a list."""
    if isinstance(kind, type) and is_dataclass(kind):
        return kind, False
    inner = get_args(kind)
    if get_origin(kind) is Annotated:
        return next((one for one in inner[1:] if isinstance(one, type) and is_dataclass(one)), None), False
    found = next((one for one in inner if isinstance(one, type) and is_dataclass(one)), None)
    return found, found is not None and get_origin(kind) in (list, dict)


def _any_of(kind: Any) -> str:
    """Return how the key of any one of the sections in a list or a mapping ends."""
    return "[0]" if get_origin(kind) is list else ".NAME"


def _purpose(section: type) -> str:
    """Return the docstring of a section on one line."""
    return " ".join(inspect.cleandoc(section.__doc__ or "").split())


def _allowed(kind: Any, section: type | None, *, is_named: bool) -> str:
    if section is None:
        inner = get_args(kind)
        has_values = get_origin(kind) is dict and inner[1] is not Any
        return f"a mapping, each value {describe(inner[1])}" if has_values else describe(kind)
    if is_named:
        return "a list of sections" if get_origin(kind) is list else "sections by name"
    return (
        "a section, or null" if NoneType in get_args(kind) else "some keys of a section" if get_origin(kind) is Annotated else "a section"
    )


def _text(value: Any) -> str:
    """Return a default as YAML has it."""
    if is_dataclass(value):
        named = {f.name: getattr(value, f.name) for f in fields(value)}
        defaults = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(value)}
        return _text({name: one for name, one in named.items() if one != defaults[name]})
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_text(one)}' for name, one in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


@cache
def docstrings_of(section: type) -> dict[str, str]:
    """Return the docstring of every field of a section, on one line each; a name in capitals becomes the names that it stands for."""
    found = {
        name: text for base in reversed(section.__mro__[:-1]) for name, text in _parsed(base.__module__).get(base.__name__, {}).items()
    }
    lists = {name: value for name, value in vars(sys.modules[section.__module__]).items() if name.isupper() and isinstance(value, tuple)}
    for name, value in lists.items():
        found = {key: re.sub(rf"\b{name}\b", ", ".join(value), text) for key, text in found.items()}
    return found


@cache
def _parsed(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of fields in a module's source, by class and field."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                before.target.id: " ".join(inspect.cleandoc(after.value.value).split())
                for before, after in zip(node.body, node.body[1:], strict=False)
                if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name)
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
            }
    return found


def _lines(doc: KeyDoc) -> list[str]:
    default = f"; default {doc.default}" if doc.default not in ("", "required") else "; required" if doc.default else ""
    return [doc.key, *_wrapped(f"{doc.allowed}{default}", "    "), *_wrapped(doc.meaning, "    ")]


def _wrapped(text: str, indent: str = "", width: int = _WIDTH) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def markdown() -> str:
    """Return docs/configuration.md."""
    parts = [_INTRO.replace("PRESETS", _presets())]
    headings = {section: prefix.removesuffix(".") for section, prefix, _ in sections()}
    for section, prefix, meaning in sections():
        if section is Config:
            rows = [doc for doc in keys_of(section, prefix) if doc.section is None]
            parts.append("## Keys outside of sections\n\n" + _table(rows, prefix, headings))
            continue
        purpose = "\n".join(_wrapped(meaning, width=120))
        parts.append(f"## `{prefix.removesuffix('.')}`\n\n{purpose}\n\n" + _table(list(keys_of(section, prefix)), prefix, headings))
    return "\n".join(parts)


def _presets() -> str:
    """Return the table of the presets; what each is for is the first line of its file."""
    from nlray.config.loading import PRESETS, load_config

    rows = ["| preset | what it is | model | steps | update periods |", "| --- | --- | --- | --- | --- |"]
    for name in PRESETS:
        config = load_config(name)
        meaning = (package_files("nlray.config") / "presets" / f"{name}.yaml").read_text().partition("\n")[0].removeprefix("# ")
        model, batch = config.model, config.sequence.global_batch
        size = f"dim {model.dim}, {model.layers} layers"
        steps = f"{config.run.steps:,} of {batch} x {model.seq_len:,} tokens"
        rows.append(f"| `{name}` | {meaning} | {size} | {steps} | {', '.join(str(one.update_period) for one in config.levels.values())} |")
    return "\n".join(rows) + "\n"


def _table(docs: list[KeyDoc], prefix: str, headings: Mapping[type, str]) -> str:
    rows = ["| key | type and range | default | meaning |", "| --- | --- | --- | --- |"]
    for doc in docs:
        allowed = doc.allowed if doc.section is None else f"{doc.allowed}: `{headings[doc.section]}`"
        default = f"`{doc.default}`" if doc.default not in ("", "required") else doc.default
        cells = [f"`{doc.key.removeprefix(prefix)}`", allowed, default, doc.meaning]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
