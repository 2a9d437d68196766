"""Settings for every script: a frozen dataclass, config files and flags.

    python train.py [config.py ...] [--key=value ...]

Defaults < files, left to right < flags; `--key` alone turns on what is on or off. A config file is plain Python assignments, so
`max_steps = 6 * 1000` works.
A field's trailing comment is its line in `--help`; whatever does not fit the dataclass ends with one line.
"""
import dataclasses
import difflib
import inspect
import math
import re
import runpy
import sys
import types
import typing


class UserError(Exception):
    """Bad input, told in one line: a script prints it without a traceback and exits with 1."""


def comments(cls):
    """{field: trailing comment} of a dataclass and its bases, read from their source."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): [^#]*#\s*(.*)", line):
                found[match[1]] = match[2]
    return found


def convert(key, value, kind, text):
    """`value` as the declared type `kind`; `text` says that it came from a flag and is a string."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    name = getattr(kind, "__name__", None) or str(kind)
    if types.NoneType in kinds and (value is None or text and value == "None"):
        return None
    kind, given = kinds[0], value
    if text and kind is not str:
        try:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
        except (KeyError, ValueError):
            raise UserError(f"{key} must be {name}, got {given!r}") from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{key} must be {name}, got {given!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{key} must be finite, got {given!r}")
    return value


def load(cls, argv, doc=""):
    """The settings that config files and flags in `argv` make of the dataclass `cls`.

    Raises UserError on an unknown key, a wrong type or a file that does not run; `--help` prints and exits with 0.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    values = {}

    def put(key, value, where, text=False):
        if key not in kinds:
            near = difflib.get_close_matches(key.replace("-", "_"), kinds, n=1)
            raise UserError(f"unknown key {key!r} in {where}" + (f"; did you mean {near[0]!r}?" if near else "; --help lists the keys"))
        values[key] = convert(key, value, kinds[key], text)

    if "--help" in argv or "-h" in argv:
        notes = comments(cls)
        print(doc.strip() + "\n")
        for field in dataclasses.fields(cls):
            print(f"  {'--' + field.name + '=' + str(field.default):<32} {notes.get(field.name, '')}")
        sys.exit(0)
    for arg in argv:
        if not arg.startswith("-"):
            if not arg.endswith(".py"):
                raise UserError(f"{arg!r} is neither a config file (*.py) nor a flag (--key=value)")
            try:
                names = runpy.run_path(arg)
            except Exception as error:  # whatever a user's file may raise
                raise UserError(f"config file {arg}: {type(error).__name__}: {error}") from None
            for key, value in names.items():
                if not key.startswith("_") and not isinstance(value, types.ModuleType):
                    put(key, value, arg)
    for arg in argv:
        if arg.startswith("-"):
            match = re.fullmatch(r"--([\w-]+)(?:=(.*))?", arg, re.DOTALL)
            if not match or match[2] is None and kinds.get(match[1], bool) is not bool:
                raise UserError(f"flags are written --key=value, got {arg!r}")
            put(match[1], "True" if match[2] is None else match[2], "the flags", text=True)
    return cls(**values)
