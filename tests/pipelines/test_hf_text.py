"""Hugging Face tokenizers and the text of the stream: it decodes to the files, and no text is made into the token that ends a document."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from nlray.config import DataConfig, SourceConfig
from nlray.config.loading import load_config
from nlray.errors import DataError, UserError
from nlray.pipelines.continuations import PARTS, part_tokenizers
from nlray.pipelines.order import is_held_out
from nlray.pipelines.sources import open_source
from nlray.pipelines.stream import BlockStream
from nlray.pipelines.tokenizer_processes import open_tokenizer
from nlray.pipelines.tokenizers import HFTokenizer, load_tokenizer, with_vocabulary

WORDS = ["memory", "Gedächtnis", "記憶", "lernt", "naïve", "🙂", "x", "  ", "</s>", "<unk>", "<0x0A>"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SENTENCEPIECE_DECODER = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def changed(tokenizer: Tokenizer, change: Callable[[dict], None]) -> Tokenizer:
    plain = json.loads(tokenizer.to_str())
    change(plain)
    return Tokenizer.from_str(json.dumps(plain))


def sentencepiece_bpe(texts: list[str], *, before: normalizers.Normalizer) -> Tokenizer:
    """A BPE with bytes for unknown characters, as Llama 2: the normalizer puts a space before a text, the decoder takes it off."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([before, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([*SENTENCEPIECE_DECODER, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=SPECIAL + BYTES, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return changed(tokenizer, lambda plain: plain.update(added_tokens=plain["added_tokens"][: len(SPECIAL)]))


def unigram(texts: list[str], scheme: str, *, added: bool = True) -> Tokenizer:
    """A Unigram with Metaspace and bytes; its vocabulary has </s>, which need not be an added token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace(prepend_scheme=scheme)])
    options = {"vocab_size": 200, "special_tokens": SPECIAL, "unk_token": "<unk>", "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.UnigramTrainer(**options))

    def change(plain: dict) -> None:
        plain["model"]["vocab"] += [[name, -8.0] for name in BYTES]
        plain["model"]["byte_fallback"] = True
        plain["added_tokens"] = plain["added_tokens"] if added else []
        # One decoder joins the bytes before the other looks for spaces.
        plain["decoder"] = {"type": "Sequence", "decoders": [json.loads(d.__getstate__()) for d in SENTENCEPIECE_DECODER]}
        if scheme != "never":
            plain["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})

    return changed(tokenizer, change)


def byte_level(texts: list[str], *, add_prefix_space: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


BUILDERS: dict[str, Callable[[list[str]], Tokenizer]] = {
    "prepend": lambda texts: sentencepiece_bpe(texts, before=normalizers.Prepend("▁")),
    "regex": lambda texts: sentencepiece_bpe(texts, before=normalizers.Replace(Regex(r"\A"), "▁")),
    "first": lambda texts: unigram(texts, "first"),
    "always": lambda texts: unigram(texts, "always"),
    "not added": lambda texts: unigram(texts, "always", added=False),
    "never": lambda texts: unigram(texts, "never"),
    "prefix space": lambda texts: byte_level(texts, add_prefix_space=True),
    "plain": lambda texts: byte_level(texts, add_prefix_space=False),
    "not special": lambda texts: changed(
        byte_level(texts, add_prefix_space=False), lambda plain: plain["added_tokens"][0].update(special=False)
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> dict[str, Path]:
    """Tokenizer files by name, and `text`: a file with lines that end in CRLF, and with lines longer than a piece and than a window."""
    folder = tmp_path_factory.mktemp("hf")
    rng = np.random.default_rng(3)
    lines = [" ".join(rng.choice(WORDS, rng.integers(1, 12))) + "\r\n" for _ in range(200)]
    lines += ["".join(rng.choice(WORDS, 400)) + "\r\n" for _ in range(3)] + ["  indented\n", "\n", " last"]
    (folder / "text.txt").write_bytes("".join(lines).encode())
    for name, build in BUILDERS.items():
        build([*texts, *lines]).save(str(folder / f"{name}.json"))
    return {path.stem: path for path in folder.iterdir()}


def documents(stream: BlockStream, text: bytes) -> list[str]:
    """Return the texts between the ends of documents, until they are all of `text`."""
    tokens, found = [], []
    while sum(len(document.encode()) for document in found) < len(text):
        tokens += stream.take(1).blocks[0, :-1].tolist()
        *whole, _ = np.split(np.array(tokens), np.flatnonzero(np.array(tokens) == stream.tokenizer.end_of_document) + 1)
        found = [stream.tokenizer.decode(part) for part in whole]
        assert len(tokens) < 10 * len(text)
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_the_stream_of_a_file_decodes_to_the_file(small_limits: None, files: dict[str, Path], data_config: Callable, name: str) -> None:
    text = files["text"].read_bytes()
    stream = BlockStream(data_config(files["text"], tokenizer=str(files[name])), seq_len=500, seed=0)
    # A decoder that does not take the space off again gives it once a document.
    assert documents(stream, text)[0].removeprefix(" " if name == "prefix space" else "") == text.decode()


@pytest.mark.parametrize("name", ["prepend", "always", "prefix space"])
def test_documents_between_held_out_pieces_decode_to_what_was_kept(
    small_limits: None, files: dict[str, Path], data_config: Callable, name: str
) -> None:
    source = open_source(SourceConfig(path=str(files["text"])))
    pieces = [piece for unit in range(source.num_units) for piece in source.read(unit).text.to_pylist()]
    held_out = is_held_out(pa.array(pieces, pa.large_binary()), 0.3)
    expected, is_open = [], False
    for piece, is_out in zip(pieces, held_out, strict=True):
        if not is_out:
            expected = [*expected[:-1], expected[-1] + piece] if is_open else [*expected, piece]
        is_open = not is_out
    assert len(expected) > 5 and source.num_units > 3
    config = data_config(files["text"], tokenizer=str(files[name]), eval_fraction=0.3)
    found = documents(BlockStream(config, seq_len=100, seed=0), b"".join(expected))
    assert [text.removeprefix(" " if name == "prefix space" else "") for text in found][: len(expected)] == [e.decode() for e in expected]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_of_pieces_goes_on_from_any_block(
    small_limits: None, files: dict[str, Path], data_config: Callable, shuffle: bool
) -> None:
    config = data_config(files["text"], tokenizer=str(files["prepend"]), eval_fraction=0.3, shuffle=shuffle)
    config = replace(config, begin_token="<s>")
    stream = BlockStream(config, seq_len=64, seed=0)
    count = 250
    blocks, states = [], []
    for _ in range(count):
        states.append(stream.state_dict())
        blocks.append(stream.take(1).blocks)
    assert states[-1]["sources"][0]["epoch"] > 0
    for start in range(0, count, 3):
        other = BlockStream(config, seq_len=64, seed=0)
        other.load_state_dict(states[start])
        assert np.array_equal(other.take(5).blocks[: count - start], np.concatenate(blocks[start : start + 5])), start


def test_the_processes_tokenize_parts_as_the_tokenizer_does(files: dict[str, Path]) -> None:
    config = DataConfig(tokenizer=str(files["prepend"]), tokenizer_processes=2, end_token="</s>", begin_token="<s>")
    hf, processes = load_tokenizer(config), open_tokenizer(config)
    text = pa.array(["one", " two</s>", "three\n", "", "four <s>"] * 5)
    marks = np.arange(25) % 3 == 0, np.arange(25) % 4 == 0
    try:
        for found, expected in zip(processes.encode_records(text, *marks), hf.encode_records(text, *marks), strict=True):
            assert np.array_equal(found, expected)
        assert (processes.begin_of_document, processes.end_of_document) == (hf.begin_of_document, hf.end_of_document)
    finally:
        processes.close()


def test_tokenizers_that_need_no_other_for_parts_keep_their_tokens(files: dict[str, Path]) -> None:
    for name in ("plain", "never", "not special"):
        tokenizer = Tokenizer.from_file(str(files[name]))
        assert all(part is tokenizer for part in part_tokenizers(tokenizer, name=name).values())


def test_words_split_at_spaces_keep_their_mark_at_the_start_of_a_part(texts: list[str]) -> None:
    """Where spaces are dropped before words are marked, as T5 does, a part that begins with a word needs the mark."""
    tokenizer = unigram(texts, "always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), tokenizer.pre_tokenizer])
    parts = part_tokenizers(tokenizer, name="x")
    whole = parts[True, True].encode("one two\nthree", add_special_tokens=False).ids
    assert [i for part, text in ((PARTS[1], "one two\n"), (PARTS[2], "three")) for i in parts[part].encode(text).ids] == whole


def test_ends_are_stripped_at_the_ends_of_a_text_only(texts: list[str]) -> None:
    tokenizer = byte_level(texts, add_prefix_space=False)
    tokenizer.normalizer = normalizers.Strip(left=True, right=True)
    hf = HFTokenizer(tokenizer, name="x", end_token="</s>")
    pieces = ["  one\n", "  two\n", "\n", " three  \n"]
    tokens, _ = hf.encode_records(pa.array(pieces), np.array([True, False, False, False]), np.array([False, False, False, True]))
    assert hf.decode(tokens) == "".join(pieces).strip()


def test_a_tokenizer_whose_pieces_change_the_text_is_told(texts: list[str], caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level(texts, add_prefix_space=False)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+$"), "")])
    for _ in range(2):
        part_tokenizers(tokenizer, name="odd.json")
    assert caplog.text.count("odd.json: where a text file is cut into pieces") == 1


@pytest.mark.parametrize("name", BUILDERS)
def test_no_text_is_made_into_an_end_or_a_begin_and_each_decodes_to_itself(files: dict[str, Path], name: str) -> None:
    begin = "<s>" if Tokenizer.from_file(str(files[name])).token_to_id("<s>") is not None else None
    hf = load_tokenizer(DataConfig(tokenizer=str(files[name]), end_token="</s>", begin_token=begin))
    never = {hf.end_of_document, hf.begin_of_document}

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from([*WORDS, "<s>", "</", "s>", " ", "\n", "</s></s>", "a"]), min_size=1, max_size=12).map("".join))
    def check(text: str) -> None:
        # Metaspace puts no second space before a text that begins with one, and the decoder takes it off.
        text = f"a{text}"
        tokens, _ = hf.encode_records(pa.array([text]))
        assert not never & set(tokens.tolist())
        assert tokens.tolist() == hf.encode(text).tolist()
        assert hf.decode(tokens).removeprefix(" ") == text

    check()


def test_an_added_end_token_that_takes_the_spaces_around_it_is_not_made_of_text(texts: list[str]) -> None:
    tokenizer = byte_level(texts, add_prefix_space=False)
    plain = changed(tokenizer, lambda plain: plain["added_tokens"][0].update(special=False, lstrip=True, rstrip=True))
    hf = HFTokenizer(plain, name="x", end_token="</s>")
    text = "a" + 9 * " " + "</s>" + 30 * " " + "b</s>"
    assert hf.end_of_document not in hf.encode(text) and hf.decode(hf.encode(text)) == text


@pytest.mark.parametrize("split", [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Whitespace()])
def test_words_of_a_list_are_not_made_into_an_end(split: pre_tokenizers.PreTokenizer) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = split
    hf = HFTokenizer(tokenizer, name="x", end_token="[SEP]")
    assert hf.end_of_document not in hf.encode("a [SEP] [UNK] b")


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("[UNK]", r"data.end_token is '\[UNK\]', into which x makes '.*'; allowed: a token that no character"),
        ("a", r"data.end_token is 'a', into which x makes 'a'"),
        ("nothing", r"data.end_token is 'nothing'; allowed: a token of x"),
    ],
)
def test_an_end_token_that_is_text_is_refused(end: str, words: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    with pytest.raises(DataError, match=words):
        HFTokenizer(tokenizer, name="x", end_token=end)
    with pytest.raises(DataError, match=words.replace("end_token", "begin_token")):
        HFTokenizer(tokenizer, name="x", end_token="[SEP]", begin_token=end)


def test_a_text_that_a_tokenizer_cannot_take_is_one_line(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="[UNK]")).save(str(tmp_path / "words.json"))
    hf = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "words.json")))
    assert hf.encode("a").tolist() == [1]
    with pytest.raises(DataError, match=r"^data.tokenizer: .*words.json: cannot tokenize a text: .*UNK"):
        hf.encode("b")


def test_halves_of_surrogate_pairs_in_a_prompt_are_replaced(files: dict[str, Path]) -> None:
    hf = load_tokenizer(DataConfig(tokenizer=str(files["plain"])))
    assert hf.decode(hf.encode("a\ud83d")).rstrip("\N{REPLACEMENT CHARACTER}") == "a"


SAVED = {
    "config.json": [{"eos_token_id": 1}, {"eos_token_id": [1, 2]}, {"eos_token_id": [99, 1]}],
    "generation_config.json": [{"eos_token_id": [1]}],
    "tokenizer_config.json": [{"eos_token": "<stop>"}, {"eos_token": {"content": "<stop>", "lstrip": False}}],
}


def tokenizer_with(folder: Path, texts: list[str], *names: str) -> Path:
    """Save a tokenizer with added tokens at ids 0, 1, ... as folder/tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 300, "special_tokens": list(names), "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts[:10], trainers.BpeTrainer(**options))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(("file", "content"), [(file, content) for file, contents in SAVED.items() for content in contents])
def test_the_end_token_is_what_the_files_beside_the_tokenizer_name(tmp_path: Path, texts: list[str], file: str, content: dict) -> None:
    path = tokenizer_with(tmp_path, texts, "</s>", "<stop>", "<other>")
    (tmp_path / file).write_text(json.dumps(content))
    assert load_tokenizer(DataConfig(tokenizer=str(path))).end_token == "<stop>"
    assert load_tokenizer(DataConfig(tokenizer=str(path), end_token="<other>")).end_token == "<other>"
    # Only a file of the usual name belongs to what lies beside it.
    path = path.rename(tmp_path / "mine.json")
    assert load_tokenizer(DataConfig(tokenizer=str(path))).end_token == "</s>"


def test_an_id_that_is_an_ordinary_token_is_passed_over(tmp_path: Path, texts: list[str]) -> None:
    path = tokenizer_with(tmp_path, texts, "</s>", "<stop>")
    (tmp_path / "config.json").write_text('{"eos_token_id": 40}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 50256}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>"}')
    assert load_tokenizer(DataConfig(tokenizer=str(path))).end_token == "<stop>"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1]", "is a JSON list"),
        ("{", "not valid JSON"),
        ('{"a":' * 1100 + "1" + "}" * 1100, "nested too deep"),
        ('{"eos_token_id": 1.5, "eos_token": 7}', r"eos_token(_id)? is (1.5|7)"),
        ('{"eos_token_id": [true], "eos_token": ["</s>"]}', r"eos_token(_id)? is \["),
        ('{"eos_token_id": {}, "eos_token": {"content": 1}}', r"eos_token(_id is \{\}|.content is 1)"),
        ('{"eos_token_id": 1, "eos_token_id": 2}', "the key 'eos_token_id' is there twice"),
    ],
)
def test_damaged_files_beside_the_tokenizer_are_one_line(tmp_path: Path, texts: list[str], file: str, content: str, words: str) -> None:
    path = tokenizer_with(tmp_path, texts, "</s>")
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        load_tokenizer(DataConfig(tokenizer=str(path)))
    assert str(tmp_path / file) in str(caught.value) and "\n" not in str(caught.value)
    # A token that is named needs none of them.
    assert load_tokenizer(DataConfig(tokenizer=str(path), end_token="</s>")).end_token == "</s>"


PANIC = '{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}'


@pytest.mark.parametrize(
    "content", ['{"a":' * 1100 + "1" + "}" * 1100, "[" * 1100, "[]", "\xff", PANIC], ids=["deep", "deep list", "list", "not UTF-8", "panic"]
)
def test_damaged_tokenizers_are_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"tokenizer.json: not a tokenizers JSON file") as caught:
        load_tokenizer(DataConfig(tokenizer=str(tmp_path / "tokenizer.json")))
    assert "\n" not in str(caught.value)


def test_the_begin_token_comes_before_each_document_of_the_stream(tmp_path: Path, data_config: Callable, files: dict[str, Path]) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one <s>", "two", "three")))
    config = replace(data_config(tmp_path / "a.jsonl", tokenizer=str(files["prepend"])), begin_token="<s>")
    stream = BlockStream(config, seq_len=4, seed=0)
    tokenizer = stream.tokenizer
    tokens = np.concatenate([stream.take(1).blocks[0, :-1] for _ in range(30)]).tolist()
    first = tokens[: tokens.index(tokenizer.end_of_document) + 1]
    assert first[0] == tokenizer.begin_of_document and tokens[len(first)] == tokenizer.begin_of_document
    assert tokenizer.decode(first) == "one <s>" and first.count(tokenizer.begin_of_document) == 1


def test_what_the_tokenizer_puts_before_a_text_is_known(files: dict[str, Path]) -> None:
    inner = Tokenizer.from_file(str(files["prepend"]))
    assert HFTokenizer(inner, name="x", end_token="</s>").usual_begin is None
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))])
    assert HFTokenizer(inner, name="x", end_token="</s>").usual_begin == "<s>"


@pytest.mark.parametrize("key", ["end_token", "begin_token"])
def test_tokens_are_checked_by_the_configuration(key: str) -> None:
    with pytest.raises(UserError, match=rf"{key} is </s>; allowed with data.tokenizer=bytes: null"):
        DataConfig(**{key: "</s>"})
    with pytest.raises(UserError, match=rf"{key} is ''; allowed: a string that is not empty, or null"):
        DataConfig(**{"tokenizer": "x.json", key: ""})


def test_what_the_tokenizer_decides_is_written_out(files: dict[str, Path]) -> None:
    config = with_vocabulary(load_config("tiny", [f"data.tokenizer={files['prepend']}"]))
    assert config.data.end_token == "</s>" and config.model.vocab_size == load_tokenizer(config.data).vocab_size
    assert with_vocabulary(load_config("tiny")).data.end_token is None


def test_a_compressed_file_decodes_to_its_text_and_goes_on(
    small_limits: None, tmp_path: Path, files: dict[str, Path], data_config: Callable
) -> None:
    text = files["text"].read_bytes()
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(text))
    config = data_config(tmp_path / "text.txt.gz", tokenizer=str(files["always"]))
    stream = BlockStream(config, seq_len=64, seed=0)
    blocks, states = [], []
    for _ in range(100):
        states.append(stream.state_dict())
        blocks.append(stream.take(1).blocks)
    for start in range(0, 100, 7):
        other = BlockStream(config, seq_len=64, seed=0)
        other.load_state_dict(states[start])
        assert np.array_equal(other.take(1).blocks, blocks[start]), start
    assert documents(BlockStream(config, seq_len=500, seed=0), text)[0] == text.decode()
