"""The one place that writes and reads checkpoints: out_dir/ckpt_000123.pt holds the run after 123 updates."""
import os
import re
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import torch

from config import UserError
from model import Decoder, ModelConfig


def paths(out_dir):
    """The checkpoints of a run, oldest first."""
    return sorted((path for path in Path(out_dir).glob("ckpt_*.pt") if re.fullmatch(r"ckpt_\d+\.pt", path.name)), key=step_of)


def step_of(path):
    return int(Path(path).stem.removeprefix("ckpt_"))


def save(out_dir, state, keep, keep_every=0):
    """Writes `state` (a dict with "step") so that a crash leaves either the whole file or none, then deletes what is neither
    among the newest `keep` nor a multiple of `keep_every` (0: no such)."""
    path = Path(out_dir, f"ckpt_{state['step']:06d}.pt")
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if hasattr(os, "O_DIRECTORY"):  # the rename itself must reach the disk; Windows has no such call
        folder = os.open(out_dir, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    for old in paths(out_dir)[:-keep]:
        if not keep_every or step_of(old) % keep_every:
            old.unlink()
    return path


def read(path):
    """The state in a checkpoint, on the CPU. UserError where the file is damaged: PyTorch itself checks no checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise UserError(f"checkpoint {path} is damaged: wrong checksum in {bad}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} is damaged: {str(error).splitlines()[0]}") from None


def newest(out_dir):
    """The state of the newest checkpoint that is whole, or None where there is none; a damaged one is told on stderr and passed over."""
    for path in reversed(paths(out_dir)):
        try:
            return read(path)
        except UserError as error:
            print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
    return None


def load_model(path):
    """The Decoder of a checkpoint file, or of the newest good checkpoint of a run's folder, in eval mode on the CPU."""
    state = newest(path) if Path(path).is_dir() else read(path)
    if state is None:
        raise UserError(f"no checkpoint in {path}: a run writes ckpt_*.pt there")
    decoder = Decoder(ModelConfig(**{field.name: state["config"][field.name] for field in fields(ModelConfig)}))
    decoder.load_state_dict(state["model"])
    return decoder.eval()
