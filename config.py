"""Settings of every script: a frozen dataclass, filled from config files and flags.

    python train.py configs/11m.py configs/vanilla.py --lr=1e-3     # [config.py ...] [--key=value ...]
    python train.py --help                                          # every key with its default and meaning

Defaults < files, left to right < flags. `--key` alone turns a switch on. A config file is plain Python
assignments, so `max_steps = 6 * 1000` works. The comment after a field is its line in `--help`.
"""
import dataclasses
import difflib
import inspect
import math
import os
import re
import runpy
import sys
import types
import typing


class UserError(Exception):
    """Bad input, explained in one line: `run` prints it without a traceback and exits with 1."""


def run(main):
    """Calls `main` with the command line's arguments: how every script here starts."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may Python's last flush fail
        if "--help" not in sys.argv:  # as `--help | head` does
            sys.exit("error: standard output was closed")


def load(cls, argv, doc=""):
    """The settings that the config files and flags in `argv` make of the dataclass `cls`.

    Raises UserError for an unknown key, a wrong type or a file that does not run. `--help` prints and exits.
    """
    if "--help" in argv or "-h" in argv:
        notes = comments(cls)
        print(doc.strip() + "\n")
        for field in dataclasses.fields(cls):
            print(f"  {'--' + field.name + '=' + str(field.default):<32} {notes.get(field.name, '')}")
        sys.exit(0)

    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    values = {}

    def put(key, value, where, is_text=False):
        if key not in kinds:
            near = difflib.get_close_matches(key.replace("-", "_"), kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
            raise UserError(f"unknown key {key!r} in {where}; {hint}")
        values[key] = convert(key, value, kinds[key], is_text)

    for path in (arg for arg in argv if not arg.startswith("-")):
        if not path.endswith(".py"):
            raise UserError(f"{path!r} is neither a config file (*.py) nor a flag (--key=value)")
        try:
            names = runpy.run_path(path)
        except Exception as error:  # whatever a user's file may raise
            raise UserError(f"config file {path}: {type(error).__name__}: {error}") from None
        for key, value in names.items():
            if not key.startswith("_") and not isinstance(value, types.ModuleType):
                put(key, value, path)
    for flag in (arg for arg in argv if arg.startswith("-")):
        match = re.fullmatch(r"--([\w-]+)(?:=(.*))?", flag, re.DOTALL)
        if not match or match[2] is None and kinds.get(match[1], bool) is not bool:
            raise UserError(f"flags are written --key=value, got {flag!r}")
        put(match[1], "True" if match[2] is None else match[2], "the flags", is_text=True)
    return cls(**values)


def operands(argv):
    """(what is neither a flag nor a config file, the rest): for scripts that take the folders of runs."""
    paths = [arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")]
    return paths, [arg for arg in argv if arg not in paths]


def convert(key, value, declared, is_text):
    """`value` as the type that the field declares; `is_text`: it comes from a flag and is a string."""
    union = typing.get_args(declared) if isinstance(declared, types.UnionType) else (declared,)
    name = getattr(declared, "__name__", None) or str(declared)
    if types.NoneType in union and (value is None or is_text and value == "None"):
        return None
    kind, given = union[0], value
    if is_text and kind is not str:
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


def comments(cls):
    """{field: trailing comment} of a dataclass and its bases, read from their source."""
    notes = {}
    for base in reversed(cls.__mro__[:-1]):
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    (\w+): [^#]*#\s*(.*)", line):
                notes[match[1]] = match[2]
    return notes


# ---- checks for a dataclass's __post_init__ ----


def require(ok, message):
    if not ok:
        raise UserError(message)


def require_at_least(cfg, least, *keys):
    for key in keys:
        require(getattr(cfg, key) >= least, f"{key} must be at least {least}, got {getattr(cfg, key)}")


def require_positive(cfg, *keys):
    for key in keys:
        require(getattr(cfg, key) > 0, f"{key} must be positive, got {getattr(cfg, key)}")


def require_choice(cfg, key, *choices):
    value = getattr(cfg, key)
    listed = ", ".join(choice or "empty" for choice in choices)
    require(value in choices, f"{key} must be one of {listed}, got {value!r}")
