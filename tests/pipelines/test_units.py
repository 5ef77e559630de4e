"""Units are bounded by what they are when decoded; damage inside a file is told; small sources do not keep a run waiting."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from nlray.config import DataConfig, SourceConfig, StreamConfig
from nlray.errors import DataError
from nlray.pipelines import source_stream
from nlray.pipelines.lanes import LaneStream
from nlray.pipelines.readers import MAX_UNIT_BYTES
from nlray.pipelines.sources import Source, check_sources, open_source
from nlray.pipelines.stream import BlockStream, heldout_blocks

MIB = 1 << 20


def read_texts(source: Source) -> list[bytes]:
    return [text for unit in range(source.num_units) for text in source.read(unit).text.to_pylist()]


def bytes_of(source: Source) -> list[int]:
    """Return the bytes in memory of each unit's text and tags."""
    units = (source.read(unit) for unit in range(source.num_units))
    return [records.text.nbytes + sum(tags.nbytes for tags in records.tags.values()) for records in units]


def write(table: pa.Table, path: Path, **options: object) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, **options)
    else:
        with (pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream)(path, table.schema) as writer:
            writer.write_table(table)


@pytest.mark.parametrize("name", ["t.parquet", "file.arrow", "stream.arrow", "views.parquet"])
def test_text_and_tags_that_repeat_stay_small(tmp_path: Path, name: str) -> None:
    texts = ["a" * MIB, "b" * MIB, "c"] * 100
    kind = pa.string_view() if "views" in name else pa.string()
    column = pa.array(texts).dictionary_encode() if "arrow" in name else pa.array(texts, kind)
    write(pa.table({"text": column, "tag": column}), tmp_path / name)
    assert (tmp_path / name).stat().st_size < 5 * MIB
    source = open_source(SourceConfig(path=str(tmp_path / name), tag_columns=["tag"]))
    assert max(bytes_of(source)) < 10 * MIB
    assert read_texts(source) == [text.encode() for text in texts]


def test_text_that_stays_a_dictionary_gives_the_same_blocks(tmp_path: Path, data_config: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, 123, 100, np.uint8).tobytes().decode() for _ in range(40)] + [None, ""]
    pq.write_table(pa.table({"text": texts * 20, "tag": [*"abc", *texts[3:]] * 20}), tmp_path / "t.parquet")
    config = data_config(
        SourceConfig(path=str(tmp_path / "t.parquet"), tag_columns=["tag"]), shuffle=True, shuffle_tokens=5000, eval_fraction=0.3
    )

    def take() -> tuple:
        batch, heldout = BlockStream(config, seq_len=90, seed=0).take(1000), heldout_blocks(config, seq_len=90, seed=0, num_blocks=100)
        return batch.blocks.tolist(), batch.tags, heldout.blocks.tolist(), heldout.tags

    expected = take()
    monkeypatch.setattr("nlray.pipelines.readers.MAX_UNIT_BYTES", 6000)
    monkeypatch.setattr(source_stream, "SLICE_BYTES", 1000)
    source = open_source(config.sources[0])
    assert source.num_units == 1 and pa.types.is_dictionary(source.read(0).text.type)
    assert take() == expected


def test_text_that_repeats_and_then_does_not_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    different = [rng.integers(97, 123, 2000, np.uint8).tobytes().decode() for _ in range(1500)]
    texts = ["a" * MIB] * 60 + different + ["a" * MIB] * 60
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet", write_batch_size=16)
    source = open_source(SourceConfig(path=str(tmp_path / "t.parquet")))
    assert read_texts(source) == [text.encode() for text in texts]
    assert max(bytes_of(source)) < 2.5 * MAX_UNIT_BYTES


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
def test_one_large_batch_among_small_ones_is_cut_and_the_others_are_not(small_limits: None, tmp_path: Path, name: str) -> None:
    batches = [pa.record_batch({"text": [f"{i}.{j}" * 10 for j in range(size)]}) for i, size in enumerate([5] * 30 + [5000] + [5] * 30)]
    with (pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)(tmp_path / name, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    source = open_source(SourceConfig(path=str(tmp_path / name)))
    counts = [len(source.read(unit).text) for unit in range(source.num_units)]
    assert counts[:30] == counts[-30:] == [5] * 30 and source.num_units > 80
    assert max(sum(map(len, source.read(unit).text.to_pylist())) for unit in range(source.num_units)) <= 4000
    assert read_texts(source) == [text.encode() for batch in batches for text in batch.column(0).to_pylist()]


@pytest.mark.parametrize("use_dictionary", [True, False])
def test_a_changed_byte_of_a_parquet_page_is_refused_where_pages_have_checksums(
    tmp_path: Path, data_config: Callable, texts: list[str], use_dictionary: bool
) -> None:
    path = tmp_path / "t.parquet"
    options = {"compression": "none", "use_dictionary": use_dictionary}
    table = pa.table({"text": texts})
    pq.write_table(table, path, write_page_checksum=True, **options)
    check_sources(data_config(path))
    content = bytearray(path.read_bytes())
    at = content.index(texts[150].encode())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"t.parquet: cannot be read as parquet: .*CRC checksum verification failed"):
        check_sources(data_config(path))
    pq.write_table(table, path, write_page_checksum=False, **options)
    assert read_texts(open_source(SourceConfig(path=str(path)))) == [text.encode() for text in texts]


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
def test_changed_offsets_and_indices_of_arrow_are_refused(tmp_path: Path, name: str) -> None:
    texts = pa.array([f"text {i}" for i in range(1000)])
    for column, wanted in ((texts, texts.buffers()[1]), (texts.dictionary_encode(), texts.dictionary_encode().indices.buffers()[1])):
        write(pa.table({"text": column}), tmp_path / name)
        content = bytearray((tmp_path / name).read_bytes())
        at = content.index(wanted.to_pybytes()[: 4 * 1000]) + 4 * 500
        content[at + 3] ^= 0x40
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: cannot be read as arrow: "):
            open_source(SourceConfig(path=str(tmp_path / name))).read(0)


def test_feather_v1_is_told_by_its_name(tmp_path: Path, data_config: Callable) -> None:
    (tmp_path / "t.feather").write_bytes(b"FEA1" + bytes(100) + b"FEA1")
    with pytest.raises(DataError, match=r"t.feather: is Feather V1, which is not read; allowed: Feather V2"):
        check_sources(data_config(tmp_path / "t.feather"))


@pytest.mark.parametrize("num_files", [1, 3])
def test_a_window_of_a_tiny_source_ends_after_so_many_epochs(tmp_path: Path, num_files: int) -> None:
    for i in range(num_files):
        (tmp_path / f"{i}.txt").write_text("hi")
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path))], eval_fraction=0, stream=StreamConfig(shuffle_tokens=1 << 20))
    stream = BlockStream(config, seq_len=256, seed=0)
    batch = stream.take(2)
    assert np.isin(batch.blocks, [*b"hi", 256]).all()
    state = stream.state_dict()["sources"][0]
    # Two bytes and an end: 256 / 3 epochs or a third of them to a block. A window of 64 blocks would be at its start still.
    assert state["epoch"] * num_files <= 2 * 256 and (num_files > 1 or (state["window"] == 0 and state["next"] == 2))
    blocks = [stream.take(1).blocks for _ in range(6)]
    resumed = BlockStream(config, seq_len=256, seed=0)
    resumed.load_state_dict({"block": 2, "sources": [state]})
    assert np.array_equal(np.concatenate(blocks), resumed.take(6).blocks)
    assert stream.state_dict() == resumed.state_dict()
    assert stream.state_dict()["sources"][0]["window"] >= (1 if num_files == 1 else 0)


def test_lanes_and_evaluation_of_a_tiny_source_end(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("hi")
    config = DataConfig(sources=[SourceConfig(path=str(tmp_path / "t.txt"))], eval_fraction=0.5)
    with pytest.raises(DataError, match=r"no text to train on; data.eval_fraction=0.5 holds every record out|do not fill one sequence"):
        heldout_blocks(config, seq_len=64, seed=0, num_blocks=2)
        BlockStream(config, seq_len=64, seed=0).take(1)
    lanes = LaneStream(
        BlockStream(DataConfig(sources=config.sources, eval_fraction=0), seq_len=64, seed=0, in_order=True), lanes=2, length=8
    )
    assert np.isin(lanes.take(2).blocks, [*b"hi", 256]).all()


def test_an_arrow_file_whose_first_message_has_no_length_is_read(tmp_path: Path) -> None:
    """The files of polars: readers find the schema by the footer."""
    path, table = tmp_path / "a.arrow", pa.table({"text": ["a", "b"]})
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    content = bytearray(path.read_bytes())
    content[8:16] = b"\x04\0\0\0\xf2\xff\xff\xff"
    path.write_bytes(content)
    assert open_source(SourceConfig(path=str(path))).read(0).text.to_pylist() == [b"a", b"b"]
