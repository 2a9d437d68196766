"""Several ranks: refused where they disagree, named where one dies, gone before the interpreter is."""

import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
from conftest import TOY, same, write_bin
from forks import Forks

import checkpoint


@pytest.fixture(scope="module")
def forks():
    with Forks() as forks:
        yield forks


def run(forks, flags, *of_rank, patches=()):
    """[(exit code, output)] of two ranks with the same flags, and of_rank[r] of each."""
    pids = [forks.start([*TOY, *flags, *of_rank[rank:rank + 1]], rank, 2, patch=dict(patches).get(rank, ""))
            for rank in range(2)]
    return [forks.wait(pid) for pid in pids]


def errors(results):
    """The last words of all ranks that failed, which have no traceback."""
    assert all(code in (1, 2) and "Traceback" not in output for code, output in results), results
    return [line for _, output in results for line in output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("flag, says", [
    ("lr=0.01", "lr = 0.001 on rank 0, 0.01 on rank 1"),
    ("weight_decay=0", "weight_decay = 0.1 on rank 0, 0.0 on rank 1"),
    ("grad_clip=2", "grad_clip = 1.0 on rank 0, 2.0 on rank 1"),
    ("seed=2", "seed = 1 on rank 0, 2 on rank 1"),
    ("meta_share=0", "meta_share = 0.5 on rank 0, 0.0 on rank 1"),
    ("inner_steps=1", "inner_steps = 3 on rank 0, 1 on rank 1"),
    ("batch_size=2", "batch_size = 4 on rank 0, 2 on rank 1"),
    ("eval_sequences=9", "eval_sequences = 8 on rank 0, 9 on rank 1")])
def test_ranks_with_other_settings_are_refused(forks, toy, tmp_path, flag, says):
    """They ended with different parameters and exit code 0, or in DDP's traceback."""
    results = run(forks, [f"--data={toy}", f"--out_dir={tmp_path / 'run'}"], "--log_every=1", f"--{flag}")
    assert errors(results) == [f"error: rank 0: the ranks do not run the same: {says}: start them with the "
                               "same command, code and data"]
    assert not (tmp_path / "run").exists()


def test_ranks_with_other_data_code_or_pytorch_are_refused(forks, toy, tmp_path):
    """A silent wrong mix. Only the content differs, or the tokenizer; paths may."""
    flags = [f"--out_dir={tmp_path / 'run'}", "--max_steps=1"]
    other = shutil.copytree(toy, tmp_path / "other")
    both = f"--data={toy}", f"--data={other}"
    assert [code for code, _ in run(forks, flags, *both)] == [0, 0]
    write_bin(other / "val_000000.bin", np.full(5000, 300))
    [line] = errors(run(forks, flags, *both))
    assert "the ranks do not run the same: val = '" in line
    shutil.copy(toy / "val_000000.bin", other)
    write_bin(other / "train_000001.bin", np.full(50_000, 300))
    [line] = errors(run(forks, flags, *both))
    assert "the ranks do not run the same: training data = '" in line
    for patch, says in (("import torch; torch.__version__ = '1.0'", "PyTorch = "),
                        ("import progress; progress.__file__ = '/proc/none.py'", "the digest of the ")):
        [line] = errors(run(forks, [*flags, f"--data={toy}"], patches={1: patch}))
        assert f"the ranks do not run the same: {says}" in line


def test_a_rank_that_dies_ends_the_others_which_name_it(forks, toy, tmp_path):
    """The other's line was a traceback of gloo."""
    die = "import os, train; train.loss_weights = lambda cfg, step: os.kill(os.getpid(), 9)"
    flags = [f"--data={toy}", f"--out_dir={tmp_path}"]
    start = time.monotonic()
    survivor, dead = run(forks, flags, patches={0: "import machine; machine.LAST_WORDS = 1", 1: die})
    assert time.monotonic() - start < 120, "a collective alone would wait for ten minutes"
    assert dead[0] == -signal.SIGKILL
    assert errors([survivor]) == ["error: rank 1 has ended (without a word: killed, hanging, or its machine "
                                  "is gone), so all do; the same command resumes from the newest checkpoint"]


def test_a_shard_that_one_rank_cannot_read_stops_all_with_a_checkpoint(forks, toy, tmp_path):
    """The others waited in a collective until the group timed out, and the updates since were lost."""
    late = """import data, config, train
def read(corpus, shard, start, length):
    raise config.UserError("cannot read train_000001.bin: Input/output error")
def loss_weights(cfg, step):
    data.Corpus.read = read
    return real(cfg, step)
real, train.loss_weights = train.loss_weights, loss_weights"""
    flags = [f"--data={toy}", f"--out_dir={tmp_path / 'run'}", "--meta_share=0", "--checkpoint_every=0"]
    (code, output), failed = run(forks, flags, patches={1: late})
    step = checkpoint.newest(tmp_path / "run")["step"]
    assert code == 0 and f"stopped   at step {step}; the same command resumes" in output and 0 < step < 4
    assert errors([failed]) == ["error: rank 1: cannot read train_000001.bin: Input/output error; mend that, "
                                f"and the same command resumes from step {step}"]


def test_a_rank_that_fails_is_named_with_its_reason(forks, toy, tmp_path):
    """A shard that is cut short on one rank, at the start."""
    short = shutil.copytree(toy, tmp_path / "short")
    os.truncate(short / "train_000001.bin", 5000)
    lines = errors(run(forks, [f"--out_dir={tmp_path / 'run'}"], f"--data={toy}", f"--data={short}"))
    assert len(lines) == 2 and all("the file holds 1988; copy or prepare it again" in line for line in lines)


def test_what_all_ranks_find_is_said_once(forks, toy, tmp_path):
    """Each printed it."""
    [line] = errors(run(forks, [f"--data={toy}", f"--out_dir={tmp_path}", "--vocab_size=3000"]))
    assert line.startswith("error: rank 0: the tokenizer of")


def test_a_second_job_in_the_same_folder_is_refused(forks, toy, tmp_path):
    """Both ended with "done": logs interleaved, checkpoints deleted. One process or several ranks; a lock
    that a kill left behind does not count.
    """
    wait = "import time, train; train.loss_weights = lambda cfg, step: time.sleep(600)"
    flags = [*TOY, f"--data={toy}", f"--out_dir={tmp_path}", "--max_steps=3"]
    first = forks.start(flags, patch=wait)
    deadline = time.time() + 60
    while not (tmp_path / "config.json").exists() and time.time() < deadline:
        time.sleep(0.01)
    before = {path.name for path in tmp_path.iterdir()}
    held = f"out_dir = {tmp_path} is being written by process {first} on "
    [line] = errors([forks.wait(forks.start([*flags, "--seed=2"]))])
    assert held in line
    [line] = errors(run(forks, flags[len(TOY):]))
    assert held in line and {path.name for path in tmp_path.iterdir()} >= before
    os.kill(first, signal.SIGKILL)
    assert forks.wait(first)[0] == -signal.SIGKILL and (tmp_path / "lock.holder").exists()
    assert forks.wait(forks.start(flags))[0] == 0


def test_the_group_is_gone_before_the_run_ends(forks, toy, tmp_path):
    """Gloo's threads wait for the GIL, which DDP held while it joined them: at the end of a finished run
    that was started again, a rank hung or was aborted. When main is about to end, none is left, also where
    DDP is part of a cycle that no garbage collection happened to come by; and the interpreter is not
    finalized, which is where a thread that is left would abort.
    """
    patch = """import atexit, gc, os, train
gc.disable()
atexit.register(print, "finalized", flush=True)
real = train.wrap_for_ranks
def wrap_for_ranks(*args):
    model = real(*args)
    model.cycle = [model]
    return model
train.wrap_for_ranks = wrap_for_ranks
def write_report(out_dir):
    print([open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")])
train.write_report = write_report"""
    flags = [f"--data={toy}", f"--out_dir={tmp_path}", "--max_steps=2", "--report=True"]
    (code, output), _ = run(forks, flags, patches={0: patch})
    assert code == 0 and "python" in output and "gloo_runloop" not in output, output
    assert "finalized" not in output


def test_a_run_resumed_over_one_two_and_four_ranks_equals_one_left_alone(forks, toy, tmp_path):
    """Up to rounding: sums over ranks have another order."""
    flags = [*TOY, f"--data={toy}", "--max_steps=8", "--meta_blocks=1", "--eval_every=0", "--probe_every=0"]
    assert forks.wait(forks.start([*flags, f"--out_dir={tmp_path / 'one'}"]))[0] == 0
    for world, last in ((1, 2), (2, 4), (4, 6), (1, 8)):
        stop = """import os, signal, train
real, seen = train.loss_weights, []
def loss_weights(cfg, step):
    seen.append(step)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return real(cfg, step)
train.loss_weights = loss_weights"""
        pids = [forks.start([*flags, f"--out_dir={tmp_path / 'many'}"], rank, world, patch=stop)
                for rank in range(world)]
        assert [forks.wait(pid)[0] for pid in pids] == [0] * world
        assert checkpoint.newest(tmp_path / "many")["step"] == last
    one, many = (checkpoint.newest(tmp_path / name) for name in ("one", "many"))
    assert same([one[key] for key in ("tokens", "flops")], [many[key] for key in ("tokens", "flops")])
    for name, p in one["model"].items():
        assert (many["model"][name] - p).norm() < 1e-3 * p.norm(), name
    logs = [[json.loads(line).get("train/loss", 0) for line in (tmp_path / name / "log.jsonl").open()]
            for name in ("one", "many")]
    assert logs[0] == pytest.approx(logs[1], rel=1e-4) and len(logs[0]) == 8
