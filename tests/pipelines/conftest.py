"""Small corpora in every format, and limits made small so that little data has many units, slices and pieces."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from nlray.config import DataConfig, SourceConfig, StreamConfig
from nlray.pipelines import readers, source_stream, text_reader

WORDS = ["memory", "Gedächtnis", "記憶", "lernt", "slow\nfast", "naïve", "🙂", "x"]


def make_texts(count: int, *, seed: int) -> list[str]:
    """Return different texts of 1 to 40 words."""
    rng = np.random.default_rng(seed)
    return [f"{seed}.{i} " + " ".join(rng.choice(WORDS, rng.integers(1, 40))) for i in range(count)]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(300, seed=1)


@pytest.fixture(scope="session")
def languages() -> list[str]:
    return [["de", "en", "ja"][i % 3] for i in range(300)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str], languages: list[str]) -> Path:
    """A folder with the same 300 records in every table format, and texts as plain files."""
    root = tmp_path_factory.mktemp("corpus")
    table = pa.table({"id": range(300), "text": texts, "language": languages})
    pq.write_table(table, root / "a.parquet", row_group_size=70)
    with pa.ipc.new_file(root / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with pa.ipc.new_stream(root / "stream.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    pyarrow.feather.write_feather(table, root / "a.feather", chunksize=70)
    rows = zip(texts, languages, strict=True)
    (root / "a.jsonl").write_text("".join(json.dumps({"text": t, "language": x, "n": i}) + "\n" for i, (t, x) in enumerate(rows)))
    (root / "a.txt").write_text("\n".join(texts))
    notes = root / "notes" / "deep"
    notes.mkdir(parents=True)
    for i in range(20):
        (notes.parent if i % 2 else notes).joinpath(f"{i:02}.md").write_text(texts[i])
    return root


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    with_small_limits(monkeypatch)


@pytest.fixture(scope="module")
def module_small_limits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        with_small_limits(patch)
        yield


def with_small_limits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(readers, "RANGE_BYTES", 3000)
    patch.setattr(readers, "MAX_UNIT_BYTES", 4000)
    patch.setattr(text_reader, "_WINDOW", 500)
    patch.setattr(text_reader, "_MIN_PIECE", 200)
    patch.setattr(source_stream, "SLICE_BYTES", 1000)


@pytest.fixture(scope="session")
def data_config() -> Callable[..., DataConfig]:
    """Build a DataConfig from paths or SourceConfigs: not shuffled and nothing held out unless asked for."""

    def build(
        *sources: object, shuffle: bool = False, shuffle_tokens: int = 0, eval_fraction: float = 0.0, tokenizer: str = "bytes"
    ) -> DataConfig:
        configs = [s if isinstance(s, SourceConfig) else SourceConfig(path=str(s)) for s in sources]
        stream = StreamConfig(shuffle=shuffle, shuffle_tokens=shuffle_tokens)
        return DataConfig(sources=configs, eval_fraction=eval_fraction, tokenizer=tokenizer, stream=stream)

    return build


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets beside the project."""
    path = Path(__file__).parents[2].parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the shared data sets are not beside the project")
    return path
