"""Tokenizers: `bytes` (no file needed) or a Hugging Face tokenizers JSON file. `load_tokenizer(name)` gives either."""

from collections.abc import Sequence
from itertools import chain
from typing import Protocol

import numpy as np
import pyarrow as pa
import tokenizers

from nlray.config import Config
from nlray.errors import DataError, UserError
from nlray.pipelines.files import one_line
from nlray.pipelines.order import offsets
from nlray.storage import locate

END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]", "[EOS]")
"""Names of the end-of-document token, in the order they are looked for."""


class Tokenizer(Protocol):
    """What the stream and generation need of a tokenizer."""

    vocab_size: int
    """Token ids are 0 .. vocab_size - 1."""
    end_of_document: int
    """The id that ends each document in the stream; never produced from text."""
    dtype: np.dtype
    """Of the tokens: uint16 where the vocabulary fits, else int32."""
    slices: int
    """How many MiB of records `encode_records` is best asked for at a time."""

    def encode_records(self, text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Encode records without end-of-document tokens.

        Args:
            text: (large) string or (large) binary array without nulls, [records].

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
        """Return the text of tokens; end-of-document tokens give nothing, broken UTF-8 gives U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes are tokens 0 .. 255; 256 ends a document."""

    vocab_size = 257
    end_of_document = 256
    dtype = np.dtype(np.uint16)
    slices = 1

    def encode_records(self, text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
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
    """A tokenizer of the `tokenizers` library. Names of special tokens inside the text are text, not special tokens."""

    slices = 1

    def __init__(self, tokenizer: tokenizers.Tokenizer, *, name: str) -> None:
        """Raise DataError where the vocabulary has no end-of-document token; `name` is for that message."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        end = next((token for token in END_TOKENS if token in vocabulary), None)
        if end is None:
            raise DataError(f"data.tokenizer: {name}: has no end-of-document token; one of these is needed: {' '.join(END_TOKENS)}")
        self._tokenizer, self.name = tokenizer, name
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_of_document = vocabulary[end]
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.int32)

    @property
    def json(self) -> str:
        """The tokenizer's file."""
        return self._tokenizer.to_str()

    def encode_records(self, text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        records = [record.decode("utf-8", "replace") for record in text.cast(pa.large_binary()).to_pylist()]
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(records, add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), self.dtype, int(lengths.sum())), lengths

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, self.dtype)

    def close(self) -> None:
        pass

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        values = np.asarray(ids, np.int64)
        return self._tokenizer.decode(values[values != self.end_of_document].tolist(), skip_special_tokens=True)


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer `bytes`, or the one in a tokenizers JSON file (path or fsspec URL).

    Raises:
        DataError: no such file, not a tokenizers JSON file, or no end-of-document token in it.
    """
    if name == "bytes":
        return ByteTokenizer()
    allowed = "allowed: bytes, or a Hugging Face tokenizers JSON file"
    try:
        fs, path = locate(name)
        content = fs.cat_file(path)
    except (OSError, ValueError, ImportError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {one_line(error)}"
        raise DataError(f"data.tokenizer: {name}: {reason}; {allowed}") from error
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"data.tokenizer: {name}: not a tokenizers JSON file: {one_line(error)}; {allowed}") from error
    return HFTokenizer(tokenizer, name=name)


def checked_vocab_size(config: Config) -> int:
    """Return the rows of the embedding; raise UserError where the tokenizer has more tokens than the model."""
    tokens = load_tokenizer(config.data.tokenizer).vocab_size
    rows = config.model.vocab_size
    if rows is not None and rows < tokens:
        raise UserError(
            f"model.vocab_size is {rows}; allowed: {tokens} (the tokens of data.tokenizer={config.data.tokenizer}) or more, or null"
        )
    return rows if rows is not None else tokens
