"""bench.py: what it reports adds up, and what it compares computes the same. No timing is asserted."""

import json
import tracemalloc

import pytest
import torch
from conftest import TOY

import bench
import data
from config import UserError
from model import Decoder, ModelConfig

TINY = [*TOY, "--rounds=1", "--json"]


def measure(capsys, *flags):
    bench.main([*TINY, *flags])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("flags", [[], ["--adapt=all"]])
def test_the_figures_add_up(capsys, flags):
    result = measure(capsys, *flags)
    lm, episodes = result["steps"]["lm"], result["steps"]["episodes"]
    assert lm["tokens"] == 4 * 32 and episodes["tokens"] == 4 * (2 + 2) * 8
    for step in (lm, episodes):
        assert step["tok_per_s"] == pytest.approx(1000 * step["tokens"] / step["ms"])
        assert step["of_limit"] == pytest.approx(step["flop_per_s"] / result["limit_flop_per_s"])
    ratio = (episodes["ms"] / episodes["tokens"]) / (lm["ms"] / lm["tokens"])
    assert result["episode_over_lm_at_equal_tokens"] == pytest.approx(ratio)
    same = (
        result["episode_over_lm_by_flops"] * lm["flop_per_s"] / episodes["flop_per_s"]
    )  # FLOPs are rate x time
    assert same == pytest.approx(ratio)
    # 16 sequences an update, 4 a micro-step, half of them episodes
    optimizer = result["shares"]["optimizer"] * result["update_ms"]
    assert result["update_ms"] == pytest.approx(2 * lm["ms"] + 2 * episodes["ms"] + optimizer)
    batches = 2 * result["batch_ms"]["lm"] + 2 * result["batch_ms"]["episodes"]
    assert result["shares"]["data, in the background"] == pytest.approx(batches / result["update_ms"])
    assert list(result["parts_ms"]) == ["embedding", "attention", "MLP", "norms", "output layer and loss"]
    assert result["config"]["d_model"] == 24 and ("inner_loop_share_of_episode" in result) == (not flags)


@pytest.mark.parametrize("against", ["naive", "transformers"])
def test_what_is_compared_has_the_same_loss(capsys, against):
    result = measure(capsys, f"--against={against}")
    it, generation = result["against"], result["generation"]
    assert it["their_loss"] == pytest.approx(it["our_loss"], rel=1e-5)
    assert it["times_as_fast"] == pytest.approx(it["their_ms"] / it["our_ms"])
    assert (generation["prompt_tokens"], generation["new_tokens"]) == (16, 16)
    assert ("their" in generation) == (against == "transformers")


def test_what_generates_beside_transformers_makes_the_same_tokens():
    transformers = pytest.importorskip("transformers")
    cfg = ModelConfig(d_model=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=211, context=64)
    decoder = Decoder(cfg, torch.Generator().manual_seed(1))
    settings = transformers.LlamaConfig(
        vocab_size=211, hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, rms_norm_eps=1e-6,
    )
    other = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for p in decoder.parameters():
            p.mul_(8) if p.dim() == 2 else p.add_(0.3 * torch.randn(p.shape))
    other.load_state_dict(decoder.state_dict())
    calls, prompt, new = bench.generation(cfg, decoder, other, torch.device("cpu"), torch.float32)
    assert torch.equal(calls["our generation"](), calls["their generation"]()) and (prompt, new) == (32, 32)
    assert calls["our prefill"]().shape == (1, 33) and calls["our generation"]().shape == (1, 65)


def test_an_episode_takes_no_more_memory_from_a_thousand_times_the_text():
    peaks = []
    for tokens in (10**6, 10**9):
        corpus, tokenizer = bench.made_up(4096, tokens)
        episodes = data.Episodes(corpus, tokenizer, ways=16, shots=4, queries=2, window=32, seed=1)
        episodes[[0]]
        tracemalloc.start()
        assert episodes[[1, 2]].support.shape == (2, 16, 4, 32)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 100e6, peaks


def test_second_order_is_measured_uncompiled(capsys):
    """It ended in torch.compile's error that there is no double backward; train.py runs it uncompiled."""
    assert not measure(capsys, "--compile=True", "--adapt=all", "--first_order=False")["compiled"]


def test_the_logits_are_never_whole():
    """A loss and its gradients at the paper's vocabulary take a fraction of what the logits would in
    float32.
    """
    decoder, n = Decoder(ModelConfig(n_layers=1)), 4096
    x, targets = torch.randn(1, n, 96, requires_grad=True), torch.randint(0, 50304, (1, n))
    spent = bench.peak_memory(torch.device("cpu"), lambda: decoder.loss(x, targets).backward())
    if spent is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 4 * 512 * 50304 < spent < 4 * n * 50304 / 3


def test_the_tables_name_every_measurement(capsys):
    bench.main([flag for flag in TINY if flag != "--json"])
    out = capsys.readouterr().out
    for word in (
        "limit ",
        "lm ",
        "episodes ",
        "optimizer ",
        "probes ",
        "logging ",
        "data, in the background ",
        "attention ",
        "MLP ",
        "generate ",
        "ours ",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("flag", "message"),
    [("--rounds=0", "rounds must be at least 1"), ("--against=pico", "against must be one of")],
)
def test_bad_flags_are_told(flag, message):
    with pytest.raises(UserError, match=message):
        bench.main([*TOY, flag])
