"""Tokenizers give back the text, never make an end of document out of text, and tell bad files."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from nlray.config import DataConfig
from nlray.errors import DataError, NlrayError, UserError
from nlray.pipelines.tokenizer_processes import open_tokenizer
from nlray.pipelines.tokenizers import ByteTokenizer, HFTokenizer, load_tokenizer


def train_tokenizer(texts: list[str], special: list[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def hf_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(texts, ["<|endoftext|>"]).save(str(path))
    return path


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=8))
def test_bytes_round_trip_and_records_equal_single_encodings(records: list[str]) -> None:
    tokenizer = ByteTokenizer()
    tokens, lengths = tokenizer.encode_records(pa.array(records, pa.string()))
    assert tokens.dtype == np.uint16 and lengths.dtype == np.int64
    assert tokens.tolist() == [b for record in records for b in record.encode()]
    assert lengths.tolist() == [len(record.encode()) for record in records]
    assert tokenizer.decode(tokens) == "".join(records)
    assert all(tokenizer.decode(tokenizer.encode(record)) == record for record in records)


def test_bytes_encode_slices_and_decode_broken_utf8() -> None:
    tokenizer = ByteTokenizer()
    tokens, lengths = tokenizer.encode_records(pa.array(["ab", "c", "def"]).slice(1))
    assert tokens.tolist() == list(b"cdef") and lengths.tolist() == [1, 3]
    assert tokenizer.decode([0xC3, 65, 256, 66]) == "\ufffdAB"
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (257, 256)


def test_hf_round_trip_and_records_equal_single_encodings(hf_file: Path, texts: list[str]) -> None:
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(hf_file)))
    tokens, lengths = tokenizer.encode_records(pa.array(texts, pa.large_string()))
    assert tokens.dtype == np.uint16 and tokens.max() < tokenizer.vocab_size
    singles = [tokenizer.encode(text) for text in texts]
    assert np.array_equal(tokens, np.concatenate(singles))
    assert lengths.tolist() == [len(single) for single in singles]
    assert len(tokens) < sum(len(text.encode()) for text in texts)
    assert tokenizer.decode(tokens) == "".join(texts)
    assert tokenizer.decode([tokenizer.end_of_document]) == ""


def test_hf_end_of_document_never_comes_from_text(hf_file: Path) -> None:
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(hf_file)))
    tokens, _ = tokenizer.encode_records(pa.array(["a<|endoftext|>b"]))
    assert tokenizer.end_of_document not in tokens
    assert tokenizer.decode(tokens) == "a<|endoftext|>b"


def test_hf_reads_invalid_utf8_and_ignores_truncation(hf_file: Path) -> None:
    inner = tokenizers.Tokenizer.from_file(str(hf_file))
    inner.enable_truncation(2)
    inner.enable_padding(length=50)
    tokenizer = HFTokenizer(inner, name="x", end_token="<|endoftext|>")
    tokens, lengths = tokenizer.encode_records(pa.array([b"ok \xff then more"], pa.binary()))
    assert tokenizer.decode(tokens) == "ok \ufffd then more"
    assert 2 < lengths[0] < 50


@pytest.mark.parametrize("name", ["</s>", "[SEP]", "<eos>"])
def test_hf_end_of_document_is_the_first_known_name(tmp_path: Path, texts: list[str], name: str) -> None:
    inner = train_tokenizer(texts[:20], ["[UNK]", name])
    inner.save(str(tmp_path / "any.json"))
    assert load_tokenizer(DataConfig(tokenizer=str(tmp_path / "any.json"))).end_of_document == inner.token_to_id(name)


def test_mistakes_are_told_in_one_line(tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "bad.json").write_text('{"model": 1}')
    train_tokenizer(texts[:5], ["<pad>"]).save(str(tmp_path / "no_end.json"))
    for name, told in (
        ("missing.json", "no such file"),
        ("bad.json", "not a tokenizers JSON"),
        ("no_end.json", "no known end-of-document"),
        ("", ""),
    ):
        with pytest.raises(DataError, match=rf"^data.(tokenizer|end_token).*{name}.*{told}") as caught:
            load_tokenizer(DataConfig(tokenizer=str(tmp_path / name)))
        assert "\n" not in str(caught.value)


def test_processes_give_the_same_tokens_and_end_when_closed(hf_file: Path, texts: list[str]) -> None:
    hf = load_tokenizer(DataConfig(tokenizer=str(hf_file)))
    processes = open_tokenizer(DataConfig(tokenizer=str(hf_file), tokenizer_processes=2))
    try:
        # Also fewer records than processes, a slice, nothing, and a record larger than a pipe holds.
        for records in (texts, texts[:1], texts[2:5], [], ["", "x" * 200_000, ""]):
            text = pa.array(["before", *records], pa.large_string()).slice(1)
            for found, expected in zip(processes.encode_records(text), hf.encode_records(text), strict=True):
                assert found.dtype == expected.dtype and np.array_equal(found, expected)
        assert processes.decode(processes.encode(texts[0])) == texts[0]
        started = list(processes._processes)
    finally:
        processes.close()
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_process_that_has_ended_is_an_error_and_a_closed_one_starts_anew(hf_file: Path) -> None:
    processes = open_tokenizer(DataConfig(tokenizer=str(hf_file), tokenizer_processes=1))
    text = pa.array(["a", "b"])
    expected = processes.encode_records(text)
    processes._processes[0].kill()
    processes._processes[0].wait()
    with pytest.raises(NlrayError, match=r"tokenizer process has ended: exit statuses \[-9\]"):
        processes.encode_records(text)
    processes.close()
    assert np.array_equal(processes.encode_records(text)[0], expected[0])
    processes.close()


def test_processes_end_with_their_worker(hf_file: Path) -> None:
    program = (
        "import sys, pyarrow as pa\n"
        "from nlray.config import DataConfig\n"
        "from nlray.pipelines.tokenizer_processes import open_tokenizer\n"
        "tokenizer = open_tokenizer(DataConfig(tokenizer=sys.argv[1], tokenizer_processes=1))\n"
        "tokenizer.encode_records(pa.array(['a']))\n"
        "print(tokenizer._processes[0].pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", program, str(hf_file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with worker:
        pid = int(worker.stdout.readline())
        worker.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "the tokenizer's process goes on without its worker"
        time.sleep(0.05)


def test_bytes_have_no_processes() -> None:
    with pytest.raises(UserError, match=r"tokenizer_processes is 2; allowed with data.tokenizer=bytes: 0"):
        DataConfig(tokenizer_processes=2)
