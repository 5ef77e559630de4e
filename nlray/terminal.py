"""Text that comes from a run's folder, a cluster or a model, made fit for a terminal."""

import re

# Control characters, which move the cursor, set titles or fill the clipboard; those that turn the direction of writing; halves of surrogate
# pairs, which cannot be written at all.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: object) -> str:
    """Return a text as one line that a terminal shows as it is: white space is a space, other control characters their escapes."""
    return _UNFIT.sub(_escape, str(text))


def clean_lines(text: object, keep: str = "\n\t") -> str:
    """Return a text of several lines the same way; the characters in `keep` stay."""
    return _UNFIT.sub(lambda found: found[0] if found[0] in keep else _escape(found), str(text))


def _escape(found: re.Match[str]) -> str:
    return " " if found[0] in "\t\n\r" else found[0].encode("unicode_escape").decode()
