"""A toy corpus (no network, no download), a toy model and runs of both that the tests share."""
import base64
import functools
import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # sums in another order would differ in the last bit

import numpy as np
import pytest
import torch
from forks import Forks

import prepare
import train
from model import Decoder
from nanomaml import checkpoint, config, machine
from nanomaml.config import UserError

# A suite that is started in the background, or under nohup, has these ignored, and so would its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
machine.peak_flops = functools.cache(machine.peak_flops)  # a second each

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TOY_VOCAB = 256 + 3000 + 2
CLOCK = {"seconds", "tok_per_s", "mfu", "data_wait"}  # of a log: what no two runs have in common

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


# ---- runs of train.py ----


def run(toy, out_dir, *flags):
    """A run in this process, of ten updates or as the flags say: (its last checkpoint's state, `log`)."""
    train.main(TOY + last_of_each(f"--data={toy}", f"--out_dir={out_dir}", "--max_steps=10", *flags))
    return checkpoint.newest(out_dir), log(out_dir)


def log(out_dir, name="log.jsonl"):
    """The lines of a log but for the clock's."""
    texts = Path(out_dir, name).read_text().splitlines()
    return [{key: x for key, x in json.loads(text).items() if key not in CLOCK} for text in texts]


def results(out_dir):
    """All that a run leaves but for the clock: parameters, optimizer, counters and lines, in order."""
    state = checkpoint.newest(out_dir)
    kept = ("model", "learner", "optimizers", "step", "tokens", "flops", "skipped")
    return [state[key] for key in kept] + [log(out_dir), log(out_dir, "probes.jsonl")]


def rewrite(path, change):
    """Applies `change` to the state of a checkpoint."""
    state = checkpoint.read(path)
    change(state)
    checkpoint.save(path.parent, state, keep=99)


@pytest.fixture(scope="session")
def whole(toy, tmp_path_factory):
    """The folder of ten hybrid updates with accumulation that met nothing. Only to be read."""
    out_dir = tmp_path_factory.mktemp("runs") / "whole"
    run(toy, out_dir)
    return out_dir


@pytest.fixture
def half(whole, tmp_path):
    """A copy of it where the newest checkpoint is that of step 5."""
    out_dir = shutil.copytree(whole, tmp_path / "half")
    (out_dir / "ckpt_000010.pt").unlink()
    return out_dir


@pytest.fixture(scope="session")
def forks():
    with Forks() as forks:
        yield forks
