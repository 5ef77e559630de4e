"""Paths and URLs: names, opens and writes every file of nlray, on local disks and on any fsspec URL.

url = absolute("~/runs/demo")            # what a configuration holds: an absolute path or a URL
fs, path = locate(url)                   # every file system is reached through here
write_file(f"{url}/state.json", data)    # atomic: after a crash or a power failure the file is the old one or the new one
"""

import errno
import os
import posixpath
import re
import shutil
import uuid
from contextlib import suppress
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from nlray.errors import NlrayError, StorageOutageError, UserError

_FILE_SCHEMES = ("file://", "local://")
PART = re.compile(r"(\.[0-9a-f]{8})?\.part$")
"""What the name of a file has behind it while it is written; an earlier version had no number there."""
_LASTING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)


def is_local(url: str) -> bool:
    """Return whether a path or URL is of this machine's own file system."""
    return "://" not in url or url.startswith(_FILE_SCHEMES)


def absolute(url: str) -> str:
    """Return a local path as an absolute one, `~` and `file://` resolved; other URLs and `stdlib:` stay.

    Raises:
        UserError: an empty path, or `~` where the user has no home.
    """
    if not url:
        raise UserError("'' is no path; allowed: a file, a folder or a URL")
    if not is_local(url) or url.startswith("stdlib:"):
        return url
    path = url if "://" not in url else LocalFileSystem._strip_protocol(url)
    if path.startswith("~"):
        path = os.path.expanduser(path)
        if path.startswith("~"):
            raise UserError(f"{url}: {path.split('/')[0]} has no home folder here; allowed: a path without ~")
    return os.path.abspath(path)


def locate(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a path or URL, and the path within it.

    A path without `://` is always a local one: `a::b.jsonl` is a file of that name, not a chain of URLs.

    Raises:
        UserError: a kind of URL that nothing installed can read.
    """
    if is_local(url):
        return LocalFileSystem(), absolute(url)
    try:
        return url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url}: this kind of URL needs a package that is not installed: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise UserError(f"{url}: no kind of URL that can be read: {' '.join(str(error).split())}") from error


def lies_in(url: str, folder: str) -> bool:
    """Return whether a path or URL is `folder` or below it; links of local paths are followed."""
    try:
        (fs, inner), (other, outer) = locate(url), locate(folder)
    except UserError:  # a store that nothing here can open
        fs, inner, other, outer = None, url, None, folder
    if type(fs) is not type(other):
        return False
    if isinstance(fs, LocalFileSystem):
        inner, outer = os.path.realpath(inner), os.path.realpath(outer)
    inner, outer = inner.rstrip("/"), outer.rstrip("/")
    return inner == outer or inner.startswith(f"{outer}/")


def may_pass(error: BaseException) -> bool:
    """Return whether a failed write may succeed a little later: a full disk, a network or a store that does not answer.

    A file or folder that is gone and one that must not be written to stay so.
    """
    if isinstance(error, OSError):
        # A store's client sets no number, and a permission there may be renewed.
        return error.errno not in _LASTING and not isinstance(error, FileNotFoundError)
    if isinstance(error, NlrayError):
        return isinstance(error, StorageOutageError)
    # The errors of a store's client, of botocore for example, are classes of its own.
    return isinstance(error, Exception) and type(error).__module__ != "builtins"


def reason(error: BaseException) -> str:
    """Return in one line why something could not be read or written."""
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split()) or type(error).__name__


def write_file(url: str, data: bytes) -> None:
    """Write a whole file so that a reader, or a crash, meets the old one or the new one, never half of it.

    On a local disk the data and the folder's entry are on the disk when this returns; a store shows an object when it is complete.
    """
    fs, path = locate(url)
    if not isinstance(fs, LocalFileSystem):
        fs.makedirs(posixpath.dirname(path), exist_ok=True)
        fs.pipe_file(path, data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    # A name of its own: two writes of one file may overlap, where an actor that is given up still writes.
    part = f"{path}.{uuid.uuid4().hex[:8]}.part"
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
    sync_folder(os.path.dirname(path))


def copy_folder(source: str, target: str) -> None:
    """Copy the files directly in the folder `source` to `target`: hard links on one local disk.

    Raises:
        FileNotFoundError: `source` or a file of it is not there (any more).
    """
    (source_fs, source_path), (fs, path) = locate(source), locate(target)
    files = [name for name in source_fs.ls(source_path, detail=False) if source_fs.isfile(name)]
    fs.makedirs(path, exist_ok=True)
    for name in files:
        copy = posixpath.join(path, posixpath.basename(name))
        if fs.exists(copy):
            fs.rm_file(copy)
        if not (is_local(source) and is_local(target) and _link(name, copy)):
            with source_fs.open(name, "rb") as reading, fs.open(copy, "wb") as writing:
                shutil.copyfileobj(reading, writing, 16 << 20)
    if is_local(target):
        sync_folder(path)


def _link(source: str, target: str) -> bool:
    """Make a hard link; return whether this disk can: not to another disk, nor on every file system."""
    try:
        os.link(os.path.realpath(source), target)
    except FileNotFoundError:
        raise
    except OSError:
        return False
    return True


def sync_folder(path: str) -> None:
    """Bring a local folder's entries to the disk: names that were made, replaced or removed in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
