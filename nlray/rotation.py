"""Which checkpoints of a run stay: old ones are deleted, and what a run does not continue from is put aside.

    put_aside_after(run_dir, 10)                             # a resume from step 10: later ones never count again
    delete_old_checkpoints(run_dir, keep=2, known=known)     # after a checkpoint has been written

A folder that is put aside is renamed to `step_XXXXXXXXX.aside`, and is the user's from then on: nothing here reads or deletes it.
"""

import logging
import os
import posixpath
from collections.abc import Callable, Collection
from itertools import count

from fsspec.implementations.local import LocalFileSystem

from nlray.checkpoint import (
    has_manifest,
    is_folder,
    list_checkpoints,
    named_as_checkpoints,
    step_of,
    sync_parents,
    verify_checkpoint,
)
from nlray.errors import CheckpointError
from nlray.run_folder import MANIFEST
from nlray.storage import locate

logger = logging.getLogger(__name__)


def put_aside_after(run_dir: str, step: int) -> list[str]:
    """Rename what is named as a checkpoint of a later step, so that it never counts again; return what was renamed, as `OLD as NEW`.

    A folder without a manifest stays: it is written again, or deleted when it is old.
    """
    later = [url for url in named_as_checkpoints(run_dir) if step_of(url) > step]
    return [_put_aside(url) for url in later if not is_folder(url) or has_manifest(url)]


def _put_aside(url: str) -> str:
    fs, path = locate(url)
    names = (f"{path}.aside" + (f"-{n}" if n > 1 else "") for n in count(1))
    target = next(name for name in names if not fs.exists(name))
    fs.mv(path, target, recursive=True)
    sync_parents(url)
    return f"{posixpath.basename(path)} as {posixpath.basename(target)}"


def delete_old_checkpoints(
    run_dir: str, keep: int, *, known: set[str], protected: Collection[str] = (), warn: Callable[[str], None] = logger.warning
) -> list[str]:
    """Delete what is older than the newest `keep` complete checkpoints; return what was deleted.

    Args:
        known: URLs of checkpoints that are complete; another one is verified before it counts, and added, or else put aside.
        protected: URLs that are not deleted, however old.
        warn: is told of a checkpoint that is put aside.
    """
    found, complete, gone = list_checkpoints(run_dir), 0, []
    for url in found if len(found) > keep else ():
        if complete >= keep:
            if url not in protected and _delete(url):
                gone.append(url)
        elif url in known:
            complete += 1
        elif has_manifest(url):
            try:
                verify_checkpoint(url)
            except CheckpointError as error:
                warn(f"{error}; put aside {_put_aside(url)}")
                continue
            known.add(url)
            complete += 1
    return gone


def _delete(url: str) -> bool:
    """Delete a checkpoint's folder; False: it is a link, whose target is not this run's to delete."""
    fs, path = locate(url)
    if isinstance(fs, LocalFileSystem) and os.path.islink(path):
        return False
    # The manifest goes first, so that a deletion cut short leaves a torn folder, not a false one.
    if fs.exists(posixpath.join(path, MANIFEST)):
        fs.rm(posixpath.join(path, MANIFEST), recursive=True)
    fs.rm(path, recursive=True)
    return True
