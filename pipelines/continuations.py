"""Tokenizers for the parts of a text: a text file is tokenized in pieces, and a piece is not a text of its own.

Many tokenizers put a space before a text (Llama 2), and some strip its ends. Done to every piece, that changes the text at each cut.
`part_tokenizers(tokenizer)` gives the tokenizer of each kind of part, so that the parts' tokens together decode as those of the text.
"""

import json
import logging
from functools import cache
from typing import Any

import tokenizers

logger = logging.getLogger(__name__)

Part = tuple[bool, bool]
"""Whether a part is the start of its text, and whether it is the end of it."""
PARTS: tuple[Part, ...] = ((True, True), (True, False), (False, True), (False, False))
_CUTS = (("one two\n", "three four"), ("one tw", "o three four"), ("one two\n", "  three\n\n", "four"))
"""Texts in parts: a tokenizer of parts is good where the tokens of the parts decode as those of the whole."""


def part_tokenizers(tokenizer: tokenizers.Tokenizer, *, name: str) -> dict[Part, tokenizers.Tokenizer]:
    """Return the tokenizer of each kind of part; it is `tokenizer` itself wherever that does.

    Args:
        name: of the tokenizer, for a warning where a cut changes the text with any of them.
    """
    whole = dict.fromkeys(PARTS, tokenizer)
    good = _good_cuts(whole)
    if good == len(_CUTS):
        return whole
    text = tokenizer.to_str()
    found = {part: _open_ended(text, part) for part in PARTS[1:]}
    parts = {PARTS[0]: tokenizer} | {part: _copy(changed, tokenizer) if changed != text else tokenizer for part, changed in found.items()}
    better = _good_cuts(parts)
    if max(good, better) < len(_CUTS):
        _warn(name)
    return parts if better > good else whole


@cache
def _warn(name: str) -> None:
    """Say once in a process that a tokenizer is not exact at cuts; a launch loads it several times."""
    logger.warning("%s: where a text file is cut into pieces, its text changes a little with this tokenizer", name)


def _good_cuts(parts: dict[Part, tokenizers.Tokenizer]) -> int:
    """Return how many of the cuts do not change the text."""
    good = 0
    for texts in _CUTS:
        kinds = [(index == 0, index == len(texts) - 1) for index in range(len(texts))]
        try:
            ids = [i for text, kind in zip(texts, kinds, strict=True) for i in _ids(parts[kind], text)]
            whole = _ids(parts[True, True], "".join(texts))
        except Exception:  # the library raises bare Exception: the vocabulary has no token for this text, which so tells nothing
            good += 1
            continue
        good += parts[True, True].decode(ids) == parts[True, True].decode(whole)
    return good


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def _copy(text: str, tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    copy = tokenizers.Tokenizer.from_str(text)
    copy.encode_special_tokens = tokenizer.encode_special_tokens
    return copy


def _open_ended(text: str, part: Part) -> str:
    """Return a tokenizer's JSON without what it does at those ends that are not the text's."""
    plain = json.loads(text)
    for key in ("normalizer", "pre_tokenizer"):
        plain[key] = _without_ends(plain[key], part)
    return json.dumps(plain, ensure_ascii=False) if plain != json.loads(text) else text


def _without_ends(step: dict[str, Any] | None, part: Part) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer without what it does at those ends; None where that is all it does."""
    is_start, is_end = part
    match step:
        case {"type": "Sequence"}:
            key = "normalizers" if "normalizers" in step else "pretokenizers"
            return step | {key: [kept for inner in step[key] if (kept := _without_ends(inner, part)) is not None]}
        case {"type": "Strip"}:
            return step | {"strip_left": step["strip_left"] and is_start, "strip_right": step["strip_right"] and is_end}
        case {"type": "Prepend"} if not is_start:
            return None
        case {"type": "Replace", "pattern": {"Regex": pattern}} if not is_start and pattern.startswith("\\A"):
            return None
        case {"type": "Metaspace"} if not is_start:
            return step | {"prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": True} if not is_start:
            return step | {"add_prefix_space": False}
    return step
