"""Command line of the benchmarks."""

import argparse
import re
import sys
from typing import NoReturn

from bingo.runtime.errors import USER_MISTAKE

_INVALID = re.compile(r"argument (?P<name>\S+): invalid (?P<allowed>\w+) value: '(?P<value>.*)'", re.DOTALL)
_NO_CHOICE = re.compile(r"argument (?P<name>\S+): invalid choice: '?(?P<value>.*?)'? \(choose from (?P<allowed>.*)\)", re.DOTALL)
_KINDS = {"int": "a whole number", "count": "a whole number from 1", "float": "a number"}


def count(text: str) -> int:
    """Type of an argument that is a whole number from 1."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


class Parser(argparse.ArgumentParser):
    """argparse's parser, with errors in one line: name = value, and what is allowed."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit with the code of a user error."""
        if found := _INVALID.fullmatch(message) or _NO_CHOICE.fullmatch(message):
            message = f"{found['name']} = {found['value']}: allowed is {_KINDS.get(found['allowed'], found['allowed'])}"
        print(f"error: {message}; see: {self.prog} --help", file=sys.stderr, flush=True)
        raise SystemExit(USER_MISTAKE)
