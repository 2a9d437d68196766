"""The one place that writes and reads checkpoints: out_dir/ckpt_000123.pt holds the run after 123 updates.

    decoder = checkpoint.load_model("out/demo")        # a run's newest checkpoint, or a file
    torch.load(path, weights_only=True)["model"]       # loads into transformers' LlamaForCausalLM

A file is what torch.save writes, and then the CRC-32 of that: PyTorch checks no checksums when it loads, and
a zip archive's own do not cover its directory. Imports model.py, to load a model.
"""
import os
import pickle
import re
import sys
import zlib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch

from model import Decoder, ModelConfig
from nanomaml.config import UserError, one_line

NAME = r"ckpt_\d+\.pt"
TRAILER = b"crc32 %08x\n"  # ends a file: the checksum of all before it
whole = {}  # {path: stamp} of the files that this process wrote or read, so that no save reads them again


def paths(out_dir):
    """The checkpoints of a run, oldest first."""
    files = (path for path in Path(out_dir).glob("ckpt_*.pt") if re.fullmatch(NAME, path.name))
    return sorted((path for path in files if path.is_file()), key=step_of)


def step_of(path):
    return int(Path(path).stem.removeprefix("ckpt_"))


class Summed:
    """A binary file for torch.save to write to, which computes the CRC-32 on the way."""

    def __init__(self, file):
        self.file, self.crc = file, 0

    def write(self, content):
        self.crc = zlib.crc32(content, self.crc)
        return self.file.write(content)

    def flush(self):
        self.file.flush()


def save(out_dir, state, keep, keep_every=0):
    """Writes `state` (a dict with "step") so that a crash leaves either the whole file or none.

    Then deletes later steps (a future that a resume gave up), and earlier ones that are neither among the
    newest `keep` whole ones nor multiples of `keep_every` (0: off).
    """
    path = Path(out_dir, f"ckpt_{state['step']:06d}.pt")
    partial = path.with_suffix(".partial")
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:  # a new file: nothing goes through a link
            summed = Summed(file)
            torch.save(state, summed)
            file.write(TRAILER % summed.crc)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        cause = error  # PyTorch raises its own RuntimeError after the file's error
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or one_line(error, 200)
        raise UserError(f"cannot write checkpoint {path}: {reason}", 1) from None
    whole[path] = stamp(path)
    with suppress(OSError, AttributeError):  # the rename should reach the disk too; Windows cannot
        folder = os.open(out_dir, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    for old in reversed(paths(out_dir)):
        if old == path or step_of(old) < state["step"] and keep > 0 and is_whole(old):
            keep -= 1
        elif step_of(old) > state["step"] or not keep_every or step_of(old) % keep_every:
            old.unlink(missing_ok=True)
    for old in Path(out_dir).glob("ckpt_*.partial"):  # of a write that was killed
        old.unlink(missing_ok=True)
    return path


class Damaged(UserError):
    """The file can be read, but is not a whole checkpoint."""


def stamp(path):
    """What changes when a file is written again."""
    return [getattr(os.stat(path), f"st_{key}") for key in ("ino", "size", "mtime_ns")]


def is_whole(path):
    """Whether a checkpoint's checksum is right; one that cannot be read just now counts as whole."""
    try:
        if whole.get(path) != stamp(path):
            check(path)
    except Damaged:
        return False
    except OSError:
        pass
    return True


def check(path):
    """Reads the whole file. Raises Damaged where a checksum is wrong, OSError where it cannot be read."""
    before, crc, length = stamp(path), 0, len(TRAILER % 0)
    with open(path, "rb") as file:
        left = max(0, os.fstat(file.fileno()).st_size - length)
        while left and (content := file.read(min(left, 2**24))):
            crc, left = zlib.crc32(content, crc), left - len(content)
        trailer = file.read()
    if trailer[:6] != TRAILER[:6]:
        raise Damaged(f"checkpoint {path} is damaged: the checksum at its end is missing")
    if trailer != TRAILER % crc:
        raise Damaged(f"checkpoint {path} is damaged: its checksum is {(TRAILER % crc).decode().strip()}, it "
                      f"should be {trailer.decode(errors='replace').strip()}")
    whole[Path(path)] = before


def named(error):
    return f"{type(error).__name__}: {one_line(error, 300) or '-'}"


def read(path):
    """The state in a checkpoint, on the CPU; executes nothing. Damaged: not whole; UserError: unreadable."""
    try:
        check(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not (isinstance(state, dict) and type(state.get("step")) is int
                and isinstance(state.get("model"), dict) and isinstance(state.get("config"), dict)):
            raise Damaged(f"{path} is not a checkpoint of train.py")
        bad = [key for key, p in state["model"].items() if not torch.is_tensor(p) or not p.isfinite().all()]
        if bad:
            raise Damaged(f"checkpoint {path} holds numbers that are not finite: {one_line(bad[0], 80)}")
        step, last = state["step"], state["config"].get("max_steps", state["step"])
        in_name = step_of(path) if re.fullmatch(NAME, Path(path).name) else step
        if step != in_name or not 0 <= step <= last:
            raise Damaged(f"checkpoint {path} is damaged: it says step {step}, its name {in_name} and the "
                          f"run's max_steps {last}")
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Damaged:
        raise
    except (OSError, MemoryError) as error:  # the file may be good: do not go on from an older one
        raise UserError(f"cannot read checkpoint {path}: {error or type(error).__name__}") from None
    except pickle.UnpicklingError:  # PyTorch's message goes on to say how to run it anyway
        raise Damaged(f"checkpoint {path} is not loaded, since it holds code") from None
    except Exception as error:  # PyTorch raises its own
        if "allocate memory" in str(error):  # a RuntimeError; the file is good
            raise UserError(f"cannot read checkpoint {path}: {named(error)}") from None
        raise Damaged(f"checkpoint {path} is damaged: {named(error)}") from None
    return state


def newest(out_dir, *keys):
    """The state of the newest whole checkpoint that has these keys, or None if there is no checkpoint.

    Others are reported on stderr and skipped; UserError if none is left.
    """
    for path in reversed(paths(out_dir)):
        try:
            state = read(path)
            if lacks := [key for key in keys if key not in state]:
                raise Damaged(f"checkpoint {path} lacks {', '.join(lacks)}")
            return state
        except Damaged as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    if paths(out_dir):
        raise UserError(f"every checkpoint in {out_dir} is damaged: restore one, or start in another folder")
    return None


def load(path):
    """The state in a checkpoint file, or in the newest good one of a run's folder."""
    state = newest(path) if Path(path).is_dir() else read(path)
    if state is None:
        raise UserError(f"no checkpoint in {path}: a run writes ckpt_*.pt there")
    return state


def load_config(cls, state):
    """The settings of the saved run as a `cls`; a field that was added since takes its default."""
    saved = state["config"]
    try:
        return cls(**{field.name: saved[field.name] for field in fields(cls) if field.name in saved})
    except (TypeError, ArithmeticError, UserError) as error:  # such as a width that is text
        raise Damaged(f"the checkpoint of step {state['step']} holds invalid settings: {named(error)}"
                      ) from None


def load_model(source):
    """The Decoder of a checkpoint file, of a run's folder or of a state that was read; eval mode, on CPU."""
    state = source if isinstance(source, dict) else load(source)
    try:
        cfg = load_config(ModelConfig, state)
        with torch.device("meta"):  # before any memory is allocated
            shapes = {(name, p.shape) for name, p in Decoder(cfg).state_dict().items()}
        others = shapes ^ {(name, p.shape) for name, p in state["model"].items()}
        if others:
            raise KeyError(f"{sorted(map(str, others))[0]} does not fit its settings")
        # A generator of its own, so that the caller's random numbers stay as they are.
        decoder = Decoder(cfg, torch.Generator())
        decoder.load_state_dict(state["model"])
    except (KeyError, TypeError, AttributeError, RuntimeError, UserError) as error:
        where = "this state" if isinstance(source, dict) else source
        raise Damaged(f"{where} holds no model of train.py: {named(error)}") from None
    return decoder.eval()
