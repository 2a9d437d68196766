"""Settings of every script: a frozen dataclass, filled from config files and flags.

    python train.py configs/11m.py configs/vanilla.py --lr=1e-3     # [config.py ...] [--key=value ...]
    python train.py --help                                          # every key with its default and meaning

Defaults < files, left to right < flags. `--key` alone turns a switch on. A config file is plain Python
assignments, so `max_steps = 6 * 1000` works. The comment after a field is its line in `--help`.
"""
import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import runpy
import sys
import time
import types
import typing

# OSErrors that are no mistake of the user: a full or broken disk, no memory, a network that went away.
MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ENOMEM, errno.EMFILE,
                  errno.ENFILE, errno.ESTALE}


class UserError(Exception):
    """What went wrong, in one line: `run` prints it without a traceback and exits with `code`.

    code: 2 for a mistake in what was given; 1 for a failure of the machine, such as a full disk. Without it,
    the exception that is being handled decides.
    """

    def __init__(self, message, code=None):
        super().__init__(message)
        cause = sys.exception()
        is_machine = getattr(cause, "errno", None) in MACHINE_ERRNOS
        self.code = code or (cause.code if isinstance(cause, UserError) else 1 if is_machine else 2)


def run(main):
    """Calls `main` with the command line's arguments: how every script here starts."""
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
        if "RANK" in os.environ:  # of torchrun; its threads may need the interpreter that ends, and abort
            os._exit(0)
    except UserError as error:
        fail(error, error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of the output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may Python's last flush fail
        if "--help" not in sys.argv:  # as `--help | head` does
            fail("standard output was closed", 1)
    except (OSError, MemoryError, RuntimeError) as error:
        says = str(error)
        if isinstance(error, RuntimeError) and "out of memory" not in says and "allocate memory" not in says:
            raise
        is_mistake = isinstance(error, OSError) and error.errno not in MACHINE_ERRNOS  # such as a wrong path
        fail(f"{type(error).__name__}: {says}", 2 if is_mistake else 1)


def fail(message, code):
    """Ends the process with one line on stderr."""
    print("error:", one_line(message), file=sys.stderr, flush=True)
    sys.exit(code)


def one_line(text, most=1000):
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[:most] + " ..."


def load(cls, argv, doc=""):
    """The settings that the config files and flags in `argv` make of the dataclass `cls`.

    Raises UserError for an unknown key, a wrong type, a flag given twice or a file that does not run.
    `--help` prints and exits. Under torchrun only the first rank of a node says what is wrong.
    """
    try:
        return read(cls, argv, doc)
    except UserError:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # torchrun ends this rank once the first has exited
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

    kinds = {field.name: field.type for field in dataclasses.fields(cls)}
    defaults, values = {field.name: field.default for field in dataclasses.fields(cls)}, {}

    def put(key, value, where, is_text=False):
        if key not in kinds:
            near = difflib.get_close_matches(key.replace("-", "_"), kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help lists the keys"
            raise UserError(f"unknown key {shown(key)} in {where}; {hint}")
        values[key] = convert(key, value, kinds[key], is_text)
        require(values[key] != "" or defaults[key] == "", f"{key} must not be empty")

    for path in (arg for arg in argv if not arg.startswith("-")):
        if not path.endswith(".py"):
            raise UserError(f"{shown(path)} is neither a config file (*.py) nor a flag (--key=value)")
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
        if not match or match[2] is None and kinds.get(match[1], bool) is not bool:
            raise UserError(f"flags are written --key=value, got {shown(flag)}")
        require(match[1] not in given, f"--{match[1]} is given twice")
        given.add(match[1])
        put(match[1], "True" if match[2] is None else match[2], "the flags", is_text=True)
    return cls(**values)


def operands(argv):
    """(what is neither a flag nor a config file, the rest): for scripts that take the folders of runs."""
    paths = [arg for arg in argv if not arg.startswith("-") and not arg.endswith(".py")]
    require(all(paths), "an argument is empty: name a folder or a file")
    return paths, [arg for arg in argv if arg not in paths]


def shown(value):
    return one_line(repr(value), 80)


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
            raise UserError(f"{key} must be {name}, got {shown(given)}") from None
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 2**1000 else math.inf
    if type(value) is not kind:
        raise UserError(f"{key} must be {name}, got {shown(given)}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{key} must be finite, got {shown(given)}")
    if kind is int and abs(value) >= 2**63:
        raise UserError(f"{key} must be below 2**63, got {shown(given)}")
    if kind is str and ("\0" in value or value.encode(errors="ignore").decode() != value):
        raise UserError(f"{key} must be text without NUL, in UTF-8, got {shown(given)}")
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


def require_fits(cfg, size, *keys):
    """Refuses settings that need `size` bytes of the host's memory where it has less."""
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**40
    given = ", ".join(f"{key} = {getattr(cfg, key)}" for key in keys)
    require(size <= has, f"too large: {given} would take {size // 2**30:,} GiB of memory, this machine has "
                         f"{has // 2**30:,}")


def require_choice(cfg, key, *choices):
    value = getattr(cfg, key)
    listed = ", ".join(choice or "empty" for choice in choices)
    require(value in choices, f"{key} must be one of {listed}, got {shown(value)}")
