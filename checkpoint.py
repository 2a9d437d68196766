"""The one place that writes and reads checkpoints: out_dir/ckpt_000123.pt holds the run after 123 updates.

    decoder = checkpoint.load_model("out/demo")        # a run's newest checkpoint, or a file
    torch.load(path, weights_only=True)["model"]       # loads into transformers' LlamaForCausalLM
"""
import os
import re
import sys
import zipfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import torch

from config import MachineError, UserError
from model import Decoder, ModelConfig


def paths(out_dir):
    """The checkpoints of a run, oldest first."""
    files = (path for path in Path(out_dir).glob("ckpt_*.pt") if re.fullmatch(r"ckpt_\d+\.pt", path.name))
    return sorted(files, key=step_of)


def step_of(path):
    return int(Path(path).stem.removeprefix("ckpt_"))


def save(out_dir, state, keep, keep_every=0):
    """Writes `state` (a dict with "step") so that a crash leaves either the whole file or none.

    Then deletes later steps (a future that a resume gave up), and earlier ones that are neither among the
    newest `keep` nor multiples of `keep_every` (0: none of these).
    """
    path = Path(out_dir, f"ckpt_{state['step']:06d}.pt")
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # PyTorch turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        raise MachineError(f"cannot write checkpoint {path}: {str(error).splitlines()[0]}") from None
    with suppress(OSError, AttributeError):  # the rename should reach the disk too; Windows cannot
        folder = os.open(out_dir, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    steps = [step_of(old) for old in paths(out_dir) if step_of(old) <= state["step"]]
    for old in paths(out_dir):
        step = step_of(old)
        if step not in steps or step not in steps[-keep:] and (not keep_every or step % keep_every):
            old.unlink(missing_ok=True)
    for old in Path(out_dir).glob("ckpt_*.partial"):  # of a write that was killed
        old.unlink(missing_ok=True)
    return path


class Damaged(UserError):
    """The file can be read, but is not a whole checkpoint."""


def read(path):
    """The state in a checkpoint, on the CPU.

    Damaged where it is not a whole checkpoint (PyTorch itself checks no checksums), UserError where it
    cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise Damaged(f"checkpoint {path} is damaged: wrong checksum in {bad}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not {"step", "model", "config"} <= state.keys() or not isinstance(state["step"], int):
            raise Damaged(f"{path} is not a checkpoint of train.py")
        return state
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except Damaged:
        raise
    except (OSError, MemoryError) as error:  # the file may be good: do not go on from an older one
        raise UserError(f"cannot read checkpoint {path}: {error or type(error).__name__}") from None
    except Exception as error:  # zipfile, pickle and PyTorch each have their own
        reason = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
        raise Damaged(f"checkpoint {path} is damaged: {reason}") from None


def newest(out_dir):
    """The state of the newest whole checkpoint, or None where there is none.

    A damaged one is reported on stderr and passed over; UserError where all are damaged.
    """
    for path in reversed(paths(out_dir)):
        try:
            return read(path)
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
    """The settings of the saved run as a `cls` (ModelConfig, or train.py's Config).

    A field that the checkpoint does not have, since it was added later, takes its default.
    """
    saved = state["config"]
    return cls(**{field.name: saved[field.name] for field in fields(cls) if field.name in saved})


def load_model(source):
    """The Decoder of a checkpoint file, of a run's folder or of a state that was read; eval mode, on CPU."""
    state = source if isinstance(source, dict) else load(source)
    try:
        # A generator of its own, so that the caller's random numbers stay as they are.
        decoder = Decoder(load_config(ModelConfig, state), torch.Generator())
        decoder.load_state_dict(state["model"])
    except (KeyError, TypeError, RuntimeError, UserError) as error:
        where = "this state" if isinstance(source, dict) else source
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise Damaged(f"{where} holds no model of train.py: {reason}") from None
    return decoder.eval()
