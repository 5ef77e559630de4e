"""The token that ends a document: what the configuration names, else what the files beside a `tokenizer.json` do, else a known name."""

import posixpath
from collections.abc import Iterator
from typing import Any

import tokenizers

from nlray.config import DataConfig
from nlray.errors import DataError
from nlray.json_files import JsonObject

END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[SEP]", "[EOS]")
"""Names of the end-of-document token, in the order they are looked for."""
BESIDE = "tokenizer.json"
"""Only a file of this name is taken to belong to the files beside it."""


def find_end_token(tokenizer: tokenizers.Tokenizer, data: DataConfig) -> str:
    """Return the name of the token that ends a document.

    Raises:
        UserError: there is none, or a file beside the tokenizer is damaged.
    """
    if data.end_token is not None:
        return data.end_token
    beside = named_beside(tokenizer, data.tokenizer)
    found = next((name for name in (*beside, *END_TOKENS) if tokenizer.token_to_id(name) is not None), None)
    if found is None:
        raise DataError(
            f"data.end_token is null, and {data.tokenizer} has no known end-of-document token ({' '.join(END_TOKENS)}); "
            "allowed: the name of one of its tokens"
        )
    return found


def named_beside(tokenizer: tokenizers.Tokenizer, path: str) -> Iterator[str]:
    """Yield the end tokens that the files beside a `tokenizer.json` name, the first file first.

    An id counts where it is that of an added token or has a known name: some files carry the default of their model's kind.

    Raises:
        UserError: one of the files is damaged.
    """
    folder, file = posixpath.split(path)
    if file != BESIDE:
        return
    added = tokenizer.get_added_tokens_decoder()
    for name in ("config.json", "generation_config.json"):
        for token_id in _ids(_read(posixpath.join(folder, name))):
            token = tokenizer.id_to_token(token_id)
            if token is not None and (token_id in added or token in END_TOKENS):
                yield token
    tokenizer_config = _read(posixpath.join(folder, "tokenizer_config.json"))
    token = tokenizer_config.values.get("eos_token")
    if isinstance(token, dict):
        token = tokenizer_config.get("eos_token", dict).get("content", str)
    if token is not None and not isinstance(token, str):
        raise tokenizer_config.error("eos_token", f"is {str(token)[:80]}", "a string, or an object with content")
    if token is not None:
        yield token


def _read(path: str) -> JsonObject:
    try:
        return JsonObject.read(path)
    except FileNotFoundError:
        return JsonObject({}, path)


def _ids(config: JsonObject) -> list[int]:
    value: Any = config.values.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < 1 << 32 for i in ids):
        raise config.error("eos_token_id", f"is {str(value)[:80]}", "a token's number, or a list of them")
    return ids
