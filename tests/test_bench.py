"""bench.py: the figures fit each other and the run they describe; how large they are is not asserted."""
import json
import tracemalloc

import pytest
import torch
from conftest import TOY

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
