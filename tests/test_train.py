"""The loop end to end: the mix of steps, resume, ranks, stopping, what is written."""

import copy
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TOY, TOY_VOCAB, last_of_each, same, toy_config, write_bin

import checkpoint
import config
import data
import logs
import probes
import train
from config import UserError
from progress import Progress
from schedule import Schedule, block_kinds
from train import Config

ROOT = Path(train.__file__).parent


def run(toy, out_dir, *flags):
    """A run in this process; gives its last checkpoint's state and the lines of log.jsonl without the
    clock's.
    """
    train.main(TOY + last_of_each(f"--data={toy}", f"--out_dir={out_dir}", "--max_steps=10", *flags))
    return checkpoint.newest(out_dir), log(out_dir)


def log(out_dir, name="log.jsonl"):
    lines = [json.loads(line) for line in (Path(out_dir) / name).read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in ("seconds", "tok_per_s", "mfu", "data_wait")}
        for line in lines
    ]


def process(toy, out_dir, *flags, ranks=0, script=ROOT / "train.py"):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return subprocess.Popen(
        [
            sys.executable,
            *launcher,
            str(script),
            *TOY,
            *last_of_each(f"--data={toy}", f"--out_dir={out_dir}", "--max_steps=10", *flags),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """Ten hybrid updates with accumulation, uninterrupted, and their folder."""
    out_dir = tmp_path_factory.mktemp("whole")
    return *run(toy, out_dir), out_dir


# ---- the learning rate ----


def test_learning_rate_warms_up_and_decays_linearly():
    cfg = toy_config(max_steps=6000, warmup_steps=2500, lr=3e-4)
    factors = [train.lr_factor(cfg, step) for step in (0, 1249, 2499, 2500, 4250, 5999)]
    assert factors == pytest.approx([1 / 2500, 0.5, 1, 1, 0.5, 1 / 3500])


# ---- what a run writes ----


def test_a_run_writes_what_others_read(whole, capsys):
    state, lines, out_dir = whole
    assert {path.name for path in out_dir.iterdir()} == {
        "ckpt_000005.pt",
        "ckpt_000010.pt",
        "config.json",
        "lock",
        "log.jsonl",
        "probes.jsonl",
        "tokenizer.json",
    }
    training, validation = (
        [line for line in lines if "lr" in line],
        [line for line in lines if "val/loss" in line],
    )
    assert [line["step"] for line in training] == list(range(1, 11)) and [
        line["step"] for line in validation
    ] == [0, 5, 10]
    kinds = block_kinds(toy_config(max_steps=10))
    is_episodes = kinds == "episodes"
    assert {0, 1, 2} == set(is_episodes.sum(1)), "the seed gives updates of either kind and mixed ones"
    for line, blocks in zip(training, is_episodes):
        assert ("train/loss" in line) == (not blocks.all()) and ("meta/query_loss" in line) == blocks.any()
        assert {"tokens", "flops", "grad_norm", "skipped"} <= line.keys()
    assert training[-1]["tokens"] == (~is_episodes).sum() * 8 * 32, "LM tokens"
    for line in [
        json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines() if '"lr"' in line
    ]:
        assert line["tok_per_s"] > 0 and line["mfu"] > 0 and 0 < line["data_wait"] < 1
    assert [line["step"] for line in log(out_dir, "probes.jsonl")] == [0, 5, 10]
    assert {"rank/resid/01", "rank/v_proj/00", "entropy/01/01"} <= log(out_dir, "probes.jsonl")[0].keys()
    assert json.loads((out_dir / "config.json").read_text()) == state["config"]
    assert data.load_tokenizer(str(out_dir)).n_vocab == TOY_VOCAB


def test_logged_losses_are_means_over_the_updates_since_the_last_line(toy, tmp_path, whole):
    _, lines = run(toy, tmp_path, "--log_every=5", "--eval_every=0", "--probe_every=0")
    assert [line["step"] for line in lines] == [5, 10]
    kinds = block_kinds(toy_config(max_steps=10))
    for line, steps in zip(lines, (range(1, 6), range(6, 11))):
        each = {x["step"]: x for x in whole[1] if "lr" in x}
        weights = [(kinds[step - 1] == "lm").sum() for step in steps]
        assert line["train/loss"] == pytest.approx(
            np.average([each[step].get("train/loss", 0) for step in steps], weights=weights), rel=1e-5
        )


def test_probes_and_evaluation_leave_the_run_as_it_is(toy, tmp_path, whole):
    state, _ = run(toy, tmp_path, "--eval_every=0", "--probe_every=0")
    assert all(same(state[key], whole[0][key]) for key in ("model", "learner", "optimizers"))


@pytest.fixture
def tracing(monkeypatch):
    """torch.compile with the backend that traces and differentiates as the real one does, but needs no C++
    compiler.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()


def test_probes_leave_a_compiled_run_as_it_is_and_measure_gradients(toy, tmp_path, tracing):
    """Probed at every step, gradients too, a compiled run has the same parameters, bit for bit."""
    flags = ["--compile=True", "--max_steps=4", "--seed=4", "--eval_every=0"]
    probed, _ = run(toy, tmp_path / "probed", *flags, "--probe_every=1", "--probe_gradients=True")
    bare, _ = run(toy, tmp_path / "bare", *flags, "--probe_every=0")
    assert all(same(probed[key], bare[key]) for key in ("model", "learner", "optimizers"))
    lines = log(tmp_path / "probed", "probes.jsonl")
    assert [line["step"] for line in lines] == list(range(5))
    grads = [{key: value for key, value in line.items() if key.startswith("rank/grad_")} for line in lines]
    assert (
        not grads[0]
        and len(grads[1]) == 6
        and all(0 < value <= 24 for value in grads[1].values())
        and grads[1] != grads[2]
    )


def test_effective_ranks_of_trained_weights_equal_the_full_svd(whole):
    for name, weight in checkpoint.load_model(whole[2]).named_parameters():
        if name.endswith(("v_proj.weight", "o_proj.weight", "down_proj.weight")):
            sigma = torch.linalg.svdvals(weight.detach().double())
            p = sigma / sigma.sum()
            assert probes.effective_rank(weight) == pytest.approx(
                torch.exp(-(p * p.log()).sum()).item(), rel=1e-6
            )


def test_probing_the_checkpoints_gives_what_was_measured_live(whole):
    out_dir = whole[2]
    result = subprocess.run(
        [sys.executable, str(ROOT / "probes.py"), str(out_dir)], capture_output=True, text=True, cwd=ROOT
    )
    again = [json.loads(line) for line in result.stdout.splitlines()]
    live = [line for line in log(out_dir, "probes.jsonl") if line["step"]]
    assert [line["step"] for line in again] == [5, 10], result.stderr
    for x, y in zip(again, live, strict=True):
        counted = y.pop("flops")
        assert counted > 0 and {key: x[key] for key in y} == pytest.approx(y, rel=1e-5)


def test_train_loss_is_the_lm_loss_alone(toy, tmp_path, whole):
    """The published trainer averages 32-way query losses into one curve with the LM loss."""
    first = next(line for line in whole[1] if "train/loss" in line)
    assert (
        first["train/loss"] == pytest.approx(math.log(TOY_VOCAB + 6), abs=0.2)
        and first.get("meta/query_loss", 1.4) < 1.5
    )


def test_validation_loss_is_the_mean_over_domains_whoever_computes_it(toy, tmp_path):
    """Domains of unlike size, one of them shorter than the context, against the plain loss of each."""
    for path in toy.iterdir():
        if not path.name.startswith("val"):
            (tmp_path / path.name).symlink_to(path)
    for name, n in (("a", 3000), ("b", 20)):
        write_bin(tmp_path / f"val_{name}_000000.bin", np.random.default_rng(n).integers(256, 3000, n))
    _, lines = run(tmp_path, tmp_path / "one", "--max_steps=2", "--eval_sequences=21")
    decoder, losses = checkpoint.load_model(tmp_path / "one"), {}
    for name, split in data.open_corpus(tmp_path)[1].items():
        batch = data.eval_sequences(split, 32, 21)
        assert len(batch.ids) == (21 if name == "a" else 1)
        losses[f"val/{name}"] = torch.nn.functional.cross_entropy(
            decoder(batch.ids).flatten(0, 1), batch.targets.flatten()
        ).item()
    last = {key: x for key, x in lines[-1].items() if key.startswith("val/") and "query" not in key}
    assert last == pytest.approx(losses | {"val/loss": sum(losses.values()) / 2}, rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--adapt=all", "--inner_lr=0.1"],
        ["--adapt=all", "--first_order=False", "--inner_steps=1", "--inner_lr=0.1"],
    ],
    ids=["head", "all", "second order"],
)
def test_a_compiled_run_equals_an_eager_one(toy, tmp_path, flags, tracing, capsys):
    """What is logged, and the checkpoints."""
    flags = [*flags, "--max_steps=4", "--seed=4"]
    eager, eager_lines = run(toy, tmp_path / "eager", *flags)
    compiled, lines = run(toy, tmp_path / "compiled", *flags, "--compile=True")
    assert ("not compiled" in capsys.readouterr().err) == ("--first_order=False" in flags)
    for x, y in zip(eager_lines, lines, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-5)
    assert compiled["model"].keys() == eager["model"].keys()
    for name, weight in eager["model"].items():
        assert torch.linalg.norm(compiled["model"][name] - weight) < 1e-3 * torch.linalg.norm(weight), name


@pytest.mark.parametrize("flags", [[], ["--adapt=all", "--inner_lr=0.1"]], ids=["head", "all"])
def test_nothing_is_compiled_after_the_first_updates(toy, tmp_path, flags, tracing):
    """With more and longer kinds of windows than dynamo keeps by default (8): past its limit it would go
    on uncompiled.
    """
    stats, graphs = torch._dynamo.utils.counters["stats"], []
    flags = [*flags, "--compile=True", "--seed=4", "--shots=3", "--eval_every=2", "--probe_every=1"]
    for steps in (4, 8):
        torch._dynamo.reset()
        stats.clear()
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            _, lines = run(toy, tmp_path / str(steps), *flags, f"--max_steps={steps}")
        assert {"train/loss", "meta/query_loss", "val/loss"} <= set().union(*lines)
        graphs.append(stats["unique_graphs"])
    assert graphs[0] == graphs[1] > 4


# ---- resume ----


def test_ten_updates_equal_five_a_killed_process_and_five_more(toy, tmp_path, whole):
    """Parameters, optimizer and logged losses, bit for bit, with episodes and accumulation; killed without
    a word.
    """
    torch.set_num_threads(1)  # as the other process: sums in another order differ in the last bit
    straight, lines = run(toy, tmp_path / "straight")
    first = process(toy, tmp_path / "killed")
    deadline = time.time() + 120
    while (
        not (tmp_path / "killed" / "ckpt_000005.pt").exists()
        and first.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.01)
    first.kill()
    first.communicate()
    assert (tmp_path / "killed" / "ckpt_000005.pt").exists()
    (tmp_path / "killed" / "ckpt_000010.pt").unlink(missing_ok=True)  # where the kill came late
    second = process(toy, tmp_path / "killed")
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0 and "ckpt_000005.pt" in output, output
    again = checkpoint.newest(tmp_path / "killed")
    assert all(
        same(again[key], straight[key])
        for key in ("model", "learner", "optimizers", "step", "tokens", "flops")
    )
    assert log(tmp_path / "killed") == lines and log(tmp_path / "killed", "probes.jsonl") == log(
        tmp_path / "straight", "probes.jsonl"
    )


def test_a_resume_amid_a_logging_interval_logs_the_same(toy, tmp_path):
    flags = ["--log_every=10", "--checkpoint_every=3", "--keep=9"]
    _, lines = run(toy, tmp_path, *flags)
    for step in (6, 9, 10):
        (tmp_path / f"ckpt_{step:06d}.pt").unlink()
    assert run(toy, tmp_path, *flags)[1] == lines


def test_waiting_for_data_is_part_of_the_time_of_training(toy, tmp_path, monkeypatch):
    """Rates and `seconds` would leave out what a slow disk costs, and data_wait would exceed 1."""
    real = train.read_ahead
    monkeypatch.setattr(train, "read_ahead", lambda *args: ((steps, 100.0) for steps, _ in real(*args)))
    run(toy, tmp_path, "--max_steps=3")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"lr"' in line]
    assert [line["seconds"] // 100 for line in lines] == [1, 2, 3]
    assert all(0.5 < line["data_wait"] < 1 for line in lines)


def test_a_finished_run_is_left_alone(toy, tmp_path, whole, capsys):
    out_dir = whole[2]
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    run(toy, out_dir)
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before
    assert "the run is finished" in capsys.readouterr().out


def test_a_run_goes_on_where_its_data_moved_but_not_on_other_data(toy, tmp_path, whole):
    moved = shutil.copytree(toy, tmp_path / "moved")
    run(moved, whole[2])
    (moved / "train_000001.bin").unlink()
    with pytest.raises(UserError, match="a run on 150,000 training tokens, .* has 100,000"):
        run(moved, whole[2])


def test_a_run_does_not_go_on_with_other_data_of_the_same_length_or_another_tokenizer(toy, tmp_path):
    """Both were accepted in silence. A checkpoint from before there were digests still is."""
    run(toy, tmp_path / "run", "--max_steps=1")
    other = shutil.copytree(toy, tmp_path / "other")
    write_bin(other / "train_000001.bin", data.open_bin(other / "train_000001.bin")[::-1])
    with pytest.raises(UserError, match=rf"with other data than {other} \(training data\): give"):
        run(other, tmp_path / "run", "--max_steps=1")
    shutil.copy(toy / "train_000001.bin", other)
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["tokens"][300:302] = spec["tokens"][301:299:-1]
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match=r"with other data than .* \(tokenizer\)"):
        run(other, tmp_path / "run", "--max_steps=1")
    rewrite(tmp_path / "run" / "ckpt_000001.pt", lambda state: state.pop("digests"))
    assert run(other, tmp_path / "run", "--max_steps=2")[0]["step"] == 2


def test_a_config_that_contradicts_the_checkpoint_is_refused_field_by_field(toy, whole):
    with pytest.raises(UserError) as error:
        run(toy, whole[2], "--lr=0.5", "--ways=3", "--log_every=7")
    assert "lr = 0.001 there, 0.5 here; ways = 4 there, 3 here" in str(
        error.value
    ) and "log_every" not in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_writes_a_checkpoint_and_exits_with_0(toy, tmp_path, number):
    running = process(
        toy, tmp_path, "--max_steps=100000", "--checkpoint_every=0", "--eval_every=0", "--probe_every=0"
    )
    for line in running.stdout:
        if line.startswith("step"):
            break
    running.send_signal(number)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 0 and "stopped   at step" in output, output
    step = checkpoint.newest(tmp_path)["step"]
    assert log(tmp_path)[-1]["step"] == step and f"step {step};" in output


# ---- ranks ----

# Episodes from the LM batch: one large enough that words repeat in it.
JOINT = ["--episodes_from=batch", "--read_out=context", "--ways=3", "--shots=1", "--queries=1",
         "--batch_size=8", "--global_batch_size=32", "--context=64"]
WORKER = """
import sys; sys.path.insert(0, {root!r})
import functools, os, torch, train
torch.compile = functools.partial(torch.compile, backend="aot_eager")
class Learner(train.Learner):
    def __init__(self, *args):
        super().__init__(*args)
        global made
        made = self
train.Learner = Learner
train.main(sys.argv[1:])
torch.save(made.state_dict(), {out!r} + os.environ["RANK"] + ".pt")
sys.stdout.flush()
os._exit(0)  # as config.run does
"""


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--head_layers=2", "--inner_lr=0.1"],
        ["--adapt=all", "--inner_lr=0.1"],
        ["--meta_share=0", "--head_layers=2"],
        ["--compile=True"],
        JOINT,
        ["--read_out=context", "--query_lm", "--meta_decay=0.8"],
    ],
    ids=["linear", "mlp", "all", "vanilla", "compiled", "joint", "query LM"],
)
def test_two_ranks_are_bit_identical_and_equal_one_process_with_twice_the_micro_steps(toy, tmp_path, flags):
    """Twenty updates of LM, episodes and both; a head of several layers goes without gradient in some of
    them.
    """
    flags = [*flags, "--max_steps=20", "--eval_every=20", "--probe_every=0", "--seed=2"]
    kinds = block_kinds(toy_config(max_steps=20, seed=2))
    assert {0, 1, 2} == set((kinds == "episodes").sum(1))
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT), out=str(tmp_path / "rank")))
    two = process(toy, tmp_path / "two", *flags, ranks=2, script=tmp_path / "worker.py")
    output, _ = two.communicate(timeout=240)
    assert two.returncode == 0, output
    a, b = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert same(a, b)
    one, lines = run(toy, tmp_path / "one", *flags, "--compile=False")
    single = {f"decoder.{name}": p for name, p in one["model"].items()} | one["learner"]
    assert single.keys() == a.keys()
    for name in a:  # Adam turns gradients that are zero but for rounding into whole steps: compare the bulk
        assert torch.linalg.norm(a[name] - single[name]) < 1e-3 * torch.linalg.norm(single[name]) + 1e-6, name
    for x, y in zip(lines, log(tmp_path / "two"), strict=True):
        assert x.keys() == y.keys() and all(
            x[key] == pytest.approx(y[key], rel=1e-3, abs=1e-3) for key in x if "acc" not in key
        )


# ---- variants of the episodes ----


def test_a_joint_run_logs_both_losses_and_resumes(toy, tmp_path):
    """Its LM tokens are all it reads; ten updates equal five, a resume and five."""
    straight, lines = run(toy, tmp_path, *JOINT, "--meta_weight=0.1")
    training = [line for line in lines if "lr" in line]
    assert training[-1]["tokens"] == 10 * 32 * 64 and all("train/loss" in line for line in training)
    assert {2.0, 3.0} >= {line["meta/ways"] for line in training if line.get("share/joint") == 1.0}
    (tmp_path / "ckpt_000010.pt").unlink()
    again, more = run(toy, tmp_path, *JOINT, "--meta_weight=0.1")
    assert more == lines
    assert all(same(again[key], straight[key]) for key in ("model", "learner", "optimizers"))


def test_the_tokens_of_query_windows_count_as_lm_tokens_with_query_lm(toy, tmp_path):
    flags = ["--read_out=context", "--max_steps=4", "--eval_every=0", "--probe_every=0"]
    plain, lines = run(toy, tmp_path / "plain", *flags)
    with_lm, others = run(toy, tmp_path / "lm", *flags, "--query_lm")
    episodes = (block_kinds(toy_config(max_steps=4)) == "episodes").sum() * 2  # micro-steps
    assert others[-1]["tokens"] - lines[-1]["tokens"] == episodes * 4 * 2 * 8  # ways, queries, window
    assert "train/query_lm_loss" in set().union(*others) and not same(plain["model"], with_lm["model"])


def test_the_weight_of_the_episodes_decays_to_zero():
    cfg = toy_config(max_steps=200, meta_start=50, meta_weight=0.5, meta_decay=0.25)
    weights = [train.loss_weights(cfg, step)["meta"] for step in (50, 75, 100, 150)]
    assert weights == [0.5, 0.25, 0.0, 0.0]
    assert train.loss_weights(toy_config(meta_weight=0.3), 9) == {"lm": 1.0, "meta": 0.3}


def test_every_run_measures_adaptation_on_held_out_text(toy, tmp_path):
    """Vanilla runs too, at every evaluation; it changes nothing else."""
    state, lines = run(toy, tmp_path / "a", "--meta_share=0")
    measured = [line for line in lines if "val/loss" in line]
    assert len(measured) == 3 and all(
        {"val/query_acc", "val/query_loss", "val/query_acc_unadapted", "val/new_query_acc"} <= line.keys()
        for line in measured
    )
    assert "final/mask_query_acc" in lines[-1] and "final/mask_query_acc" not in measured[1]
    bare, others = run(toy, tmp_path / "b", "--meta_share=0", "--eval_episodes=0")
    assert same(state["model"], bare["model"]) and not any("query" in key for key in set().union(*others))


def test_adaptation_is_measured_on_validation_text_with_the_settings_of_the_run(toy, tmp_path, monkeypatch):
    """What `main` hands over; and that it trains with the run's read-out and the weights of each step."""
    seen = {}
    real, episodes, weights = train.AdaptationTest, data.Episodes, train.loss_weights

    def test_of(cfg, validation, tokenizer):
        seen["paths"] = {path.name for split in validation.values() for path in split.paths}
        return real(cfg, validation, tokenizer)

    def episodes_of(corpus, *args, **options):
        seen.setdefault("read_out", args[-1])
        return episodes(corpus, *args, **options)

    monkeypatch.setattr(train, "AdaptationTest", test_of)
    monkeypatch.setattr(train.data, "Episodes", episodes_of)
    monkeypatch.setattr(train, "loss_weights", lambda cfg, step: seen.setdefault("steps", []).append(step)
                        or weights(cfg, step))
    run(toy, tmp_path, "--read_out=context", "--max_steps=3")
    assert seen == {"paths": {"val_000000.bin"}, "read_out": "context", "steps": [0, 1, 2]}


# ---- trouble ----


def test_updates_with_a_non_finite_gradient_are_skipped_counted_and_end_the_run(toy, tmp_path, monkeypatch):
    real = train.Learner.forward

    def broken(when):
        def forward(self, kind, batch):
            losses, metrics = real(self, kind, batch)
            calls[0] += self.training and torch.is_grad_enabled()
            factor = math.nan if torch.is_grad_enabled() and when(calls[0]) else 1.0
            return {part: loss * factor for part, loss in losses.items()}, metrics

        return forward

    calls = [0]
    monkeypatch.setattr(
        train.Learner, "forward", broken(lambda n: n == 6)
    )  # in the second of the updates of 4 micro-steps
    state, lines = run(toy, tmp_path / "once")
    assert [line["skipped"] for line in lines if "lr" in line] == [0] + [1] * 9
    assert all(torch.isfinite(p).all() for p in state["model"].values())
    assert {float(s["step"]) for s in state["optimizers"][0]["state"].values()} <= set(range(10))
    calls = [0]
    monkeypatch.setattr(train.Learner, "forward", broken(lambda n: True))
    with pytest.raises(UserError, match="not finite in 10 updates in a row"):
        run(toy, tmp_path / "always", "--max_steps=30")
    first = checkpoint.read(tmp_path / "always" / "ckpt_000000.pt")["model"]
    assert same(checkpoint.newest(tmp_path / "always")["model"], first)


def test_a_run_warns_when_the_query_loss_stays_at_ln_n(toy, tmp_path, capsys):
    run(toy, tmp_path, "--inner_lr=1e-6", "--meta_share=1", "--eval_every=0")
    assert "stays at ln N = 1.386" in capsys.readouterr().out


def test_bad_data_is_refused_before_training(toy, tmp_path):
    with pytest.raises(UserError, match="the tokenizer of .* has 3258 ids, vocab_size = 3257"):
        run(toy, tmp_path / "a", "--vocab_size=3257")
    (tmp_path / "tokenizer.json").write_text((toy / "tokenizer.json").read_text())
    for name in ("train_000000.bin", "val_000000.bin"):
        write_bin(tmp_path / name, np.arange(5000))
    with pytest.raises(UserError, match="token id 4999 at 4,999 is outside the vocabulary of 3264"):
        run(tmp_path, tmp_path / "a", "--meta_share=0")
    # An id that the model has and the tokenizer has not ended in an IndexError when an episode met it.
    for name in ("train_000000.bin", "val_000000.bin"):
        write_bin(tmp_path / name, np.arange(TOY_VOCAB + 1))
    with pytest.raises(UserError, match=f"token id {TOY_VOCAB} at .* outside the vocabulary of {TOY_VOCAB}"):
        run(tmp_path, tmp_path / "a")
    run(tmp_path, tmp_path / "b", "--meta_share=0", "--max_steps=1")
    assert not (tmp_path / "a").exists()


def test_a_users_mistake_prints_one_line_and_no_traceback(tmp_path):
    for flags in (["--max_stesp=3"], [f"--data={tmp_path}/none"], ["--device=warp"]):
        result = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *flags], capture_output=True, text=True, cwd=tmp_path
        )
        assert (
            result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        ), result.stderr


# ---- forks ----


def rewrite(path, change):
    """Applies `change` to the state of a checkpoint."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_a_field_that_an_older_checkpoint_lacks_takes_its_default(toy, tmp_path):
    """A new field of ModelConfig made every older checkpoint "damaged", and every resume refused."""
    run(toy, tmp_path, "--max_steps=5")

    def forget(state):
        del state["config"]["norm_eps"], state["config"]["head_width"], state["config"]["inner_lr"]

    rewrite(tmp_path / "ckpt_000005.pt", forget)
    assert checkpoint.load_model(tmp_path).cfg.norm_eps == 1e-6
    rule = f"--inner_lr={25.6 / 24}"  # of a run with d_model 24
    both = "norm_eps = 1e-06 there, 1e-05 here; head_width = 128 there, 64 here"
    with pytest.raises(UserError, match=both):
        run(toy, tmp_path, "--max_steps=5", rule, "--norm_eps=1e-5", "--head_width=64")
    assert run(toy, tmp_path, "--max_steps=5", rule)[0]["step"] == 5


class Scaled(train.Learner):
    """A fork with a parameter and a metric of its own."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))

    def lm_loss(self, batch):
        losses, metrics = super().lm_loss(batch)
        self.calls += torch.is_grad_enabled()
        metrics |= {"fork/calls": self.calls.clone(), "fork/nan": math.nan}
        return {"lm": losses["lm"] * self.scale.mean()}, metrics


def test_a_parameter_of_a_fork_is_saved_and_restored(toy, tmp_path, monkeypatch):
    """It was trained, but neither saved nor restored."""
    monkeypatch.setattr(train, "Learner", Scaled)
    straight, lines = run(toy, tmp_path)
    (tmp_path / "ckpt_000010.pt").unlink()
    again, more = run(toy, tmp_path)
    assert again["learner"].keys() == {"scale", "calls"} and (again["learner"]["scale"] != 1).all()
    assert all(same(again[key], straight[key]) for key in ("model", "learner", "optimizers"))
    assert more == lines
    assert not any("scale" in name for name in again["model"]), "transformers loads it"


def test_whatever_a_loss_returns_is_averaged_and_logged(toy, tmp_path, monkeypatch):
    """A metric that was not on a list was dropped. One that is not finite does not make an update bad."""
    monkeypatch.setattr(train, "Learner", Scaled)
    _, lines = run(toy, tmp_path, "--meta_share=0", "--log_every=2", "--eval_every=0")
    assert [line["fork/calls"] for line in lines] == [4.5 + 8 * i for i in range(5)]  # 1 to 8, 9 to 16, ...
    assert not any("fork/nan" in line for line in lines) and lines[-1]["skipped"] == 0


def test_what_was_not_measured_does_not_count():
    """A metric is nan in a micro-step that has none of it, as a batch without an episode."""
    metrics = {"a": [torch.tensor(1.0), math.nan, 3.0], "b": [math.nan, math.nan]}
    totals = train.sum_over_ranks(metrics, torch.device("cpu"), 1)
    assert {name: total.tolist() for name, total in totals.items()} == {"a": [4.0, 2.0], "b": [0.0, 0.0]}


def test_the_metrics_of_a_skipped_update_are_not_averaged_in():
    progress = Progress()
    progress.finish_update({"a": torch.tensor([math.nan, 2.0])}, torch.tensor(1.0), 0.0)
    progress.finish_update({"a": torch.tensor([6.0, 2.0])}, torch.tensor(0.0), 0.0)
    assert progress.sums["a"].tolist() == [6.0, 2.0]
    assert progress.step == 2 and progress.skipped.tolist() == [1.0, 0.0], "in all, in a row"


def test_a_checkpoint_with_other_parameters_is_refused_in_one_line(toy, tmp_path, monkeypatch):
    run(toy, tmp_path, "--max_steps=5")
    monkeypatch.setattr(train, "Learner", Scaled)
    with pytest.raises(UserError, match="other parameters .*scale") as error:
        run(toy, tmp_path, "--max_steps=5")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    adamw = train.build_optimizers

    def with_other_betas(cfg, learner):
        [optimizer] = adamw(cfg, learner)
        optimizer.param_groups[0]["betas"] = (0.8, 0.9)
        return [optimizer]

    def sgd(cfg, learner):
        optimizer = torch.optim.SGD(learner.parameters(), lr=cfg.lr, momentum=0.9)
        optimizer.param_groups[0]["initial_lr"] = cfg.lr
        return [optimizer]

    for other in (with_other_betas, sgd):  # AdamW with other betas went on with the saved ones
        monkeypatch.setattr(train, "build_optimizers", other)
        with pytest.raises(UserError, match="holds a run with other optimizers"):
            run(toy, tmp_path, "--max_steps=5")
    monkeypatch.undo()
    rewrite(tmp_path / "ckpt_000005.pt", lambda state: state.pop("learner"))
    with pytest.raises(UserError, match="of an older version, whose checkpoints can be evaluated but not"):
        run(toy, tmp_path, "--max_steps=5")


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
        lambda params: torch.optim.AdamW(params, lr=0.1, fused=False),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
        lambda params: torch.optim.Muon(params, lr=0.1),
    ],
    ids=["fused AdamW", "AdamW", "SGD", "fused SGD", "Muon"],
)
def test_a_bad_update_is_left_out_whatever_the_optimizer(make):
    """found_inf was set for all: Muon would have applied the update, fused SGD corrupted its momentum."""
    p = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = make([p])
    optimizer.param_groups[0]["initial_lr"] = 0.1

    def update(grad, is_bad):
        p.grad = torch.full_like(p, grad)
        train.optimizer_step([optimizer], 0.5, torch.tensor(is_bad))
        assert p.grad is None and optimizer.param_groups[0]["lr"] == 0.05
        return p.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])

    before = p.detach().clone()
    first = update(math.nan, 1.0)
    second = update(1.0, 0.0)
    third = update(math.nan, 1.0)
    assert torch.equal(first[0], before) and not torch.equal(second[0], before) and same(third, second)


def test_each_group_keeps_its_own_rate():
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizers = [torch.optim.SGD([{"params": [p], "lr": 1.0}], lr=9.0), torch.optim.SGD([q], lr=0.1)]
    for group, rate in zip((optimizers[0].param_groups[0], optimizers[1].param_groups[0]), (1.0, 0.1)):
        group["initial_lr"] = rate
    for _ in range(2):
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        train.optimizer_step(optimizers, 0.25, torch.tensor(0.0))
    assert p.tolist() == pytest.approx([0.5, 0.5]) and q.tolist() == pytest.approx([0.95, 0.95])


def test_fineweb_in_bins_of_llm_c_trains_as_it_is(tmp_path):
    """As published: their names, a header and uint16 tokens of GPT-2; neither tokenizer nor meta.json."""
    ids = np.random.default_rng(0).integers(0, 50257, 4000)
    for name in ("fineweb_val_000000", "fineweb_train_000001", "fineweb_train_000002"):
        write_bin(tmp_path / f"{name}.bin", ids)
    flags = ["--max_steps=1", "--meta_share=0", "--vocab_size=50304", "--eval_episodes=0"]
    assert run(tmp_path, tmp_path / "run", *flags)[0]["corpus_tokens"] == 8000


def test_a_vanilla_run_ignores_the_settings_of_episodes(toy, tmp_path):
    assert run(toy, tmp_path, "--meta_share=0", "--adapt=(", "--max_steps=1")[0]["step"] == 1


# ---- the configs, wandb ----


@pytest.mark.parametrize("name", ["11m", "65m", "181m"])
def test_the_papers_configs_run_two_updates(toy, tmp_path, name):
    """At their width, depth, vocabulary and rate, half of it episodes; batch and context are cut down. 570m
    is only counted: test_model.py.
    """
    train.main(
        [
            str(ROOT / "configs" / f"{name}.py"),
            f"--data={toy}",
            f"--out_dir={tmp_path}",
            "--max_steps=2",
            "--device=cpu",
            "--dtype=float32",
            "--context=32",
            "--global_batch_size=2",
            "--batch_size=1",
            "--meta_blocks=2",
            "--meta_share=0.5",
            "--meta_start=0",
            "--window=4",
            "--queries=1",
            "--eval_sequences=1",
            "--probe_every=0",
            "--checkpoint_every=0",
            "--seed=5",
            "--log_every=1",
        ]
    )
    lines = [line for line in log(tmp_path) if "lr" in line]
    assert (
        len(lines) == 2
        and any("meta/query_loss" in line for line in lines)
        and any("train/loss" in line for line in lines)
    )
    (tmp_path / "ckpt_000002.pt").unlink()


@pytest.mark.parametrize("name", ["demo", "11m", "65m", "181m", "570m"])
def test_configs_load_with_the_overlay_and_their_batch_divides(name):
    path = str(ROOT / "configs" / f"{name}.py")
    cfg = config.load(Config, [path])
    assert (cfg.meta_share, cfg.meta_weight, cfg.meta_start / cfg.max_steps) == (0.1, 0.1, 0.5)
    assert config.load(Config, [path, str(ROOT / "configs" / "vanilla.py")]) == replace(cfg, meta_share=0.0)
    for world in (1, 2) if name == "demo" else (1, 4, 8):
        Schedule(cfg, world)
    if name != "demo":
        assert (cfg.lr, cfg.warmup_steps, cfg.max_steps, cfg.ways, cfg.shots, cfg.inner_steps) == (
            3e-4,
            2500,
            6000,
            32,
            4,
            10,
        )


def read_wandb(out_dir):
    """(rows of the history, summary, config, {metric: its x axis}) of the one offline run in a folder."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    def values(items):
        return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}

    (path,) = out_dir.glob("wandb/offline-run-*/*.wandb")
    store, history, summary, settings, axes = DataStore(), [], {}, {}, {}
    store.open_for_scan(str(path))
    while (content := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content)
        history += [values(record.history.item)] if record.history.item else []
        summary |= values(record.summary.update)
        settings |= values(record.run.config.update)
        if record.HasField("metric"):
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    return history, summary, settings, axes


def test_wandb_offline_writes_a_run_that_wandb_reads_back(toy, tmp_path):
    """Was: both parts of a resumed offline run began at wandb's step 0, so the later one replaced the earlier
    in `wandb sync`; now the later one is the whole run. At 12 x 12 there were 288 panels of heads.
    """
    run(toy, tmp_path / "first", "--wandb=offline", "--max_steps=5")
    shutil.copytree(tmp_path / "first", tmp_path / "resumed", ignore=shutil.ignore_patterns("wandb"))
    state, lines = run(toy, tmp_path / "resumed", "--wandb=offline")
    history, summary, settings, axes = read_wandb(tmp_path / "resumed")
    for name in ("train/loss", "val/loss", "rank/resid/01", "tokens", "flops"):
        sent = [(row["step"], row[name]) for row in history if name in row]
        logged = log(tmp_path / "resumed") + log(tmp_path / "resumed", "probes.jsonl")
        written = [(line["step"], line[name]) for line in logged if name in line]
        assert sorted(sent) == sorted(written) and len(sent) >= 3, name
    assert all({"step", "tokens", "flops", "seconds"} <= row.keys() for row in history)
    assert [row["step"] for row in history] == sorted(row["step"] for row in history)
    assert axes["*"] == "step" and {"step", "tokens", "flops", "seconds"} <= axes.keys()

    probed = log(tmp_path / "resumed", "probes.jsonl")
    assert len(probed) == 3 and "entropy_nats/01/01" in probed[0]
    for kind in ("entropy", "entropy_nats"):
        means = [np.mean([line[f"{kind}/01/{head:02d}"] for head in range(2)]) for line in probed]
        assert [row[f"{kind}/01"] for row in history if f"{kind}/01" in row] == pytest.approx(means)
    assert not [key for row in history for key in row if key.startswith("entropy") and key.count("/") == 2]
    heatmaps = sorted(tmp_path.glob("resumed/wandb/offline-run-*/files/media/images/entropy/heatmap_*.png"))
    assert len(heatmaps) == 3 and all(path.stat().st_size > 1000 for path in heatmaps)

    for key, better in (("val/loss", min), ("val/mask_query_acc", max)):
        assert summary[f"best/{key}"] == pytest.approx(better(line[key] for line in lines if key in line))
    assert settings["d_model"] == 24 and settings["ranks"] == 1
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")
    assert settings["parameters"] == sum(p.numel() for p in state["model"].values())
    assert settings["head_parameters"] == sum(p.numel() for p in state["learner"].values())


def test_a_run_that_wandb_knows_is_not_sent_again(toy, tmp_path, monkeypatch):
    """Resumed online: the server has the earlier lines, and the best of all of them stays the best."""
    import wandb

    run(toy, tmp_path, "--max_steps=5")
    (loss,) = {line["val/loss"] for line in log(tmp_path) if "val/loss" in line and line["step"] == 5}
    logs.append(tmp_path / "log.jsonl", {"step": 5, "val/loss": 0.5})  # a best that the rest does not reach
    sent, summary = [], {}
    known = SimpleNamespace(
        define_metric=lambda *args, **options: None, log=sent.append, finish=lambda: None, summary=summary,
        resumed=True,
    )
    monkeypatch.setattr(wandb, "init", lambda **options: known)
    monkeypatch.setattr(wandb, "Image", lambda image: None)
    run(toy, tmp_path, "--wandb=online")
    assert min(line["step"] for line in sent) == 6
    assert summary["best/val/loss"] == 0.5 < loss


def test_wandb_disabled_is_not_even_imported(toy, tmp_path):
    flags = [*TOY, f"--data={toy}", f"--out_dir={tmp_path}", "--max_steps=1"]
    code = (
        f"import sys, train; train.main({flags!r}); "
        "assert not {'wandb', 'matplotlib', 'rustbpe'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_failing_wandb_does_not_stop_training(toy, tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **options: 1 / 0)
    state, _ = run(toy, tmp_path / "init", "--wandb=online")
    assert (
        state["step"] == 10 and "wandb failed, the run goes on: ZeroDivisionError" in capsys.readouterr().err
    )
    broken = SimpleNamespace(
        define_metric=lambda *args, **options: None, log=lambda line: 1 / 0, finish=lambda: 1 / 0
    )
    monkeypatch.setattr(wandb, "init", lambda **options: broken)
    state, _ = run(toy, tmp_path / "log", "--wandb=online")
    assert (
        state["step"] == 10 and "wandb failed, the run goes on: ZeroDivisionError" in capsys.readouterr().err
    )
