"""What a long run meets: a full disk, damaged files, numbers gone bad, nobody who reads the output."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import TOY, last_of_each, refuses, same

import adaptation
import checkpoint
import data
import eval_ner
import logs
import prepare
import probes
import report
import train
from config import UserError
from progress import Progress

ROOT = Path(train.__file__).parent
CLOCK = ("seconds", "tok_per_s", "mfu", "data_wait")


def run(toy, out_dir, *flags):
    train.main([*TOY, f"--data={toy}", f"--out_dir={out_dir}", *last_of_each("--max_steps=10", *flags)])


def lines(out_dir, name="log.jsonl"):
    """Of a log, without what the clock says."""
    texts = (Path(out_dir) / name).read_text().splitlines()
    return [{key: x for key, x in json.loads(text).items() if key not in CLOCK} for text in texts]


def equals(out_dir, other):
    """Two runs ended with the same parameters, optimizer and logs."""
    a, b = checkpoint.newest(out_dir), checkpoint.newest(other)
    keys = ("step", "tokens", "model", "learner", "optimizers")
    return (all(same(a[key], b[key]) for key in keys) and lines(out_dir) == lines(other)
            and lines(out_dir, "probes.jsonl") == lines(other, "probes.jsonl"))


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """The folder of ten updates that met nothing."""
    out_dir = tmp_path_factory.mktemp("whole")
    run(toy, out_dir)
    return out_dir


@pytest.fixture
def half(whole, tmp_path):
    """A copy of it where the newest checkpoint is that of step 5."""
    out_dir = shutil.copytree(whole, tmp_path / "half")
    (out_dir / "ckpt_000010.pt").unlink()
    return out_dir


def rewrite(path, change):
    """Applies `change` to the state of a checkpoint."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


# ---- a disk that is full, a folder that is gone ----


class Full:
    """A file on a full disk: it takes half of what it is given."""

    def __init__(self, file):
        self.file = file

    def write(self, content):
        self.file.write(content[:len(content) // 2])
        self.file.flush()
        raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def fill_disk(monkeypatch, module, is_full):
    """`open` in the module gives a Full file where is_full(name of the file)."""
    def opened(path, mode):
        file = open(path, mode)
        return Full(file) if is_full(Path(path).name) else file

    monkeypatch.setattr(module, "open", opened, raising=False)


def test_a_full_disk_at_a_checkpoint(toy, tmp_path, whole, monkeypatch, capsys):
    """PyTorch's internal text was printed. The checkpoint before stays, and the same command goes on."""
    fill_disk(monkeypatch, checkpoint, lambda name: name == "ckpt_000010.partial")
    refuses(lambda: run(toy, tmp_path), f"cannot write checkpoint {tmp_path}/ckpt_000010.pt: No space left")
    assert {path.name for path in tmp_path.glob("ckpt*")} == {"ckpt_000000.pt", "ckpt_000005.pt"}
    monkeypatch.undo()
    run(toy, tmp_path)
    assert equals(tmp_path, whole)


@pytest.mark.parametrize("name, call, steps", [
    ("log.jsonl", 6, range(5, 10)), ("log.jsonl", 7, range(5, 10)), ("probes.jsonl", 2, range(5, 10)),
    ("probes.jsonl", 3, [10])])
def test_a_full_disk_at_a_line_of_a_log(toy, tmp_path, whole, monkeypatch, name, call, steps):
    """It was a traceback, without a checkpoint. Now the run stops as on a signal, and the line is written
    when it goes on. At the very last line the run ended with "done" and 0.
    """
    calls, finished = [], probes.Spectra.finished
    if steps == [10]:  # spectra are held back until the loop waits for them
        monkeypatch.setattr(probes.Spectra, "finished", lambda self, through=-1: (
            finished(self, through) if self.pending and self.pending[0]["step"] <= through else ()))
    fill_disk(monkeypatch, logs, lambda opened: opened == name and calls.append(name) is None
              and len(calls) >= call)
    with pytest.raises(UserError, match="No space left on device") as error:
        run(toy, tmp_path)
    assert f"cannot write {tmp_path}/{name}: " in str(error.value) and error.value.code == 1
    assert checkpoint.newest(tmp_path)["step"] in steps
    monkeypatch.undo()
    run(toy, tmp_path)
    assert equals(tmp_path, whole)


def test_a_full_disk_while_the_tokenizer_is_written(toy, half, whole, monkeypatch):
    """The old one was cut off."""
    before = (half / "tokenizer.json").read_bytes()
    real = Path.write_bytes

    def write_bytes(path, content):
        real(path, content[:9])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    refuses(lambda: data.save_tokenizer(data.load_tokenizer(toy), half),
            f"cannot write {half}/tokenizer.json: No space left")
    refuses(lambda: run(toy, half), f"cannot write {half}/config.json: No space left")
    monkeypatch.undo()
    assert (half / "tokenizer.json").read_bytes() == before and not list(half.glob("*.partial"))
    run(toy, half)
    assert equals(half, whole)


def test_a_full_disk_in_preparation(tmp_path):
    """Here a limit on the size of a file, which the kernel keeps."""
    resource = pytest.importorskip("resource")
    (tmp_path / "a.txt").write_text("\n\n\n".join(f"word{i} and more" for i in range(20_000)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    cfg = prepare.Config(out=str(tmp_path / "out"), source=str(tmp_path / "a.txt"), vocab_size=300)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        refuses(lambda: prepare.prepare(cfg), f"cannot write {tmp_path}/out: File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    prepare.prepare(cfg)
    assert data.open_corpus(tmp_path / "out")[0].tokens > 20_000


def test_a_folder_that_is_removed_ends_the_run_in_one_line(toy, tmp_path, monkeypatch):
    real = train.optimizer_step

    def step(*args):
        shutil.rmtree(tmp_path / "a", ignore_errors=True)
        real(*args)

    monkeypatch.setattr(train, "optimizer_step", step)
    refuses(lambda: run(toy, tmp_path / "a"), "cannot write", "No such file or directory")


# ---- damaged state ----


def test_probes_pass_over_a_damaged_checkpoint(whole, tmp_path, capsys):
    """They stopped there, where train.py and eval_ner.py go on."""
    out_dir = shutil.copytree(whole, tmp_path / "a")
    (out_dir / "ckpt_000010.pt").write_bytes(b"PK")
    probes.main([str(out_dir)])
    printed = capsys.readouterr()
    assert [json.loads(line)["step"] for line in printed.out.splitlines()] == [5]
    assert "ckpt_000010.pt is damaged" in printed.err


@pytest.mark.parametrize("line", [b"[1, 2]", b'{"step": null}', b'{"step": "3"}', b'{"step": 3, "\xff": 1}',
                                  b"[" * 100_000, b'{"step": 2', b"\0" * 50, b"5"])
def test_a_damaged_line_of_a_log_is_told_and_dropped(toy, half, whole, capsys, line):
    """Each but the last three ended in a traceback."""
    path = half / "log.jsonl"
    texts = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*texts[:2], line, *texts[2:]]) + b"\n")
    logs.truncate_log(path, 10)
    assert path.read_bytes().splitlines() == texts
    assert f"{path} loses 1 damaged lines, the first is line 3" in capsys.readouterr().err


def test_a_run_goes_on_without_its_log_or_config(toy, half, whole, capsys):
    (half / "log.jsonl").unlink()
    (half / "probes.jsonl").unlink()
    (half / "config.json").write_bytes(b"\xff{")
    (half / "tokenizer.json").unlink()
    run(toy, half)
    assert "log.jsonl is missing: the new one begins after step 5" in capsys.readouterr().out
    assert lines(half) == [line for line in lines(whole) if line["step"] > 5]
    for name in ("config.json", "tokenizer.json"):
        assert len((half / name).read_bytes()) >= 0.9 * len((whole / name).read_bytes())


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
    assert equals(out_dir, whole)


def cut(tensors, name):
    tensors[name] = tensors[name][:-1]


@pytest.mark.parametrize("change", [
    lambda state: cut(state["model"], "lm_head.weight"),
    lambda state: state["model"].pop("lm_head.weight"),
    lambda state: cut(state["optimizers"][0]["state"][0], "exp_avg"),
    lambda state: state["optimizers"].clear(),
    lambda state: state["optimizers"][0].pop("param_groups"),
    lambda state: state.update(optimizers=5),
    lambda state: state.update(learner=[]),
    lambda state: state["config"].update(d_model="wide"),
], ids=["shape", "missing", "shape of moments", "none", "no groups", "a number", "a list", "config"])
def test_a_checkpoint_of_other_content_is_refused_in_one_line(toy, half, change):
    rewrite(half / "ckpt_000005.pt", change)
    refuses(lambda: run(toy, half), "holds")


@pytest.mark.parametrize("change, says", [
    ({"pattern": "(["}, "Parsing error"), ({"pattern": 5}, "int"), ({"tokens": ["QQ==", 5]}, "int"),
    ({"tokens": []}, "every byte"), ({"tokens": ["QQ=="] * 2}, "every byte"), ({"tokens": ["?"]}, "Error"),
    ({"tokens": None}, "None"), ({"name": 5}, "no text"),
])
def test_a_damaged_tokenizer_is_refused_in_one_line(toy, tmp_path, change, says):
    spec = json.loads((toy / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
    refuses(lambda: data.load_tokenizer(tmp_path), "tokenizer.json is not a tokenizer that", says)


def test_a_tokenizer_that_is_a_folder_or_no_text(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    refuses(lambda: data.load_tokenizer(tmp_path), "cannot read", "tokenizer.json: Is a directory")
    (tmp_path / "tokenizer.json").rmdir()
    (tmp_path / "tokenizer.json").write_bytes(b'{"name": "\xff"}')
    refuses(lambda: data.load_tokenizer(tmp_path), "is not a tokenizer that prepare.py wrote")


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("kind", ["zip", "legacy"])
def test_a_malicious_pickle_never_runs_through_any_command(toy, half, tmp_path, kind):
    """All that takes a checkpoint; no other call in the repository reads a pickle."""
    target = tmp_path / "owned"
    state = torch.load(half / "ckpt_000005.pt", weights_only=True) | {"payload": Payload(target)}
    for path in half.glob("ckpt*"):
        path.unlink()
    path = half / "ckpt_000005.pt"
    torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    assert not target.exists()
    ner = str(tmp_path / "none")
    for main, argv in (
        (train.main, [*TOY, f"--data={toy}", f"--out_dir={half}"]),
        (train.main, [*TOY, f"--data={toy}", f"--out_dir={tmp_path}/new", f"--init_from={path}"]),
        (train.main, [*TOY, f"--data={toy}", f"--out_dir={tmp_path}/new", f"--init_from={half}"]),
        (eval_ner.main, [str(half), f"--data={ner}"]), (eval_ner.main, [str(path), f"--data={ner}"]),
        (probes.main, [str(half)]), (adaptation.main, [str(half)]),
    ):
        refuses(lambda: main(argv), "is damaged")  # noqa: B023
    report.main([str(half), f"--out={tmp_path}/report"])
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the payload is live"
    for path in ROOT.glob("*.py"):
        source = path.read_text()
        assert source.count("torch.load(") == source.count("weights_only=True"), path
        assert "pickle.load" not in source and "allow_pickle" not in source, path


def test_a_torn_line_of_results_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "ner.jsonl"
    for torn, kept in ((b'{"f1": 0.', []), (b'{"f1": 1}', [{"f1": 1}]), (b"", []), (b"\0\0\0", [])):
        path.write_bytes(b'{"f1": 2}\n' + torn)
        logs.append(path, {"f1": 3})
        logs.append(path, {"f1": 4})
        assert lines(tmp_path, "ner.jsonl") == [{"f1": 2}, *kept, {"f1": 3}, {"f1": 4}]
    refuses(lambda: logs.append(tmp_path, {}), f"cannot write {tmp_path}: Is a directory")


# ---- numbers gone bad ----


@pytest.mark.parametrize("flags", [["--max_steps=5"], ["--max_steps=40", "--adapt=all"]])
def test_a_broken_run_ends_with_the_last_good_checkpoint(toy, tmp_path, flags, capsys):
    """It printed "done" and then a traceback from sampling; the checkpoints that were kept were all from
    after the breakdown, and the advice was refused in the same folder.
    """
    flags, out_dir = [*flags, "--lr=1e30", "--checkpoint_every=3", "--keep=1"], tmp_path / "a"
    refuses(lambda: run(toy, out_dir, *flags), "not finite", f"--init_from={out_dir}/ckpt_000000.pt")
    assert "done" not in capsys.readouterr().out
    assert [path.name for path in out_dir.glob("ckpt*")] == ["ckpt_000000.pt"]
    run(toy, tmp_path / "b", f"--init_from={out_dir}/ckpt_000000.pt", "--max_steps=2")


@pytest.mark.parametrize("first", range(20, 31))
def test_ten_bad_updates_in_a_row_end_the_run_whenever_they_begin(first):
    """Every tenth update was looked at, so up to 19 were skipped. A healthy run is looked at seldom."""
    cfg = SimpleNamespace(max_steps=100, lr=1.0, inner_lr=1.0, out_dir="nowhere")
    progress, look, looks = Progress(), False, 0
    with pytest.raises(UserError, match="not finite in 10 updates in a row"):
        for step in range(100):
            progress.finish_update({}, torch.tensor(float(step >= first)), 0.0)
            look = train.require_finite(cfg, progress, look)
            looks += look
    assert progress.step == first + 10 and looks <= 9


def test_a_run_whose_every_update_was_bad_is_not_done(toy, tmp_path, monkeypatch):
    """Its parameters are finite, those of the start."""
    real = train.Learner.forward

    def forward(self, kind, batch):
        losses, metrics = real(self, kind, batch)
        factor = math.nan if torch.is_grad_enabled() else 1.0
        return {part: loss * factor for part, loss in losses.items()}, metrics

    monkeypatch.setattr(train.Learner, "forward", forward)
    refuses(lambda: run(toy, tmp_path, "--max_steps=3"), "not finite in 3 updates in a row (step 3)",
            "ckpt_000000.pt")


BAD_RANK = """
import sys; sys.path.insert(0, {root!r})
import math, os, train
real, calls = train.Learner.forward, [0]
def forward(self, kind, batch):
    losses, metrics = real(self, kind, batch)
    calls[0] += self.training
    factor = math.nan if os.environ["RANK"] == "1" and self.training and {when} else 1.0
    return {{part: loss * factor for part, loss in losses.items()}}, metrics
train.Learner.forward = forward
train.config.run(train.main)
"""


@pytest.mark.parametrize("adapt", ["head", "all"])
def test_a_bad_number_on_one_rank_is_skipped_on_all(toy, tmp_path, adapt):
    """In the last of an update's two micro-steps: skipped, counted and logged; where it stays, from the
    fifth update on, the run ends and names the checkpoint from before.
    """
    when = "(calls[0] == 4 or calls[0] > 8)"
    (tmp_path / "worker.py").write_text(BAD_RANK.format(root=str(ROOT), when=when))
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(tmp_path / "worker.py"), *TOY, f"--data={toy}", f"--out_dir={tmp_path}/a", "--max_steps=30",
         f"--adapt={adapt}", "--inner_lr=0.1", "--probe_every=0", "--eval_every=0", "--checkpoint_every=4",
         "--keep=1"],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240)
    assert result.returncode != 0 and "not finite in 10 updates in a row (step 14)" in result.stderr
    assert f"--init_from={tmp_path}/a/ckpt_000004.pt" in result.stderr
    assert [line["skipped"] for line in lines(tmp_path / "a")] == [0, 1, 1, 1, *range(2, 12)]
    state = checkpoint.newest(tmp_path / "a")
    assert state["step"] == 4 and all(torch.isfinite(p).all() for p in state["model"].values())


# ---- nobody who reads the output, Ctrl-C ----


def test_a_reader_that_goes_away_does_not_end_the_run(toy, tmp_path, whole):
    """`train.py | tee log` and Ctrl-C: tee died first, and the checkpoint was lost to a BrokenPipeError."""
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TOY, f"--data={toy}", f"--out_dir={tmp_path}",
         "--max_steps=4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert running.stdout.readline().startswith("machine")
    running.stdout.close()
    assert running.wait(120) == 0
    assert running.stderr.read() == "warning: nothing more is printed (Broken pipe); the run goes on\n"
    assert checkpoint.newest(tmp_path)["step"] == 4


def test_a_full_disk_under_the_output_does_not_end_the_run(toy, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        run(toy, tmp_path, "--max_steps=2")
        assert (sys.stdout, sys.stderr) == (out, err)
    assert checkpoint.newest(tmp_path)["step"] == 2


def test_ctrl_c_while_modules_load_prints_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("print('here', flush=True); import time; time.sleep(600)")
    running = subprocess.Popen([sys.executable, str(ROOT / "train.py")], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert running.stdout.readline() == b"here\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == -signal.SIGINT and err == b""


# ---- wandb ----


def test_wandb_that_fails_in_mid_run_warns_once(toy, tmp_path, whole, monkeypatch, capsys):
    """It warned at each line."""
    wandb = pytest.importorskip("wandb")
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) > 3:
            raise ConnectionResetError("Connection lost")

    broken = SimpleNamespace(define_metric=lambda *args, **options: None, log=fail, finish=fail, summary={},
                             resumed=False)
    monkeypatch.setattr(wandb, "init", lambda **options: broken)
    monkeypatch.setattr(wandb, "teardown", lambda: calls.append("teardown"))
    run(toy, tmp_path, "--wandb=online")
    assert capsys.readouterr().err.count("wandb failed, the run goes on: ConnectionResetError") == 1
    assert len(calls) == 5 and calls[-1] == "teardown"
    assert equals(tmp_path, whole)


def test_wandb_does_not_ask_where_there_is_no_terminal(tmp_path, monkeypatch, capsys):
    """Without a key it fails, and so warns."""
    pytest.importorskip("wandb")
    code = ("import dataclasses, logs\n@dataclasses.dataclass\nclass C:\n    wandb: str = 'online'\n"
            "    wandb_project: str = 'x'\nlogs.start_wandb(C(), 'a', '.')[1]()")
    env = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    result = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True,
                            text=True, cwd=tmp_path, timeout=120,
                            env=env | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)})
    assert result.returncode == 0 and "wandb failed, the run goes on: UsageError" in result.stderr
    assert "key" in result.stderr and "choice" not in result.stdout + result.stderr
