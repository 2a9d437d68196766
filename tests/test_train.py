"""The loop end to end: the mix of steps, what is written, resume, forks, wandb."""
import copy
import functools
import json
import math
import shutil
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TOY, TOY_VOCAB, log, refuses, results, rewrite, run, same, toy_config, write_bin

import data
import probes
import report
import train
from adaptation import AdaptationTest
from meta import Head, Learner
from nanomaml import checkpoint, config, resume
from schedule import Schedule, block_kinds

WEIGHTS = ("model", "learner", "optimizers")

# ---- what a run writes ----


def test_a_run_writes_what_others_read(whole):
    names = "ckpt_000005.pt ckpt_000010.pt config.json lock log.jsonl probes.jsonl run.json tokenizer.json"
    assert sorted(path.name for path in whole.iterdir()) == names.split()
    lines = log(whole)
    training = [line for line in lines if "lr" in line]
    assert [line["step"] for line in training] == list(range(1, 11))
    assert [line["step"] for line in lines if "val/loss" in line] == [0, 5, 10]
    is_episodes = block_kinds(toy_config(max_steps=10)) == "episodes"
    assert {0, 1, 2} == set(is_episodes.sum(1)), "the seed gives updates of either kind and mixed ones"
    for line, blocks in zip(training, is_episodes):
        assert ("train/loss" in line) == (not blocks.all()) and ("meta/query_loss" in line) == blocks.any()
        assert {"tokens", "grad_norm", "skipped"} <= line.keys() and type(line["flops"]) is int
    assert training[-1]["tokens"] == (~is_episodes).sum() * 8 * 32, "LM tokens"
    first = next(line for line in training if "train/loss" in line)  # without the episodes' loss
    assert first["train/loss"] == pytest.approx(math.log(TOY_VOCAB + 6), abs=0.2)
    for line in map(json.loads, (whole / "log.jsonl").read_text().splitlines()):
        assert "lr" not in line or min(line["tok_per_s"], line["mfu"]) > 0 and 0 < line["data_wait"] < 1
    assert [line["step"] for line in log(whole, "probes.jsonl")] == [0, 5, 10]
    assert {"rank/resid/01", "rank/v_proj/00", "entropy/01/01"} <= log(whole, "probes.jsonl")[0].keys()
    assert json.loads((whole / "config.json").read_text()) == checkpoint.newest(whole)["config"]
    assert data.load_tokenizer(str(whole)).n_vocab == TOY_VOCAB
    facts = json.loads((whole / "run.json").read_text())
    assert facts["state"] == "finished" and facts["command"] and facts["torch"] == torch.__version__
    assert len(facts["tokenizer"]) == 16 and facts["ranks"] == 1
    [(name, split)] = data.open_corpus(checkpoint.newest(whole)["config"]["data"])[1].items()
    assert facts["validation"] == {name: split.digest}
    cfg = config.load(train.Config, [str(whole)])
    corpus, _, tokenizer = train.load_data(cfg, True)
    plan = Schedule(cfg, 1)
    planned = plan.mean_flops(train.build_learner(cfg, torch.float32), train.build_sources(
        cfg, plan.names, corpus, tokenizer))
    assert lines[-1]["flops"] == pytest.approx(planned * cfg.max_steps), "what the time left was told from"
    assert facts["started"] <= facts["updated"] and len(facts.get("commit", "x" * 40)) == 40


def test_without_probes_and_evaluation_and_with_other_intervals_training_is_the_same(toy, tmp_path, whole):
    """Logged losses are means over the updates since the last line, also where a run was stopped between."""
    flags = ["--log_every=5", "--checkpoint_every=3", "--keep=9", "--eval_every=0", "--probe_every=0"]
    state, lines = run(toy, tmp_path, *flags)
    assert all(same(state[key], checkpoint.newest(whole)[key]) for key in WEIGHTS)
    assert [line["step"] for line in lines] == [5, 10]
    is_lm, each = block_kinds(toy_config(max_steps=10)) == "lm", {}
    for line in log(whole):
        each.setdefault(line["step"], {}).update(line)
    for line, part in zip(lines, (slice(0, 5), slice(5, 10))):
        losses = [each[step + 1].get("train/loss", 0) for step in range(part.start, part.stop)]
        mean = np.average(losses, weights=is_lm[part].sum(1))
        assert line["train/loss"] == pytest.approx(mean, rel=1e-5) and line["share/lm"] == is_lm[part].mean()
    (tmp_path / "ckpt_000010.pt").unlink()
    (tmp_path / "ckpt_000009.pt").unlink()
    again, more = run(toy, tmp_path, *flags)
    assert more == lines and all(same(again[key], state[key]) for key in WEIGHTS)


def test_measuring_the_checkpoints_gives_what_was_measured_live(toy, whole, tmp_path, capsys):
    """The probes, where a damaged checkpoint is passed over; and adaptation on validation text."""
    out_dir = shutil.copytree(whole, tmp_path / "a")
    live = [line for line in log(whole, "probes.jsonl") if line["step"]]
    for damaged, steps in ((None, [5, 10]), ("ckpt_000010.pt", [5])):
        if damaged:
            (out_dir / damaged).write_bytes(b"PK")
        probes.main([str(out_dir)])
        printed = capsys.readouterr()
        again = [json.loads(line) for line in printed.out.splitlines()]
        assert [line["step"] for line in again] == steps and ("is damaged" in printed.err) == bool(damaged)
        for x, y in zip(again, live):
            assert {key: x.get(key, y["flops"]) for key in y} == pytest.approx(y, rel=1e-5)
    test = AdaptationTest(toy_config(), data.open_corpus(toy)[1], data.load_tokenizer(toy))
    measured = test.measure(checkpoint.load_model(whole), torch.float32, is_last=True)
    assert {"adapt/query_loss", "adapt/new_query_acc", "final/mask_query_acc"} <= measured.keys()
    logged = {key: x for key, x in log(whole)[-1].items() if key.startswith(("adapt/", "final/"))}
    assert logged == pytest.approx(measured, abs=1e-6)


def test_vanilla_runs_measure_adaptation_too_and_it_changes_nothing_else(toy, tmp_path):
    flags = ["--meta_share=0", "--max_steps=2", "--eval_every=1", "--probe_every=0"]
    state, lines = run(toy, tmp_path / "a", *flags)
    measured = [line for line in lines if "val/loss" in line]
    assert len(measured) == 3 and all("adapt/query_acc" in line for line in measured)
    assert ["final/mask_query_acc" in line for line in measured] == [False, False, True]
    bare, others = run(toy, tmp_path / "b", *flags, "--eval_episodes=0")
    assert same(state["model"], bare["model"]) and not any("query" in key for key in set().union(*others))


def test_validation_loss_is_the_mean_over_domains(toy, tmp_path):
    """Domains of unlike size, one of them shorter than the context, against the plain loss of each."""
    for path in toy.iterdir():
        if not path.name.startswith("val"):
            (tmp_path / path.name).symlink_to(path)
    for name, n in (("a", 3000), ("b", 20)):
        write_bin(tmp_path / f"val_{name}_000000.bin", np.random.default_rng(n).integers(256, 3000, n))
    _, [line] = run(tmp_path, tmp_path / "one", "--max_steps=0", "--eval_sequences=21")
    decoder, losses = checkpoint.load_model(tmp_path / "one"), {}
    for name, split in data.open_corpus(tmp_path)[1].items():
        batch = data.eval_sequences(split, 32, 21)
        assert len(batch.ids) == (21 if name == "a" else 1)
        logits = decoder(batch.ids).flatten(0, 1)
        losses[f"val/{name}"] = torch.nn.functional.cross_entropy(logits, batch.targets.flatten()).item()
    losses["val/loss"] = sum(losses.values()) / 2
    assert {key: x for key, x in line.items() if key in losses} == pytest.approx(losses, rel=1e-5)


def test_no_name_of_a_domain_meets_that_of_a_metric(toy, tmp_path, capsys):
    """query_logs was hidden, query_acc overwritten by an accuracy; of news_acc the best was the worst."""
    for path in toy.iterdir():
        if not path.name.startswith("val"):
            (tmp_path / path.name).symlink_to(path)
    names = ["docs", "news_acc", "query_acc", "query_logs"]
    for name in names:
        write_bin(tmp_path / f"val_{name}_000000.bin", np.arange(256, 3000))
    _, [line] = run(tmp_path, tmp_path / "one", "--max_steps=0")
    assert {key for key in line if key.startswith("val/")} == {"val/loss", *(f"val/{name}" for name in names)}
    assert all(line[f"val/{name}"] == pytest.approx(line["val/loss"]) for name in names)
    shown = capsys.readouterr().out
    text = report.write([tmp_path / "one"], tmp_path / "report")[0]
    for name in names:
        assert f"val/{name} {line['val/loss']:.4f}" in shown and f"validation loss, {name}" in text
    write_bin(tmp_path / "val_loss_000000.bin", np.arange(256, 3000))
    refuses(lambda: data.open_corpus(tmp_path), "the domain loss would be logged as val/loss")


def test_compile_without_a_compiler_is_one_line(toy, tmp_path, monkeypatch):
    """It was a traceback of 131 lines."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    refuses(lambda: run(toy, tmp_path / "a", "--compile"), "there is no no-such-compiler", "--compile=False")


def test_waiting_for_data_is_part_of_the_time_of_training(toy, tmp_path, monkeypatch):
    """Rates and `seconds` would leave out what a slow disk costs, and data_wait would exceed 1."""
    real = train.read_ahead
    monkeypatch.setattr(train, "read_ahead", lambda *args: ((steps, 100.0) for steps, _ in real(*args)))
    run(toy, tmp_path, "--max_steps=2", "--eval_every=0")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"lr"' in line]
    assert [line["seconds"] // 100 for line in lines] == [1, 2]
    assert all(0.5 < line["data_wait"] < 1 for line in lines)


def test_learning_rate_warms_up_and_decays_linearly():
    cfg = toy_config(max_steps=6000, warmup_steps=2500)
    factors = {0: 1 / 2500, 1249: 0.5, 2499: 1, 2500: 1, 4250: 0.5, 5999: 1 / 3500}
    assert {step: train.lr_factor(cfg, step) for step in factors} == pytest.approx(factors)


# ---- compiled ----


@pytest.mark.slow
@pytest.mark.parametrize("flags", [
    [], ["--adapt=all", "--inner_lr=0.1"],
    ["--adapt=all", "--first_order=False", "--inner_steps=1", "--inner_lr=0.1"],
], ids=["head", "all", "second order"])
def test_a_compiled_run_equals_an_eager_one(toy, tmp_path, flags, monkeypatch, capsys):
    """Up to rounding; bit for bit where it is probed at every step, gradients too. Nothing is compiled after
    four updates, though there are more and longer kinds of windows than dynamo keeps by default (8): past its
    limit it would go on uncompiled. torch.compile has no second derivative.
    """
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # no C++
    monkeypatch.setenv("CXX", sys.executable)
    torch._dynamo.reset()
    graphs, real = [], train.optimizer_step
    monkeypatch.setattr(train, "optimizer_step", lambda *args: graphs.append(
        torch._dynamo.utils.counters["stats"]["unique_graphs"]) or real(*args))
    flags = [*flags, "--max_steps=8", "--seed=4", "--shots=3"]
    eager, eager_lines = run(toy, tmp_path / "eager", *flags, "--eval_every=2")
    compiled, _ = run(toy, tmp_path / "bare", *flags, "--eval_every=0", "--probe_every=0", "--compile=True")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs.clear()
    capsys.readouterr()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        probed, lines = run(toy, tmp_path / "probed", *flags, "--eval_every=2", "--compile=True",
                            "--probe_every=1")
    is_possible = "--first_order=False" not in flags
    assert ("not compiled" in capsys.readouterr().out) != is_possible
    assert graphs[3] == graphs[-1] and (graphs[-1] > 4) == is_possible
    assert all(same(probed[key], compiled[key]) for key in WEIGHTS)
    for x, y in zip(eager_lines, lines, strict=True):
        assert x == pytest.approx(y, rel=1e-4, abs=1e-5)
    for name, weight in eager["model"].items():
        assert torch.linalg.norm(probed["model"][name] - weight) < 1e-3 * torch.linalg.norm(weight), name


# ---- stopping and resuming ----


def test_a_signal_finishes_the_step_and_writes_a_checkpoint_from_which_the_run_goes_on(
        toy, tmp_path, whole, monkeypatch, capfd):
    """Stopped by each signal, it ends as if left alone. A second Ctrl-C kills."""
    real, due = train.optimizer_step, []

    def step(*args):
        while due:
            signal.raise_signal(due.pop())
        real(*args)

    monkeypatch.setattr(train, "optimizer_step", step)
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    for last, number in enumerate(numbers, 1):
        due.append(number)
        state, lines = run(toy, tmp_path)
        assert state["step"] == last == lines[-1]["step"]
        says = f"stopped   at step {last}; the same command resumes from step {last}"
        printed = capfd.readouterr()
        assert says in printed.out and "finishing the step; a second Ctrl-C kills" in printed.err
        assert json.loads((tmp_path / "run.json").read_text())["state"] == "stopped"
    due += [signal.SIGINT] * 2
    with pytest.raises(KeyboardInterrupt):
        run(toy, tmp_path)
    assert before == [signal.getsignal(number) for number in numbers]
    run(toy, tmp_path)
    assert same(results(tmp_path), results(whole))
    finished = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(toy, tmp_path)
    assert finished == {path.name: path.read_bytes() for path in tmp_path.iterdir()}, "it is left alone"
    assert "the run is finished" in capfd.readouterr().out


@pytest.fixture(scope="session")
def restore(toy):
    """restore(out_dir, **settings): what a command with these settings does there before it trains."""
    learner = train.build_learner(toy_config(), torch.float32)

    def restore(out_dir, make=train.build_optimizers, folder=toy, **settings):
        cfg = toy_config(max_steps=10, data=str(folder), out_dir=str(out_dir), **settings)
        train.load_data(cfg, True)
        return resume.restore(cfg, resume.data_digests(cfg.data), learner, make(cfg, learner))

    return restore


def test_a_config_or_optimizer_that_contradicts_the_checkpoint_is_refused(restore, whole):
    """Field by field. AdamW with other betas went on with the saved ones."""
    refuses(lambda: restore(whole, lr=0.5, ways=3, log_every=7),
            "lr = 0.001 there, 0.5 here; ways = 4 there, 3 here)", f"--init_from={whole}")
    assert restore(whole, log_every=7, eval_episodes=1, keep=7)[0].step == 10
    for make in (lambda cfg, learner: train.build_optimizers(replace(cfg, beta1=0.8), learner),
                 lambda cfg, learner: [torch.optim.SGD(learner.parameters(), lr=cfg.lr)]):
        refuses(lambda: restore(whole, make), "holds a run with other optimizers")  # noqa: B023


def test_data_may_move_but_not_change(restore, toy, tmp_path, whole):
    """Bytes in a text of the same length, and another tokenizer, were accepted in silence."""
    moved = shutil.copytree(toy, tmp_path / "moved")
    assert restore(whole, folder=moved)[0].step == 10
    write_bin(moved / "train_000001.bin", np.fromfile(moved / "train_000001.bin", "<u2")[:511:-1])
    refuses(lambda: restore(whole, folder=moved), f"other data than {moved} (corpus 0, train_000000.bin")
    shutil.copy(toy / "train_000001.bin", moved)
    spec = json.loads((moved / "tokenizer.json").read_text())
    spec["tokens"][300:302] = spec["tokens"][301:299:-1]
    (moved / "tokenizer.json").write_text(json.dumps(spec))
    refuses(lambda: restore(whole, folder=moved), "(tokenizer)")


OTHER = "a run with other parameters or counters ("


@pytest.mark.parametrize("change, says", [
    (lambda state: state.pop("version"), "a run of another version of this code"),
    (lambda state: state.pop("digests"), "other data than"),
    (lambda state: state.pop("optimizer_options"), "other optimizers"),
    (lambda state: state["config"].update(imported_from="x"), "an imported model and not a run"),
    (lambda state: state.update(step=5, config=state["config"] | {"d_model": "wide"}), "invalid settings"),
    (lambda state: state["model"].update({"lm_head.weight": torch.ones(3)}), OTHER),
    (lambda state: state["model"].pop("lm_head.weight"), OTHER),
    (lambda state: state["optimizers"][0]["state"][0].update(exp_avg=torch.ones(3)), OTHER),
    (lambda state: state["optimizers"][0]["state"][0].pop("exp_avg"), OTHER),
    (lambda state: state["optimizers"].clear(), OTHER),
    (lambda state: state["optimizers"][0].pop("param_groups"), OTHER),
    (lambda state: state.update(optimizers=5), OTHER),
    (lambda state: state.update(learner=[]), OTHER),
    (lambda state: state.update(flops=None), OTHER),
    *[(lambda state, fields=fields: state.update(fields), says) for fields, says in (
        ({"unlogged": [["../../.bashrc", {"step": 1}]]}, OTHER),  # chosen text went to any file, and ran
        ({"unlogged": [["log.jsonl", "text"]]}, OTHER), ({"unlogged": [5]}, OTHER), ({"unlogged": {}}, OTHER),
        ({"interval": {}}, OTHER), ({"interval": {"steps": "many"}}, OTHER), ({"micro_steps": {3: 1}}, OTHER),
        ({"micro_steps": {"lm": "x"}}, OTHER), ({"sums": {"a": 3.0}}, OTHER),
        ({"sums": {"a": torch.ones(3)}}, OTHER),
        ({"skipped": torch.ones(3)}, OTHER), ({"skipped": torch.full((2,), math.nan)}, OTHER),
        ({"unlogged": [["log.jsonl", {"step": 1, "x": torch.ones(1)}]]}, OTHER), ({"tokens": 10**400}, OTHER),
        ({"unlogged": [["log.jsonl", {"step": 1, (1, 2): 3}]]}, OTHER), ({"flops": torch.ones(1)}, OTHER),
        ({"seconds": math.inf}, OTHER), ({"tokens": -1}, OTHER),
        ({"digests": 5}, OTHER), ({"digests": {"tokenizer": []}}, "other data than"),
        ({"optimizer_options": {}}, "other optimizers"), ({"learner": 3}, OTHER), ({"run_id": 7}, OTHER),
        ({"optimizers": [{"state": 1, "param_groups": 2}]}, OTHER))],
    (lambda state: state["optimizers"][0]["param_groups"][0].update(betas="xy"), "other optimizers"),
    (lambda state: state["optimizers"][0]["state"][0].update(step="x"), OTHER),
])
def test_a_checkpoint_that_this_command_does_not_continue_is_refused_in_one_line(restore, half, change, says):
    rewrite(half / "ckpt_000005.pt", change)
    refuses(lambda: restore(half), says)


def test_a_field_that_an_older_checkpoint_lacks_takes_its_default(restore, half):
    """A new field of ModelConfig made every older checkpoint "damaged", and every resume refused."""
    rewrite(half / "ckpt_000005.pt", lambda state: list(map(state["config"].pop, ("norm_eps", "keep"))))
    assert checkpoint.load_model(half).cfg.norm_eps == 1e-6
    refuses(lambda: restore(half, norm_eps=1e-5), "norm_eps = 1e-06 there, 1e-05 here")
    assert restore(half)[0].step == 5


def test_a_run_made_longer_may_come_to_its_first_episodes(toy, tmp_path):
    """It was refused as one with other data."""
    for steps in (1, 2):
        flags = ["--meta_share=1", "--meta_start=1", f"--max_steps={steps}", "--eval_every=0"]
        assert run(toy, tmp_path, *flags)[0]["step"] == steps


# ---- forks ----


class Fork(Learner):
    """A parameter, a copy of the first weights as a buffer, and metrics of its own."""

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", self.decoder.lm_head.weight.detach().clone())

    def lm_loss(self, batch):
        losses, metrics = super().lm_loss(batch)
        self.calls += torch.is_grad_enabled()
        metrics |= {"fork/calls": self.calls.clone(), "fork/nan": math.nan}
        return {"lm": losses["lm"] * self.scale.mean()}, metrics


def test_a_forks_parameters_are_saved_and_its_metrics_logged(toy, tmp_path, monkeypatch, restore):
    """They were trained, but not saved. A metric that is not finite does not make an update bad."""
    monkeypatch.setattr(train, "Learner", Fork)
    flags = ["--meta_share=0", "--log_every=2", "--eval_every=0", "--probe_every=0"]
    straight, lines = run(toy, tmp_path, *flags)
    assert [line["fork/calls"] for line in lines] == [4.5 + 8 * i for i in range(5)]  # 1 to 8, 9 to 16, ...
    assert not any("fork/nan" in line for line in lines) and lines[-1]["skipped"] == 0
    (tmp_path / "ckpt_000010.pt").unlink()
    again, more = run(toy, tmp_path, *flags)
    assert {"scale", "calls", "average"} <= again["learner"].keys() and (again["learner"]["scale"] != 1).all()
    assert all(same(again[key], straight[key]) for key in WEIGHTS) and more == lines
    assert not any("scale" in name for name in again["model"]), "transformers loads it"
    refuses(lambda: restore(tmp_path, meta_share=0.0), OTHER, "scale")


def test_a_forks_copy_of_the_weights_is_that_of_the_loaded_ones(toy, tmp_path, whole, monkeypatch):
    """With --init_from an average of the weights stayed random: they were loaded after it was made."""
    monkeypatch.setattr(train, "Learner", Fork)
    state, _ = run(toy, tmp_path, f"--init_from={whole}", "--max_steps=0")
    theirs = checkpoint.newest(whole)["model"]
    assert same(state["model"], theirs) and same(state["learner"]["average"], theirs["lm_head.weight"])
    refuses(lambda: train.build_learner(toy_config(), torch.float32, {}), "has other parameters")


def test_a_second_dataset_of_a_fork_may_not_change_between_resumes(toy, tmp_path, monkeypatch):
    """The digests were those of cfg.data alone."""
    other, real = shutil.copytree(toy, tmp_path / "other"), train.build_sources

    def build_sources(cfg, *args):
        corpus = data.open_corpus(other)[0]
        return real(cfg, *args) | {"second": train.Source(data.Sequences(corpus, cfg.context, cfg.seed), 4)}

    monkeypatch.setattr(train, "build_sources", build_sources)
    run(toy, tmp_path / "run", "--max_steps=1")
    write_bin(other / "train_000001.bin", np.full(50_000, 300))
    refuses(lambda: run(toy, tmp_path / "run", "--max_steps=2"), "(corpus 2, train_000000.bin)")


def test_the_log_and_the_warning_use_the_episodes_own_number_of_ways(toy, tmp_path, monkeypatch, capsys):
    """A curriculum of ways was warned of by the setting. The loss stays at ln N, since nothing adapts."""
    real = data.Episodes
    monkeypatch.setattr(data, "Episodes", lambda *args, **options: real(*args, **options | {"ways": 2}))
    flags = ["--inner_lr=1e-9", "--meta_share=1", "--max_steps=8", "--ways=7"]
    _, lines = run(toy, tmp_path, *flags, "--eval_every=0", "--probe_every=0", "--eval_episodes=0")
    assert [line["meta/ways"] for line in lines] == [2.0] * 8
    assert capsys.readouterr().out.count("warning: the adapted query loss stays at ln N = 0.693") == 1


def test_a_fork_cannot_mix_up_what_it_adds_with_what_is_there(toy):
    """Two forks each added a ninth positional argument."""
    decoder, head = train.Decoder(toy_config()), Head(24, 1, 0, "zero", 4)
    with pytest.raises(TypeError, match="positional"):
        Learner(decoder, head=head)
    with pytest.raises(TypeError, match="positional"):
        data.Episodes(data.open_corpus(toy)[0], data.load_tokenizer(toy), 4)


@pytest.mark.parametrize("make", [
    (torch.optim.AdamW, {"fused": True}), (torch.optim.AdamW, {}), (torch.optim.Muon, {}),
    (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.SGD, {"momentum": 0.9, "fused": True})])
def test_a_bad_update_is_left_out_whatever_the_optimizer(make):
    """found_inf was set for all: Muon would have applied the update, fused SGD corrupted its momentum. Each
    group keeps its own rate.
    """
    (kind, options), p, q = make, *(torch.nn.Parameter(torch.randn(4, n)) for n in (2, 3))
    groups = [{"params": [p], "initial_lr": 0.1}, {"params": [q], "initial_lr": 2.0}]
    optimizer = kind(groups, lr=1.0, **options)

    def update(grad, is_bad):
        p.grad, q.grad = torch.full_like(p, grad), torch.full_like(q, grad)
        train.optimizer_step([optimizer], 0.5, torch.tensor(is_bad))
        assert p.grad is None and [group["lr"] for group in optimizer.param_groups] == [0.05, 1.0]
        return p.detach().clone(), q.detach().clone(), copy.deepcopy(optimizer.state_dict()["state"])

    before = p.detach().clone()
    first, second, third = update(math.nan, 1.0), update(1.0, 0.0), update(math.nan, 1.0)
    assert torch.equal(first[0], before) and not torch.equal(second[0], before) and same(third, second)


# ---- data and configs ----


def test_episodes_are_read_as_the_settings_say(toy):
    cfg = toy_config(data=str(toy), read_out="context", word_targets="any", max_word_share=0.01, ways=3)
    corpus, _, tokenizer = train.load_data(cfg, True)
    episodes, size = train.build_sources(cfg, {"episodes"}, corpus, tokenizer)["episodes"]
    batch = episodes[range(size)]
    assert (episodes.read_out, episodes.word_targets, episodes.max_share) == ("context", "any", 0.01)
    assert batch.support.shape == (1, 3, 2, 8) and batch.query.shape == (1, 3, 2, 8)


def test_bad_data_is_refused_before_training(toy, tmp_path):
    """An id that the model has and the tokenizer has not ended in an IndexError when an episode read it."""
    refuses(lambda: run(toy, tmp_path / "a", "--vocab_size=3257"), "has 3258 ids, vocab_size = 3257")
    shutil.copy(toy / "tokenizer.json", tmp_path)
    for ids, flag, says in (
            (5000, "--meta_share=0", "token id 4999 at 4,999 is outside the vocabulary of 3264"),
            (TOY_VOCAB + 1, "--meta_share=1", "token id 3258 at 3,258 is outside the vocabulary of 3258")):
        for name in ("train_000000.bin", "val_000000.bin"):
            write_bin(tmp_path / name, np.arange(ids))
        refuses(lambda: run(tmp_path, tmp_path / "a", flag), says)  # noqa: B023
    run(tmp_path, tmp_path / "b", "--meta_share=0", "--max_steps=0")
    assert not (tmp_path / "a").exists()


def test_fineweb_in_bins_of_llm_c_trains_as_it_is(tmp_path, capsys):
    """As published: their names, a header and uint16 tokens of GPT-2; neither tokenizer nor meta.json."""
    ids = np.random.default_rng(0).integers(0, 50257, 4000)
    for name in ("fineweb_val_000000", "fineweb_train_000001", "fineweb_train_000002"):
        write_bin(tmp_path / f"{name}.bin", ids)
    flags = ["--max_steps=1", "--meta_share=0", "--vocab_size=50304", "--eval_episodes=0"]
    assert run(tmp_path, tmp_path / "run", *flags)[0]["step"] == 1
    assert "8,000 training tokens" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["11m", "65m", "181m"])
def test_the_papers_configs_run_two_updates(toy, tmp_path, name):
    """At their width, depth, vocabulary and rate; 570m is only counted, in test_model.py."""
    cut = {"context": 32, "global_batch_size": 2, "batch_size": 1, "window": 4, "queries": 1,
           "eval_sequences": 1, "eval_episodes": 0, "probe_every": 0, "seed": 5, "log_every": 1,
           "max_steps": 2, "device": "cpu", "dtype": "float32"}
    flags = [f"--{key}={value}" for key, value in cut.items()]
    train.main([f"{ROOT}/configs/{name}.py", f"--data={toy}", f"--out_dir={tmp_path}", *flags])
    lines = [line for line in log(tmp_path) if "lr" in line]
    assert len(lines) == 2 and {"meta/query_loss", "train/loss"} <= set().union(*lines)
    (tmp_path / "ckpt_000002.pt").unlink()


@pytest.mark.parametrize("name", ["demo", "11m", "65m", "181m", "570m"])
def test_configs_are_the_papers_and_take_the_overlays(name):
    def load(*overlays):
        return config.load(train.Config, [f"{ROOT}/configs/{file}.py" for file in (name, *overlays)])

    cfg = load()
    assert (cfg.meta_share, cfg.meta_weight, cfg.meta_start) == (0.5, 1.0, 0)
    assert (cfg.head_layers, cfg.head_start) == (1, "zero")
    assert load("vanilla") == replace(cfg, meta_share=0.0)
    late = replace(cfg, meta_share=0.1, meta_weight=0.1, meta_start=cfg.max_steps // 2)
    assert load("light") == late
    published = replace(cfg, head_layers=4, head_start="random", inner_lr=1e-3, queries=1)
    assert load("published") == published and load("published", "light").inner_lr == 1e-3
    for world in (1, 2) if name == "demo" else (1, 4, 8):
        Schedule(cfg, world)
    published = (cfg.lr, cfg.warmup_steps, cfg.max_steps, cfg.ways, cfg.shots, cfg.inner_steps)
    assert name == "demo" or published == (3e-4, 2500, 6000, 32, 4, 10)


# ---- wandb ----


def fake_wandb(monkeypatch, **of_run):
    """Stands in for the package; of_run: what its run does or knows."""
    calls = {"define_metric": lambda *args, **options: None, "finish": lambda: None, "resumed": False,
             "log": lambda line: None, "summary": {}} | of_run
    module = {"init": lambda **options: SimpleNamespace(**calls), "Image": lambda image: image.shape,
              "teardown": lambda: None} | of_run
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(**module))


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_failing_wandb_warns_once_and_does_not_stop_training(toy, half, whole, monkeypatch, capsys, broken):
    """It warned at each line."""
    calls = []

    def fail(*args, **options):
        calls.append(args)
        if broken != "log" or len(calls) > 3:
            raise ConnectionResetError("Connection lost")

    fake_wandb(monkeypatch, **{broken: fail})
    run(toy, half, "--wandb=online")
    assert capsys.readouterr().err.count("wandb failed, the run goes on: ConnectionResetError") == 1
    assert len(calls) == (4 if broken == "log" else 1) and same(results(half), results(whole))


@pytest.mark.parametrize("resumed", [False, True])
def test_wandb_has_every_line_once(toy, half, monkeypatch, resumed):
    """A resumed offline run began at wandb's step 0, so `wandb sync` replaced the earlier part: it is sent
    again, but where the server knows the run. At 12 x 12 there were 288 panels of heads.
    """
    sent, axes = [], {}
    fake_wandb(monkeypatch, log=sent.append, resumed=resumed,
               define_metric=lambda name, step_metric=None: axes.update({name: step_metric}))
    _, lines = run(toy, half, "--wandb=online")
    written = [line for line in lines + log(half, "probes.jsonl") if line["step"] >= (6 if resumed else 0)]
    assert axes == {"*": "step", "step": None, "tokens": None, "flops": None, "seconds": None}
    assert [line["step"] for line in sent] == sorted(line["step"] for line in sent)
    for name in ("train/loss", "val/loss", "rank/resid/01", "tokens", "flops"):
        there, here = ([line[name] for line in part if name in line] for part in (sent, written))
        assert sorted(there) == sorted(here) != []
    means = [(x["entropy/01/00"] + x["entropy/01/01"]) / 2 for x in written if "rank/resid/01" in x]
    assert [line["entropy/01"] for line in sent if "entropy/heatmap" in line] == pytest.approx(means)
    assert not any(key.startswith("entropy/01/") for line in sent for key in line)


@pytest.mark.slow
def test_wandb_takes_what_it_is_sent(toy, half, capfd):
    pytest.importorskip("wandb")
    run(toy, half, "--wandb=offline")
    assert "wandb failed" not in capfd.readouterr().err
    assert len(list(half.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert len(list(half.glob("wandb/offline-run-*/files/media/images/entropy/heatmap_*.png"))) == 3


def test_wandb_disabled_is_not_even_imported(forks, toy, tmp_path):
    patch = """import atexit, sys
atexit.register(lambda: print("imported", {"wandb", "matplotlib", "rustbpe"} & set(sys.modules)))"""
    flags = [*TOY, f"--data={toy}", f"--out_dir={tmp_path}", "--max_steps=0"]
    [(code, output)] = forks.run(flags, patches={0: patch})
    assert code == 0 and "imported set()" in output, output
