"""What the suites' command lines have in common: a mistake is one line that says what came and what is allowed, with exit status 2."""

import argparse
import sys
from collections.abc import Iterable
from typing import NoReturn

from nlray.errors import UserError


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def positive(text: str) -> int:
    """Return a whole number, 1 or more: a `type` of argparse."""
    if not (text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def whole_numbers(option: str, text: str) -> list[int]:
    """Return an option's numbers, 1 or more each, with commas between them.

    Raises:
        UserError: names the option.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= 1 for part in parts):
        raise UserError(f"{option} is {text!r}; allowed: whole numbers from 1 on, with commas between them")
    return [int(part) for part in parts]


def choices(option: str, text: str, allowed: Iterable[str]) -> list[str]:
    """Return an option's names, with commas between them.

    Raises:
        UserError: names the option.
    """
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(f"{option} has {unknown[0]!r}; allowed: {', '.join(allowed)}")
    return names
