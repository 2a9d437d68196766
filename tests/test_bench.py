"""bench.py: the figures fit each other and the run they describe; how large they are is not asserted."""
import json
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TOY

import bench
import data
from model import Decoder, ModelConfig

TINY = [*TOY, "--rounds=1"]


@pytest.mark.parametrize("flag", [
    "--against=transformers", pytest.param("--adapt=all", marks=pytest.mark.slow),
    pytest.param("--meta_share=0", marks=pytest.mark.slow)])  # vanilla: its episodes are measured as well
def test_the_figures_add_up_and_the_tables_name_every_one(capsys, flag):
    pytest.importorskip("transformers")
    bench.main([*TINY, flag, "--json"])
    result = json.loads(capsys.readouterr().out)
    lm, episodes = result["steps"]["lm"], result["steps"]["episodes"]
    assert lm["tokens"] == 4 * 32 and episodes["tokens"] == 4 * (2 + 2) * 8
    for step in (lm, episodes):
        assert step["tok_per_s"] == pytest.approx(1000 * step["tokens"] / step["ms"])
        assert step["of_limit"] == pytest.approx(step["flop_per_s"] / result["limit_flop_per_s"])
    ratio = (episodes["ms"] / episodes["tokens"]) / (lm["ms"] / lm["tokens"])
    assert result["episode_over_lm_at_equal_tokens"] == pytest.approx(ratio)
    # FLOPs are rate x time
    same = result["episode_over_lm_by_flops"] * lm["flop_per_s"] / episodes["flop_per_s"]
    assert same == pytest.approx(ratio)
    # 16 sequences an update, 4 a micro-step, half of them episodes
    n, ms = (0 if flag == "--meta_share=0" else 2), result["batch_ms"]
    optimizer, background = (result["shares"][key] for key in ("optimizer", "data, in the background"))
    steps_ms = (4 - n) * lm["ms"] + n * episodes["ms"]
    assert result["update_ms"] == pytest.approx(steps_ms + optimizer * result["update_ms"])
    assert background == pytest.approx(((4 - n) * ms["lm"] + n * ms["episodes"]) / result["update_ms"])
    assert ("inner_loop_share_of_episode" in result) == (flag != "--adapt=all")
    assert result["config"]["d_model"] == 24
    words = ["limit", "lm", "episodes", *result["shares"], *result["parts_ms"]]
    if it := result.get("against"):
        assert it["their_loss"] == pytest.approx(it["our_loss"], rel=1e-5)
        assert it["times_as_fast"] == pytest.approx(it["their_ms"] / it["our_ms"])
        words += ["transformers: "]
    bench.print_result(result)
    out = capsys.readouterr().out
    assert len(result["parts_ms"]) == 5 and len(result["shares"]) == 4
    assert all(f"{word} " in out or f" {word}" in out for word in words), out


def test_times_are_medians_in_milliseconds_of_the_rounds_after_two(monkeypatch):
    now, seconds = [0.0], iter([9.0, 9.0, 0.5, 0.25, 4.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def call():
        now[0] += next(seconds)

    assert bench.measure(torch.device("cpu"), {"a": call}, 3) == {"a": 500.0}


def test_an_episode_takes_no_more_memory_from_a_thousand_times_the_text():
    peaks = []
    for tokens in (10**6, 10**9):
        episodes = data.Episodes(*bench.made_up(4096, tokens), ways=16, shots=4, queries=2, window=32, seed=1)
        episodes[[0]]
        tracemalloc.start()
        assert episodes[[1, 2]].support.shape == (2, 16, 4, 32)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 100e6, peaks


@pytest.mark.slow
def test_second_order_is_measured_uncompiled(capsys):
    """It ended in torch.compile's error that there is no double backward; train.py runs it uncompiled."""
    bench.main([*TINY, "--json", "--compile=True", "--adapt=all", "--first_order=False"])
    assert not json.loads(capsys.readouterr().out)["compiled"]


def test_the_logits_are_never_whole():
    """A loss and its gradients at the paper's vocabulary take a fraction of float32 logits' memory."""
    decoder, n = Decoder(ModelConfig(n_layers=1)), 3072
    x, targets = torch.randn(1, n, 96, requires_grad=True), torch.randint(0, 50304, (1, n))
    spent = bench.peak_memory(torch.device("cpu"), lambda: decoder.loss(x, targets).backward())
    if spent is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 4 * 512 * 50304 < spent < 4 * n * 50304 / 3


# ---- what a run will need ----


def test_the_plan_is_made_of_the_real_micro_steps(capsys):
    bench.main(["configs/11m.py", "--batch_size=4", "--plan"])
    out = capsys.readouterr().out
    assert re.search(r"parameters +0.04 GiB\n +parameters and optimizer +0.13 GiB", out), "x 4 bytes"
    peaks = {kind: float(gib) for kind, gib in re.findall(r"peak, (\w+).*? ([\d.]+) GiB", out)}
    assert 0.4 < peaks["lm"] < 1 < peaks["episodes"] < 2 and peaks["probe"] < 0.5
    assert re.search(r"batch_size that fits: 24 GB 128, 40 GB \d+", out)
    share, vanilla = (re.search(rf"meta_share {x} .*", out)[0].split() for x in ("0.5", "0"))
    embedding = 50304 * 96  # 6 FLOPs a parameter and token, without the embedding; attention comes on top
    flops = 6 * (11_282_784 - embedding) * 6000 * 256 * 2048
    assert flops < float(vanilla[4]) < 2 * flops and float(share[2]) < float(vanilla[2])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells a peak of memory")
@pytest.mark.parametrize("flags", [
    ["configs/11m.py", "--batch_size=4", "--global_batch_size=8", "--dtype=bfloat16"],
    ["configs/11m.py", "--batch_size=4", "--global_batch_size=8", "--dtype=float32"],
    ["configs/65m.py", "--batch_size=2", "--global_batch_size=4", "--dtype=bfloat16"]])
def test_the_plan_is_what_a_step_takes(flags):
    """Within a tenth, where malloc gives back what is freed; by default it keeps a fifth more."""
    code = """
import json, sys, torch
import bench, train
from nanomaml import config
cfg, result = config.load(bench.Config, sys.argv[1:]), {}
sources = train.build_sources(cfg, {"lm", "episodes"}, *bench.made_up(cfg.vocab_size))
batch = {kind: batches[range(size)] for kind, (batches, size) in sources.items()}

def peaks(measure):
    learner = train.build_learner(cfg, getattr(torch, cfg.dtype))
    for kind in batch:
        step = lambda: sum(learner(kind, batch[kind])[0].values()).backward()
        step()  # makes the gradients
        result.setdefault(kind, []).append(measure(step))

def planned(step):
    alive.peak = before = alive.now
    step()
    return alive.peak - before

peaks(lambda step: bench.peak_memory(torch.device("cpu"), step))
with bench.FakeTensorMode(allow_non_fake_inputs=True), bench.Alive() as alive:
    batch = {kind: type(b)(*(torch.empty(x.shape, dtype=x.dtype) for x in b)) for kind, b in batch.items()}
    peaks(planned)
print(json.dumps(result))
"""
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    for kind, (measured, planned) in json.loads(done.stdout).items():
        assert planned == pytest.approx(measured, rel=0.1), kind
