"""Files: written whole or not at all, and JSON lines, in and out."""
import json
import os
import sys
from pathlib import Path

from nanomaml.config import UserError, require


def replace(path, content):
    """Replaces a file by bytes or text: a crash or a full disk (UserError) leaves the old one whole."""
    partial = Path(f"{path}.partial")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # a new file: nothing goes through a link
            file.write(content if isinstance(content, bytes) else content.encode())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def finite(line):
    """The dict `line` without numbers that are not finite, as floats: JSON has no NaN."""
    return {key: value for key, value in line.items()
            if not isinstance(value, (int, float)) or abs(value) <= sys.float_info.max}


def parse(text):
    """The object in a line of a .jsonl file (bytes), or None if there is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return finite(line) if isinstance(line, dict) else None


def require_no_link(path):
    require(not Path(path).is_symlink(), f"{path} is a link: nothing is written through it; remove it")


def append(path, line):
    """Appends the dict `line` as JSON, replacing a last line that a kill cut short; UserError if it fails."""
    require_no_link(path)
    try:
        with open(path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            if file.read() not in (b"", b"\n"):
                file.seek(max(0, end - 2**24))
                torn = file.read().rpartition(b"\n")[2]
                if parse(torn) is None:
                    file.truncate(end - len(torn))
                else:  # whole, only its newline is missing
                    file.write(b"\n")
            file.write(json.dumps(finite(line)).encode() + b"\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_jsonl(path, *keys, skip_damaged=False):
    """The lines of a .jsonl file as dicts with these keys, without non-finite numbers; [] without a file.

    A torn last line, of a run that is still going, is skipped. Any other line that is not such JSON, or whose
    step is not an int, is a UserError with its number or, with `skip_damaged`, passed over with a warning.
    """
    try:
        texts = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    lines = []
    for number, text in enumerate(texts, 1):
        line = parse(text)
        if line is not None and all(key in line for key in keys) and type(line.get("step", 0)) is int:
            lines.append(line)
        elif text and number < len(texts):
            message = f"{path}, line {number}: expected JSON with {', '.join(keys)}, got {text[:80]!r}"
            require(skip_damaged, message)
            print(f"warning: {message}; passed over", file=sys.stderr, flush=True)
    return lines
