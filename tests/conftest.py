"""A toy corpus (no network, no download) and a toy model that the tests share."""

import base64
import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import config
import prepare
import train
from config import UserError
from model import Decoder

# A suite that is started in the background, or under nohup, has these ignored, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SHARED = Path(__file__).resolve().parents[2] / "shared"
TOY_VOCAB = 256 + 3000 + 2

# What a run of seconds on the toy corpus is started with. A file, so that flags may override it.
TOY = [str(Path(__file__).with_name("toy_run.py"))]


def random_run(toy, folder, cfg):
    """Makes a run's folder with one checkpoint, of a random model (ModelConfig) with the toy's tokenizer."""
    folder.mkdir()
    decoder = Decoder(cfg, torch.Generator().manual_seed(1))
    checkpoint.save(folder, {"step": 7, "model": decoder.state_dict(), "config": vars(cfg)}, keep=1)
    shutil.copy(toy / "tokenizer.json", folder)
    return folder


def last_of_each(*flags):
    """Flags without those that later ones override: a flag given twice is refused."""
    return list({flag.split("=")[0]: flag for flag in flags}.values())


def write_bin(path, tokens):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder of bins over a vocabulary of 3,000 words: train in two shards, 150,000 tokens, and
    validation.
    """
    folder = tmp_path_factory.mktemp("toy")
    letters, words = random.Random(0), set()
    while len(words) < 3000:
        words.add(" " + "".join(letters.choices("abcdefghij", k=letters.randint(4, 7))))
    tokens = [bytes([i]) for i in range(256)] + [word.encode() for word in sorted(words)]
    encoded = [base64.b64encode(token).decode() for token in tokens]
    spec = {"name": "toy", "pattern": prepare.PATTERN, "tokens": encoded}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    rng = np.random.default_rng(0)

    def draw(n):
        ids = 256 + np.minimum(rng.zipf(1.3, n) + rng.integers(0, 600, n), 2999)
        ids[rng.random(n) < 0.02] = ord(".")
        ids[::500] = TOY_VOCAB - 2  # <|endoftext|>
        return ids

    for name, n in (("train_000000", 100_000), ("train_000001", 50_000), ("val_000000", 5_000)):
        write_bin(folder / f"{name}.bin", draw(n))
    return folder


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def refuses(call, *says):
    """`call` ends in a UserError of one line that holds all of `says`."""
    with pytest.raises(UserError) as error:
        call()
    assert all(part in str(error.value) for part in says) and "\n" not in str(error.value), str(error.value)


def same(a, b):
    """Two nested states are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def toy_config(**changes):
    """The settings of a run on the toy corpus."""
    return replace(config.load(train.Config, TOY), **changes)
