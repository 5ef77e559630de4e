"""The global order: exact tokens, the same for any take sizes and worker split, exact to the token on resume."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nlray.config import DataConfig, SourceConfig
from nlray.errors import DataError
from nlray.pipelines.sources import Source
from nlray.pipelines.stream import Batch, BlockStream, heldout_blocks

END = 256
SEQ_LEN = 64


def tokens_of(batch: Batch) -> np.ndarray:
    """Return the run of tokens that consecutive blocks of one source cover."""
    return np.concatenate([batch.blocks[:, :-1].reshape(-1), batch.blocks[-1:, -1]])


def documents_of(tokens: np.ndarray) -> list[str]:
    """Return the whole documents in a run of byte tokens; an unfinished last one is dropped."""
    ends = np.flatnonzero(tokens == END)
    return [bytes(part[part != END].astype(np.uint8)).decode() for part in np.split(tokens[: ends[-1] + 1], ends[:-1] + 1)]


def expected_tokens(texts: list[str]) -> np.ndarray:
    return np.concatenate([np.append(np.frombuffer(text.encode(), np.uint8).astype(np.int32), END) for text in texts])


def same(a: Batch, b: Batch) -> bool:
    return np.array_equal(a.blocks, b.blocks) and a.tags == b.tags and np.array_equal(a.sources, b.sources)


@pytest.fixture(scope="module", params=[0, 37 * SEQ_LEN, 1 << 20], ids=["no windows", "windows", "windows of an epoch"])
def mixed(request: pytest.FixtureRequest, module_small_limits: None, corpus: Path, data_config: Callable) -> DataConfig:
    """Four sources of different formats and weights, shuffled, with records held out."""
    return data_config(
        SourceConfig(path=str(corpus / "a.parquet"), weight=2.0, tag_columns=["language"]),
        SourceConfig(path=str(corpus / "a.txt"), weight=1.0),
        SourceConfig(path=str(corpus / "notes"), weight=0.5),
        SourceConfig(path=str(corpus / "a.jsonl"), weight=1.5, tag_columns=["language", "n"]),
        shuffle=True,
        shuffle_tokens=request.param,
        eval_fraction=0.2,
    )


@pytest.fixture(scope="module")
def reference(mixed: DataConfig) -> Batch:
    """The first 4500 blocks of `mixed`, more than an epoch of every source, taken at once."""
    return BlockStream(mixed, seq_len=SEQ_LEN, seed=3).take(4500)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow", "a.jsonl"])
@pytest.mark.parametrize("seq_len", [1, 7, 256, 5000])
def test_blocks_are_the_documents_in_order_over_epochs(
    small_limits: None, corpus: Path, texts: list[str], data_config: Callable, name: str, seq_len: int
) -> None:
    expected = np.tile(expected_tokens(texts), 3)
    count = min((len(expected) - 1) // seq_len, 2000)
    batch = BlockStream(data_config(corpus / name), seq_len=seq_len, seed=0).take(count)
    assert batch.blocks.dtype == np.int32 and batch.blocks.shape == (count, seq_len + 1)
    assert np.array_equal(tokens_of(batch), expected[: count * seq_len + 1])


def test_a_text_file_is_one_document_per_epoch(small_limits: None, corpus: Path, data_config: Callable) -> None:
    document = expected_tokens([(corpus / "a.txt").read_text()])
    batch = BlockStream(data_config(corpus / "a.txt"), seq_len=SEQ_LEN, seed=0).take(2 * len(document) // SEQ_LEN)
    assert np.array_equal(tokens_of(batch), np.tile(document, 3)[: len(batch.blocks) * SEQ_LEN + 1])


def test_pieces_apart_from_each_other_end_a_document(small_limits: None, corpus: Path, data_config: Callable) -> None:
    text = (corpus / "a.txt").read_bytes()
    one_pass = BlockStream(data_config(corpus / "a.txt", eval_fraction=0.2), seq_len=1, seed=0, split="heldout").take(len(text))
    held_out = documents_of(tokens_of(one_pass))
    train = BlockStream(data_config(corpus / "a.txt", shuffle=True, eval_fraction=0.2), seq_len=1, seed=0).take(2 * len(text))
    ends = np.cumsum([len(document.encode()) for document in documents_of(tokens_of(train))])
    epoch = int(np.flatnonzero(ends == len(text) - sum(len(d.encode()) for d in held_out))[0]) + 1
    places = [(text.index(d.encode()), len(d.encode())) for d in [*documents_of(tokens_of(train))[:epoch], *held_out]]
    assert len(places) > 20
    at = 0
    for start, length in sorted(places):
        assert start == at
        at += length
    assert at == len(text)


def test_an_hf_tokenizer_gives_the_tokens_of_each_record(
    small_limits: None, corpus: Path, texts: list[str], tmp_path: Path, data_config: Callable
) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "memory": 1, "x": 2, "slow": 3, "</s>": 4}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    expected = [token for text in texts for token in [*tokenizer.encode(text).ids, 4]]
    batch = BlockStream(data_config(corpus / "a.parquet", tokenizer=str(tmp_path / "words.json")), seq_len=50, seed=0).take(
        len(expected) // 50
    )
    assert tokens_of(batch).tolist() == [*expected, *expected][: len(batch.blocks) * 50 + 1]


def test_shuffle_keeps_each_epoch_whole_and_orders_each_differently(
    small_limits: None, corpus: Path, texts: list[str], data_config: Callable
) -> None:
    size = len(expected_tokens(texts))
    for name in ("a.parquet", "a.jsonl", "stream.arrow"):
        config = data_config(corpus / name, shuffle=True)
        documents = documents_of(tokens_of(BlockStream(config, seq_len=1, seed=0).take(3 * size)))
        epochs = [documents[i * 300 : (i + 1) * 300] for i in range(3)]
        assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
        assert texts not in epochs and epochs[0] != epochs[1] != epochs[2]
        assert documents != documents_of(tokens_of(BlockStream(config, seq_len=1, seed=1).take(3 * size)))


def test_train_and_heldout_are_disjoint_and_complete(small_limits: None, corpus: Path, texts: list[str], data_config: Callable) -> None:
    size = len(expected_tokens(texts))
    config = data_config(corpus / "a.parquet", shuffle=True, eval_fraction=0.3)
    train = set(documents_of(tokens_of(BlockStream(config, seq_len=1, seed=0).take(2 * size))))
    held_out = documents_of(tokens_of(BlockStream(config, seq_len=1, seed=0, split="heldout").take(2 * size)))
    assert len(held_out) == len(set(held_out)) and 50 < len(held_out) < 130
    assert train.isdisjoint(held_out) and train | set(held_out) == set(texts)
    again = documents_of(
        tokens_of(BlockStream(data_config(corpus / "a.jsonl", eval_fraction=0.3), seq_len=1, seed=9, split="heldout").take(size))
    )
    assert set(again) == set(held_out)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=12))
def test_order_is_independent_of_take_sizes(mixed: DataConfig, reference: Batch, counts: list[int]) -> None:
    stream, at = BlockStream(mixed, seq_len=SEQ_LEN, seed=3), 0
    for count in counts:
        batch = stream.take(count)
        assert np.array_equal(batch.blocks, reference.blocks[at : at + count])
        assert batch.tags == reference.tags[at : at + count]
        assert np.array_equal(batch.sources, reference.sources[at : at + count])
        at += count


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 20))
def test_order_is_independent_of_the_worker_split(mixed: DataConfig, reference: Batch, workers: int, rows: int, steps: int) -> None:
    count = workers * rows
    streams = [BlockStream(mixed, seq_len=SEQ_LEN, seed=3) for _ in range(workers)]
    for step in range(steps):
        shares = [s.take(count, start=w * rows, stop=(w + 1) * rows) for w, s in enumerate(streams)]
        assert np.array_equal(np.concatenate([s.blocks for s in shares]), reference.blocks[step * count : (step + 1) * count])
        assert [t for s in shares for t in s.tags] == reference.tags[step * count : (step + 1) * count]
    assert all(s.state_dict() == streams[0].state_dict() for s in streams)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4400), st.integers(1, 50))
def test_resume_from_any_point_gives_the_remaining_blocks(mixed: DataConfig, reference: Batch, point: int, step: int) -> None:
    stream = BlockStream(mixed, seq_len=SEQ_LEN, seed=3)
    stream.take(point, start=0, stop=0)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = BlockStream(mixed, seq_len=SEQ_LEN, seed=3)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    batches = [resumed.take(step), resumed.take(100 - step)]
    rows = slice(point, point + 100)
    assert np.array_equal(np.concatenate([b.blocks for b in batches]), reference.blocks[rows])
    assert [t for b in batches for t in b.tags] == reference.tags[rows]
    assert resumed.state_dict() == (stream.take(100) and stream.state_dict())


def test_reference_passes_an_epoch_of_every_source(mixed: DataConfig) -> None:
    stream = BlockStream(mixed, seq_len=SEQ_LEN, seed=3)
    stream.take(4400)
    assert all(source["epoch"] > 0 for source in stream.state_dict()["sources"])


def test_state_is_small_and_resume_reads_one_unit_per_source(mixed: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = BlockStream(mixed, seq_len=SEQ_LEN, seed=3)
    stream.take(777)
    state = stream.state_dict()
    assert len(json.dumps(state)) < 1000
    resumed = BlockStream(mixed, seq_len=SEQ_LEN, seed=3)
    read, reads = Source.read, []
    monkeypatch.setattr(Source, "read", lambda source, unit: reads.append(source.path) or read(source, unit))
    resumed.load_state_dict(state)
    resumed.take(40)
    if mixed.stream.shuffle_tokens > 0:  # the windows are read again, an epoch at the most
        assert len(set(reads)) == 4
        return
    assert len(set(reads)) == 4 and max(Counter(path for path in reads if "notes" not in path).values()) <= 2


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_windows_hold_the_blocks_of_the_source_in_another_order(
    small_limits: None, corpus: Path, data_config: Callable, split: str
) -> None:
    take = {"seq_len": 16, "seed": 5, "split": split}
    plain = BlockStream(data_config(corpus / "a.parquet", shuffle=True, eval_fraction=0.3), **take).take(500)
    config = data_config(corpus / "a.parquet", shuffle=True, shuffle_tokens=100 * 16, eval_fraction=0.3)
    shuffled = BlockStream(config, **take).take(500)
    assert len(shuffled.blocks) == len(plain.blocks)
    for start in (0, 100):
        rows = slice(start, start + 100)
        assert not np.array_equal(shuffled.blocks[rows], plain.blocks[rows])
        assert sorted(map(bytes, shuffled.blocks[rows])) == sorted(map(bytes, plain.blocks[rows]))


def test_a_window_is_an_epoch_at_the_most(corpus: Path, data_config: Callable) -> None:
    config = data_config(corpus / "notes", shuffle=True, shuffle_tokens=1 << 20)
    stream = BlockStream(config, seq_len=8, seed=0)
    size = len(expected_tokens([p.read_text() for p in (corpus / "notes").rglob("*.md")])) // 8
    length = 0
    while stream.state_dict()["sources"][0]["window"] == 0:
        stream.take(1)
        length += 1
    assert size <= length - 1 <= size + 64


def test_a_state_of_other_sources_is_refused(mixed: DataConfig, corpus: Path, data_config: Callable) -> None:
    state = BlockStream(mixed, seq_len=8, seed=0).state_dict()
    with pytest.raises(DataError, match=r"the saved position has 4 sources, the config has 1"):
        BlockStream(data_config(corpus / "a.txt"), seq_len=8, seed=0).load_state_dict(state)
    state = BlockStream(data_config(corpus / "a.txt"), seq_len=8, seed=0).state_dict()
    with pytest.raises(DataError, match=r"data.sources\[0\]: .*a.parquet: has \d+ units of data, but the saved position is in \d+"):
        BlockStream(data_config(corpus / "a.parquet"), seq_len=8, seed=0).load_state_dict(state)


def test_weights_are_honoured(mixed: DataConfig) -> None:
    sources = BlockStream(mixed, seq_len=1, seed=0).take(20_000, stop=20_000).sources
    shares = np.bincount(sources) / len(sources)
    assert shares == pytest.approx([0.4, 0.2, 0.1, 0.3], abs=0.02)
    assert not np.array_equal(sources[:100], BlockStream(mixed, seq_len=1, seed=1).take(100).sources)


def test_equal_sources_have_orders_of_their_own(corpus: Path, data_config: Callable) -> None:
    batch = BlockStream(data_config(corpus / "a.parquet", corpus / "a.parquet", shuffle=True), seq_len=SEQ_LEN, seed=0).take(100)
    first, second = (batch.blocks[batch.sources == index] for index in (0, 1))
    assert not np.array_equal(first[:10], second[:10])


def test_tags_are_those_of_the_record_with_most_tokens(
    small_limits: None, corpus: Path, texts: list[str], languages: list[str], data_config: Callable
) -> None:
    config = data_config(SourceConfig(path=str(corpus / "a.parquet"), tag_columns=["language", "id"]))
    lengths = [len(text.encode()) + 1 for text in texts]
    owner = np.repeat(np.arange(300), lengths)
    stream, batch = BlockStream(config, seq_len=SEQ_LEN, seed=0), []
    for _ in range(len(owner) // SEQ_LEN // 10):
        batch += stream.take(10).tags
    for block, tag in enumerate(batch):
        main = int(np.bincount(owner[block * SEQ_LEN : block * SEQ_LEN + SEQ_LEN + 1]).argmax())
        assert tag == {"language": languages[main], "id": str(main)}


def test_one_pass_drops_only_the_unfinished_block_and_then_is_over(small_limits: None, corpus: Path, data_config: Callable) -> None:
    config = data_config(corpus / "a.parquet", corpus / "a.jsonl", eval_fraction=0.3)
    whole = BlockStream(config, seq_len=SEQ_LEN, seed=0, split="heldout").take(10_000)
    stream = BlockStream(config, seq_len=SEQ_LEN, seed=0, split="heldout")
    parts = [stream.take(count) for count in (1, 7, 30, 10_000, 5)]
    assert [len(part.blocks) for part in parts[:3]] == [1, 7, 30] and len(parts[4].blocks) == 0
    assert np.array_equal(np.concatenate([part.blocks for part in parts]), whole.blocks)
    assert np.array_equal(np.concatenate([part.sources for part in parts]), whole.sources)
    for index in (0, 1):
        alone = data_config(config.sources[index], eval_fraction=0.3)
        assert np.array_equal(
            BlockStream(alone, seq_len=SEQ_LEN, seed=0, split="heldout").take(10_000).blocks, whole.blocks[whole.sources == index]
        )


def test_heldout_blocks_are_the_first_of_one_pass(mixed: DataConfig) -> None:
    batch = heldout_blocks(mixed, seq_len=SEQ_LEN, seed=3, num_blocks=20)
    assert same(batch, BlockStream(mixed, seq_len=SEQ_LEN, seed=3, split="heldout").take(20))
    assert len(batch.blocks) == len(batch.tags) == len(batch.sources) == 20
    assert len(heldout_blocks(mixed, seq_len=SEQ_LEN, seed=3, num_blocks=10**5).blocks) < 400


def test_no_held_out_text_is_told_and_no_share_gives_no_block(corpus: Path, data_config: Callable) -> None:
    with pytest.raises(
        DataError, match=r"^data.eval_fraction is 0.1: the records held out do not fill one sequence of 100000 tokens[^\n]*$"
    ):
        heldout_blocks(data_config(corpus / "a.parquet", eval_fraction=0.1), seq_len=100_000, seed=0, num_blocks=4)
    assert heldout_blocks(data_config(corpus / "a.parquet"), seq_len=8, seed=0, num_blocks=4).blocks.shape == (0, 9)


def test_no_text_left_to_train_on_is_told(tmp_path: Path, data_config: Callable) -> None:
    pq.write_table(pa.table({"text": ["only one"] * 5}), tmp_path / "t.parquet")
    stream = BlockStream(data_config(tmp_path / "t.parquet", eval_fraction=0.999999), seq_len=4, seed=0)
    with pytest.raises(
        DataError, match=r"^data.sources\[0\]: .*t.parquet: no text to train on; data.eval_fraction=0.999999 holds every record out$"
    ):
        stream.take(1)


def test_rows_out_of_range_are_refused(mixed: DataConfig) -> None:
    with pytest.raises(ValueError, match="rows 3:9 of 8 blocks"):
        BlockStream(mixed, seq_len=8, seed=0).take(8, start=3, stop=9)


def test_shared_data_streams_in_both_splits(shared_data: Path, data_config: Callable) -> None:
    names = {"languages": "language", "domains": "domain", "clinc150": "label"}
    sources = [SourceConfig(path=str(shared_data / f"{name}.parquet"), tag_columns=[tag]) for name, tag in names.items()]
    config = data_config(*sources, shuffle=True, eval_fraction=0.05)
    batch = BlockStream(config, seq_len=256, seed=0).take(600)
    assert [set(tag) for tag in batch.tags] == [{list(names.values())[source]} for source in batch.sources]
    held_out = heldout_blocks(config, seq_len=256, seed=0, num_blocks=64)
    assert len(held_out.blocks) == 64 and len({json.dumps(tag) for tag in held_out.tags}) > 10
