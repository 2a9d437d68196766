"""What run.json says of a run besides its settings: state, command, code, versions, machine and data."""
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanomaml import machine
from nanomaml.ranks import rank_and_world


def commit():
    """{"commit", "dirty": whether files that git tracks differ from it} of this code; {} without git."""
    def git(*args):
        done = subprocess.run(["git", *args], cwd=Path(__file__).parent, capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": git("status", "--porcelain", "-uno") != ""}
    except (OSError, subprocess.CalledProcessError):
        return {}


def facts(learner, device, dtype, digests, validation):
    """Facts of a starting run, for JSON. digests: `resume.data_digests`; validation: {domain: Corpus}."""
    return {
        "command": sys.argv, "started": now(), **commit(), "python": platform.python_version(),
        "torch": torch.__version__, "platform": platform.platform(), "device": str(device),
        "dtype": str(dtype).removeprefix("torch."), "ranks": rank_and_world()[1],
        "machine": machine.describe(device, dtype),
        "parameters": sum(p.numel() for p in learner.decoder.parameters()),
        "head_parameters": sum(p.numel() for p in learner.head.parameters()),
        "tokenizer": digests["tokenizer"],
        "validation": {name: split.digest for name, split in validation.items()},
    }


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
