"""How every script starts and ends, and its settings: a frozen dataclass, filled from config files and flags.

    python train.py configs/11m.py configs/vanilla.py --lr=1e-3     # [config.py ...] [--key=value ...]
    python train.py --help                                          # every key with its default and meaning

Defaults < files, left to right < flags. `--key` alone turns a switch on. A config file is Python code, plain
assignments, so `max_steps = 6 * 1000` works. The comment after a field is its line in `--help`; the type says
what it may be: `Count`, `Share` and others below, Literal["a", "b"] for a choice.
"""
import codecs
import dataclasses
import difflib
import errno
import inspect
import json
import math
import os
import re
import runpy
import sys
import time
import types
import typing
from contextlib import redirect_stdout
from typing import Annotated

Natural = Annotated[int, "at least 0", lambda x: x >= 0]
Count = Annotated[int, "at least 1", lambda x: x >= 1]
NonNegative = Annotated[float, "at least 0", lambda x: x >= 0]
Positive = Annotated[float, "positive", lambda x: x > 0]
Updates = Annotated[float, "a number of updates, or below 1 a share of max_steps",
                    lambda x: 0 <= x < 1 or x.is_integer() and x >= 0]
Share = Annotated[float, "in [0, 1]", lambda x: 0 <= x <= 1]

NO_TEXT = {"idna", "punycode", "raw-unicode-escape", "unicode-escape"}  # codecs that are not for text
CONTROLS = {i: f"\\x{i:02x}" for i in (*range(32), *range(127, 160)) if chr(i) not in "\t\n"}


def is_text_encoding(name):
    try:
        return codecs.lookup(name).name not in NO_TEXT and isinstance("".encode(name), bytes)
    except (LookupError, ValueError):
        return False


TextEncoding = Annotated[str, "a text encoding of Python, such as gb18030 or utf-16-le", is_text_encoding]

# OSErrors that are not a mistake of the user: a full or broken disk, no memory, a network that went away.
MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE,
                  errno.ENFILE, errno.ESTALE}


class UserError(Exception):
    """What went wrong, in one line: `run` prints it without a traceback and exits with `code`.

    code: 2 for a mistake in what was given; 1 for a failure of the machine, such as a full disk. Without it,
    the exception that is being handled decides.
    """

    def __init__(self, message, code=None):
        super().__init__(visible(message))
        cause = sys.exception()
        is_machine = getattr(cause, "errno", None) in MACHINE_ERRNOS
        self.code = code or (cause.code if isinstance(cause, UserError) else 1 if is_machine else 2)


def require(ok, message):
    if not ok:
        raise UserError(message)


def visible(text):
    """`text` with control characters as \\x1b and the like: foreign text could control the terminal."""
    return str(text).translate(CONTROLS)


class Visible:
    """A text stream that shows control characters; other attributes are the stream's."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.stream.write(visible(text))

    def __getattr__(self, name):
        return getattr(self.stream, name)


def one_line(text, most=1000):
    """A text, or what an exception says, as one line."""
    text = visible(" ".join(str(text).split()))
    return text if len(text) <= most else text[:most] + " ..."


def run(main):
    """Calls `main` with the command line's arguments: how every script here starts."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # `>&-`
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may lack characters; not in a notebook
        sys.stdout.reconfigure(errors="replace")
    try:
        with redirect_stdout(Visible(sys.stdout)):
            main(sys.argv[1:])
        sys.stdout.flush()
        if {"RANK", "WORLD_SIZE"} <= os.environ.keys():  # torchrun's: threads may need the interpreter
            os._exit(0)
    except UserError as error:
        fail(error, error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would fail
        if "--help" not in sys.argv:  # as `--help | head` does
            fail("standard output was closed", 1)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate|overflow", str(error)):
            raise
        is_mistake = isinstance(error, OSError) and error.errno not in MACHINE_ERRNOS  # such as a wrong path
        fail(f"{type(error).__name__}: {error}", 2 if is_mistake else 1)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust libraries; not an Exception
            raise
        fail(f"the tokenizer failed on the text: {error}", 2)


def fail(message, code):
    """Ends the process with one line on stderr."""
    print("error:", one_line(message), file=sys.stderr, flush=True)
    sys.exit(code)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Each value has its field's type, or UserError; subclasses check how fields fit together."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, convert(field.name, getattr(self, field.name), field.type))


def load(cls, argv, doc=""):
    """The settings, of class `cls`, that the config files and flags in `argv` give.

    Raises UserError for an unknown key, a wrong type, a flag given twice or a file that does not run.
    `--help` prints and exits. Under torchrun only the first rank of a node says what is wrong.
    """
    try:
        return read(cls, argv, doc)
    except UserError:
        is_other = "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
        if is_other:  # torchrun ends this rank once the first has exited
            time.sleep(30)
        raise


def read(cls, argv, doc):
    if "--help" in argv or "-h" in argv:
        notes = comments(cls)
        print(doc.strip() + "\n")
        for field in dataclasses.fields(cls):
            print(f"  {'--' + field.name + '=' + str(field.default):<32} {notes.get(field.name, '')}")
        print("\nExit code: 0 when done or stopped by a signal, 2 for a mistake in what was given, 1 for a "
              "failure of the machine.", flush=True)
        sys.exit(0)
    known, values = {field.name: field for field in dataclasses.fields(cls)}, {}

    def put(key, value, where, is_text=False):
        if key not in known:
            near = difflib.get_close_matches(key.replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
            hint += "" if is_text else f" (a name of your own begins with _: _{key})"
            raise UserError(f"unknown key {shown(key)} in {where}; {hint}")
        values[key] = convert(key, value, known[key].type, is_text)
        require(values[key] != "" or known[key].default == "", f"{key} must not be empty")

    argv = joined(cls, argv)
    for path in (arg for arg in argv if not arg.startswith("-")):
        if "out_dir" in known and os.path.exists(f"{path}/config.json"):  # a run's folder: its settings
            for key, value in run_settings(path).items():
                put(key, value, f"{path}/config.json")
            continue
        require(path.endswith(".py"),
                f"{shown(path)} is neither a config file (*.py) nor a flag (--key=value), nor a run's folder")
        require(os.path.isfile(path), f"config file {path}: there is no such file")  # a folder would run too
        try:
            names = runpy.run_path(path)
        except (Exception, SystemExit) as error:  # whatever a user's file may raise
            raise UserError(f"config file {path}: {type(error).__name__}: {one_line(error, 200)}") from None
        for key, value in names.items():
            if not key.startswith("_") and not isinstance(value, types.ModuleType):
                put(key, value, path)
    given = set()
    for flag in (arg for arg in argv if arg.startswith("-")):
        match = re.fullmatch(r"--([\w-]+)(?:=(.*))?", flag, re.DOTALL)
        is_switch = match and match[1] in known and known[match[1]].type in (bool, bool | None)
        require(match and (match[2] is not None or is_switch or match[1] not in known),
                f"flags are written --key=value, got {shown(flag)}")
        require(match[1] not in given, f"--{match[1]} is given twice")
        given.add(match[1])
        put(match[1], "True" if match[2] is None else match[2], "the flags", is_text=True)
    return cls(**values)


def run_settings(folder):
    """The settings of the run in a folder, which may have been moved."""
    try:
        with open(f"{folder}/config.json", encoding="utf-8") as file:
            return json.load(file) | {"out_dir": folder}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{folder}/config.json is not a run's: {one_line(error, 200)}") from None


def joined(cls, argv):
    """`argv` with `--key value` as `--key=value`; a switch takes no value."""
    types_of, result = {field.name: field.type for field in dataclasses.fields(cls)}, []
    for arg in argv:
        key = result[-1].removeprefix("--") if result and re.fullmatch(r"--[\w-]+", result[-1]) else "help"
        is_value = arg.lower() in ("true", "false", "none") if types_of.get(key) in (bool, bool | None) else (
            key in types_of or key != "help" and not os.path.exists(arg))  # after a misspelt key: not a path
        if is_value and not arg.startswith("--"):
            result[-1] += f"={arg}"
        else:
            result.append(arg)
    return result


def operands(cls, argv):
    """(what is neither a flag of `cls` nor a config file, the rest): for scripts that take runs' folders."""
    argv = joined(cls, argv)
    paths = [arg for arg in argv
             if not arg.startswith("-") and (os.path.isdir(arg) or not arg.endswith(".py"))]
    require(all(paths), "an argument is empty: name a folder or a file")
    return paths, [arg for arg in argv if arg not in paths]


def one_operand(cls, argv, what="one run's folder or checkpoint, for instance out/demo"):
    """(the one operand, the rest of `argv`) of a script that works on one thing."""
    given, rest = operands(cls, argv)
    require(len(given) == 1 or {"--help", "-h"} & set(rest), f"name {what}; got {', '.join(given) or 'none'}")
    return "".join(given), rest


def shown(value):
    return one_line(repr(value), 80)


def convert(key, value, declared, is_text=False):
    """`value` as the type that the field declares; `is_text`: it comes from a flag and is a string."""
    kind, given = declared, value
    if isinstance(declared, types.UnionType):  # only `| None` is supported
        kind = typing.get_args(declared)[0]
        if value is None or is_text and value == "None":
            return None
    if typing.get_origin(kind) is typing.Literal:
        listed = ", ".join(choice or "empty" for choice in typing.get_args(kind))
        require(value in typing.get_args(kind), f"{key} must be one of {listed}, got {shown(value)}")
        return value
    kind, *rules = typing.get_args(kind) or (kind,)
    try:
        if is_text and kind is not str:
            value = {"true": True, "false": False}[value.lower()] if kind is bool else number(value)
        if kind is float and type(value) is int:
            value = float(value)
        if kind is int and type(value) is float and value.is_integer():  # 1e3
            value = int(value)
        if type(value) is not kind:
            raise ValueError
    except (KeyError, ValueError, OverflowError):
        name = kind.__name__ + " or None" * isinstance(declared, types.UnionType)
        raise UserError(f"{key} must be {name}, got {shown(given)}") from None
    require(kind is not float or math.isfinite(value), f"{key} must be finite, got {shown(given)}")
    require(kind is not int or abs(value) < 2**63, f"{key} must be below 2**63, got {shown(given)}")
    require(kind is not str or "\0" not in value and value.encode(errors="ignore").decode() == value,
            f"{key} must be text without NUL, in UTF-8, got {shown(given)}")
    for says, holds in zip(rules[::2], rules[1::2]):
        require(holds(value), f"{key} must be {says}, got {shown(value)}")
    return value


def number(text):
    try:
        return int(text)
    except ValueError:
        return float(text)


def comments(cls):
    """{field: trailing comment} of a dataclass and its bases, read from their source."""
    source = "".join(map(inspect.getsource, reversed(cls.__mro__[:-1])))
    return dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)", source, re.MULTILINE))
