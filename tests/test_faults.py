"""What a long run meets: a full disk, damaged files, numbers gone bad, memory that creeps."""
import io
import json
import os
import re
import shutil
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, last_of_each, log, refuses, results, rewrite, run, same, toy_config

import adaptation
import data
import eval_ner
import prepare
import probes
import report
import train
from nanomaml import checkpoint, files, logs, tokenizer, trouble
from nanomaml.config import UserError
from nanomaml.resume import Progress

# ---- a disk that is full, a folder that is gone ----


class Full(io.FileIO):
    """A file on a full disk: it takes half of what it is given."""

    def write(self, content):
        super().write(content[:len(content) // 2])
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("module, name, call, step", [
    (checkpoint, "ckpt_000010.partial", 1, 5), (files, "log.jsonl", 2, 7), (files, "log.jsonl", 6, 10),
    (files, "probes.jsonl", 1, 10)])
def test_a_full_disk_at_a_checkpoint_or_a_line_of_a_log(
        toy, half, whole, monkeypatch, module, name, call, step):
    """It was a traceback, or PyTorch's internal text. The checkpoint before stays; at a line the run stops as
    on a signal, and the line is written when it goes on. At the very last one it ended with "done" and 0.
    """
    opened, finished = [], probes.Live.finished

    def open_on_disk(path, mode):
        opened.append(Path(path).name)
        return (Full if opened[-1] == name and opened.count(name) >= call else open)(path, mode)

    monkeypatch.setattr(module, "open", open_on_disk, raising=False)
    # Spectra are held back until the loop waits for them.
    monkeypatch.setattr(probes.Live, "finished", lambda self, through=-1: (
        finished(self, through) if self.pending and self.pending[0]["step"] <= through else ()))
    with pytest.raises(UserError, match=f"cannot write .*{half}/{name[:11]}.*: No space left") as error:
        run(toy, half)
    assert error.value.code == 1 and checkpoint.step_of(checkpoint.paths(half)[-1]) == step
    monkeypatch.undo()
    run(toy, half)
    assert same(results(half), results(whole))


def test_a_full_disk_while_a_file_is_replaced(toy, half, monkeypatch):
    """The old one was cut off."""
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    monkeypatch.setattr(files, "open", lambda path, mode: Full(path, mode), raising=False)
    refuses(lambda: tokenizer.save_tokenizer(data.load_tokenizer(toy), half),
            f"cannot write {half}/tokenizer.json: No space left")
    refuses(lambda: run(toy, half), f"cannot write {half}/config.json: No space left")
    assert before == {name: (half / name).read_bytes() for name in before}


def test_a_full_disk_in_preparation(tmp_path):
    """Here a limit on the size of a file, which the kernel keeps."""
    resource = pytest.importorskip("resource")
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"word{i} and more" for i in range(9000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = prepare.Config(out=str(tmp_path / "out"), source=str(tmp_path / "a.txt"), vocab_size=300)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    refuses(lambda: prepare.prepare(cfg), f"cannot write {tmp_path}/out", "File too large")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    prepare.prepare(cfg)
    assert data.open_corpus(tmp_path / "out")[0].tokens > 20_000


def test_a_folder_that_is_removed_ends_the_run_in_one_line(toy, tmp_path, monkeypatch):
    out_dir = tmp_path / "a"
    monkeypatch.setattr(train, "optimizer_step", lambda *args: shutil.rmtree(out_dir, ignore_errors=True))
    refuses(lambda: run(toy, out_dir), "cannot write", "No such file or directory")


# ---- damaged state ----


@pytest.mark.parametrize("line", [b"[1, 2]", b'{"step": null}', b'{"step": "3"}', b'{"step": 3, "\xff": 1}',
                                  b"[" * 100_000, b'{"step": 2', b"\0" * 50, b"5"])
def test_a_damaged_line_of_a_log_is_reported_and_dropped(half, capsys, line):
    """Each but the last three ended in a traceback."""
    path = half / "log.jsonl"
    texts = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*texts[:2], line, *texts[2:]]) + b"\n")
    logs.truncate(half, 10)
    assert path.read_bytes().splitlines() == texts
    assert f"{path}, line 3" in capsys.readouterr().err


def test_a_run_goes_on_without_its_log_or_config(toy, half, whole, capsys):
    for name in ("log.jsonl", "probes.jsonl", "tokenizer.json"):
        (half / name).unlink()
    (half / "config.json").write_bytes(b"\xff{")
    run(toy, half)
    assert "log.jsonl is missing" in capsys.readouterr().out
    assert log(half) == [line for line in log(whole) if line["step"] > 5]
    assert data.load_tokenizer(half).n_vocab == data.load_tokenizer(whole).n_vocab
    assert json.loads((half / "config.json").read_text())["out_dir"] == str(half)


@pytest.mark.parametrize("content", ['{"lengths": 3, "started": []}', '{"lengths": {"a": 1}}', "[]", "x"])
def test_a_run_json_from_elsewhere_ends_no_resume(toy, half, content):
    (half / "run.json").write_text(content)
    run(toy, half, "--max_steps=11", "--warmup_steps=2")
    assert json.loads((half / "run.json").read_text())["lengths"] == [10]


def test_a_run_whose_checkpoints_are_gone_is_not_wiped(toy, half):
    """The same command began again and left 2 lines of 45."""
    for path in half.glob("ckpt*"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in half.iterdir()}
    refuses(lambda: run(toy, half), f"{half}/log.jsonl holds a run up to step 10 whose checkpoints are gone")
    assert {path.name: path.read_bytes() for path in half.iterdir()} == before
    (half / "log.jsonl").unlink()
    refuses(lambda: run(toy, half), f"{half}/probes.jsonl holds a run up to step 10")


def test_a_newest_checkpoint_without_optimizer_is_passed_over(toy, whole, tmp_path, capsys):
    out_dir = shutil.copytree(whole, tmp_path / "a")
    rewrite(out_dir / "ckpt_000010.pt", lambda state: state.pop("optimizers"))
    run(toy, out_dir)
    assert "ckpt_000010.pt lacks optimizers; trying the one before" in capsys.readouterr().err
    assert same(results(out_dir), results(whole))


class Payload(str):
    def __reduce__(self):
        return os.mkdir, (str(self),)


@pytest.mark.parametrize("is_zip", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_malicious_pickle_never_runs_through_any_command(toy, half, tmp_path, is_zip):
    """All that takes a checkpoint; no other call in the repository reads a pickle."""
    target, path, content = tmp_path / "owned", half / "ckpt_000005.pt", io.BytesIO()
    state = checkpoint.read(path) | {"payload": Payload(target)}
    torch.save(state, content, _use_new_zipfile_serialization=is_zip)
    path.write_bytes(content.getvalue() + checkpoint.TRAILER % zlib.crc32(content.getvalue()))
    toys = [*TOY, f"--data={toy}"]
    for main, *argv in (
            (train.main, *toys, f"--out_dir={half}"),
            (train.main, *toys, f"--out_dir={tmp_path}/new", f"--init_from={path}"),
            (train.main, *toys, f"--out_dir={tmp_path}/new", f"--init_from={half}"),
            (eval_ner.main, str(half), "--data=none"), (eval_ner.main, str(path), "--data=none"),
            (probes.main, str(half)), (adaptation.main, str(half))):
        with pytest.raises(UserError, match="is not loaded, since it holds code|is damaged: restore one"):
            main(argv)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the payload is live"
    for source in (path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("nanomaml/*.py"))):
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\b(.*)", source))
        assert "pickle.load" not in source and "allow_pickle" not in source


@pytest.mark.parametrize("name", ["config.json.partial", "log.jsonl.partial", "run.json.partial", "lock",
                                  "lock.holder", "ckpt_000006.partial", "log.jsonl", "probes.jsonl"])
def test_no_link_in_a_foreign_folder_leads_what_is_written_elsewhere(toy, half, tmp_path, name):
    """Each overwrote the file that it pointed to, or began it."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (half / name).unlink(missing_ok=True)
    (half / name).symlink_to(victim)
    with suppress(UserError):
        run(toy, half, "--checkpoint_every=1")
    assert victim.read_text() == "mine"
    for link in ("ner.jsonl", "other.jsonl"):  # to nothing: it would be begun
        (half / link).symlink_to(tmp_path / "begun")
    refuses(lambda: files.append(half / "other.jsonl", {"step": 1}), "other.jsonl is a link")
    refuses(lambda: eval_ner.main([str(half), "--data=none"]), "ner.jsonl is a link")
    (half / "report.png").symlink_to(victim)
    if not (half / name).is_symlink():
        report.write([half])
    assert victim.read_text() == "mine" and not (tmp_path / "begun").exists()


def test_a_torn_line_of_results_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "ner.jsonl"
    for torn, kept in ((b'{"f1": 0.', []), (b'{"f1": 1}', [{"f1": 1}]), (b"", []), (b"\0\0\0", [])):
        path.write_bytes(b'{"f1": 2}\n' + torn)
        files.append(path, {"f1": 3})
        files.append(path, {"f1": 4})
        assert log(tmp_path, "ner.jsonl") == [{"f1": 2}, *kept, {"f1": 3}, {"f1": 4}]
    refuses(lambda: files.append(tmp_path, {}), f"cannot write {tmp_path}: Is a directory")


# ---- numbers gone bad ----


BREAK = """import math, os, train
real, n, rank = train.Learner.forward, 0, int(os.environ.get("RANK", 0))
def forward(self, kind, batch):
    global n
    n += self.training
    losses, metrics = real(self, kind, batch)
    factor = math.nan if self.training and {when} else 1.0
    return {{part: loss * factor for part, loss in losses.items()}}, metrics
train.Learner.forward = forward"""
HERE, THERE = "rank == 1 and (n == 4 or n > 8)", [0, 1, 1, 1, *range(2, 12)]


@pytest.mark.parametrize("world, when, skipped, step, flags", [
    (1, "n == 6", [0, 1, 1], 3, ["--max_steps=3"]),
    (1, "True", [1, 2, 3], 0, ["--max_steps=3"]),
    (2, HERE, THERE, 4, []),
    pytest.param(2, HERE, THERE, 4, ["--adapt=all"], marks=pytest.mark.slow)])
def test_bad_updates_are_skipped_on_all_ranks_and_end_the_run(
        forks, toy, tmp_path, world, when, skipped, step, flags):
    """Updates of 4 micro-steps over all ranks; n counts those of a rank. A run whose updates were all bad is
    not done, though its parameters are finite.
    """
    argv = [*TOY, f"--data={toy}", f"--out_dir={tmp_path}", "--inner_lr=0.1", "--probe_every=0",
            "--eval_every=0", "--checkpoint_every=4", "--keep=1", *last_of_each("--max_steps=30", *flags)]
    patches = dict.fromkeys(range(world), BREAK.format(when=when))
    (code, output), *_ = forks.run(argv, world, patches=patches, kill_all=True)
    assert [line["skipped"] for line in log(tmp_path)] == list(skipped)
    state = checkpoint.newest(tmp_path)
    assert state["step"] == step and all(torch.isfinite(p).all() for p in state["model"].values())
    if skipped[-1] > 1:
        row = min(10, len(skipped))
        says = f"not finite in {row} updates in a row (step {len(skipped)})"
        assert code == 2 and says in output and f"--init_from={tmp_path}/ckpt_00000{step}.pt" in output
    else:
        assert code == 0 and "done" in output


def test_the_metrics_of_a_skipped_update_are_not_averaged_in():
    progress = Progress()
    progress.finish_update({"a": torch.tensor([torch.nan, 2.0])}, torch.tensor(1.0), 0.0)
    progress.finish_update({"a": torch.tensor([6.0, 2.0])}, torch.tensor(0.0), 0.0)
    assert progress.sums["a"].tolist() == [6.0, 2.0]
    assert progress.step == 2 and progress.skipped.tolist() == [1.0, 0.0], "in all, in a row"


def test_a_broken_run_ends_with_the_last_good_checkpoint(toy, tmp_path, capsys):
    """It printed "done" and then a traceback from sampling; the checkpoints that were kept were all from
    after the breakdown, and the advice was refused in the same folder.
    """
    flags, out_dir = ["--max_steps=5", "--lr=1e30", "--checkpoint_every=3", "--keep=1"], tmp_path / "a"
    refuses(lambda: run(toy, out_dir, *flags), "not finite", f"--init_from={out_dir}/ckpt_000000.pt")
    assert "done" not in capsys.readouterr().out
    assert [path.name for path in out_dir.glob("ckpt*")] == ["ckpt_000000.pt"]
    run(toy, tmp_path / "b", f"--init_from={out_dir}/ckpt_000000.pt", "--max_steps=1")


@pytest.mark.parametrize("first", range(20, 31))
def test_ten_bad_updates_in_a_row_end_the_run_whenever_they_begin(first):
    """Every tenth update was looked at, so up to 19 were skipped. A healthy run is looked at rarely."""
    cfg, progress, looks = SimpleNamespace(max_steps=100, lr=1.0, inner_lr=1.0, out_dir="no"), Progress(), 0
    watch = trouble.Guard(cfg, progress, None)
    with pytest.raises(UserError, match="not finite in 10 updates in a row"):
        for step in range(100):
            progress.finish_update({}, torch.tensor(float(step >= first)), 0.0)
            watch.require_finite()
            looks += watch.is_suspect
    assert progress.step == first + 10 and looks <= 9


def test_a_rate_that_halves_is_noted_once_it_lasts(capsys):
    """Cores shared with another process make two threads many times slower, and nothing said so."""
    watch = trouble.Guard(toy_config(), Progress(), SimpleNamespace(failure=None))
    for rate in [1000] * 8 + [400, 1000] + [400] * 2:
        watch.check({"tok_per_s": rate})
    assert not capsys.readouterr().out, "single slow lines"
    watch.check({"tok_per_s": 400})
    assert "400 tok/s, after 1,000: does another process use these cores?" in capsys.readouterr().out
    for _ in range(20):
        watch.check({"tok_per_s": 400})
    assert not capsys.readouterr().out


# ---- nobody who reads the output ----


def test_output_that_nobody_takes_does_not_end_the_run(toy, tmp_path, monkeypatch, capfd):
    """`train.py | tee log` and Ctrl-C: tee died first, and the checkpoint was lost to a BrokenPipeError."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        run(toy, tmp_path, "--max_steps=1")
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path)["step"] == 1
    assert capfd.readouterr().err.count("warning: nothing more is printed (") == 1


# ---- millions of updates ----


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux alone tells a process's memory")
def test_two_thousand_updates_take_no_more_memory_and_no_more_files(toy, tmp_path, monkeypatch):
    """Nor threads. A kept batch is 4 KiB an update, a kept graph far more. Measured: 0.1 to 0.2 KiB once
    allocators have settled, and now and then a megabyte at once, which the median does not see.
    """
    seen, append = np.zeros((2000, 3), int), files.append

    def spy(path, line):
        append(path, line)
        if "lr" in line:
            resident = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]
            folders = "/proc/self/fd", "/proc/self/task"
            seen[line["step"] - 1] = int(resident), *(len(os.listdir(folder)) for folder in folders)

    monkeypatch.setattr(files, "append", spy)
    flags = ["--max_steps=2000", "--global_batch_size=4", "--batch_size=2", "--probe_every=20"]
    flags += ["--eval_every=200", "--checkpoint_every=200", "--eval_episodes=2"]
    run(toy, tmp_path, *flags)
    resident, descriptors, threads = seen[1000:].T
    slope = np.median(resident[200:] - resident[:-200]) / 200
    assert slope < 0.5, f"{slope:.3f} KiB an update, {resident[0]} to {resident[-1]} KiB"
    assert np.ptp(descriptors) == 0 and np.ptp(threads) == 0


def test_counters_are_exact_where_floats_would_round(tmp_path):
    """2^53 + 1 is no float. Seven days of eight GPUs count 10^21 FLOPs, more than 64 bits hold."""
    progress = Progress(tokens=2**53, flops=2**53)
    progress.count("lm", 1, 1, 2**70)
    progress.count("lm", 1, 0, 1)
    progress.add_seconds(1.0)
    files.append(tmp_path / "log.jsonl", progress.axes() | progress.interval_metrics(1e12))
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["tokens"], line["flops"]) == (2**53 + 1, 2**70 + 2**53 + 1)
    state = {"step": 1, "model": {}, "config": {}, **vars(progress)}
    assert same(checkpoint.read(checkpoint.save(tmp_path, state, keep=1)), state)


def test_steps_of_seven_digits_come_after_those_of_six(tmp_path):
    """By name ckpt_1000000.pt comes before ckpt_999999.pt."""
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        checkpoint.save(tmp_path, {"step": step, "model": {}, "config": {}}, keep=3)
    assert list(map(checkpoint.step_of, checkpoint.paths(tmp_path))) == [999_999, 1_000_000, 1_000_001]
    assert checkpoint.newest(tmp_path)["step"] == 1_000_001
