"""What the folder of a run may have this machine do: it may come from anybody.

    text = read_bounded(f"{run_dir}/config.yaml")   # bounded; None: no such file
    state = read_object(f"{run_dir}/state.json")
    confirm(config, run_dir, trust=False)           # UserError where the folder would have code run or addresses contacted

What the user types is the user's own; what a file in a run's folder says is not, until the user confirms it. See `docs/trust.md`.
"""

import json
import os
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any
from urllib.parse import urlsplit

from nlray.config import Config
from nlray.errors import UserError
from nlray.storage import absolute, is_local, locate
from nlray.terminal import clean

MAX_BYTES = 16 << 20
MAX_DEPTH = 50
DAMAGED = "damaged: not the JSON that a run writes there"


def read_bounded(url: str) -> bytes | None:
    """Return the contents of a file of a run's folder; None if there is none.

    Raises:
        UserError: it is no regular file, or larger than `MAX_BYTES`.
    """
    fs, path = locate(url)
    if not fs.exists(path):
        return None
    require_regular(url)
    if (fs.size(path) or 0) > MAX_BYTES:
        raise UserError(f"{url}: larger than {MAX_BYTES >> 20} MiB")
    return fs.cat_file(path)


def require_regular(url: str) -> None:
    """Raise UserError where a local file is there and is none that can be read to its end, such as a pipe."""
    if is_local(url) and os.path.exists(path := absolute(url)) and not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{url}: not a regular file")


def read_object(url: str) -> dict[str, Any] | None:
    """Return the JSON object that a file of a run's folder holds; None if there is no such file.

    Raises:
        UserError: it is something else, larger than `MAX_BYTES`, or nested deeper than `MAX_DEPTH`.
    """
    data = read_bounded(url)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{url}: {DAMAGED}") from error
    if not isinstance(found, dict):
        raise UserError(f"{url}: {DAMAGED}")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        level = [item for value in level for item in _items(value)]
    if level:
        raise UserError(f"{url}: nested deeper than {MAX_DEPTH} levels")
    return found


def confirm(config: Config, run_dir: str, *, trust: bool, typed: Collection[str] = (), is_resumed: bool = False) -> None:
    """Make sure that the user wants what a run's configuration would have this machine do, before any of it is done.

    Args:
        config: of the run, with what the user changed.
        run_dir: its folder or URL.
        trust: the user has confirmed it already. Else, in a terminal, the user is asked.
        typed: what the user has named among the arguments, which is the user's own.
        is_resumed: the run is going to read its sources and to write into its folder.

    Raises:
        UserError: the user has not confirmed it; names all of it.
    """
    found = [] if trust else [*_claims(config, run_dir, typed, is_resumed=is_resumed)]
    if not found:
        return
    what = "; ".join(found)
    if sys.stdin.isatty() and sys.stderr.isatty():
        lines = "".join(f"  {clean(line)}\n" for line in found)
        question = f"{clean(run_dir)} names what is not part of nlray:\n{lines}Code of whoever made it may run here. Continue? [y/N] "
        print(question, end="", file=sys.stderr, flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
        raise UserError(f"{run_dir}: not confirmed: {what}")
    raise UserError(f"{run_dir or '.'}: the run's folder names {what}; allowed where you trust whoever made the folder: --trust")


def _claims(config: Config, run_dir: str, typed: Collection[str], *, is_resumed: bool) -> Iterator[str]:
    """Give what a run would have this machine import, contact or write to outside of its folder."""
    from nlray.extensions import is_installed

    names = {"cms.mlp": config.cms.mlp, "model.titans.memory": config.model.titans.memory}
    names |= {"sequence.optimizer.name": config.sequence.optimizer.name}
    names |= {f"cms.levels.{name}.optimizer.name": level.optimizer.name for name, level in config.cms.levels.items()}
    for name in dict.fromkeys(names.values()):
        if ":" in name and name not in typed and not is_installed(name.partition(":")[0]):
            yield f"the class {name} ({', '.join(key for key, value in names.items() if value == name)})"
    urls = {"data.tokenizer": config.data.tokenizer}
    if is_resumed:
        urls |= {f"data.sources[{index}].path": source.path for index, source in enumerate(config.data.sources)}
        urls |= {} if config.init is None else {"init": config.init}
    for key, url in urls.items():
        if not is_local(url) and url not in typed and ("::" in url or _store(url) != _store(run_dir)):
            yield f"the address {url} ({key})"
    if is_resumed and is_local(run_dir):
        yield from (f"the link {link} -> {os.readlink(link)}" for link in _links(absolute(run_dir)))


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _store(url: str) -> tuple[str, str]:
    """Return the scheme and the host or bucket of a URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _links(folder: str) -> Iterator[str]:
    """Give the symbolic links below a folder: what a run writes, cuts back or deletes there would be somewhere else."""
    for place, folders, files in os.walk(folder):
        yield from (path for name in (*folders, *files) if os.path.islink(path := os.path.join(place, name)))
