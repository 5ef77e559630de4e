"""The source `stdlib:`, which needs no download: the Python files and pydoc topics of the running interpreter."""

import importlib
import os
import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa

from nlray.errors import DataError
from nlray.pipelines.readers import Records

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "pydoc_data"}
TAG = "kind"


class StdlibReader:
    """One unit of one record per file, tagged kind=code, and per pydoc topic, tagged kind=prose."""

    file_name = "stdlib:"

    def __init__(self, *, where: str) -> None:
        """Raise DataError where this interpreter comes without its sources."""
        root = Path(sysconfig.get_path("stdlib"))
        self._files = sorted(_python_files(root))
        if not self._files:
            raise DataError(f"{where}: stdlib:: this Python has no library sources in {root}; give a path of your own")
        self._topics = sorted(_pydoc_topics().items())
        self.sequence = np.arange(len(self._files) + len(self._topics))

    def read(self, unit: int) -> Records:
        is_code = unit < len(self._files)
        text = self._files[unit].read_bytes() if is_code else self._topics[unit - len(self._files)][1].encode()
        return Records(pa.array([text], pa.large_binary()), {TAG: pa.array(["code" if is_code else "prose"])})

    def close(self) -> None:
        """Nothing is kept open."""


def fingerprint() -> str:
    """Return a hash of what the source `stdlib:` has in this interpreter."""
    reader, digest = StdlibReader(where="stdlib:"), blake2b(digest_size=12)
    for unit in range(len(reader.sequence)):
        text = reader.read(unit).text[0].as_py()
        digest.update(b"%d\n" % len(text) + text)
    return digest.hexdigest()


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        # Pruned in place: site-packages may hold very many files.
        subfolders[:] = set(subfolders) - _LEFT_OUT
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _pydoc_topics() -> dict[str, str]:
    """Return the help topics; none where a distribution ships Python without them."""
    try:
        return importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return {}
