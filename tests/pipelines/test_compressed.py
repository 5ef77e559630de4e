"""Compressed text and JSON lines give the records of the files that were compressed, in bounded memory and in any order of reads."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.local import LocalFileSystem

from nlray.config import SourceConfig
from nlray.errors import DataError
from nlray.pipelines import compressed
from nlray.pipelines.compressed import ForwardReader
from nlray.pipelines.source_list import list_files
from nlray.pipelines.sources import Source, check_sources, open_source
from nlray.pipelines.stream import BlockStream


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACK = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}
ENDINGS = list(PACK)


def read_texts(source: Source) -> list[bytes]:
    return [text for unit in range(source.num_units) for text in source.read(unit).text.to_pylist()]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_compressed_file_gives_the_same_records(small_limits: None, corpus: Path, tmp_path: Path, name: str, ending: str) -> None:
    packed = tmp_path / f"{name}{ending}"
    packed.write_bytes(PACK[ending]((corpus / name).read_bytes()))
    source, plain = open_source(SourceConfig(path=str(packed))), open_source(SourceConfig(path=str(corpus / name)))
    assert source.num_units == plain.num_units > 5
    assert read_texts(source) == read_texts(plain)
    assert len(set(source.sequence.tolist())) == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_several_streams_in_one_file_are_all_read(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"a.txt{ending}").write_bytes(PACK[ending](b"one\n") + PACK[ending](b"two\n"))
    assert b"".join(read_texts(open_source(SourceConfig(path=str(tmp_path / f"a.txt{ending}"))))) == b"one\ntwo\n"


@pytest.mark.parametrize("ending", ENDINGS)
def test_reads_go_back_and_forth_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(compressed, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(compressed, "HELD_BYTES", 5000)
    data = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
    (tmp_path / "a").write_bytes(PACK[ending](data))
    kind = {".gz": "gzip", ".zst": "zstd"}.get(ending, ending[1:])
    reader = ForwardReader(LocalFileSystem(), str(tmp_path / "a"), kind)
    assert reader.count() == len(data)
    for start, stop in [(0, 10), (5, 30_000), (29_000, 40_000), (90_000, 90_001), (85_500, 86_000), (2, 3), (99_990, 200_000)]:
        assert reader.read(start, stop) == data[start:stop]
        assert sum(map(len, reader._held)) <= stop - start + 5000 + 4 * 1000
    file = list_files(SourceConfig(path=str(tmp_path / "a"), format="text"), where="data.sources[0]").files[0]
    with file.open() as stream:
        assert stream.read() == data
        stream.seek(7)
        assert stream.read(5) == data[7:12]


def test_a_folder_reads_compressed_and_plain_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "c.NDJSON.XZ").write_bytes(lzma.compress(b'{"text": "c"}\n'))
    (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(b"left out beside JSON lines"))
    assert read_texts(open_source(SourceConfig(path=str(tmp_path)))) == [b"a", b"b", b"c"]


def test_compression_goes_by_content_not_by_ending(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    (tmp_path / "b.jsonl.gz").write_bytes(b'{"text": "b"}\n')
    assert read_texts(open_source(SourceConfig(path=str(tmp_path)))) == [b"a", b"b"]


def test_a_remote_compressed_file_is_read(tmp_path: Path) -> None:
    with fsspec.open("memory://compressed/a.jsonl.zst", "wb") as file:
        file.write(zstd(b'{"text": "a"}\n' * 3))
    assert read_texts(open_source(SourceConfig(path="memory://compressed/a.jsonl.zst"))) == [b"a"] * 3


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_truncated_file_is_named_before_any_work(tmp_path: Path, data_config: Callable, ending: str) -> None:
    (tmp_path / f"a.txt{ending}").write_bytes(PACK[ending](b"text " * 1000)[:-4])
    with pytest.raises(DataError, match=rf"data.sources\[0\]: .*a.txt{ending}: cannot be read: .+"):
        check_sources(data_config(tmp_path / f"a.txt{ending}"))


def test_the_stream_of_a_compressed_file_resumes(small_limits: None, corpus: Path, tmp_path: Path, data_config: Callable) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((corpus / "a.jsonl").read_bytes()))
    (tmp_path / "b.jsonl.zst").write_bytes(zstd((corpus / "a.jsonl").read_bytes()))
    config = data_config(tmp_path, shuffle=True, shuffle_tokens=600, eval_fraction=0.1)
    whole = BlockStream(config, seq_len=32, seed=1).take(4000)
    stream = BlockStream(config, seq_len=32, seed=1)
    stream.take(1500)
    resumed = BlockStream(config, seq_len=32, seed=1)
    resumed.load_state_dict(stream.state_dict())
    assert np.array_equal(resumed.take(2500).blocks, whole.blocks[1500:])
