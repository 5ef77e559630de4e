"""Tokenizers: `bytes` (no file needed) or a Hugging Face tokenizers JSON file. `load_tokenizer(config.data)` gives either."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Protocol

import numpy as np
import pyarrow as pa
import tokenizers

from nlray.config import Config, DataConfig
from nlray.errors import DataError, UserError
from nlray.pipelines.continuations import PARTS, part_tokenizers
from nlray.pipelines.files import one_line
from nlray.pipelines.order import offsets
from nlray.pipelines.special_tokens import find_end_token
from nlray.storage import locate


class Tokenizer(Protocol):
    """What the stream and generation need of a tokenizer."""

    vocab_size: int
    """Token ids are 0 .. vocab_size - 1."""
    end_of_document: int
    """The id that ends each document in the stream; never produced from text."""
    begin_of_document: int | None
    """The id that begins each document and each prompt, never produced from text; None: there is none."""
    dtype: np.dtype
    """Of the tokens: uint16 where the vocabulary fits, else int32."""
    slices: int
    """How many MiB of records `encode_records` is best asked for at a time."""

    def encode_records(
        self, text: pa.Array, is_start: np.ndarray | None = None, is_end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode records without the tokens that begin and end documents.

        Args:
            text: (large) string or (large) binary array without nulls, [records].
            is_start: bool [records]: whether a record is the start of its document; None: all are.
            is_end: bool [records]: whether a record is the end of its document; None: all are.

        Returns:
            tokens, uint16 or int32 [all tokens], and lengths, int64 [records], in tokens.
        """
        ...

    def encode(self, text: str) -> np.ndarray:
        """Return the tokens of one text, without an end-of-document token."""
        ...

    def close(self) -> None:
        """End what the tokenizer has started."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens; those that begin and end documents give nothing, broken UTF-8 gives U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are tokens 0 .. 255; 256 ends a document."""

    vocab_size = 257
    end_of_document = 256
    begin_of_document = None
    dtype = np.dtype(np.uint16)
    slices = 1

    def encode_records(
        self, text: pa.Array, is_start: np.ndarray | None = None, is_end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        text = text.cast(pa.large_binary())
        ends = offsets(text)
        data = np.frombuffer(text.buffers()[2] or b"", np.uint8)[ends[0] : ends[-1]]
        return data.astype(np.uint16), np.diff(ends)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint16)

    def close(self) -> None:
        pass

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        values = np.asarray(ids, np.int64)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode("utf-8", "replace")


class HFTokenizer:
    """A tokenizer of the `tokenizers` library that never turns text into a special token.

    Text may contain the name of a special token, of the end or begin token, or of a single byte (`<0x0A>`). The library would encode
    such a name as that token. Here the text is cut in the middle of the name, and both sides are encoded separately.
    """

    slices = 1

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, name: str, end_token: str, begin_token: str | None = None) -> None:
        """Prepare the tokenizer; `name` is for messages.

        Raises:
            DataError: the vocabulary lacks the end or the begin token, or text of one character is encoded as one of them.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.usual_begin = _usual_begin(tokenizer)
        """The token that the tokenizer's own post-processor puts before a text; nlray does not add it. None: there is none."""
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        for key, token in (("end_token", end_token), ("begin_token", begin_token)):
            if token is not None and token not in vocabulary:
                raise DataError(f"data.{key} is {token!r}; allowed: a token of {name}")
        self._tokenizer, self.name, self.end_token, self.begin_token = tokenizer, name, end_token, begin_token
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = vocabulary[end_token]
        self.begin_of_document = None if begin_token is None else vocabulary[begin_token]
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)
        self._parts = part_tokenizers(tokenizer, name=name)
        self._look_for_names(vocabulary)

    def _look_for_names(self, vocabulary: dict[str, int]) -> None:
        """Collect the tokens that text must not be encoded as, and check the end and the begin token.

        `_never` has the ids of the special tokens, the end token and the begin token: no text is encoded as these. `_named` has the
        byte tokens and the unknown token: characters are encoded as these, but not the names of the tokens. A text that contains such
        a name contains one of `_hints`.

        Raises:
            DataError: a single character is encoded as the end or the begin token, so no cut can prevent it.
        """
        own = {"end_token": self.end_token, "begin_token": self.begin_token}
        self._own = {vocabulary[token]: key for key, token in own.items() if token is not None}
        byte_names = {name for byte in range(256) if (name := f"<0x{byte:02X}>") in vocabulary}
        unknown = _ids_or_none(self._tokenizer, _RARE)[-1:]
        # Bytes and the unknown token are made of text too; only their names are not.
        self._named = {vocabulary[n]: n for n in byte_names} | {i: self._tokenizer.id_to_token(i) for i in unknown}
        self._hints = [*(["<0x"] if byte_names else []), *(n for n in self._named.values() if n not in byte_names and len(n) > 1)]
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._never = (special - self._named.keys()) | self._own.keys()
        for token_id in self._own:
            for text in (_RARE, self._tokenizer.id_to_token(token_id), self._tokenizer.decode([token_id], skip_special_tokens=False)):
                try:
                    self._encode(text, PARTS[0])
                except DataError:
                    raise
                except Exception:  # the library raises bare Exception: nothing is made of this text
                    continue

    @property
    def json(self) -> str:
        """The tokenizer's file."""
        return self._tokenizer.to_str()

    def encode_records(
        self, text: pa.Array, is_start: np.ndarray | None = None, is_end: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        records = [record.decode("utf-8", "replace") for record in text.cast(pa.large_binary()).to_pylist()]
        yes = np.ones(len(records), bool)
        kinds = np.stack([yes if is_start is None else is_start, yes if is_end is None else is_end], axis=1)
        ids: list[list[int]] = [[]] * len(records)
        for part in PARTS:
            chosen = np.flatnonzero((kinds == part).all(axis=1)).tolist()
            for index, found in zip(chosen, self._encode_all([records[i] for i in chosen], part), strict=True):
                ids[index] = found
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), self.dtype, int(lengths.sum())), lengths

    def _encode_all(self, texts: list[str], part: tuple[bool, bool]) -> list[list[int]]:
        """Return the tokens of several texts. `part`: whether each is the start and whether it is the end of its document."""
        try:
            ids = [encoding.ids for encoding in self._parts[part].encode_batch_fast(texts, add_special_tokens=False)]
            for index, text in enumerate(texts):
                if not self._never.isdisjoint(ids[index]) or any(hint in text for hint in self._hints):
                    ids[index] = self._encode(text, part)
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"data.tokenizer: {self.name}: cannot tokenize a text: {one_line(error)}") from error
        return ids

    def _encode(self, text: str, part: tuple[bool, bool]) -> list[int]:
        """Return the tokens of a text in which the names of tokens are plain text.

        The text is cut in the middle of every name that the library encodes as the token of that name. The parts are then encoded in
        the same way, one by one.

        Args:
            text: a document or a part of one.
            part: whether the text is the start, and whether it is the end of its document.
        """
        encoding = self._parts[part].encode(text, add_special_tokens=False)
        spans = zip(encoding.ids, encoding.offsets, strict=True)
        cuts = sorted({(a + b) // 2 for token_id, (a, b) in spans if self._is_name(token_id, text[a:b])})
        if not cuts:
            return encoding.ids
        bounds = [0, *cuts, len(text)]
        parts = [(part[0] and a == 0, part[1] and b == len(text)) for a, b in pairwise(bounds)]
        return [i for (a, b), kind in zip(pairwise(bounds), parts, strict=True) for i in self._encode(text[a:b], kind)]

    def _is_name(self, token_id: int, text: str) -> bool:
        """Return whether `text`, which the library encodes as the token `token_id`, is the name of a token and has to be cut.

        Raises:
            DataError: the token is the end or the begin token, and the text is a single character, which cannot be cut.
        """
        if token_id in self._own and len(text) < 2:
            key, token = self._own[token_id], self._tokenizer.id_to_token(token_id)
            raise DataError(
                f"data.{key} is {token!r}, into which {self.name} makes {text!r}; allowed: a token that no character of a text is made into"
            )
        return len(text) > 1 and (token_id in self._never or self._named.get(token_id) == text)

    def encode(self, text: str) -> np.ndarray:
        # A prompt may hold halves of surrogate pairs.
        text = text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
        return np.asarray(self._encode_all([text], PARTS[0])[0], self.dtype)

    def close(self) -> None:
        pass

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        values = np.asarray(ids, np.int64)
        # Each document by itself: what is done to the start of a text is done to that of each.
        documents = np.split(values, np.flatnonzero(values == self.end_of_document))
        texts = [[i for i in document.tolist() if i not in self._own] for document in documents]
        return "".join(self._tokenizer.decode_batch(texts, skip_special_tokens=True))


_RARE = "\U0010fffe"
"""A character that no vocabulary has: it is made into bytes or the unknown token."""


def _ids_or_none(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Return a text's tokens; none where the tokenizer cannot make any of it."""
    try:
        return tokenizer.encode(text, add_special_tokens=False).ids
    except Exception:  # the library raises bare Exception, without an unknown token for example
        return []


def _usual_begin(tokenizer: tokenizers.Tokenizer) -> str | None:
    tokenizer.encode_special_tokens = False
    text = "a"
    plain = _ids_or_none(tokenizer, text)
    usual = tokenizer.encode(text, add_special_tokens=True).ids if plain else []
    return tokenizer.id_to_token(usual[0]) if len(usual) > len(plain) and usual[0] != plain[0] else None


def load_tokenizer(data: DataConfig) -> ByteTokenizer | HFTokenizer:
    """Return the tokenizer `bytes`, or the one in a tokenizers JSON file (path or fsspec URL).

    Raises:
        UserError: no such file, not a tokenizers JSON file, no such end or begin token in it, or a damaged file beside it.
    """
    name = data.tokenizer
    if name == "bytes":
        return ByteTokenizer()
    allowed = "allowed: bytes, or a Hugging Face tokenizers JSON file"
    try:
        fs, path = locate(name)
        content = fs.cat_file(path)
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {one_line(error)}"
        raise DataError(f"data.tokenizer: {name}: {reason}; {allowed}") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception; its panics are no Exception
        raise DataError(f"data.tokenizer: {name}: not a tokenizers JSON file: {one_line(error)}; {allowed}") from error
    return HFTokenizer(tokenizer, name=name, end_token=find_end_token(tokenizer, data), begin_token=data.begin_token)


def with_vocabulary(config: Config) -> Config:
    """Return the configuration with what the tokenizer decides written out: the rows of the embedding, and the token that ends a document.

    Raises:
        UserError: as `load_tokenizer`, or the tokenizer has more tokens than the model.
    """
    tokenizer = load_tokenizer(config.data)
    end_token = tokenizer.end_token if isinstance(tokenizer, HFTokenizer) else None
    rows = checked_vocab_size(config, tokenizer)
    return replace(config, model=replace(config.model, vocab_size=rows), data=replace(config.data, end_token=end_token))


def checked_vocab_size(config: Config, tokenizer: Tokenizer | None = None) -> int:
    """Return the rows of the embedding; raise UserError where the tokenizer, data.tokenizer, has more tokens than the model."""
    tokens = (tokenizer or load_tokenizer(config.data)).vocab_size
    rows = config.model.vocab_size
    if rows is not None and rows < tokens:
        raise UserError(
            f"model.vocab_size is {rows}; allowed: {tokens} (the tokens of data.tokenizer={config.data.tokenizer}) or more, or null"
        )
    return rows if rows is not None else tokens
