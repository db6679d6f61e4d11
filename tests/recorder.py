"""Runs `python -m recorder LOG MODULE ARGUMENTS`: runs a stage, and writes a line KEY<tab>FILE to LOG for each parameter that it reads.

A key counts as read when its value is read; accessing a section or a mapping only leads to one. Code that copies, dumps or compares a
section reads all of it, except keys that it excludes. FILE is the file that reads, relative to the folder, or CHECK if that called it.
"""

import os
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bingo import params

CHECK = "bingo/planning/limits.py"  # decides whether a stage starts; it calls code that builds networks, and its reads affect no output
_log, *_arguments = sys.argv[1:]
_keys: dict[int, str] = {}  # dotted keys of the sections of params.yaml, by identity
_sections: list[Any] = []  # kept alive, so that identities are not reused
_seen: set[tuple[str, str]] = set()
_quiet = False


class _Mapping(dict):
    """A mapping in params.yaml: listing its names does not count as reading, but reading a value does."""

    def __init__(self, values: dict[str, Any], key: str):
        super().__init__(values)
        self._key = key

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if id(value) not in _keys:
            _read([f"{self._key}.{name}"])
        return value

    def values(self):
        return [self[name] for name in self]

    def items(self):
        return [(name, self[name]) for name in self]


def _read(keys: Iterable[str]) -> None:
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename == __file__ or "pydantic" in frame.f_code.co_filename):
        frame = frame.f_back
    callers = [os.path.relpath(frame.f_code.co_filename)]
    while frame.f_back:
        frame = frame.f_back
        callers.append(os.path.relpath(frame.f_code.co_filename))
    file = CHECK if CHECK in callers else callers[0]
    with Path(_log).open("a") as log:
        for key in keys:
            if (key, file) not in _seen:
                _seen.add((key, file))
                log.write(f"{key}\t{file}\n")


def _leaves(section: Any, without: Iterable[str] = ()) -> list[str]:
    """The keys of all values below a section or a mapping."""
    found, key = [], _keys[id(section)]
    for name in set(type(section).model_fields) - set(without):
        value, below = _attribute(section, name), f"{key}.{name}".removeprefix(".")
        if isinstance(value, params.Section):
            found += _leaves(value)
        elif isinstance(value, dict) and all(isinstance(held, params.Section) for held in value.values()):
            found += [leaf for held in value.values() for leaf in _leaves(held)]
        else:
            found.append(below)
    return found


def _note(section: Any, key: str) -> None:
    _keys[id(section)] = key
    _sections.append(section)
    for name in type(section).model_fields:
        value, below = _attribute(section, name), f"{key}.{name}".removeprefix(".")
        held = value.items() if isinstance(value, dict) else [("", value)]
        for item, part in held:
            if isinstance(part, params.Section):
                _note(part, f"{below}.{item}".removesuffix("."))


_attribute, _dump, _copy, _load = params.Section.__getattribute__, params.Section.model_dump, params.Section.model_copy, params.load_params


def _get(section: Any, name: str) -> Any:
    value, key = _attribute(section, name), _keys.get(id(section))
    if key is None or _quiet:
        return value
    if name == "__dict__":  # a copy, a comparison, a pickle
        _read(_leaves(section))
    elif name in type(section).model_fields and not isinstance(value, params.Section):
        below = f"{key}.{name}".removeprefix(".")
        if isinstance(value, dict):
            return _Mapping(value, below)
        _read([below])
    return value


def _whole(method: Any, section: Any, without: Iterable[str], **options: Any) -> Any:
    global _quiet
    if id(section) in _keys and not _quiet:
        _read(_leaves(section, without))
    before, _quiet = _quiet, True
    try:
        return method(section, **options)
    finally:
        _quiet = before


def _noted(*arguments: Any) -> Any:
    loaded = _load(*arguments)
    _note(loaded, "")
    return loaded


def _dumped(section: Any, **options: Any) -> Any:
    included = options.get("include")
    without = options.get("exclude") or () if included is None else set(type(section).model_fields) - set(included)
    return _whole(_dump, section, without, **options)


def _copied(section: Any, **options: Any) -> Any:
    return _whole(_copy, section, options.get("update") or (), **options)


setattr(params.Section, "__getattribute__", _get)  # noqa: B010
setattr(params.Section, "model_dump", _dumped)  # noqa: B010
setattr(params.Section, "model_copy", _copied)  # noqa: B010
params.load_params = _noted
sys.argv = _arguments
runpy.run_module(_arguments[0], run_name="__main__", alter_sys=True)
