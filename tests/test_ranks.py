"""Several ranks: refused where they disagree, ended together where one fails, equal to one process."""
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, log, refuses, run, toy_config, write_bin

from nanomaml import checkpoint, ranks, resume
from schedule import block_kinds


def errors(ended):
    """The last lines of all ranks that failed, without a traceback."""
    assert all(code in (1, 2) and "Traceback" not in output for code, output in ended), ended
    return [line for _, output in ended for line in output.splitlines() if line.startswith("error: ")]


# ---- ranks that do not run the same ----


def test_all_that_changes_what_is_computed_must_be_the_same_on_all_ranks(tmp_path, monkeypatch):
    """Else they ended with different parameters and 0. Code is what the run imports, from any folder."""
    (tmp_path / "own_loss.py").write_text("weight = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("own_loss")
    cfg = toy_config()
    shared, code = resume.what_ranks_share(cfg), "the digest of the source files"
    assert set(shared) - set(asdict(cfg)) == {code, "PyTorch"}
    own = {"out_dir", "data", "init_from", "wandb", "wandb_project", "device"}
    assert set(asdict(cfg)) - set(shared) == own
    (tmp_path / "own_loss.py").write_text("weight = 2\n")
    changed = resume.what_ranks_share(replace(cfg, lr=0.5))
    assert {what for what in shared if shared[what] != changed[what]} == {code, "lr"}
    monkeypatch.delitem(sys.modules, "own_loss")


def test_what_is_wrong_on_all_ranks_is_said_by_the_first(forks, toy, tmp_path):
    """In one line, with both values where they do not run the same, before anything is written. Only the
    content of the data differs, or the settings; paths may. torchrun ends the others once one has exited.
    """
    other, both = shutil.copytree(toy, tmp_path / "other"), (f"--data={toy}", f"--data={tmp_path / 'other'}")
    flags = [*TOY, f"--out_dir={tmp_path / 'run'}", "--max_steps=0"]
    write_bin(other / "val_000000.bin", np.full(5000, 300))
    for common, of_rank, says in (
            ([f"--data={toy}"], ("--log_every=1", "--lr=0.01"), "lr = 0.001 on rank 0, 0.01 on rank 1"),
            ([f"--data={toy}", "--vocab_size=3000"], (), "the tokenizer of"),
            ([], both, "corpus 1, val_000000.bin = '")):
        first, second = forks.run(flags + common, 2, of_rank, kill_all=True)
        [line] = errors([first])
        assert line.startswith("error: rank 0: ") and says in line and "error" not in second[1]
    assert not (tmp_path / "run").exists()
    shutil.copy(toy / "val_000000.bin", other)
    assert [code for code, _ in forks.run(flags, 2, both)] == [0, 0]


# ---- one that fails ----


@pytest.mark.parametrize("call, says, has_traceback", [
    ("data.load_tokenizer = lambda *_: train.require(False, 'a\\nbad disk')", "a bad disk", False),
    ("train.optimizer_step = lambda *args: 1 / 0", "ZeroDivisionError: division by zero", True)])
def test_a_rank_that_fails_says_why_and_the_others_end(forks, toy, tmp_path, call, says, has_traceback):
    """A traceback of gloo was all that the other one said."""
    patch = f"import data, train; {call}"
    other, failed = forks.run([*TOY, f"--data={toy}", f"--out_dir={tmp_path}"], 2, patches={1: patch})
    assert [line.partition(" (")[0] for line in errors([other])] == ["error: rank 0: another rank has ended"]
    assert f"error: rank 1: {says}\n" in failed[1] and ("Traceback" in failed[1]) == has_traceback


def test_a_shard_that_one_rank_cannot_read_stops_all_with_a_checkpoint(forks, toy, tmp_path):
    """The others waited in a collective until the group timed out, and the updates since were lost."""
    late = """import train
from nanomaml import bins
def read(corpus, shard, start, length):
    raise train.UserError("cannot read train_000001.bin: Input/output error")
def optimizer_step(*args):
    bins.Corpus.read = read
    real(*args)
real, train.optimizer_step = train.optimizer_step, optimizer_step"""
    flags = [*TOY, f"--data={toy}", f"--out_dir={tmp_path}", "--meta_share=0", "--checkpoint_every=0"]
    (code, output), failed = forks.run(flags, 2, patches={1: late})
    step = checkpoint.newest(tmp_path)["step"]
    assert code == 0 and f"stopped   at step {step}; the same command resumes" in output and 0 < step < 4
    [line] = errors([failed])
    assert line.startswith("error: rank 1: cannot read train_000001.bin: Input/output error; fix that; ")
    assert line.endswith(f"resumes from step {step}")


@pytest.mark.slow
def test_torchrun_names_the_rank_that_dies(toy, tmp_path):
    """Its "root cause" is the first in the same second, so the rank that only noticed may stand there."""
    code = "import os, sys; sys.path.insert(0, {root!r})\nimport train\nif os.environ['RANK'] == '1':\n" \
           "    train.optimizer_step = lambda *args: os.kill(os.getpid(), 9)\ntrain.config.run(train.main)"
    (tmp_path / "worker.py").write_text(code.format(root=str(ROOT)))
    ended = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "worker.py"), *TOY, f"--data={toy}", f"--out_dir={tmp_path}"],
        capture_output=True, text=True, cwd=ROOT)
    died = re.search(r"rank      : 1 \(.*\n +exitcode  : -9 ", ended.stderr)
    assert ended.returncode and died, ended.stderr


# ---- one folder, one run ----


def test_a_second_job_in_the_same_folder_is_refused(forks, toy, tmp_path):
    """Both ended with "done": logs interleaved, checkpoints deleted. One process or several ranks."""
    held = f"out_dir = {tmp_path} is being written by process {os.getpid()} on "
    with ranks.only_writer(tmp_path / "lock", "it"):
        before = {path.name for path in tmp_path.iterdir()}
        refuses(lambda: run(toy, tmp_path), held)
        [line] = errors(forks.run([*TOY, f"--data={toy}", f"--out_dir={tmp_path}"], 2, kill_all=True)[:1])
        assert held in line and {path.name for path in tmp_path.iterdir()} == before
    assert run(toy, tmp_path, "--max_steps=0")[0]["step"] == 0


@pytest.mark.slow
def test_the_group_is_gone_before_the_run_ends(forks, toy, tmp_path):
    """Gloo's threads wait for the GIL, which DDP held while it joined them: a rank hung or was aborted. When
    main is about to end, none is left, also where DDP is part of a cycle that is not collected yet; and the
    interpreter is not finalized, which is where a thread that is left would abort.
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
    flags = [*TOY, f"--data={toy}", f"--out_dir={tmp_path}", "--max_steps=2", "--report=True"]
    (code, output), _ = forks.run(flags, 2, patches={0: patch})
    assert code == 0 and "python" in output and "gloo_runloop" not in output, output
    assert "finalized" not in output


# ---- equal to one process ----


# Prints what a rank holds at each checkpoint.
SHOW = """import hashlib, functools, torch
from nanomaml import trouble
torch.compile = functools.partial(torch.compile, backend="aot_eager")
real = trouble.Guard.is_sound
def is_sound(watch, learner, *args):
    state = b"".join(p.numpy(force=True).tobytes() for p in learner.state_dict().values())
    print("parameters", hashlib.sha256(state).hexdigest(), flush=True)
    return real(watch, learner, *args)
trouble.Guard.is_sound = is_sound"""


def equal_up_to_rounding(one, many):
    """Adam turns gradients that are zero but for rounding into whole steps: compare the bulk."""
    assert (one["step"], one["tokens"], one["flops"]) == (many["step"], many["tokens"], many["flops"])
    for part in ("model", "learner"):
        assert one[part].keys() == many[part].keys()
        for name, p in one[part].items():
            assert torch.linalg.norm(many[part][name] - p) < 1e-3 * torch.linalg.norm(p) + 1e-6, name


@pytest.mark.parametrize("flags", [[], *(pytest.param(flags, marks=pytest.mark.slow) for flags in (
    ["--head_layers=2", "--inner_lr=0.1"], ["--adapt=all", "--inner_lr=0.1"],
    ["--meta_share=0", "--head_layers=2"], ["--compile=True"], ["--read_out=context"]))], ids=" ".join)
def test_two_ranks_are_bit_identical_and_equal_one_process(forks, toy, tmp_path, flags):
    """Twenty updates of LM, episodes and both; a head of several layers goes without gradient in some. One
    process makes twice the micro-steps.
    """
    flags = [*flags, "--max_steps=20", "--seed=2"]
    assert set((block_kinds(toy_config(max_steps=20, seed=2)) == "episodes").sum(1)) == {0, 1, 2}
    argv = [*TOY, f"--data={toy}", f"--out_dir={tmp_path / 'two'}", *flags]
    ended = forks.run(argv, 2, patches=dict.fromkeys(range(2), SHOW))
    assert [code for code, _ in ended] == [0, 0], ended
    held = [[line for line in output.splitlines() if line.startswith("parameters")] for _, output in ended]
    assert held[0] == held[1] and len(set(held[0])) == 5
    state, lines = run(toy, tmp_path / "one", *flags, "--compile=False")
    equal_up_to_rounding(state, checkpoint.newest(tmp_path / "two"))
    for x, y in zip(lines, log(tmp_path / "two"), strict=True):
        assert x.keys() == y.keys()
        assert all(x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-3) for key in x if "acc" not in key)


@pytest.mark.slow
def test_a_run_resumed_over_one_two_and_four_ranks_equals_one_on_one(forks, toy, tmp_path):
    """Up to rounding: sums over ranks have another order. In its warm-up a run may stop anywhere."""
    flags = [*TOY, f"--data={toy}", "--meta_blocks=1", "--warmup_steps=9", "--eval_every=0"]
    for name, parts in (("one", [(1, 8)]), ("many", [(1, 2), (2, 4), (4, 6), (1, 8)])):
        for world, last in parts:
            ended = forks.run([*flags, f"--out_dir={tmp_path / name}", f"--max_steps={last}"], world)
            assert [code for code, _ in ended] == [0] * world, ended
    equal_up_to_rounding(*(checkpoint.newest(tmp_path / name) for name in ("one", "many")))
    losses = [[line.get("train/loss", 0) for line in log(tmp_path / name)] for name in ("one", "many")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 8
